"""Heads for segmentation: from feature maps to a logit per class and location."""

from collections.abc import Sequence

import torch
from torch import nn
from torchvision.models.convnext import LayerNorm2d
from torchvision.models.segmentation.deeplabv3 import ASPP, DeepLabHead

from common.resize import resize_maps
from models.config import ModelConfig
from models.layers import LAYERS

WIDTH = 256  # channels of the heads of several levels


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


def _normalized(convolution: nn.Conv2d) -> nn.Sequential:
    return nn.Sequential(convolution, nn.BatchNorm2d(convolution.out_channels), nn.ReLU())


def _separable(in_channels: int, out_channels: int, dilation: int) -> nn.Sequential:
    """A 3x3 convolution per channel, then a 1x1 convolution, each with batch norm and ReLU."""
    depthwise = nn.Conv2d(
        in_channels,
        in_channels,
        3,
        padding=dilation,
        dilation=dilation,
        groups=in_channels,
        bias=False,
    )
    pointwise = nn.Conv2d(in_channels, out_channels, 1, bias=False)
    return nn.Sequential(*_normalized(depthwise), *_normalized(pointwise))


class SegFormerHead(nn.Module):
    """All levels to `WIDTH` channels and to the size of layer1, concatenated and classified.

    The all-MLP head of SegFormer (Xie et al. 2021, arXiv:2105.15203, eq. 4). Its last linear layer
    but one is followed by batch norm and ReLU, as in the authors' code. Each level is normalized
    over its channels first, which the authors' backbone does itself.

    Args:
        channels: channels of layer1 to layer4.
        num_classes: K.
        dropout: share of the classifier's input channels.

    Shapes: layer1 to layer4 (N, C, H', W') -> (N, K, H, W) of layer1.
    """

    def __init__(self, channels: Sequence[int], num_classes: int, dropout: float):
        super().__init__()
        self.embeddings = nn.ModuleList(
            nn.Sequential(LayerNorm2d(width, eps=1e-6), nn.Conv2d(width, WIDTH, 1))
            for width in channels
        )
        self.fusion = self.build_fusion(len(channels) * WIDTH)
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(WIDTH, num_classes, 1)
        nn.init.normal_(self.classifier.weight, std=0.01)

    def build_fusion(self, in_channels: int) -> nn.Module:
        return _normalized(nn.Conv2d(in_channels, WIDTH, 1, bias=False))

    def forward(self, *maps: torch.Tensor) -> torch.Tensor:
        size = maps[0].shape[2:]
        pairs = zip(self.embeddings, maps, strict=True)
        embedded = [embedding(x) for embedding, x in pairs]
        resized = [embedded[0], *(resize_maps(x, size) for x in embedded[1:])]
        return self.classifier(self.dropout(self.fusion(torch.cat(resized, dim=1))))


class ContextFusion(nn.Module):
    """ASPP with depthwise separable convolutions: (N, C, H, W) -> (N, `WIDTH`, H, W)."""

    def __init__(self, in_channels: int, dilations: Sequence[int] = (6, 12, 18)):
        super().__init__()
        self.branches = nn.ModuleList([_normalized(nn.Conv2d(in_channels, WIDTH, 1, bias=False))])
        self.branches.extend(_separable(in_channels, WIDTH, dilation) for dilation in dilations)
        joined = WIDTH * len(self.branches)
        self.bottleneck = _normalized(nn.Conv2d(joined, WIDTH, 3, padding=1, bias=False))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.bottleneck(torch.cat([branch(x) for branch in self.branches], dim=1))


class DAFormerHead(SegFormerHead):
    """SegFormer's head whose fusion sees context (Hoyer et al. 2022, arXiv:2111.14887, sec. 3.2).

    As in the authors' code there is no branch of the pooled image. Shapes as of `SegFormerHead`.
    """

    def build_fusion(self, in_channels: int) -> nn.Module:
        return ContextFusion(in_channels)


class UpsamplingHead(nn.Module):
    """Two transposed convolutions, each of twice the size, and a classifier, for a ViT.

    As in the code of Englert et al. 2024 (VFM-UDA, arXiv:2406.09896).

    Args:
        in_channels: D of layer4.
        num_classes: K.
        dropout: share of the classifier's input channels; the authors have none.

    Shapes: (N, D, H, W) -> (N, K, 4 H, 4 W).
    """

    def __init__(self, in_channels: int, num_classes: int, dropout: float):
        super().__init__()
        half, quarter = in_channels // 2, in_channels // 4
        self.upsampling = nn.Sequential(
            nn.ConvTranspose2d(in_channels, half, 2, stride=2, bias=False),
            LayerNorm2d(half, eps=1e-6),
            nn.GELU(),
            nn.ConvTranspose2d(half, quarter, 2, stride=2, bias=False),
            LayerNorm2d(quarter, eps=1e-6),
            nn.Conv2d(quarter, quarter, 3, padding=1, bias=False),
            LayerNorm2d(quarter, eps=1e-6),
        )
        self.dropout = nn.Dropout2d(dropout)
        self.classifier = nn.Conv2d(quarter, num_classes, 1, bias=False)
        nn.init.normal_(self.classifier.weight, std=0.1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.classifier(self.dropout(self.upsampling(x)))


def build_head(
    config: ModelConfig, channels: dict[str, int], num_classes: int
) -> tuple[nn.Module, tuple[str, ...]]:
    """The main head of a config.

    Args:
        config: the section `model`.
        channels: channels of each layer by name.
        num_classes: K.

    Returns:
        (head, the layers that it reads).
    """
    last = channels["layer4"]
    if config.head == "deeplab_v2":
        return DeepLabV2Head(last, num_classes), ("layer4",)
    if config.head == "deeplab_v3":
        return deeplab_v3_head(last, num_classes, config.output_stride), ("layer4",)
    if config.head == "upsampling":
        return UpsamplingHead(last, num_classes, config.dropout), ("layer4",)
    kind = {"segformer": SegFormerHead, "daformer": DAFormerHead}[config.head]
    return kind([channels[name] for name in LAYERS], num_classes, config.dropout), LAYERS
