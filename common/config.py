"""Strict, typed configs: dataclass default < yaml < `key=value`, all mistakes reported at once.

A script subclasses `RunConfig` with its method's own fields. The comment behind a field is its line in `--help`.
"""

import argparse
import dataclasses
import difflib
import inspect
import os
import re
import sys
import types
import typing
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import yaml

from common.runtime import UserError


def require(*rules: tuple[bool, str]) -> None:
    """Raise `ValueError` with the sentence of every rule that does not hold."""
    broken = [sentence for holds, sentence in rules if not holds]
    if broken:
        raise ValueError("\n".join(broken))


DRAWN = {
    "classification": ("drawn_digits", "drawn_digits_shifted"),
    "segmentation": ("drawn_street", "drawn_street_dusk"),
}
DIGITS = ("mnist", "usps", "svhn", "mnistm")
FILES = ("folder", "list")


@dataclass
class DomainConfig:
    name: str  # mnist usps svhn mnistm | folder list | drawn_digits drawn_digits_shifted drawn_street drawn_street_dusk
    path: str | None = None  # below data.root: the folder, the list file, or mnistm's photographs
    classes: str | None = None  # list: file below data.root with one class name a line, in label order
    resize: int | list[int] | None = None  # px, or [height, width]: what an image is resized to before it is cropped
    masks: str | None = None  # segmentation, folder: the folder of masks, below data.root
    image_suffix: str | None = None  # segmentation, folder: end of an image's name, after what its mask shares with it
    mask_suffix: str | None = None  # segmentation, folder: end of a mask's name; null, here and above: the extension
    ids: str | list[str] | dict | None = None  # segmentation: what a mask's numbers mean; see data/id_maps.py
    crop: list[int] | None = None  # segmentation: [height, width] of training crops; null: whole images
    augment: dict | None = None  # of this domain's training images; null: data.augment

    def __post_init__(self):
        names = (*DIGITS, *FILES, *DRAWN["classification"], *DRAWN["segmentation"])
        near = difflib.get_close_matches(self.name, names, 1)
        resize = self.resize if isinstance(self.resize, list) else [1 if self.resize is None else self.resize]
        require(
            (
                self.name in names,
                f"name: no data set {self.name!r}"
                + (f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(names)}"),
            ),
            (
                self.name not in (*FILES, "mnistm") or self.path is not None,
                f"path is missing for name: {self.name}",
            ),
            (self.classes is None or self.name == "list", "classes goes with name: list only"),
            (all(side > 0 for side in resize), "resize must be positive"),
            (all(side > 0 for side in self.crop or ()), "crop must be positive"),
            (not isinstance(self.resize, list) or len(self.resize) == 2, "resize must be a number or [height, width]"),
            (self.crop is None or len(self.crop) == 2, "crop must be [height, width]"),
            (
                not (isinstance(self.resize, list) and self.crop)
                or all(c <= r for c, r in zip(self.crop, self.resize, strict=False)),
                f"crop {self.crop} is larger than resize {self.resize}",
            ),
            (self.masks is None or self.name == "folder", "masks goes with name: folder only"),
            (self.image_suffix is None or self.name == "folder", "image_suffix goes with name: folder only"),
            (self.mask_suffix is None or self.masks is not None, "mask_suffix goes with masks"),
        )

    def rules(self, role: str, task: str) -> list[tuple[bool, str]]:
        """(holds, sentence) of what the task asks of a domain."""
        drawn = DRAWN[task]
        if task == "classification":
            keys = [key for key in ("masks", "image_suffix", "ids", "crop") if getattr(self, key) is not None]
            known = self.name in (*FILES, *DIGITS, *drawn)
            return [
                (not keys, f"{role}: {', '.join(keys)} for task: segmentation only"),
                (not isinstance(self.resize, list), f"{role}.resize must be a number for task: classification"),
                (known, f"{role}.name: {self.name} is for task: segmentation"),
            ]
        known = self.name in (*FILES, *drawn)
        return [
            (not isinstance(self.resize, int), f"{role}.resize must be [height, width] for task: segmentation"),
            (self.classes is None, f"{role}.classes: the classes of masks are named by ids"),
            (known, f"{role}.name: {self.name} is for task: classification"),
            (self.masks is None or self.ids is not None, f"{role}.ids is missing: what the numbers of its masks mean"),
        ]


