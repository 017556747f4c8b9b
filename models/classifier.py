"""The adapted network: backbone, pooled bottleneck, classifier."""

from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from torch import nn

from common.checkpoint import load_tensors
from common.config import ModelConfig, RunConfig
from common.runtime import UserError
from models.backbones import LAYERS, build_backbone, load_weights

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class ModelOutput(NamedTuple):
    """What every model returns, in train and eval alike.

    logits: (N, K), class axis 1. features: layer name -> (N, C, H, W), and `pooled` -> (N, D), the classifier's input.
    """

    logits: torch.Tensor
    features: dict[str, torch.Tensor]


class Classifier(nn.Module):
    """uint8 images (N, 3, H, W) -> `ModelOutput`. Scaling and normalisation happen here, on the device.

    `channels` gives the width of each feature by name.
    """

    def __init__(self, backbone: nn.Module, channels: dict[str, int], num_classes: int, config: ModelConfig):
        super().__init__()
        self.backbone, self.freeze_statistics = backbone, config.bn == "frozen"
        width = channels["layer4"]
        self.bottleneck = nn.Sequential()
        if config.bottleneck:
            self.bottleneck = nn.Sequential(
                nn.Linear(width, config.bottleneck), nn.BatchNorm1d(config.bottleneck), nn.ReLU(inplace=True)
            )
            width = config.bottleneck
        self.channels = {**channels, "pooled": width}
        self.head = nn.Linear(width, num_classes)
        self.register_buffer("mean", 255 * torch.tensor(IMAGENET_MEAN).view(3, 1, 1), persistent=False)
        self.register_buffer("std", 255 * torch.tensor(IMAGENET_STD).view(3, 1, 1), persistent=False)
        self.memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.to(memory_format=self.memory_format)
        for module in self._batch_norms():
            module.requires_grad_(config.bn_affine == "train")
        self.train()  # frozen statistics are frozen from the start

    def _batch_norms(self):
        """Those of the backbone: a new bottleneck's has no statistics worth keeping."""
        return (m for m in self.backbone.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm))

    def train(self, mode: bool = True) -> "Classifier":
        super().train(mode)
        if self.freeze_statistics:
            for module in self._batch_norms():
                module.eval()
        return self

    def forward(self, images: torch.Tensor) -> ModelOutput:
        x = images.to(torch.float32, memory_format=self.memory_format, copy=True).sub_(self.mean).div_(self.std)
        try:
            features = self.backbone(x)
            features["pooled"] = self.bottleneck(features["layer4"].mean((2, 3)))
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            remedy = "" if self.freeze_statistics or len(self.bottleneck) else ", or model.bn: frozen"
            raise UserError(
                f"data.batch: {len(images)} image gives batch norm one value a channel; "
                f"use data.batch of 2 or more{remedy}"
            ) from None
        return ModelOutput(self.head(features["pooled"]), features)

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
        new = [p for module in (self.bottleneck, self.head) for p in module.parameters() if p.requires_grad]
        return [
            {"params": [p for p in self.backbone.parameters() if p.requires_grad], "lr_scale": lr_scale},
            {"params": new, "lr_scale": 1.0},
        ]


def build_classifier(config: ModelConfig, num_classes: int, root: str) -> Classifier:
    """The classifier of a config; relative `weights` resolve against `root` (`data.root`)."""
    backbone, channels = build_backbone(config.backbone, config.batch_norm)
    if config.weights:
        load_weights(backbone, config.backbone, config.weights, root, config.weights_missing)
    return Classifier(backbone, channels, num_classes, config)


def build_model(config: RunConfig, num_classes: int) -> Classifier:
    """The network of `config.model` for `config.data.task`."""
    return build_classifier(config.model, num_classes, config.data.root)


def init_from(model: nn.Module, path: str) -> None:
    """Load `model.pt` of a run (the file or its folder). Raises `UserError` unless every tensor fits."""
    file = Path(path, "model.pt") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        raise UserError(f"init_from: there is no {file}")
    try:
        model.load_state_dict(load_tensors(file))
    except RuntimeError as error:
        lines = str(error).splitlines()
        raise UserError(f"init_from: {file} does not fit this model: {lines[min(1, len(lines) - 1)].strip()}") from None
    print(f"started from {file}")


def check_layers(model: Classifier, names: list[str]) -> None:
    """Raise `UserError` for a feature layer the model does not have."""
    for name in names:
        if name not in model.channels:
            raise UserError(f"feature_layers: no layer {name!r}; there are {', '.join((*LAYERS, 'pooled'))}")


def forward_domains(
    model: Classifier, x_s: torch.Tensor, x_t: torch.Tensor, config: ModelConfig
) -> tuple[ModelOutput, ModelOutput]:
    """Outputs on source and target.

    `bn: separate` runs one forward each, so that each domain is normalised by its own statistics; with `bn_running:
    target` only the target's enter the running statistics that evaluation uses. `concat` and `frozen` run one forward
    on both (equal image sizes), the faster way.
    """
    if config.bn == "separate":
        with model.running_statistics(kept=config.bn_running == "target"):
            out_s = model(x_s)
        return out_s, model(x_t)
    sizes = [len(x_s), len(x_t)]
    out = model(torch.cat([x_s, x_t]))
    features = {name: feature.split(sizes) for name, feature in out.features.items()}
    logits = out.logits.split(sizes)
    out_s, out_t = (ModelOutput(logits[i], {name: pair[i] for name, pair in features.items()}) for i in (0, 1))
    return out_s, out_t
