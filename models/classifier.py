"""The classification network: backbone, pooled bottleneck, head."""

from contextlib import contextmanager

import torch
from torch import nn
from torch.nn.utils.parametrizations import weight_norm

from common.errors import UserError
from models.config import ModelConfig
from models.layers import Backbone
from models.network import BackboneFeatures, ModelOutput, Network
from models.weights import pretrained_backbone


class Classifier(Network):
    """uint8 images (N, 3, H, W) -> `ModelOutput` with logits (N, K) and the feature `pooled`.

    Args:
        backbone: of `build_backbone`.
        channels: channels of each layer by name.
        num_classes: K.
        config: the section `model`.
    """

    layers_read = ("pooled",)

    def __init__(
        self, backbone: Backbone, channels: dict[str, int], num_classes: int, config: ModelConfig
    ):
        width, bottleneck = channels["layer4"], nn.Sequential()
        if config.bottleneck:
            bottleneck.append(nn.Linear(width, config.bottleneck))
            bottleneck.append(nn.BatchNorm1d(config.bottleneck))
            if config.bottleneck_relu:
                bottleneck.append(nn.ReLU(inplace=True))
            width = config.bottleneck
        widths = {**channels, "pooled": width, "logits": num_classes}
        super().__init__(backbone, widths, config)
        self.bottleneck = bottleneck
        self.dropout = nn.Dropout(config.dropout)
        self.head = self.build_head()
        self.prepare(config)

    def build_head(self) -> nn.Module:
        width, hidden = self.channels["pooled"], self.config.head_hidden
        output = nn.Linear(hidden or width, self.channels["logits"])
        if self.config.weight_norm:
            weight_norm(output)
        if hidden is None:
            return output
        dropout = nn.Dropout(self.config.dropout)
        return nn.Sequential(nn.Linear(width, hidden), nn.ReLU(inplace=True), dropout, output)

    def forward(self, images: torch.Tensor | BackboneFeatures) -> ModelOutput:
        with self._explained():
            return super().forward(images)

    def predict(self, features: dict[str, torch.Tensor], size: tuple[int, ...]) -> ModelOutput:
        pooled = self.bottleneck(features["pooled"])
        features = {**features, "pooled": pooled}
        logits = self.head_logits(self.head, features, size)
        return ModelOutput(logits, {**features, "logits": logits})

    def head_logits(
        self, head: nn.Module, features: dict[str, torch.Tensor], size: tuple[int, ...]
    ) -> torch.Tensor:
        return head(self.dropout(features["pooled"]))

    def check_layers(self, names: list[str], key: str = "feature_layers") -> None:
        super().check_layers(names, key)
        if "layer4" in names and not self.backbone.pools_layer4:
            remedy = "name pooled, or layer1 to layer3"
            if key != "feature_layers":
                remedy = "leave it out, or take a backbone without one"
            raise UserError(
                f"{key}: the classifier on this backbone reads the class token and not layer4; "
                f"{remedy}"
            )

    def head_inputs(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {"pooled": features["pooled"]}

    @contextmanager
    def _explained(self):
        """Raise torch's complaint about a batch of one as a `UserError`."""
        try:
            yield
        except ValueError as error:
            if "more than 1 value per channel" not in str(error):
                raise
            frozen_helps = not (self.freeze_statistics or len(self.bottleneck))
            remedy = ", or model.bn: frozen" if frozen_helps else ""
            raise UserError(
                "data.batch, data.target_batch or accumulate: 1 image at a time gives batch norm "
                f"one value per channel; use parts of 2 or more images{remedy}"
            ) from None


def build_classifier(config: ModelConfig, num_classes: int, root: str) -> Classifier:
    """The classifier of a config.

    Args:
        config: the section `model`.
        num_classes: K.
        root: the folder (`data.root`) that a relative path in `weights` refers to.
    """
    backbone, channels = pretrained_backbone(config, root, dense=False)
    return Classifier(backbone, channels, num_classes, config)
