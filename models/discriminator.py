"""Domain discriminators. They return logits; a positive logit means source."""

from typing import Literal

import torch
from torch import nn

from common.errors import UserError


class DomainDiscriminator(nn.Module):
    """Multilayer perceptron with two hidden layers and one output (Ganin et al. 2016, section 5.2).

    Args:
        in_features: channels C of the features.
        hidden: width of both hidden layers; 1024 for ResNet-50 in the paper.
        norm: batch normalization, dropout of one half, or nothing in each hidden layer.

    Shapes: features (N, C) -> logits (N,). `feature_vectors` turns a feature map into rows.
    """

    def __init__(
        self,
        in_features: int,
        hidden: int = 1024,
        norm: Literal["batch", "dropout", "none"] = "batch",
    ):
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
    """Features (N, C, ...) as rows (M, C), the input of a `DomainDiscriminator`.

    With `locations` every location is a row, else the mean over the locations of an image. Features
    (N, C) are not changed.
    """
    if features.dim() == 2:
        return features
    if locations:
        return features.movedim(1, -1).flatten(0, -2)
    return features.flatten(2).mean(2)


class FCDiscriminator(nn.Module):
    """Fully convolutional discriminator of predictions (ADVENT, Vu et al. 2019, section 4.2).

    Five 4x4 convolutions of stride 2 and padding 1, with LeakyReLU of slope 0.2 between them.

    Args:
        in_channels: channels C of the predictions.
        hidden: width of the first convolution; the next have 2, 4 and 8 times the width, the last
            has one channel.

    Shapes: predictions (N, C, H, W) of at least 32x32 px -> logits (N, 1, H // 32, W // 32).

    Raises:
        UserError: the predictions are smaller than 32x32 px.
    """

    def __init__(self, in_channels: int, hidden: int = 64):
        super().__init__()
        layers, width = [], in_channels
        for out in (hidden, 2 * hidden, 4 * hidden, 8 * hidden):
            layers += [
                nn.Conv2d(width, out, 4, stride=2, padding=1),
                nn.LeakyReLU(0.2, inplace=True),
            ]
            width = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(width, 1, 4, stride=2, padding=1))

    def forward(self, predictions: torch.Tensor) -> torch.Tensor:
        height, width = predictions.shape[2:]
        if min(height, width) < 32:
            raise UserError(
                "the discriminator halves its input five times and needs 32x32 px, "
                f"not {height}x{width}; use larger crops (data.source.crop, data.target.crop)"
            )
        return self.layers(predictions)
