"""The ResNets of Caffe, on which ADVENT, AdaptSegNet and others train DeepLab-v2."""

import torch
import torchvision

from common.errors import UserError
from models.layers import LAYERS, Layers

# Of the channels red, green and blue, from 0 to 1; the values of Caffe are of blue, green and red.
CAFFE_MEAN = (122.67891434 / 255, 116.66876762 / 255, 104.00698793 / 255)
CAFFE_STD = (1 / 255, 1 / 255, 1 / 255)
STEM = ("conv1", "bn1", "relu", "maxpool")


class CaffeResNet(Layers):
    """A bottleneck ResNet as the models of He et al. 2015 that Caffe had.

    It differs from torchvision's in that the stride of a stage is that of its first 1x1
    convolution, that pooling rounds sizes up, and that channels come in the order blue, green, red,
    in 0..255 minus a mean (`CAFFE_MEAN`, `CAFFE_STD`).

    Args:
        name: torchvision's ResNet.
        pools: see `Backbone`.
    """

    left_out = ("fc.",)
    border = 1

    def __init__(self, name: str, pools: bool):
        network = torchvision.models.get_model(name, weights=None)
        children = {child: network.get_submodule(child) for child in (*STEM, *LAYERS)}
        super().__init__(children, LAYERS, pools)
        self.maxpool.ceil_mode = True
        for stage in (self.layer2, self.layer3, self.layer4):
            stage[0].conv1.stride = (2, 2)
            stage[0].conv2.stride = (1, 1)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return super().forward(x.flip(1))

    def dilate(self, output_stride: int) -> None:
        """Let layer4, and at `output_stride` 8 layer3 too, keep the resolution, by dilation.

        As in the code of the methods above, all 3x3 convolutions of a stage are dilated alike.
        """
        stages = {8: (self.layer3, self.layer4), 16: (self.layer4,)}[output_stride]
        for dilation, stage in zip((2, 4), stages, strict=False):
            stage[0].conv1.stride = stage[0].downsample[0].stride = (1, 1)
            for block in stage:
                block.conv2.dilation = block.conv2.padding = (dilation, dilation)


def caffe_names(backbone: str, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a file for Caffe's ResNet, by torchvision's names.

    Such a file has the prefix `Scale.`, and a head for other classes (`layer5.`), which is left
    out.

    Raises:
        UserError: another file. Torchvision's has all tensors, but learned them in another network.
    """
    if not all(name.startswith("Scale.") for name in state):
        raise UserError(
            f"model.weights: {backbone} takes a file of Caffe's ResNet, whose names begin with "
            "Scale.; for torchvision's weights choose the backbone without _caffe"
        )
    named = {name.removeprefix("Scale."): value for name, value in state.items()}
    return {name: value for name, value in named.items() if not name.startswith("layer5.")}
