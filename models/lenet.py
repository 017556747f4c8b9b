"""Networks for digits."""

import torch
from torch import nn

from models.layers import LAYERS, Backbone


class FourLayers(Backbone):
    """A backbone whose modules layer1 to layer4 come one after another."""

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = {}
        for name in LAYERS:
            x = features[name] = self.get_submodule(name)(x)
        if self.pools:
            features["pooled"] = self.pool(features)
        return features

    def stages(self) -> dict[str, list[nn.Module]]:
        return {name: [self.get_submodule(name)] for name in LAYERS}


class LeNet(FourLayers):
    """LeNet-like digit network: two 5x5 convolutions (layer1), then three 3x3 ones, one per layer.

    Every convolution is followed by max pooling, batch norm (with `batch_norm`) and ReLU. An image
    of 28 px ends at 1x1.
    """

    def __init__(self, pools: bool, batch_norm: bool = True):
        super().__init__(pools)

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


class ClassicLeNet(FourLayers):
    """The convolutions of LeNet in ADDA (arXiv:1702.05464) and SHOT (arXiv:2002.08546).

    Two 5x5 convolutions of 20 and 50 channels without padding, with max pooling and ReLU; in
    training half of the 50 channels are dropped, as in SHOT's code. From images of 28 px the 50
    maps of 4x4 are the 800 channels of layer4 and of `pooled`; larger maps are averaged to 4x4.
    Layer3 is layer2.
    """

    def __init__(self, pools: bool):
        super().__init__(pools)
        self.layer1 = nn.Sequential(nn.Conv2d(3, 20, 5), nn.MaxPool2d(2), nn.ReLU(inplace=True))
        self.layer2 = nn.Sequential(
            nn.Conv2d(20, 50, 5), nn.Dropout2d(0.5), nn.MaxPool2d(2), nn.ReLU(inplace=True)
        )
        self.layer3 = nn.Identity()
        self.layer4 = nn.Sequential(
            nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Unflatten(1, (800, 1, 1))
        )
