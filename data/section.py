"""The section `data` of a config of any method, read without knowing the method."""

import ast
import functools
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import NamedTuple

from common.config import build_config, not_negative, range_rules, read_layers
from common.errors import require
from data import config as data_config
from data.config import DataConfig, LabeledDataConfig, StreamDataConfig, TargetDataConfig

ROOT = Path(__file__).resolve().parents[1]  # the folder of the scripts


@dataclass
class Config:
    """What is read of a config."""

    data: DataConfig
    seed: int = not_negative(0)

    def __post_init__(self):
        require(*range_rules(self))


@dataclass
class TargetConfig(Config):
    data: TargetDataConfig


@dataclass
class StreamConfig(Config):
    data: StreamDataConfig


@dataclass
class LabeledConfig(Config):
    data: LabeledDataConfig


READ = ("data", "seed")  # of a config
KINDS = {"DataConfig": Config, "TargetDataConfig": TargetConfig, "StreamDataConfig": StreamConfig}
KINDS |= {"LabeledDataConfig": LabeledConfig}


class Script(NamedTuple):
    """What a script's text declares.

    Attributes:
        keys: those of its method.
        kind: the class of its section `data`, one of KINDS; a class of its own is a kind of it.
        data_keys: those that a class of its own adds to the section.
    """

    keys: set[str]
    kind: str
    data_keys: set[str]


def read_script(text: str) -> Script | None:
    """The declarations of a script; None for a text that has no class `Config`."""
    try:
        tree = ast.parse(text)
    except SyntaxError:  # a script under work
        return None
    classes = {node.name: node for node in tree.body if isinstance(node, ast.ClassDef)}
    if "Config" not in classes:
        return None
    declared = _fields(classes["Config"])
    name, data_keys = declared.get("data", "DataConfig"), set()
    while name not in KINDS and name in classes and classes[name].bases:
        data_keys |= _fields(classes[name]).keys()
        name = ast.unparse(classes[name].bases[0]).split(".")[-1]
    return Script(set(declared), _kind(name), data_keys)


def _kind(name: str) -> str:
    """The one of KINDS that a class of data/config.py is, or is derived from."""
    bases = getattr(data_config, name, DataConfig).__mro__
    return next(base.__name__ for base in bases if base.__name__ in KINDS)


@functools.cache
def read_scripts(folder: Path) -> list[Script]:
    """The declarations of all scripts in a folder."""
    texts = [file.read_text(encoding="utf-8", errors="replace") for file in folder.glob("*.py")]
    return [script for script in map(read_script, texts) if script]


def _fields(node: ast.ClassDef) -> dict[str, str]:
    """{name: last word of its type} of the fields that a class declares."""
    declared = [line for line in node.body if isinstance(line, ast.AnnAssign)]
    return {
        ast.unparse(line.target): ast.unparse(line.annotation).split(".")[-1] for line in declared
    }


def kind_of(tree: dict, scripts: list[Script]) -> str:
    """Which of KINDS the section `data` is.

    A config without a source is of a method that sees no source images, such as train_shot.py and,
    on a stream, adapt_online.py, or of one that trains on a labeled target, such as finetune.py.
    Keys of the section tell, then keys of the method, then `init_from`.

    Args:
        tree: the config.
        scripts: the scripts that it may be for.
    """
    data = tree.get("data") if isinstance(tree.get("data"), dict) else {}
    if "val_share" in data:
        return "LabeledDataConfig"
    if "order" in data:
        return "StreamDataConfig"
    if "classes_from" in data:
        return "TargetDataConfig"
    if data.get("source") is not None or "target" not in data:
        return "DataConfig"
    keys = dict.fromkeys(("TargetDataConfig", "LabeledDataConfig"), 0)
    for script in scripts:
        if script.kind in keys:
            keys[script.kind] = max(keys[script.kind], len(script.keys & tree.keys()))
    if keys["TargetDataConfig"] == keys["LabeledDataConfig"]:
        return "TargetDataConfig" if tree.get("init_from") else "LabeledDataConfig"
    return max(keys, key=keys.get)


def load_section(files: Sequence[str], overrides: Sequence[str]) -> tuple[Config, list[str]]:
    """Read `data` and `seed` of a config; the keys of the run and of the method are left aside.

    Args:
        files: yaml files, of which later ones win.
        overrides: texts `key=value`.

    Returns:
        (the config, sentences about how it was read).

    Raises:
        UserError: naming every mistake in the section, and keys of it that no script knows.
    """
    scripts = read_scripts(ROOT)
    tree, layers = read_layers(Config, files, overrides)
    kind = kind_of(tree, scripts)
    aside = [text for text in overrides if text.split("=")[0].split(".")[0] not in READ]
    notes = [f"not read here: {', '.join(aside)}"] if aside else []
    if kind == "LabeledDataConfig":
        notes.append("no data.source: read as a labeled target, as finetune.py does")
    if kind in ("TargetDataConfig", "StreamDataConfig"):
        notes.append("no data.source: read as by a method without source images, as train_shot.py")
    section = {key: tree[key] for key in READ if key in tree}
    known = {spec.name for spec in fields(KINDS[kind].__annotations__["data"])}
    foreign = set().union(*(script.data_keys for script in scripts)) - known
    if isinstance(section.get("data"), dict):
        if aside := sorted(foreign & section["data"].keys()):
            notes.append(f"not read, as keys of a method: {', '.join(f'data.{k}' for k in aside)}")
        section["data"] = {k: x for k, x in section["data"].items() if k not in foreign}
    config = build_config(KINDS[kind], section, layers, " ".join(files))
    if isinstance(config.data, TargetDataConfig) and config.data.classes_from is None:
        init_from = tree.get("init_from")
        config.data.classes_from = init_from if isinstance(init_from, str) else None
    return config, notes
