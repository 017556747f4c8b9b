"""The segmentation networks: a dilated backbone with the heads of DeepLab-v2 or DeepLab-v3."""

import torch
from torch import nn
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead
from torchvision.models.segmentation.fcn import FCNHead

from common.resize import resize_maps
from models.backbones import build_backbone, dilate
from models.config import ModelConfig
from models.network import ModelOutput, Network
from models.weights import load_weights


class DeepLabV2Head(nn.Module):
    """Sum of four 3x3 convolutions with dilations 6, 12, 18 and 24.

    Chen et al. 2017, arXiv:1606.00915, section 3.2. Much published code returns from within the
    loop over the branches, and so adds only two of the four.
    """

    def __init__(self, in_channels: int, num_classes: int):
        super().__init__()
        self.branches = nn.ModuleList(
            nn.Conv2d(in_channels, num_classes, 3, padding=dilation, dilation=dilation)
            for dilation in (6, 12, 18, 24)
        )
        for branch in self.branches:
            nn.init.normal_(branch.weight, std=0.01)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return sum(branch(x) for branch in self.branches)


def deeplab_v3_head(in_channels: int, num_classes: int, output_stride: int) -> nn.Module:
    """torchvision's head of DeepLab-v3 (Chen et al. 2017, arXiv:1706.05587).

    The dilations are 6, 12 and 18 at output stride 16, and twice that at 8. The pooled branch has
    one value per channel and image, which batch norm cannot normalize in a batch of one image;
    group norm replaces it there.

    Args:
        in_channels: channels of layer4.
        num_classes: K.
        output_stride: 8 or 16.

    Shapes: (N, C, H, W) -> (N, K, H, W).
    """
    rates = tuple(rate * 16 // output_stride for rate in (6, 12, 18))
    head = DeepLabHead(in_channels, num_classes, rates)
    pooled = next(m for m in head.modules() if isinstance(m, ASPP)).convs[-1]
    index, norm = next((i, m) for i, m in enumerate(pooled) if isinstance(m, nn.BatchNorm2d))
    pooled[index] = nn.GroupNorm(32, norm.num_features)
    return head


class Segmenter(Network):
    """uint8 images (N, 3, H, W) -> `ModelOutput` with logits (N, K, H, W), enlarged bilinearly.

    The main head reads layer4. With `aux_weight` above 0 an auxiliary head reads layer3.

    Args:
        backbone: of `build_backbone`, dilated.
        channels: channels of each layer by name.
        num_classes: K.
        config: the section `model`.
    """

    def __init__(
        self, backbone: nn.Module, channels: dict[str, int], num_classes: int, config: ModelConfig
    ):
        super().__init__(backbone, {**channels, "logits": num_classes}, config)
        if config.head == "deeplab_v2":
            self.head = DeepLabV2Head(channels["layer4"], num_classes)
            aux_head = DeepLabV2Head
        else:
            self.head = deeplab_v3_head(channels["layer4"], num_classes, config.output_stride)
            aux_head = FCNHead
        self.aux_head = aux_head(channels["layer3"], num_classes) if config.aux_weight > 0 else None
        self.prepare(config)

    def predict(self, features: dict[str, torch.Tensor], size: tuple[int, ...]) -> ModelOutput:
        aux_logits = None
        if self.aux_head is not None:
            aux_logits = resize_maps(self.aux_head(features["layer3"]), size)
        logits = resize_maps(self.head(features["layer4"]), size)
        return ModelOutput(logits, {**features, "logits": logits}, aux_logits)

    def head_inputs(self, features: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        names = ["layer4"] if self.aux_head is None else ["layer3", "layer4"]
        return {name: features[name] for name in names}


def build_segmenter(config: ModelConfig, num_classes: int, root: str) -> Segmenter:
    """The segmenter of a config.

    Args:
        config: the section `model`.
        num_classes: K.
        root: the folder (`data.root`) that a relative path in `weights` refers to.
    """
    backbone, channels = build_backbone(config.backbone, config.batch_norm, dense=True)
    if config.weights:
        load_weights(backbone, config.backbone, config.weights, root, config.weights_missing)
    dilate(backbone, config.output_stride)
    return Segmenter(backbone, channels, num_classes, config)