@dataclass
class DataConfig:
    source: DomainConfig | list[DomainConfig]  # the labelled domain, or several, taken as one
    target: DomainConfig  # the unlabelled domain; its training labels are dropped on loading
    target_test: DomainConfig | None = None  # null: the set's own test split, else the target images (transductive)
    target_labeled: int | str | None = None  # target labels to train on: images a class (maps: images), or a list file
    task: Literal["classification", "segmentation"] = "classification"  # an image has a class | each pixel has
    root: str | None = None  # null: the variable DA_DATA, else ./datasets
    size: int = 28  # classification: px of the square the network sees
    batch: int = 64  # images a step and domain
    eval_batch: int | None = None  # images a step in evaluation; null: 250 (maps: 1)
    augment: dict = field(default_factory=dict)  # operation: {parameter: value}, in order; see data/augment.py
    select_images: int = 2000  # seeded sample of target training images the label-free criteria see
    iou_classes: list[str] | None = None  # segmentation: the classes mean IoU is taken over; null: all
    workers: int = 0  # loader processes a domain; the result does not depend on it
    cache: str | None = None  # null: ./cache; where decoded images are kept, never under root
    cache_gb: float = 2.0  # a set up to this stays in memory (workers: 0), larger ones in .npy files

    def __post_init__(self):
        from data.augment import OPERATIONS, check_augment  # here, since data/ reads its config from this module

        self.root = self.root or os.environ.get("DA_DATA") or "datasets"
        self.cache = self.cache or "cache"
        if self.eval_batch is None:
            self.eval_batch = {"classification": 250, "segmentation": 1}[self.task]
        root, cache = Path(self.root).resolve(), Path(self.cache).resolve()
        several = len(self.sources) > 1
        domains = {f"source[{i}]" if several else "source": domain for i, domain in enumerate(self.sources)}
        domains |= {"target": self.target, "target_test": self.target_test}
        common = [(domain.crop, domain.augment) for domain in self.sources if domain]
        require(
            (self.size > 0, "size must be positive"),
            (self.batch > 0, "batch must be positive"),
            (self.eval_batch > 0, "eval_batch must be positive"),
            (self.select_images > 0, "select_images must be positive"),
            (self.workers >= 0, "workers must not be negative"),
            (self.cache_gb >= 0, "cache_gb must not be negative"),
            (not cache.is_relative_to(root), f"cache {self.cache} lies under root {self.root}; name another folder"),
            (self.iou_classes is None or self.task == "segmentation", "iou_classes is for task: segmentation"),
            (self.source != [], "source is an empty list; it must name a domain"),
            (
                self.target_labeled is None or not self.target_is_source(),
                "target_labeled: the target is a source too, and all of its labels are trained on; leave it out",
            ),
            (
                all(own == common[0] for own in common),
                "source: several sources are one set; give all the same crop and augment",
            ),
            (
                not isinstance(self.target_labeled, int) or self.target_labeled > 0,
                "target_labeled must be positive, a list file, or null",
            ),
            *self.own_rules(),
            *(rule for role, domain in domains.items() if domain for rule in domain.rules(role, self.task)),
            *((False, mistake) for mistake in check_augment(self.augment, OPERATIONS[self.task])),
            (
                self.target_test is None or self.target_test.augment is None,
                "target_test.augment: test images are never augmented; leave it out",
            ),
            *(
                (False, f"{role}.{mistake}")
                for role, domain in domains.items()
                if domain and domain.augment is not None
                for mistake in check_augment(domain.augment, OPERATIONS[self.task])
            ),
        )

    def own_rules(self) -> list[tuple[bool, str]]:
        """(holds, sentence) of what a subclass asks for."""
        return []

    def strong_view_rules(self, strong_augment: dict, mix: str = "none") -> list[tuple[bool, str]]:
        """(holds, sentence) of how the strong view of a target image is made, and mixed with a source image."""
        from data.augment import IN_PLACE, OPERATIONS, check_augment

        maps = self.task == "segmentation"
        source_crop = self.sources[0].crop if self.sources else None
        operations = IN_PLACE if maps else OPERATIONS[self.task]
        return [
            *((False, mistake) for mistake in check_augment(strong_augment, operations, "strong_augment")),
            (mix == "none" or maps, f"mix: {mix} is for data.task: segmentation"),
            (
                mix == "none" or not (source_crop and self.target.crop) or source_crop == self.target.crop,
                f"mix: {mix} pastes source onto target images; give data.source and data.target the same crop",
            ),
        ]

    @property
    def sources(self) -> list[DomainConfig]:
        """The source domains; none for a method without a source."""
        return self.source if isinstance(self.source, list) else [] if self.source is None else [self.source]

    def target_is_source(self) -> bool:
        """Whether the target's images are those of a source."""
        if self.target is None:
            return False
        images = [
            (domain.name, os.path.realpath(Path(self.root, domain.path or ""))) for domain in self.sources if domain
        ]
        return (self.target.name, os.path.realpath(Path(self.root, self.target.path or ""))) in images

    def augment_of(self, role: str) -> dict:
        """The augmentation of source, target or target_labeled."""
        own = (self.sources[0] if role == "source" else self.target).augment
        return self.augment if own is None else own


