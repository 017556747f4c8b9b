"""What a backbone is: a network that yields the feature maps layer1 to layer4."""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import (
    convnext,
    densenet,
    efficientnet,
    mobilenetv2,
    mobilenetv3,
    regnet,
    resnet,
    swin_transformer,
    vision_transformer,
)

LAYERS = ("layer1", "layer2", "layer3", "layer4")
BLOCKS = (
    resnet.BasicBlock,
    resnet.Bottleneck,
    regnet.ResBottleneckBlock,
    densenet._DenseLayer,
    mobilenetv2.InvertedResidual,
    mobilenetv3.InvertedResidual,
    efficientnet.MBConv,
    efficientnet.FusedMBConv,
    convnext.CNBlock,
    swin_transformer.SwinTransformerBlock,
    vision_transformer.EncoderBlock,
)


class Backbone(nn.Module):
    """Images (N, 3, H, W), normalized -> features: layer1 to layer4 (N, C, H', W').

    With `pools` there is also `pooled` (N, D), one vector per image, computed as the published
    classifier does.

    Attributes:
        pools: whether the features include `pooled`.
        paths: paths in torchvision's network of the children that have other names here.
        left_out: prefixes of the tensors that only torchvision's network has.
        multiple: px. A network that divides its input into patches gets images whose sides are
            multiples of this; others are enlarged to the next ones, so that each map covers the
            entire image.
        probe: px of the side of the zero image that widths and strides are read off.
        pools_layer4: whether `pooled` is computed from layer4.
        border: by how much a map is larger than the image divided by the stride.
    """

    paths: dict[str, str] = {}
    left_out: tuple[str, ...] = ()
    multiple = 1
    probe = 64
    pools_layer4 = True
    border = 0

    def __init__(self, pools: bool):
        super().__init__()
        self.pools = pools

    def stages(self) -> dict[str, list[nn.Module]]:
        """The modules by stage: all modules after the stage before, up to its own output."""
        raise NotImplementedError

    def pool(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        """The vector (N, D) of each image."""
        return features["layer4"].mean((2, 3))

    def parameters_by_depth(self) -> list[list[nn.Parameter]]:
        """All parameters, from the input to the output, in groups of increasing depth.

        The first group is the stem, such as the first convolution or patches and positions. Then
        each residual block is a group, together with what lies between it and the block before.
        The last group is what follows the last block; it may be empty.
        """
        blocks = [module for module in self.modules() if isinstance(module, BLOCKS)]
        depth_of = {p: i for i, block in enumerate(blocks, 1) for p in block.parameters()}
        groups, last = [[] for _ in range(len(blocks) + 2)], 0
        for parameter in self.parameters():
            if parameter in depth_of:
                last = depth_of[parameter]
                groups[last].append(parameter)
            else:
                groups[last + 1 if last else 0].append(parameter)
        return groups


class Layers(Backbone):
    """Children of a network of torchvision, one after another, up to the end of layer4.

    Args:
        children: the modules by name, in the order of the forward pass.
        ends: names of the children that end layer1 to layer4.
        pools: see `Backbone`.
        norm: normalizes the mean of layer4 over positions, which is `pooled`.
        channels_first: whether the children take maps (N, C, H, W), and not (N, H, W, C).
    """

    def __init__(
        self,
        children: dict[str, nn.Module],
        ends: tuple[str, ...],
        pools: bool,
        norm: nn.Module | None = None,
        channels_first: bool = True,
    ):
        super().__init__(pools)
        for name, child in children.items():
            self.add_module(name, child)
        if norm is not None:
            self.add_module("pool_norm", norm)
        self.order, self.ends = list(children), dict(zip(ends, LAYERS, strict=True))
        self.channels_first = channels_first

    def _children(self) -> Iterator[tuple[str | None, nn.Module]]:
        """(the layer that ends here, module) for each child, in the order of the forward pass."""
        return ((self.ends.get(name), self.get_submodule(name)) for name in self.order)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        x, features = enlarge(x, self.multiple), {}
        for layer, module in self._children():
            x = module(x)
            if layer and self.channels_first:
                features[layer] = x
            elif layer:
                features[layer] = x.permute(0, 3, 1, 2)
                x = features[layer].permute(0, 2, 3, 1)  # so that all gradients pass through it
        if self.pools:
            features["pooled"] = self.pool(features)
        return features

    def pool(self, features: dict[str, torch.Tensor]) -> torch.Tensor:
        if "pool_norm" not in self._modules:
            return super().pool(features)
        return self.pool_norm(features["layer4"].mean((2, 3), keepdim=True)).flatten(1)

    def stages(self) -> dict[str, list[nn.Module]]:
        stages, modules = {}, []
        for layer, module in self._children():
            modules.append(module)
            if layer:
                stages[layer], modules = modules, []
        if "pool_norm" in self._modules:
            stages["layer4"].append(self.pool_norm)
        return stages


def enlarge(x: torch.Tensor, multiple: int) -> torch.Tensor:
    """Images (N, 3, H, W) with sides that are multiples of `multiple` px, enlarged bilinearly."""
    if multiple == 1:
        return x
    size = [-(-side // multiple) * multiple for side in x.shape[2:]]
    if is_known(*x.shape[2:]) and size == list(x.shape[2:]):
        return x
    return F.interpolate(x, size, mode="bilinear")  # in float32, under autocast too


def is_known(*sides: int) -> bool:
    """Whether code may depend on sizes: those of an exported program can be free."""
    return not torch.compiler.is_exporting() or all(isinstance(side, int) for side in sides)
