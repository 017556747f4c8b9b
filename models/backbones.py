"""Feature extractors: every backbone yields `layer1` to `layer4`, at strides 4, 8, 16 and 32."""

from typing import NamedTuple

import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from common.errors import UserError

LAYERS = ("layer1", "layer2", "layer3", "layer4")
STRIDES = (4, 8, 16, 32)
PROBE = 64  # px of the zero image that widths and strides are read off

BatchNorm = nn.modules.batchnorm._BatchNorm


class Entry(NamedTuple):
    """Where a network of torchvision has the four layers.

    Attributes:
        layers: the children of the body that end layer1 to layer4.
        dense_last: the child that ends layer4 for segmentation, if another: MobileNetV2 ends before
            its last 1x1 convolution, at 320 channels in place of 1280, as in its paper (Sandler et
            al. 2018, arXiv:1801.04381, section 6.3), and EfficientNet likewise.
        body: the attribute of the network that holds the children; None for the network itself.
    """

    layers: tuple[str, str, str, str]
    dense_last: str | None = None
    body: str | None = None


RESNET = Entry(LAYERS)
BACKBONES: dict[str, Entry | None] = {
    "lenet": None,  # `LeNet`
    "resnet18": RESNET,
    "resnet34": RESNET,
    "resnet50": RESNET,
    "resnet101": RESNET,
    "mobilenet_v2": Entry(("3", "6", "13", "18"), dense_last="17", body="features"),
    "efficientnet_b0": Entry(("2", "3", "5", "8"), dense_last="7", body="features"),
}


class LeNet(nn.Module):
    """LeNet-like digit network: two 5x5 convolutions (layer1), then three 3x3 ones, one per layer.

    Every convolution is followed by max pooling, batch norm (with `batch_norm`) and ReLU. An image
    of 28 px ends at 1x1.
    """

    left_out: tuple[str, ...] = ()

    def __init__(self, batch_norm: bool = True):
        super().__init__()

        def conv(in_channels, out_channels, kernel_size):
            return nn.Sequential(
                nn.Conv2d(
                    in_channels, out_channels, kernel_size, padding="same", bias=not batch_norm
                ),
                nn.MaxPool2d(2, ceil_mode=True),
                nn.BatchNorm2d(out_channels) if batch_norm else nn.Identity(),
                nn.ReLU(inplace=True),
            )

        self.layer1 = nn.Sequential(conv(3, 32, 5), conv(32, 64, 5))
        self.layer2 = conv(64, 128, 3)
        self.layer3 = conv(128, 128, 3)
        self.layer4 = conv(128, 128, 3)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = {}
        for name in LAYERS:
            x = features[name] = self.get_submodule(name)(x)
        return features


@torch.no_grad()
def measure(backbone: nn.Module) -> tuple[dict[str, int], dict[str, int]]:
    """(channels, strides) of each layer, read off a forward of a small zero image in eval mode."""
    was_training = backbone.training
    backbone.eval()
    features = backbone(torch.zeros(1, 3, PROBE, PROBE))
    backbone.train(was_training)
    channels = {name: feature.shape[1] for name, feature in features.items()}
    strides = {name: PROBE // feature.shape[-1] for name, feature in features.items()}
    return channels, strides


def build_backbone(
    name: str, batch_norm: bool = True, dense: bool = False
) -> tuple[nn.Module, dict[str, int]]:
    """A backbone of the table `BACKBONES`, with random weights.

    Args:
        name: its key.
        batch_norm: whether LeNet has batch norm; the other backbones always have it.
        dense: whether it is for segmentation, see `Entry.dense_last`.

    Returns:
        (module, channels by layer name). The module maps images (N, 3, H, W) to a dict of features
        (N, C, H', W'). Its attribute `left_out` has the prefixes of the tensors that only
        torchvision's network has.
    """
    entry = BACKBONES[name]
    if entry is None:
        backbone: nn.Module = LeNet(batch_norm)
    else:
        network = torchvision.models.get_model(name, weights=None)
        body = network if entry.body is None else network.get_submodule(entry.body)
        last = entry.dense_last if dense and entry.dense_last else entry.layers[3]
        ends = (*entry.layers[:3], last)
        backbone = IntermediateLayerGetter(body, dict(zip(ends, LAYERS, strict=True)))
        named = {*dict(body.named_children()), *dict(network.named_children())}
        inside = {*dict(backbone.named_children()), entry.body}
        backbone.left_out = tuple(f"{child}." for child in sorted(named - inside))
    channels, strides = measure(backbone)
    assert tuple(channels) == LAYERS, f"{name}: has the layers {list(channels)}"
    assert tuple(strides.values()) == STRIDES, f"{name}: has the strides {strides}"
    return backbone, channels


def backbone_stages(backbone: nn.Module) -> dict[str, list[nn.Module]]:
    """The backbone's modules by stage: all modules after the stage before, up to its own output."""
    outputs, stages, modules = getattr(backbone, "return_layers", {}), {}, []
    for name, module in backbone.named_children():
        modules.append(module)
        if stage := outputs.get(name, name if name in LAYERS else None):
            stages[stage], modules = modules, []
    return stages


def dilate(backbone: nn.Module, output_stride: int) -> None:
    """Let layer4, and at `output_stride` 8 layer3 too, keep the resolution, by dilation.

    A strided convolution becomes dense and reads the dilated map before it; those behind it are
    dilated once more (Chen et al. 2017, arXiv:1706.05587, section 3.2), as torchvision's
    `replace_stride_with_dilation` does.

    Raises:
        UserError: the backbone has other strided convolutions than a ResNet, such as those of
            ConvNeXt, so that nothing or too much would be dilated.
    """
    stride = dilation = 1
    for module in backbone.modules():
        if isinstance(module, nn.MaxPool2d):
            stride *= module.stride
        if not isinstance(module, nn.Conv2d):
            continue
        kernel, step = module.kernel_size, module.stride
        if kernel[0] != kernel[1] or kernel[0] % 2 == 0 or step not in ((1, 1), (2, 2)):
            raise _cannot_dilate(f"a {kernel[0]}x{kernel[1]} convolution of stride {step[0]}")
        before, strided = dilation, step == (2, 2)
        if strided and kernel == (1, 1):  # a ResNet's shortcut, beside the 3x3 that strides or did
            module.stride = (2, 2) if dilation == 1 else (1, 1)
        elif strided and stride < output_stride:
            stride *= 2
        elif strided:
            dilation *= 2
            module.stride = (1, 1)
        if kernel > (1, 1):
            half = before * (kernel[0] // 2)
            module.dilation = (before, before)
            module.padding = (half, half)
    wanted = tuple(min(stride, output_stride) for stride in STRIDES)
    strides = tuple(measure(backbone)[1].values())
    if strides != wanted:
        raise _cannot_dilate(f"strides {strides} where {wanted} are wanted")


def _cannot_dilate(reason: str) -> UserError:
    return UserError(
        f"model.output_stride: this backbone cannot be dilated (it has {reason}); "
        "choose a ResNet, mobilenet_v2 or efficientnet_b0"
    )