@dataclass
class TargetDataConfig(DataConfig):
    """`DataConfig` of a method that adapts a trained model without the source's images."""

    source: None = field(default=None, kw_only=True)  # null: this method sees no source images
    classes_from: str | None = None  # a run folder, against the working directory: its classes; null: init_from


@dataclass
class LabeledDataConfig(DataConfig):
    """`DataConfig` of a method that trains on a labelled target alone, a part of which validates."""

    source: None = field(default=None, kw_only=True)  # null: this method sees no source images
    target: DomainConfig = field(kw_only=True)  # the labelled images
    target_test: DomainConfig | None = None  # the validation set; null: val_share of the target
    target_labeled: None = None  # null: all of the target is labelled
    batch: int = 64  # images a step
    val_share: float | None = None  # of each class (maps: of all), held out by seed; null: 0.2 without target_test

    def __post_init__(self):
        if self.val_share is None and self.target_test is None:
            self.val_share = 0.2
        super().__post_init__()

    def own_rules(self):
        both = self.val_share is not None and self.target_test is not None
        return [
            (self.val_share is None or 0 < self.val_share < 1, "val_share must lie between 0 and 1"),
            (not both, "val_share is for a target without target_test; leave one of them out"),
        ]


Backbone = Literal["lenet", "resnet18", "resnet34", "resnet50", "resnet101", "mobilenet_v2", "efficientnet_b0"]


