"""The segmentation networks: a backbone and a head on its maps."""

import torch
from torch import nn
from torchvision.models.segmentation.fcn import FCNHead

from common.resize import resize_maps
from models.config import ModelConfig
from models.dilation import dilate
from models.heads import DeepLabV2Head, build_head
from models.layers import Backbone
from models.network import ModelOutput, Network
from models.weights import pretrained_backbone


class Segmenter(Network):
    """uint8 images (N, 3, H, W) -> `ModelOutput` with logits (N, K, H, W), enlarged bilinearly.

    The main head decides which layers it reads (`build_head`). With `aux_weight` above 0 an
    auxiliary head reads layer3.

    Args:
        backbone: of `build_backbone`, dilated for the heads of DeepLab.
        channels: channels of each layer by name.
        num_classes: K.
        config: the section `model`.
    """

    def __init__(
        self, backbone: Backbone, channels: dict[str, int], num_classes: int, config: ModelConfig
    ):
        super().__init__(backbone, {**channels, "logits": num_classes}, config)
        self.head, self.layers_read = build_head(config, channels, num_classes)
        aux_head = DeepLabV2Head if config.head == "deeplab_v2" else FCNHead
        self.aux_head = aux_head(channels["layer3"], num_classes) if config.aux_weight > 0 else None
        self.prepare(config)

    def predict(self, features: dict[str, torch.Tensor], size: tuple[int, ...]) -> ModelOutput:
        aux_logits = None
        if self.aux_head is not None:
            aux_logits = self._enlarge(self.aux_head(features["layer3"]), size)
        logits = self.head_logits(self.head, features, size)
        return ModelOutput(logits, {**features, "logits": logits}, aux_logits)

    def build_head(self) -> nn.Module:
        head, _ = build_head(self.config, self.channels, self.channels["logits"])
        return head

    def head_logits(
        self, head: nn.Module, features: dict[str, torch.Tensor], size: tuple[int, ...]
    ) -> torch.Tensor:
        return self._enlarge(head(*(features[name] for name in self.layers_read)), size)

    def _enlarge(self, maps: torch.Tensor, size: tuple[int, ...]) -> torch.Tensor:
        corners = self.backbone.border > 0  # a map begins and ends at the borders of the image
        return resize_maps(maps, size, corners)

    def head_inputs(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = set(self.layers_read) | ({"layer3"} if self.aux_head is not None else set())
        return {name: features[name] for name in sorted(names)}


def build_segmenter(config: ModelConfig, num_classes: int, root: str) -> Segmenter:
    """The segmenter of a config.

    Args:
        config: the section `model`.
        num_classes: K.
        root: the folder (`data.root`) that a relative path in `weights` refers to.
    """
    backbone, channels = pretrained_backbone(config, root, dense=True)
    if config.head.startswith("deeplab"):
        dilate(backbone, config.output_stride)
    return Segmenter(backbone, channels, num_classes, config)
