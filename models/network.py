"""What the adapted networks share: output, normalisation of images, batch norm, parameter groups."""

import math
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn
from torch.utils.data import DataLoader

from common.checkpoint import load_tensors, trained_classes
from common.config import ModelConfig
from common.runtime import UserError
from models.backbones import backbone_stages

HEADS = ("head.", "aux_head.")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ModelOutput(NamedTuple):
    """What every model returns, in train and eval alike.

    logits: (N, K), or (N, K, H, W) at the size of the images; class axis 1. features: layer name -> (N, C, H', W'), and
    with a classifier `pooled` -> (N, D), its input. aux_logits: those of the auxiliary head, None without one.
    """

    logits: torch.Tensor
    features: dict[str, torch.Tensor]
    aux_logits: torch.Tensor | None = None


class Network(nn.Module):
    """A backbone and what a subclass builds on it: uint8 images (N, 3, H, W) -> `ModelOutput`.

    Scaling and normalisation of the images happen here, on the device. `channels` gives the width of each feature by
    name. A subclass builds its modules, then calls `prepare`. It has `predict`, from the backbone's features and the
    height and width of the images to a `ModelOutput`, and `head_inputs`, what of these features `predict` reads.
    """

    def __init__(self, backbone: nn.Module, channels: dict[str, int], config: ModelConfig):
        super().__init__()
        self.backbone, self.channels, self.freeze_statistics = backbone, channels, config.bn == "frozen"
        self.fixed_affine = config.bn_affine == "frozen"
        self.frozen: tuple[str, ...] = ()
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)

    def prepare(self, config: ModelConfig) -> None:
        self.to(memory_format=self.memory_format)
        for module in self._batch_norms():
            module.requires_grad_(not self.fixed_affine)
        self.train()  # frozen statistics are frozen from the start

    def _batch_norms(self):
        """Those of the backbone: a new layer's has no statistics worth keeping."""
        return (m for m in self.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def train(self, mode: bool = True) -> "Network":
        super().train(mode)
        if self.freeze_statistics:
            for module in self._batch_norms():
                module.eval()
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def forward(self, images: torch.Tensor) -> ModelOutput:
        return self.predict(self.backbone(self.normalise(images)), images.shape[2:])

    def freeze(self, *names: str) -> None:
        """Fix submodules: parameters without gradient, statistics and dropout in eval mode whatever `train` says."""
        self.frozen = tuple(name for name in names if getattr(self, name, None) is not None)
        for name in self.frozen:
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def unfreeze(self, part: list[str] | float) -> None:
        """Let stages of a frozen backbone learn again, by name, or its last share of convolutions.

        Its statistics and dropout stay in eval mode. A stage is all that follows the one before: layer1 has the stem.

        Raises:
            UserError: no such stage.
        """
        if isinstance(part, float):
            layers = [m for m in self.backbone.modules() if m._parameters]
            learnt = [i for i, m in enumerate(layers) if m.weight.dim() > 1]
            modules = layers[learnt[-math.ceil(part * len(learnt))] :]
        else:
            stages = backbone_stages(self.backbone)
            if unknown := [name for name in part if name not in stages]:
                raise UserError(f"unfreeze: no stage {unknown[0]!r}; there are {', '.join(stages)}")
            modules = [module for name in part for module in stages[name]]
        for module in modules:
            module.requires_grad_(True)
        for module in self._batch_norms():
            if self.fixed_affine:
                module.requires_grad_(False)

    def normalise(self, images: torch.Tensor) -> torch.Tensor:
        return images.to(torch.float32, memory_format=self.memory_format, copy=True).sub_(self.mean).div_(self.std)

    @contextmanager
    def running_statistics(self, kept: bool):
        """Within, if `kept`, batch norm normalises by the batch but leaves its running statistics as they are."""
        norms = [m for m in self.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
        momenta = [(m, m.momentum) for m in norms] if kept else []
        for module, _ in momenta:
            module.momentum = 0.0
        try:
            yield
        finally:
            for module, momentum in momenta:
                module.momentum = momentum

    def param_groups(self, lr_scale: float) -> list[dict]:
        """The backbone's trainable parameters at `lr_scale`, the new layers' at 1."""
        backbone = {p for p in self.backbone.parameters() if p.requires_grad}
        new = [p for p in self.parameters() if p.requires_grad and p not in backbone]
        return [
            {"params": [p for p in self.backbone.parameters() if p.requires_grad], "lr_scale": lr_scale},
            {"params": new, "lr_scale": 1.0},
        ]


def init_from(model: nn.Module, path: str, classes: list[str], new_head: bool = False) -> None:
    """Load `model.pt` of a run (the file or its folder).

    Raises `UserError` unless every tensor fits, and the classes of the run's summary.json, where there is one, are
    `classes`, in this order. With `new_head` the classes may be others: the heads of `model` then stay as they are,
    which is said, and the rest must fit.
    """
    file = Path(path, "model.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"init_from: there is no {file}")
    own = model.state_dict()
    try:
        saved = load_tensors(file)
    except UserError as error:
        raise UserError(f"init_from: {error}") from None
    trained, aside = trained_classes(path), ()
    if new_head and (
        trained not in (None, classes)
        or any(k in saved and saved[k].shape != own[k].shape for k in own if k.startswith(HEADS))
    ):
        aside = tuple(k for k in own if k.startswith(HEADS) and k in saved)
        saved |= {k: own[k] for k in aside}
    for problem, names in (
        ("lacks", [name for name in own if name not in saved]),
        ("has too many", [name for name in saved if name not in own]),
        ("has of another shape", [k for k in own if k in saved and getattr(saved[k], "shape", None) != own[k].shape]),
    ):
        if names:
            raise UserError(
                f"init_from: {file} does not fit this model: of its tensors it {problem} {len(names)}, the first "
                f"{names[0]}; is it a run of another `model` or of other classes?"
            )
    if trained not in (None, classes) and not aside:
        i = next((i for i, (a, b) in enumerate(zip(trained, classes, strict=False)) if a != b), 0)
        raise UserError(
            f"init_from: {file} was trained on other classes, or in another order: its class {i} is {trained[i]!r}, "
            f"here it is {classes[i]!r}"
        )
    model.load_state_dict(saved)
    print(f"started from {file}" + (f", with a new head for {len(classes)} classes" if aside else ""))


@torch.no_grad()
def head_features(
    model: Network, batches: DataLoader, limit_gb: float, device: torch.device
) -> tuple[dict[str, torch.Tensor], torch.Tensor] | None:
    """What the heads read of every labelled image, by layer name, for `model.predict`; and the labels. On `device`.

    With the backbone frozen and the images unchanging, training on these is training on the images. None, which is
    said, where they take more than `limit_gb`.
    """
    count, done, kept = len(batches.dataset.set), 0, {}
    for x, y in batches:
        found = model.head_inputs(model.backbone(model.normalise(x.to(device, non_blocking=True))))
        parts = {**found, "labels": y.to(device, non_blocking=True)}
        if not kept:
            size = sum(part.element_size() * part[0].numel() for part in parts.values()) * count / 2**30
            if size > limit_gb:
                print(f"features of {count} images take {size:.1f} GiB, more than feature_gb: computed anew each step")
                return None
            kept = {name: part.new_empty(count, *part.shape[1:]) for name, part in parts.items()}
        for name, part in parts.items():
            kept[name][done : done + len(part)] = part
        done += len(x)
    return kept, kept.pop("labels")


def check_layers(model: Network, names: list[str], key: str = "feature_layers") -> None:
    """Raise `UserError`, naming the config's `key`, for a feature layer the model does not have."""
    for name in names:
        if name not in model.channels:
            raise UserError(f"{key}: no layer {name!r}; there are {', '.join(model.channels)}")


def forward_domains(
    model: Network, x_s: torch.Tensor, x_t: torch.Tensor, config: ModelConfig
) -> tuple[ModelOutput, ModelOutput]:
    """Outputs on source and target.

    `bn: separate` runs one forward each, so that each domain is normalised by its own statistics; with `bn_running:
    target` only the target's enter the running statistics that evaluation uses. `concat` and `frozen` run one forward
    on both, the faster way; with `frozen`, which changes nothing by it, one each where the sizes differ.

    Raises:
        UserError: `bn: concat` with images of two sizes.
    """
    if config.bn == "separate":
        with model.running_statistics(kept=config.bn_running == "target"):
            out_s = model(x_s)
        return out_s, model(x_t)
    if x_s.shape[1:] != x_t.shape[1:]:
        if config.bn == "frozen":
            return model(x_s), model(x_t)
        raise UserError(
            "model.bn: concat forwards both domains at once, but source images are {}x{} px and target images {}x{}; "
            "give data.source and data.target the same crop, or use bn: separate".format(*x_s.shape[2:], *x_t.shape[2:])
        )
    sizes = [len(x_s), len(x_t)]
    out = model(torch.cat([x_s, x_t]))
    features = {name: feature.split(sizes) for name, feature in out.features.items()}
    logits = out.logits.split(sizes)
    aux_logits = (None, None) if out.aux_logits is None else out.aux_logits.split(sizes)
    out_s, out_t = (
        ModelOutput(logits[i], {name: pair[i] for name, pair in features.items()}, aux_logits[i]) for i in (0, 1)
    )
    return out_s, out_t