@dataclass
class ModelConfig:
    backbone: Backbone = "lenet"  # lenet: for digits; the others are torchvision's
    weights: str | None = None  # null | a name of torchvision's weights enum | a file below data.root
    weights_missing: list[str] = field(default_factory=list)  # tensors (or prefixes) the weights may lack
    batch_norm: bool = True  # lenet only: with or without batch norm
    bn: Literal["concat", "separate", "frozen"] = "concat"  # one forward on both domains | one each | statistics fixed
    bn_running: Literal["both", "target"] = "both"  # bn: separate: whose statistics evaluation uses
    bn_affine: Literal["train", "frozen"] = "train"  # scale and shift of batch norm
    channels_last: bool = False  # memory layout; speed only
    bottleneck: int | None = None  # null: none; width of Linear + BN + ReLU between pooling and classifier
    dropout: float = 0.0  # classification: share of the classifier's inputs
    head: Literal["deeplab_v2", "deeplab_v3"] = "deeplab_v2"  # segmentation: the head on layer4
    output_stride: Literal[8, 16] = 8  # segmentation: px of the image for each of layer4, which is dilated
    aux_weight: float = 0.0  # segmentation: of the cross-entropy of an auxiliary head on layer3; 0: no such head

    def __post_init__(self):
        require(
            (self.batch_norm or self.backbone == "lenet", "batch_norm: false is for backbone: lenet"),
            (self.bn_running == "both" or self.bn == "separate", "bn_running: target needs bn: separate"),
            (self.bottleneck is None or self.bottleneck > 0, "bottleneck must be positive or null"),
            (0 <= self.dropout < 1, "dropout must lie in [0, 1)"),
            (self.aux_weight >= 0, "aux_weight must not be negative"),
        )

    def rules(self, task: str) -> list[tuple[bool, str]]:
        """(holds, sentence) of what the task asks of the model."""
        if task == "classification":
            own = [f.name for f in dataclasses.fields(self) if f.name in ("head", "output_stride", "aux_weight")]
            changed = [key for key in own if getattr(self, key) != getattr(type(self), key)]
            return [(not changed, f"model: {', '.join(changed)} for task: segmentation only")]
        return [
            (self.backbone != "lenet", "model.backbone: lenet is for task: classification; choose another"),
            (self.bottleneck is None, "model.bottleneck is for task: classification"),
            (self.dropout == 0, "model.dropout is for task: classification"),
        ]


@dataclass
class OptimConfig:
    name: Literal["sgd", "adam"] = "sgd"  # sgd with Nesterov momentum
    lr: float = 0.01  # rate of the new layers
    backbone_lr_scale: float = 1.0  # the backbone's rate over lr; 0.1 is usual with pretrained weights
    momentum: float = 0.9  # sgd only
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # adam only
    weight_decay: float = 1e-3  # L2, on every trained parameter
    schedule: Literal["constant", "inverse_decay", "poly", "cosine"] = "inverse_decay"  # see common/schedules.py
    schedule_progress: int | Literal["total"] = "total"  # what 1 means: the run's length, or a number of steps
    fused: bool = True  # torch's fused kernels: same update, fewer passes over memory

    def __post_init__(self):
        require(
            (self.lr > 0, "lr must be positive"),
            (self.backbone_lr_scale >= 0, "backbone_lr_scale must not be negative"),
            (0 <= self.momentum < 1, "momentum must lie in [0, 1)"),
            (len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas), "betas must be two numbers in [0, 1)"),
            (self.weight_decay >= 0, "weight_decay must not be negative"),
            (
                self.schedule_progress == "total" or self.schedule_progress > 0,
                "schedule_progress must be total or positive",
            ),
        )


@dataclass
class RunConfig:
    out_dir: str  # the run folder, against the working directory
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = 0  # weights, order, augmentation and splits follow from it
    device: Literal["auto", "cpu", "cuda"] = "auto"  # cuda asked for and absent is an error
    amp: Literal["float32", "float16", "bfloat16"] = "float32"  # autocast precision
    steps: int = 4000  # optimizer steps
    eval_every: int = 500  # steps; the last step always evaluates
    save_every: int = 500  # steps; the last step always saves
    log_every: int = 50  # steps between lines of metrics.jsonl
    select: Literal["source_val", "entropy", "infomax"] | None = None  # picks model.pt; null: infomax (maps: entropy)
    pictures: Literal["end", "every"] = "end"  # segmentation: draw predictions at the end, or at every evaluation
    init_from: str | None = None  # a run folder or model.pt to start from, against the working directory

    def __post_init__(self):
        task = self.data.task if self.data else "classification"
        self.select = self.select or {"classification": "infomax", "segmentation": "entropy"}[task]
        require(*self.rules())

    def rules(self) -> list[tuple[bool, str]]:
        """(holds, sentence) of the run's own keys; a method adds its own."""
        positive = ("steps", "eval_every", "save_every", "log_every")
        return [
            (self.seed >= 0, "seed must not be negative"),
            (self.seed < 2**63, "seed must be below 2**63"),
            *((getattr(self, key) > 0, f"{key} must be positive") for key in positive),
            *(self.model.rules(self.data.task) if self.model and self.data else ()),
        ]

    def trained_criteria(self) -> set[str]:
        """Selection criteria that are part of this method's training loss, and so no judge of it."""
        return set()


