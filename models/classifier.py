"""The classification network: backbone, pooled bottleneck, classifier."""

from contextlib import contextmanager

import torch
from torch import nn

from common.config import ModelConfig
from common.runtime import UserError
from models.backbones import build_backbone, load_weights
from models.network import ModelOutput, Network


class Classifier(Network):
    """uint8 images (N, 3, H, W) -> `ModelOutput` with logits (N, K) and the feature `pooled`."""

    def __init__(self, backbone: nn.Module, channels: dict[str, int], num_classes: int, config: ModelConfig):
        width, bottleneck = channels["layer4"], nn.Sequential()
        if config.bottleneck:
            bottleneck = nn.Sequential(
                nn.Linear(width, config.bottleneck), nn.BatchNorm1d(config.bottleneck), nn.ReLU(inplace=True)
            )
            width = config.bottleneck
        super().__init__(backbone, {**channels, "pooled": width}, config)
        self.bottleneck = bottleneck
        self.dropout = nn.Dropout(config.dropout)
        self.head = nn.Linear(width, num_classes)
        self.prepare(config)

    def forward(self, images: torch.Tensor) -> ModelOutput:
        with self._told(len(images)):
            return super().forward(images)

    def predict(self, features: dict[str, torch.Tensor], size: tuple[int, ...]) -> ModelOutput:
        with self._told(len(features["layer4"])):
            pooled = self.bottleneck(features["layer4"].mean((2, 3)))
        return ModelOutput(self.head(self.dropout(pooled)), {**features, "pooled": pooled})

    def head_inputs(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"layer4": features["layer4"].mean((2, 3), keepdim=True)}

    @contextmanager
    def _told(self, count: int):
        """torch's complaint about a batch of one, in this project's words."""
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            remedy = "" if self.freeze_statistics or len(self.bottleneck) else ", or model.bn: frozen"
            raise UserError(
                f"data.batch: {count} image gives batch norm one value a channel; use data.batch of 2 or more{remedy}"
            ) from None


def build_classifier(config: ModelConfig, num_classes: int, root: str) -> Classifier:
    """The classifier of a config; relative `weights` resolve against `root` (`data.root`)."""
    backbone, channels = build_backbone(config.backbone, config.batch_norm)
    if config.weights:
        load_weights(backbone, config.backbone, config.weights, root, config.weights_missing)
    return Classifier(backbone, channels, num_classes, config)
