"""LeNet-like network for digits."""

import torch
from torch import nn

from models.layers import LAYERS, Backbone


class LeNet(Backbone):
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

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        features = {}
        for name in LAYERS:
            x = features[name] = self.get_submodule(name)(x)
        if self.pools:
            features["pooled"] = self.pool(features)
        return features

    def stages(self) -> dict[str, list[nn.Module]]:
        return {name: [self.get_submodule(name)] for name in LAYERS}