# keys that may differ between a run and its continuation: they do not change what is learned
FREE_AT_RESUME = ("out_dir", "save_every", "data.root", "data.workers", "data.cache", "data.cache_gb")


class _Loader(yaml.SafeLoader):
    """YAML 1.2 scalars and no duplicate keys: `1e-4` is a float, `off` a string, `010` ten."""

    yaml_implicit_resolvers: ClassVar[dict] = {}

    def construct_mapping(self, node, deep=False):
        if not isinstance(node, yaml.MappingNode):
            return super().construct_mapping(node, deep)  # refuses it
        seen = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=deep)
            if not isinstance(key, str):
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} is not a string", key_node.start_mark)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key!r}", key_node.start_mark)
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
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(_pattern), list(_first))


def _construct_int(loader, node):
    return int(loader.construct_scalar(node))  # decimal only


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
    except (RecursionError, ValueError, LookupError, AttributeError) as error:  # a value that its !!tag does not fit
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
    return {dict: "mapping", float: "number", str: "text", bool: "true | false"}.get(
        hint, getattr(hint, "__name__", str(hint))
    )


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
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) <= sys.float_info.max
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
    best = max(
        keys,
        key=lambda k: max(
            difflib.SequenceMatcher(None, key, k).ratio(),
            difflib.SequenceMatcher(None, key.rsplit(".", 1)[-1], k.rsplit(".", 1)[-1]).ratio() - 0.05,
        ),
    )
    return best


def build(cls, tree, keys: list[str], mistakes: list[str], prefix: str = ""):
    """An instance of `cls` from a tree of plain values, or None where rules are broken or a required key is missing.

    Whatever is wrong is appended to `mistakes`.
    """
    if not isinstance(tree, dict):
        mistakes.append(f"{prefix.rstrip('.') or 'the config'} must be a mapping, not {tree!r}")
        return None
    whole, hints, values, wrong = True, typing.get_type_hints(cls), {}, []
    for key in tree:
        if key not in cls.__dataclass_fields__:
            mistakes.append(f"unknown key {prefix}{key}; did you mean {_nearest(prefix + key, keys)}?")
    for spec in dataclasses.fields(cls):
        hint, name = hints[spec.name], prefix + spec.name
        section, required = _section(hint), spec.default is MISSING and spec.default_factory is MISSING
        if spec.name not in tree and not (section and required):
            if required:
                whole = False
                mistakes.append(f"{name} is missing ({_type_name(hint)})")
            continue
        value = tree.get(spec.name, {})
        if section and isinstance(value, list) and list[section] in typing.get_args(hint):
            values[spec.name] = [build(section, item, keys, mistakes, f"{name}[{i}].") for i, item in enumerate(value)]
            continue
        if section and not (value is None and types.NoneType in typing.get_args(hint)):
            values[spec.name] = build(section, value, keys, mistakes, name + ".")
            continue
        values[spec.name] = _convert(hint, value)
        if values[spec.name] is _WRONG:
            mistakes.append(f"{name} must be {_type_name(hint)}, not {value!r}")
            del values[spec.name]  # the rules see its default, and what they say of it is left out
            wrong.append(spec.name)
            whole &= not required
    if not whole:
        return None
    try:
        return cls(**values)
    except ValueError as error:
        lines = str(error).splitlines()
        mistakes += [prefix + line for line in lines if not any(re.search(rf"\b{key}\b", line) for key in wrong)]
        return None


