"""Strict, typed configs: dataclass default < yaml files from left to right < `key=value`.

A config is a dataclass whose sections are dataclasses. All mistakes of a config are reported at
once, each with the file or the `key=value` that set the value. The comment behind a field is its
line in `--help`.
"""

import copy
import dataclasses
import difflib
import inspect
import math
import os
import re
import reprlib
import sys
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field
from pathlib import Path
from typing import ClassVar, Literal

import yaml

from common.errors import UserError

# What a config may hold: far more than any needs, and little enough to be checked at once.
LONGEST, MOST_VALUES, DEEPEST = 2**18, 10_000, 50  # characters; values; mappings in one another
LONGEST_NUMBER = 4000  # characters of a whole number; Python converts up to 4300 digits
MOST_MISTAKES, MOST_HINTS = 50, 10  # that are printed; unknown keys for which a near one is sought


def positive(default, most: float = math.inf):
    """A field whose number must be above 0, and at most `most`; `range_rules` checks it."""
    return field(default=default, metadata={"range": "positive", "most": most})


def not_negative(default, most: float = math.inf):
    """A field whose number must be 0 or above, and at most `most`; `range_rules` checks it."""
    return field(default=default, metadata={"range": "not negative", "most": most})


def range_rules(config) -> list[tuple[bool, str]]:
    """Rules (holds, sentence) of the fields declared with `positive` or `not_negative`.

    Values that are not numbers, such as null or a word, are checked against the field's type.
    """
    rules = []
    for spec in dataclasses.fields(config):
        value, limit = getattr(config, spec.name), spec.metadata.get("range")
        if limit is None or isinstance(value, bool) or not isinstance(value, (int, float)):
            continue
        if limit == "positive":
            rules.append((value > 0, f"{spec.name} must be positive"))
        else:
            rules.append((value >= 0, f"{spec.name} must not be negative"))
        most = spec.metadata["most"]
        rules.append((value <= most, f"{spec.name} must be at most {most}, not {shorten(value)}"))
    return rules


_Repr = reprlib.Repr()
_Repr.maxlevel, _Repr.maxstring, _Repr.maxother = 3, 80, 80


def shorten(value) -> str:
    """`repr` of a value in a message, cut where it is long."""
    return cut(_Repr.repr(value), 200)


def cut(text: str, length: int) -> str:
    """A text of at most `length` characters."""
    return text if len(text) <= length else f"{text[: length - 3]}..."


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars and no duplicate keys: `1e-4` is a float, `off` a string, `010` ten."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)  # raises
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {shorten(key)} is not a string", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {shorten(key)}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _FastLoader(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """The scalars of `_Loader`, by libyaml if PyYAML has it: ten times as fast.

    It does not notice duplicate keys.
    """

    yaml_implicit_resolvers: ClassVar[dict] = {}


class _Dumper(yaml.SafeDumper):
    """Quotes a text that this module's YAML or the usual one would read as something else."""


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    for _class in (_Loader, _FastLoader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first)
        )


def _construct_int(loader, node):
    text = loader.construct_scalar(node)
    if len(text) > LONGEST_NUMBER:
        raise ValueError(f"a number of {len(text)} digits is too long")
    return int(text)  # decimal: `010` is ten, not eight


for _class in (_Loader, _FastLoader):
    _class.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, where: str, fast: bool = False):
    """The value of a yaml text, in which no two places share a list or a mapping.

    Args:
        text: the text.
        where: its file, for messages.
        fast: whether `dump` has written it, so that duplicate keys need not be sought.

    Raises:
        UserError: it is no yaml, or larger than any config; the message names file and line.
    """
    if len(text) > LONGEST:
        raise UserError(f"{where}: is longer than {LONGEST} characters, which no config is")
    try:
        loader = _FastLoader if fast else _Loader
        return _unshared(yaml.load(text, Loader=loader), [MOST_VALUES])
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: {cut(problem, 200)}") from None
    except (RecursionError, ValueError, LookupError, AttributeError, TypeError) as error:
        # A value that does not fit its !!tag, or that no config has.
        raise UserError(f"{where}: malformed value ({cut(str(error), 200)})") from None


