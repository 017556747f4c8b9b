"""Domain discriminators. They return logits: positive means source."""

from typing import Literal

import torch
from torch import nn

from common.runtime import UserError


class DomainDiscriminator(nn.Module):
    """Multilayer perceptron hidden-hidden-1 (Ganin et al. 2016, section 5.2; 1024 for ResNet-50).

    Args:
        in_features: channels C of the features.
        hidden: width of both hidden layers.
        norm: batch normalisation, dropout of one half, or nothing after each hidden layer.

    Shapes: features (N, C) -> logits (N,). `feature_vectors` makes rows of a feature map.
    """

    def __init__(self, in_features: int, hidden: int = 1024, norm: Literal["batch", "dropout", "none"] = "batch"):
        super().__init__()
        layers, width = [], in_features
        for _ in range(2):
            layers += [nn.Linear(width, hidden)]
            layers += [nn.BatchNorm1d(hidden)] if norm == "batch" else []
            layers += [nn.ReLU(inplace=True)]
            layers += [nn.Dropout(0.5)] if norm == "dropout" else []
            width = hidden
        self.layers = nn.Sequential(*layers, nn.Linear(width, 1))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        return self.layers(features).squeeze(1)


def feature_vectors(features: torch.Tensor, locations: bool) -> torch.Tensor:
    """Features (N, C, ...) as the rows (M, C) a discriminator judges: their mean over positions, or each location."""
    if features.dim() == 2:
        return features
    return features.movedim(1, -1).flatten(0, -2) if locations else features.flatten(2).mean(2)


class FCDiscriminator(nn.Module):
    """Five convolutions, k4 s2 p1, of width hidden * (1, 2, 4, 8) and 1, LeakyReLU 0.2 between (ADVENT, section 4.2).

    Shapes: maps (N, C, H, W) of at least 32x32 -> logits (N, 1, H // 32, W // 32).

    Raises:
        UserError: a map too small for five halvings.
    """

    def __init__(self, in_channels: int, hidden: int = 64):
        super().__init__()
        layers, width = [], in_channels
        for out in (hidden, 2 * hidden, 4 * hidden, 8 * hidden):
            layers += [nn.Conv2d(width, out, 4, stride=2, padding=1), nn.LeakyReLU(0.2, inplace=True)]
            width = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, stride=2, padding=1))

    def forward(self, maps: torch.Tensor) -> torch.Tensor:
        height, width = maps.shape[2:]
        if min(height, width) < 32:
            raise UserError(
                f"the discriminator halves its map five times and needs 32x32 px, not {height}x{width}; "
                "use larger crops (data.source.crop, data.target.crop)"
            )
        return self.layers(maps)
