"""Weights from files: ImageNet weights of a backbone, and the model of an earlier run."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from common import ranks
from common.errors import UserError
from common.files import load_tensors, trained_classes
from models.backbones import (
    BACKBONES,
    Transformer,
    build_backbone,
    is_for_digits,
    set_drop_path,
)
from models.config import ModelConfig
from models.layers import Backbone
from models.published import (
    DINOV2,
    DINOV2_URL,
    enum_of,
    published_weights,
    torchvision_names,
)

HEADS = ("head.", "aux_head.")


class Mismatch(NamedTuple):
    """Names of the tensors of a state that do not fit a module.

    missing: absent from the state; extra: unknown to the module; shape: of another shape.
    """

    missing: list[str]
    extra: list[str]
    shape: list[str]

    def __bool__(self) -> bool:
        return any(self)

    def __str__(self) -> str:
        parts = []
        for names, word in zip(self, ("missing", "unknown", "of another shape"), strict=True):
            if names:
                verb = "tensor is" if len(names) == 1 else "tensors are"
                parts.append(f"{len(names)} {verb} {word} (first: {names[0]})")
        return ", ".join(parts)


def compare(module: nn.Module, state: dict, optional: Iterable[str] = ()) -> Mismatch:
    """Which tensors of `state` do not fit `module`.

    Args:
        optional: prefixes of tensors that may be missing or of another shape.
    """
    expected, optional = module.state_dict(), tuple(optional)
    needed = [name for name in expected if not name.startswith(optional)]
    return Mismatch(
        missing=[name for name in needed if name not in state],
        extra=[name for name in state if name not in expected],
        shape=[
            name
            for name in needed
            if name in state and getattr(state[name], "shape", None) != expected[name].shape
        ],
    )


def _read_weights(name: str, weights: str, root: str) -> dict:
    """The state dict of a file below `root`, or of a published name (downloaded)."""
    path = Path(root, os.path.expanduser(weights))
    if path.is_file():
        try:
            return load_tensors(path)
        except UserError as error:
            raise UserError(f"model.weights: {error}") from None
    names = published_weights(name)
    if path.suffix or is_for_digits(name):
        raise UserError(f"model.weights: there is no file {path}")
    if weights not in names:
        others = [other for other in BACKBONES if weights in published_weights(other)]
        raise UserError(
            f"model.weights: no file {path}, and {name} has no weights {weights!r}; "
            f"there are {', '.join(names) or 'none to download: name a file'}"
            + _that_fits(name, others)
        )

    def download() -> dict:
        shown = ranks.is_first()
        if weights == DINOV2:
            address = DINOV2_URL.format(name=name)
            # Its authors publish no checksum; `load_weights` compares all names and shapes.
            return torch.hub.load_state_dict_from_url(
                address, map_location="cpu", progress=shown, weights_only=True
            )
        return enum_of(name)[weights].get_state_dict(progress=shown, check_hash=True)

    try:
        return ranks.first_on_machine(download)
    except OSError as error:
        raise UserError(
            f"model.weights: {weights} of {name} cannot be downloaded ({error}); "
            "name a file below data.root by model.weights=FILE"
        ) from None


def _names_here(backbone: Backbone, state: dict) -> dict:
    """The tensors of a state in torchvision's names, by the names of `backbone`."""
    here = {}
    for key, value in state.items():
        path = next((p for p in backbone.paths if key.startswith(f"{p}.")), None)
        if path is not None:
            here[backbone.paths[path] + key.removeprefix(path)] = value
        elif not key.startswith(backbone.left_out):
            here[key] = value
    return here