def _unshared(value, budget: list[int], depth: int = 0):
    """A copy in which aliases are values of their own, so that a change reaches one place only.

    Args:
        value: what yaml made of a text.
        budget: [number of values that may follow]; it is counted down.
        depth: of the value, in lists and mappings.

    Raises:
        ValueError: there are more values, they are nested more deeply than any config's (aliases
            may repeat and contain one another), or one is of a type that no key takes.
    """
    budget[0] -= 1
    if budget[0] < 0:
        raise ValueError(f"more than {MOST_VALUES} values")
    if depth > DEEPEST:
        raise ValueError(f"nested more than {DEEPEST} deep")
    if isinstance(value, dict):
        return {key: _unshared(item, budget, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [_unshared(item, budget, depth + 1) for item in value]
    if value is None or isinstance(value, (str, bool, int, float)):
        return value
    raise ValueError(f"a {type(value).__name__}; write texts, numbers, lists and mappings")


def _type_name(hint) -> str:
    if hint is types.NoneType:
        return "null"
    if typing.get_origin(hint) is Literal:
        return " | ".join(map(str, typing.get_args(hint)))
    if typing.get_origin(hint) in (types.UnionType, typing.Union):
        return " | ".join(map(_type_name, typing.get_args(hint)))
    if typing.get_origin(hint) is list:
        return f"list of {_type_name(typing.get_args(hint)[0])}"
    names = {dict: "mapping", float: "number", str: "text", bool: "true | false"}
    return names.get(hint, getattr(hint, "__name__", str(hint)))


_WRONG = object()


def _convert(hint, value):
    """`value` as a scalar or list of type `hint`, or `_WRONG`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):
        return next((v for v in (_convert(a, value) for a in args) if v is not _WRONG), _WRONG)
    if origin is Literal:
        return value if any(value == a and type(value) is type(a) for a in args) else _WRONG
    if origin is list:
        items = [_convert(args[0], v) for v in value] if isinstance(value, list) else [_WRONG]
        return _WRONG if any(v is _WRONG for v in items) else items
    if hint is float:
        number = (
            isinstance(value, (int, float))
            and not isinstance(value, bool)
            and abs(value) <= sys.float_info.max
        )
        return float(value) if number else _WRONG
    if hint is types.NoneType:
        return None if value is None else _WRONG
    if hint is int and isinstance(value, int) and not -(2**63) <= value < 2**63:
        return _WRONG
    return value if type(value) is hint else _WRONG


def _section(hint):
    """The dataclass in a hint such as `DomainConfig | None`, or None."""
    return next((h for h in (hint, *typing.get_args(hint)) if dataclasses.is_dataclass(h)), None)


def all_keys(cls, prefix: str = "") -> list[str]:
    """Dotted names of every key of a config class."""
    keys = []
    for name, hint in typing.get_type_hints(cls).items():
        if name in cls.__dataclass_fields__ and typing.get_origin(hint) is not ClassVar:
            section = _section(hint)
            keys += [prefix + name] + (all_keys(section, f"{prefix}{name}.") if section else [])
    return keys


def hint_of(cls, key: str):
    """The type of a dotted key of a config class; None for a key that it does not have."""
    hint = cls
    for name in key.split("."):
        section = _section(hint)
        hint = typing.get_type_hints(section).get(name) if section else None
    return hint


class Hints:
    """What to write in place of an unknown key.

    Args:
        keys: dotted names of all keys.
        elsewhere: the scripts that have a key of this name.
    """

    LIKE = 0.5  # ratio of difflib from which a key is near

    def __init__(self, keys: list[str], elsewhere: Callable[[str], list[str]] | None = None):
        self.keys, self.elsewhere = keys, elsewhere
        self.remaining = MOST_HINTS

    def __call__(self, key: str) -> str:
        """The end of a sentence about an unknown key; "" where nothing is known."""
        if self.remaining == 0:
            return ""
        self.remaining -= 1
        if scripts := self.elsewhere(key) if self.elsewhere else []:
            return f"; it is a key of {', '.join(scripts)}"
        near = self.near(key)
        return f"; did you mean {near}?" if near else "; see --help"

    def near(self, key: str) -> str | None:
        """The key that looks most like `key`, if one does."""
        last_word = key.rsplit(".", 1)[-1]

        def likeness(other: str) -> float:
            """In full, or by the last word."""
            pairs = ((key, other, 0.0), (last_word, other.rsplit(".", 1)[-1], 0.01))
            return max(difflib.SequenceMatcher(None, a, b).ratio() - less for a, b, less in pairs)

        nearest = max(self.keys, key=likeness)
        return nearest if likeness(nearest) > self.LIKE else None


def build(cls, tree, hints: Hints, mistakes: list[str], prefix: str = ""):
    """An instance of `cls` from a tree of plain values.

    Args:
        cls: a dataclass, whose sections are dataclasses too.
        tree: the mapping read from yaml.
        hints: for unknown keys.
        mistakes: everything that is wrong is appended here, one sentence each.
        prefix: dotted name of this section, with its dot at the end.

    Returns:
        The instance, or None where a rule is broken or a required key is missing.
    """
    if not isinstance(tree, dict):
        name = prefix.rstrip(".") or "the config"
        mistakes.append(f"{name} must be a mapping, not {shorten(tree)}")
        return None
    names = {spec.name for spec in dataclasses.fields(cls)}
    for key in tree:
        if key not in names:
            shown = prefix + (cut(key, 80) if re.fullmatch(r"[\w.-]+", key) else shorten(key))
            if "." in key and prefix + key in hints.keys:
                section, _, rest = key.partition(".")
                hint = f"; in a file write {section}: {{{rest}: ...}}"
            else:
                hint = hints(shown)
            mistakes.append(f"unknown key {shown}{hint}")
    complete, values, wrong = True, {}, []
    types_of = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        hint, name = types_of[spec.name], prefix + spec.name
        section = _section(hint)
        required = spec.default is MISSING and spec.default_factory is MISSING
        if spec.name not in tree and not (section and required):
            if required:
                complete = False
                mistakes.append(f"{name} is missing ({_type_name(hint)})")
            continue
        value = tree.get(spec.name, {})
        if section and isinstance(value, list) and list[section] in typing.get_args(hint):
            values[spec.name] = [
                build(section, item, hints, mistakes, f"{name}[{i}].")
                for i, item in enumerate(value)
            ]
        elif section and not (value is None and types.NoneType in typing.get_args(hint)):
            values[spec.name] = build(section, value, hints, mistakes, name + ".")
        elif (converted := _convert(hint, value)) is _WRONG:
            one = typing.get_origin(hint) is list and isinstance(value, (str, int, float))
            remedy = f"; write [{shorten(value)}]" if one else ""
            mistakes.append(f"{name} must be {_type_name(hint)}, not {shorten(value)}{remedy}")
            # The default replaces the value, and rules that name the key are not reported.
            wrong.append(spec.name)
            complete &= not required
        else:
            values[spec.name] = converted
    if not complete:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        for line in str(error).splitlines():
            if not any(re.search(rf"\b{key}\b", line) for key in wrong):
                mistakes.append(prefix + line)
        return None


def read_config(file: str) -> dict:
    """The mapping in a yaml file."""
    try:
        tree = parse_yaml(Path(file).read_text(encoding="utf-8"), file)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not utf-8 text"
        raise UserError(f"{file}: cannot be read ({reason})") from None
    if tree is None:  # comments alone
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{file}: a config is a mapping of keys to values")
    return tree


def merge(cls, first: dict, second: dict) -> dict:
    """The tree `first` with the values of `second`, which win.

    Sections are merged key by key; every other value, mappings and lists too, is replaced.
    """
    merged, hints = dict(first), typing.get_type_hints(cls)
    for key, value in second.items():
        section = _section(hints[key]) if key in hints else None
        if section and isinstance(value, dict) and isinstance(merged.get(key), dict):
            value = merge(section, merged[key], value)
        merged[key] = value
    return merged


def _apply(override: str, tree: dict) -> None:
    """Set the key of one `key=value` in the tree."""
    key, equals, text = override.partition("=")
    if not equals or not all(key.split(".")):
        shown = shorten(override)
        raise UserError(f"{shown}: overrides are written key=value, files follow --config")
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        if isinstance(node.get(parent), list):
            raise UserError(f"{key}: {parent} is a list; override it whole, as {parent}=[...]")
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[leaf] = parse_yaml(text, cut(key, 80))


def _has(tree, key: str) -> bool:
    """Whether a layer of a config sets a dotted key or something in it."""
    if key in tree:
        return True
    for name in re.sub(r"\[\d+\]", "", key).split("."):
        if isinstance(tree, list):  # its items have no names
            return True
        if not isinstance(tree, dict) or name not in tree:
            return False
        tree = tree[name]
    return True


def _origin(mistake: str, layers: list[tuple[str, dict]]) -> str | None:
    """Who set the value that a sentence is about: the last of the layers that names its key.

    Returns None for a key that none of them names, nor the section that it is missing in.

    Args:
        mistake: begins with its key, or with "unknown key" and the key. A rule names other keys
            too, of the same section without its name.
        layers: (file or `key=value`, tree), later ones win.
    """
    subject = re.split(r"; |, not ", mistake.removeprefix("unknown key "))[0]
    first, *others = re.findall(r"[\w.\[\]-]+", subject) or [""]
    section = first.rpartition(".")[0]
    keys = {first, *others, *(f"{section}.{word}" for word in others if section)}
    if mistake.startswith("unknown key "):
        keys = {first}
    while first:
        for name, tree in reversed(layers):
            if any(_has(tree, key) for key in keys):
                return name
        first = first.rpartition(".")[0]  # a key that is missing: who wrote its section
        keys = {first}
    return None


def load_config(
    cls,
    files: str | Sequence[str],
    overrides: Sequence[str] = (),
    elsewhere: Callable[[str], list[str]] | None = None,
):
    """Read yaml files, of which later ones win, apply `key=value` overrides, and build `cls`.

    Args:
        cls: the class of the config.
        files: names of yaml files.
        overrides: texts `key=value`.
        elsewhere: the scripts that have a key, for messages about unknown ones.

    Raises:
        UserError: naming every mistake, and the file or override that it came from.
    """
    files = [files] if isinstance(files, str) else files
    tree, layers = read_layers(cls, files, overrides)
    return build_config(cls, tree, layers, " ".join(map(str, files)), elsewhere)


def read_layers(
    cls, files: Sequence[str], overrides: Sequence[str]
) -> tuple[dict, list[tuple[str, dict]]]:
    """Merge yaml files and overrides.

    Returns:
        (the merged tree, (file or `key=value`, its own tree) of each).
    """
    tree: dict = {}
    layers = []
    for file in files:
        part = read_config(file)
        tree = merge(cls, tree, copy.deepcopy(part))  # overrides change it in place
        layers.append((str(file), part))
    for override in overrides:
        _apply(override, tree)
        part = {}
        _apply(override, part)
        layers.append((cut(override, 80), part))
    return tree, layers


def build_config(
    cls,
    tree: dict,
    layers: list[tuple[str, dict]],
    where: str,
    elsewhere: Callable[[str], list[str]] | None = None,
):
    """`build` of a whole config.

    Args:
        cls: the class of the config.
        tree, layers: see `read_layers`.
        where: the files, for a mistake that is in none of the layers.
        elsewhere: the scripts that have a key, for messages about unknown ones.

    Raises:
        UserError: naming every mistake, and the layer that it came from.
    """
    mistakes: list[str] = []
    config = build(cls, tree, Hints(all_keys(cls), elsewhere), mistakes)
    if mistakes:
        lines = [
            f"{_origin(mistake, layers) or where}: {cut(mistake, 400)}"
            for mistake in mistakes[:MOST_MISTAKES]
        ]
        if len(mistakes) > MOST_MISTAKES:
            lines.append(f"and {len(mistakes) - MOST_MISTAKES} more mistakes")
        raise UserError(("\n" + " " * 7).join(lines))
    return config


def split_words(words: Sequence[str]) -> tuple[list[str], list[str]]:
    """(other words, overrides `key=value`) of a command line; a file of such a name is no override.

    The values of options must not be among the words.
    """
    overrides = [w for w in words if re.match(r"\w[\w.-]*=", w) and not os.path.exists(w)]
    return [word for word in words if word not in overrides], overrides


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"target": {"accuracy": 28}} -> {"target.accuracy": 28}."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict)
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def flat_values(config, prefix: str = "") -> dict:
    """{dotted key: value} of a config; a mapping such as an augmentation is one value."""
    flat = {}
    for spec in dataclasses.fields(config):
        value = getattr(config, spec.name)
        if dataclasses.is_dataclass(value):
            flat.update(flat_values(value, f"{prefix}{spec.name}."))
        elif isinstance(value, list):
            items = [dataclasses.asdict(v) if dataclasses.is_dataclass(v) else v for v in value]
            flat[prefix + spec.name] = items
        else:
            flat[prefix + spec.name] = value
    return flat


def changed_keys(before, now, free: Sequence[str] = ()) -> dict[str, tuple]:
    """{key: (before, now)} of two configs of one class, without the keys in `free`.

    The order of the keys of a mapping counts: that of an augmentation matters.
    """
    before, now = flat_values(before), flat_values(now)
    keys = sorted((before.keys() | now.keys()) - set(free))
    pairs = {k: (before.get(k), now.get(k)) for k in keys}

    def reordered(a, b) -> bool:
        return isinstance(a, dict) and list(a) != list(b)

    return {k: (a, b) for k, (a, b) in pairs.items() if a != b or reordered(a, b)}


def dump(config) -> str:
    """The resolved config as yaml; reading it back gives the same config."""
    tree = dataclasses.asdict(config)
    return yaml.dump(tree, Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def dump_value(value) -> str:
    """A plain value as one line of yaml, which `parse_yaml` reads back as the same value."""
    text = yaml.dump(
        [value],  # a list, since a bare value would be followed by an end-of-document mark
        Dumper=_Dumper,
        default_flow_style=True,
        sort_keys=False,  # the order of augmentations matters
        allow_unicode=True,
        width=math.inf,
    )
    return text.strip()[1:-1]


def _comments(cls) -> dict[str, str]:
    """{field: the comment behind it} of a dataclass and its bases."""
    comments = {}
    for base in reversed(cls.__mro__[:-1]):
        comments.update(re.findall(r"^    (\w+): .*?  # (.*)$", inspect.getsource(base), re.M))
    return comments


def describe(cls, prefix: str = "") -> str:
    """One line per key: name, type, default and the comment behind the field.

    The keys that the class declares itself come first, then those of its bases, sections last.
    """
    comments, lines, hints = _comments(cls), [], typing.get_type_hints(cls)

    def position(spec) -> tuple[bool, bool]:
        return _section(hints[spec.name]) is not None, spec.name not in cls.__annotations__

    for spec in sorted(dataclasses.fields(cls), key=position):
        comment, hint = comments.get(spec.name, ""), hints[spec.name]
        section = _section(hint)
        if section and types.NoneType not in typing.get_args(hint):
            lines.append(f"  {prefix}{spec.name}: {comment}".rstrip(": ") + ":")
            lines.append(describe(section, f"{prefix}{spec.name}."))
            continue
        default = spec.default
        if spec.default_factory is not MISSING:
            default = spec.default_factory()
        elif default is MISSING:
            default = "required"
        shown = "null" if default is None else default
        lines.append(f"  {prefix}{spec.name}={shown}  ({_type_name(hint)}) {comment}".rstrip())
    return "\n".join(lines)
