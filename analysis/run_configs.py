"""Configs of several runs side by side, and the keys in which they differ."""

from collections import Counter
from collections.abc import Collection, Iterable

from analysis.run_files import RunFacts, inner

SECTIONS = ("data", "data.source", "data.target", "data.target_test", "model", "optim")


def split_sections(runs: Iterable[RunFacts]) -> list[str]:
    """The sections whose keys are compared one by one. The others are compared as one value.

    These are a list in one config, such as several sources, or null in one config and a mapping in
    another one of the same method. A method for which a section is always null has none.
    """
    kinds: dict[tuple, set] = {}
    for run in runs:
        for name in SECTIONS:
            *parents, key = name.split(".")
            section = inner(run.config, *parents)
            if isinstance(section, dict) and key in section:
                kinds.setdefault((name, run.method), set()).add(type(section[key]))
    wholes = {name for (name, _), kind in kinds.items() if kind not in ({dict}, {type(None)})}
    return [name for name in SECTIONS if name not in wholes]


def flat_config(tree: dict, sections: Collection[str], prefix: str = "") -> dict:
    """{dotted key: value} of a config.

    Args:
        tree: what config.yaml contains.
        sections: whose keys have entries of their own. Any other mapping, such as an augmentation,
            is one value; that of a section is without its nulls.
        prefix: the name of this section, with its dot at the end.
    """
    flat = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if isinstance(value, dict) and name in sections:
            flat |= flat_config(value, sections, f"{name}.")
        elif isinstance(value, dict) and name in SECTIONS:
            flat[name] = {k: x for k, x in value.items() if x is not None}
        else:
            flat[name] = value
    return flat


def value_text(value) -> str:
    """A value of a config, short and on one line. Values that differ have texts that do."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    if isinstance(value, list):
        return f"[{', '.join(map(value_text, value))}]"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {value_text(item)}' for key, item in value.items())}}}"
    return str(value)


def differing_keys(configs: Iterable[dict]) -> list[str]:
    """The keys of which two flat configs have different values; those with most values come first.

    A key that a config lacks, because its method or its version has none of this name, is no
    difference.
    """
    texts: dict[str, set[str]] = {}
    for config in configs:
        for key, value in config.items():
            texts.setdefault(key, set()).add(value_text(value))
    differing = [key for key, values in texts.items() if len(values) > 1]
    return sorted(differing, key=lambda key: -len(texts[key]))


def short_names(keys: Iterable[str]) -> dict[str, str]:
    """{key: its last words}, as many of them as no other key ends with: lr for optim.lr."""
    endings = {}
    for key in keys:
        words = key.split(".")
        endings[key] = [".".join(words[i:]) for i in reversed(range(len(words)))]
    counts = Counter(ending for some in endings.values() for ending in some)
    return {key: next((x for x in some if counts[x] == 1), key) for key, some in endings.items()}
