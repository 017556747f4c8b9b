"""Dilation: the last stages of a network keep the resolution of those before."""

from torch import nn

from common.errors import UserError
from models.backbones import STRIDES, measure
from models.caffe import CaffeResNet
from models.layers import Backbone


def dilate(backbone: Backbone, output_stride: int) -> None:
    """Let layer4, and at `output_stride` 8 layer3 too, keep the resolution, by dilation.

    A strided convolution becomes dense and reads the dilated map before it; those behind it are
    dilated once more (Chen et al. 2017, arXiv:1706.05587, section 3.2), as torchvision's
    `replace_stride_with_dilation` does.

    Raises:
        UserError: the backbone has other strided convolutions than a ResNet, such as those of
            ConvNeXt, so that nothing or too much would be dilated.
    """
    if isinstance(backbone, CaffeResNet):
        backbone.dilate(output_stride)
        return
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
        "choose another head or backbone (docs/backbones.md)"
    )