def load_config(cls, path: str, overrides: typing.Sequence[str] = ()):
    """Read a yaml file, apply `key=value` overrides, and build `cls`. Raises `UserError` with every mistake."""
    try:
        tree = parse_yaml(Path(path).read_text(encoding="utf-8"), path)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or 'not utf-8 text'})") from None
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a config is a mapping of keys to values")
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            raise UserError(f"{override!r}: overrides are written key=value")
        node = tree
        *parents, leaf = key.split(".")
        for parent in parents:
            if not isinstance(node.get(parent), dict):
                node[parent] = {}
            node = node[parent]
        node[leaf] = parse_yaml(text, key)
    mistakes: list[str] = []
    config = build(cls, tree, all_keys(cls), mistakes)
    if mistakes:
        raise UserError(("\n" + " " * 7).join(f"{path}: {mistake}" for mistake in mistakes))
    return config


def flatten(tree: dict, prefix: str = "") -> dict:
    """{"data": {"size": 28}} -> {"data.size": 28}; augmentations and `ids` stay whole, since their order matters."""
    flat = {}
    for key, value in tree.items():
        nested = isinstance(value, dict) and key not in ("augment", "strong_augment", "ids")
        flat.update(flatten(value, f"{prefix}{key}.") if nested else {prefix + key: value})
    return flat


def changed_keys(before, now) -> dict[str, tuple]:
    """{key: (before, now)} of two configs of a kind, without the keys of FREE_AT_RESUME."""
    before, now = flatten(dataclasses.asdict(before)), flatten(dataclasses.asdict(now))
    keys = sorted((before.keys() | now.keys()) - set(FREE_AT_RESUME))
    pairs = {k: (before.get(k), now.get(k)) for k in keys}
    return {k: (a, b) for k, (a, b) in pairs.items() if a != b or (isinstance(a, dict) and list(a) != list(b))}


def dump(config) -> str:
    """The resolved config as yaml; reading it back gives the same config."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, default_flow_style=None, width=110)


def describe(cls, prefix: str = "") -> str:
    """One line a key: name, type, default and the comment behind the field."""
    source, comments = "", {}
    for base in reversed(cls.__mro__[:-1]):
        source = inspect.getsource(base)
        comments.update(re.findall(r"^    (\w+): .*?  # (.*)$", source, re.M))
    lines, hints = [], typing.get_type_hints(cls)
    for spec in dataclasses.fields(cls):
        section = _section(hints[spec.name])
        if section and types.NoneType not in typing.get_args(hints[spec.name]):
            lines.append(f"  {prefix}{spec.name}: {comments.get(spec.name, '')}".rstrip(": ") + ":")
            lines.append(describe(section, f"{prefix}{spec.name}."))
            continue
        default = (
            spec.default
            if spec.default is not MISSING
            else "required"
            if spec.default_factory is MISSING
            else spec.default_factory()
        )
        shown = "null" if default is None else default
        lines.append(
            f"  {prefix}{spec.name}={shown}  ({_type_name(hints[spec.name])}) {comments.get(spec.name, '')}".rstrip()
        )
    return "\n".join(lines)


def parse_args(cls, description: str, argv: typing.Sequence[str] | None = None):
    """`--config FILE [key=value ...] [--resume] [--dry-run] [--debug]` -> (config, arguments)."""
    parser = argparse.ArgumentParser(
        description=description,
        epilog="keys of the config:\n" + describe(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config", required=True, metavar="FILE", help="yaml file; see configs/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    parser.add_argument("--resume", action="store_true", help="go on from the newest checkpoint in out_dir")
    parser.add_argument(
        "--dry-run", action="store_true", help="one step of training and of evaluation, nothing written"
    )
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(argv)
    config = load_config(cls, args.config, args.overrides)
    if config.select in config.trained_criteria():
        print(f"warning: select: {config.select} is part of the training loss, and no judge of it; docs/selection.md")
    return config, args