def load_weights(
    backbone: Backbone, name: str, weights: str, root: str, optional: list[str]
) -> None:
    """Load published weights. Prints "loaded N of M tensors".

    Args:
        backbone: of `build_backbone`; the file's classifier is left out.
        name: the backbone's name, for its published weights and for messages.
        weights: a published name, or a file below `root`.
        optional: prefixes of tensors that may be missing (`model.weights_missing`).

    Raises:
        UserError: no such name or file, or a tensor is missing, unknown or of another shape.
    """
    state = torchvision_names(name, _read_weights(name, weights, root))
    state = _names_here(backbone, state)
    # Batch counters are left at 0: older files have none, and only momentum: null reads them.
    expected = backbone.state_dict()
    counters = [name for name in expected if name.endswith("num_batches_tracked")]
    expected = {name: value for name, value in expected.items() if name not in counters}
    mismatch = compare(backbone, state, (*optional, *counters))
    fitting = {k: v for k, v in state.items() if k in expected and v.shape == expected[k].shape}
    print(f"weights {weights}: loaded {len(fitting)} of {len(expected)} tensors")
    if mismatch:
        only_positions = mismatch == Mismatch([], [], ["encoder.pos_embedding"])
        hint = _that_fits(name, BACKBONES) if only_positions else ""
        raise UserError(
            f"model.weights: {weights} does not fit {name}: {mismatch}; are they weights of "
            f"another backbone? What may be missing is named in model.weights_missing{hint}"
        )
    backbone.load_state_dict(fitting, strict=False)


def _that_fits(name: str, others: Iterable[str]) -> str:
    """A hint at the one of `others` that is this transformer for images of another size."""
    entry = BACKBONES[name]
    for other in others if isinstance(entry, Transformer) else ():
        its = BACKBONES[other]
        if isinstance(its, Transformer) and its != entry and its[1:] == entry[1:]:
            return f"; {other} is this network for images of {its.image_size} px"
    return ""


def pretrained_backbone(
    config: ModelConfig, root: str, dense: bool
) -> tuple[Backbone, dict[str, int]]:
    """The backbone of a config, with the weights that it names, and its channels by layer name.

    Args:
        config: the section `model`.
        root: the folder (`data.root`) that a relative path in `weights` refers to.
        dense: whether it is for segmentation.
    """
    backbone, channels = build_backbone(config.backbone, config.batch_norm, dense)
    if config.weights:
        load_weights(backbone, config.backbone, config.weights, root, config.weights_missing)
    if config.drop_path is not None:
        set_drop_path(backbone, config.backbone, config.drop_path)
    return backbone, channels


def model_file(path: str) -> Path:
    """The file of weights that `init_from` names: itself, or the model.pt of a run folder."""
    return Path(path, "model.pt") if Path(path).is_dir() else Path(path)


def init_from(model: nn.Module, path: str, classes: list[str], new_head: bool = False) -> None:
    """Load the model of an earlier run.

    Args:
        model: takes the weights.
        path: a run folder, or its model.pt.
        classes: names of the model's classes, which must be those of the run's summary.json, if
            there is one, in the same order.
        new_head: allow other classes; the heads of `model` are then not loaded, which is printed.

    Raises:
        UserError: there is no such file, a tensor does not fit, or the classes differ.
    """
    file = model_file(path)
    if not file.is_file():
        raise UserError(f"init_from: there is no {file}")
    try:
        state = load_tensors(file)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    trained = trained_classes(path)
    same_classes = trained in (None, classes)
    replaced = []
    if new_head and (not same_classes or _heads_differ(model, state)):
        new_heads = {k: v for k, v in model.state_dict().items() if k.startswith(HEADS)}
        replaced = [name for name in new_heads if name in state]
        state |= {name: new_heads[name] for name in replaced}
    if mismatch := compare(model, state):
        raise UserError(
            f"init_from: {file} does not fit this model: {mismatch}; "
            "is it a run of another `model` (with or without weight_norm) or of other classes?"
        )
    if not same_classes and not replaced:
        pairs = enumerate(zip(trained, classes, strict=False))
        i = next((i for i, (before, now) in pairs if before != now), 0)
        raise UserError(
            f"init_from: {file} was trained on other classes, or in another order: "
            f"its class {i} is {trained[i]!r}, here it is {classes[i]!r}"
        )
    model.load_state_dict(state)
    note = f", with a new head for {len(classes)} classes" if replaced else ""
    print(f"started from {file}{note}")


def _heads_differ(model: nn.Module, state: dict[str, torch.Tensor]) -> bool:
    """Whether a tensor of the heads has another shape in `state`."""
    heads = {k: v for k, v in model.state_dict().items() if k.startswith(HEADS)}
    return any(k in state and state[k].shape != v.shape for k, v in heads.items())
