"""Domain discriminators. They return logits: positive means source."""

from typing import Literal

import torch
from torch import nn


class DomainDiscriminator(nn.Module):
    """Multilayer perceptron hidden-hidden-1 (Ganin et al. 2016, section 5.2; 1024 for ResNet-50).

    Args:
        in_features: channels C of the features.
        hidden: width of both hidden layers.
        norm: batch normalisation, dropout of one half, or nothing after each hidden layer.

    Shapes: features (N, C) or (N, C, ...), whose axes after the class axis are averaged -> logits (N,).
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
        if features.dim() > 2:
            features = features.flatten(2).mean(2)
        return self.layers(features).squeeze(1)
