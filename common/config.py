"""Strict, typed configs: dataclass default < yaml files from left to right < `key=value`.

A config is a dataclass whose sections are dataclasses. All mistakes of a config are reported at
once. The comment behind a field is its line in `--help`.
"""

import dataclasses
import difflib
import inspect
import math
import re
import sys
import types
import typing
from collections.abc import Sequence
from dataclasses import MISSING, field
from pathlib import Path
from typing import ClassVar, Literal

import yaml

from common.errors import UserError


def positive(default):
    """A field whose number must be above 0; `range_rules` checks it."""
    return field(default=default, metadata={"range": "positive"})


def not_negative(default):
    """A field whose number must be 0 or above; `range_rules` checks it."""
    return field(default=default, metadata={"range": "not negative"})


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
    return rules


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars and no duplicate keys: `1e-4` is a float, `off` a string, `010` ten."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)  # raises
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(
                    None, None, f"key {key!r} is not a string", key_node.start_mark
                )
            if key in seen:
                raise yaml.constructor.ConstructorError(
                    None, None, f"duplicate key {key!r}", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes a text that this module's YAML or the usual one would read as something else."""


for _tag, _pattern, _first in (
    ("bool", r"^(?:true|True|TRUE|false|False|FALSE)$", "tTfF"),
    ("null", r"^(?:~|null|Null|NULL|)$", ["~", "n", "N", ""]),
    ("int", r"^[-+]?[0-9]+$", "-+0123456789"),
    ("float", r"^[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?$", "-+.0123456789"),
):
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(
            f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first)
        )


def _construct_int(loader, node):
    return int(loader.construct_scalar(node))  # decimal: `010` is ten, not eight


_Loader.add_constructor("tag:yaml.org,2002:int", _construct_int)


def parse_yaml(text: str, where: str):
    """The value of a yaml text. Raises `UserError` naming file and line."""
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise UserError(f"{where}{line}: {problem}") from None
    except (RecursionError, ValueError, LookupError, AttributeError) as error:
        # A value that does not fit its !!tag.
        raise UserError(f"{where}: malformed value ({error})") from None


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


def _nearest(key: str, keys: list[str]) -> str:
    """The key that looks most like `key`, compared in full and by its last word."""

    def likeness(a: str, b: str) -> float:
        return difflib.SequenceMatcher(None, a, b).ratio()

    last_word = key.rsplit(".", 1)[-1]
    return max(
        keys,
        key=lambda k: max(likeness(key, k), likeness(last_word, k.rsplit(".", 1)[-1]) - 0.05),
    )


def build(cls, tree, keys: list[str], mistakes: list[str], prefix: str = ""):
    """An instance of `cls` from a tree of plain values.

    Args:
        cls: a dataclass, whose sections are dataclasses too.
        tree: the mapping read from yaml.
        keys: dotted names of all keys, to suggest the nearest one.
        mistakes: everything that is wrong is appended here, one sentence each.
        prefix: dotted name of this section, with its dot at the end.

    Returns:
        The instance, or None where a rule is broken or a required key is missing.
    """
    if not isinstance(tree, dict):
        mistakes.append(f"{prefix.rstrip('.') or 'the config'} must be a mapping, not {tree!r}")
        return None
    names = {spec.name for spec in dataclasses.fields(cls)}
    for key in tree:
        if key not in names:
            near = _nearest(prefix + key, keys)
            mistakes.append(f"unknown key {prefix}{key}; did you mean {near}?")
    complete, values, wrong = True, {}, []
    hints = typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        hint, name = hints[spec.name], prefix + spec.name
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
                build(section, item, keys, mistakes, f"{name}[{i}].")
                for i, item in enumerate(value)
            ]
        elif section and not (value is None and types.NoneType in typing.get_args(hint)):
            values[spec.name] = build(section, value, keys, mistakes, name + ".")
        elif (converted := _convert(hint, value)) is _WRONG:
            mistakes.append(f"{name} must be {_type_name(hint)}, not {value!r}")
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


def _read(file: str) -> dict:
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
    if not equals:
        raise UserError(f"{override!r}: overrides are written key=value, files follow --config")
    node = tree
    *parents, leaf = key.split(".")
    for parent in parents:
        if isinstance(node.get(parent), list):
            raise UserError(f"{key}: {parent} is a list; override it whole, as {parent}=[...]")
        if not isinstance(node.get(parent), dict):
            node[parent] = {}
        node = node[parent]
    node[leaf] = parse_yaml(text, key)


def load_config(cls, files: str | Sequence[str], overrides: Sequence[str] = ()):
    """Read yaml files, of which later ones win, apply `key=value` overrides, and build `cls`.

    Raises:
        UserError: naming every mistake.
    """
    files = [files] if isinstance(files, str) else files
    tree: dict = {}
    for file in files:
        tree = merge(cls, tree, _read(file))
    for override in overrides:
        _apply(override, tree)
    mistakes: list[str] = []
    config = build(cls, tree, all_keys(cls), mistakes)
    if mistakes:
        where = " ".join(map(str, files))
        raise UserError(("\n" + " " * 7).join(f"{where}: {mistake}" for mistake in mistakes))
    return config


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
