"""Conditioning of the domain discriminator in CDAN (Long et al. 2018, arXiv:1705.10667)."""

import math
from typing import Literal

import torch
from torch import nn

from common.ranks import mean_over_ranks


class MultilinearMap(nn.Module):
    """Outer product of features and probabilities, or a random projection of it (eq. 6).

    The projection is Rf f * Rg g / sqrt(width), elementwise. Rf and Rg are fixed matrices of
    standard-normal values; they are buffers, and so are saved with the run.

    Args:
        in_features: width D of the features.
        num_classes: K.
        width: "full" for the outer product, or the width of the projection.

    Shapes: features (N, D) and probabilities (N, K) -> (N, D * K), or (N, width).

    Attributes:
        out_features: the width of the result.
    """

    def __init__(self, in_features: int, num_classes: int, width: int | Literal["full"] = "full"):
        super().__init__()
        self.randomized = width != "full"
        self.out_features = width if self.randomized else in_features * num_classes
        if self.randomized:
            self.register_buffer("random_f", torch.randn(in_features, width))
            self.register_buffer("random_g", torch.randn(num_classes, width))

    def forward(self, features: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        if self.randomized:
            product = (features @ self.random_f) * (probabilities @ self.random_g)
            return product / math.sqrt(self.out_features)
        return torch.einsum("nd,nk->ndk", features, probabilities.to(features.dtype)).flatten(1)


def entropy_weights(logits: torch.Tensor) -> torch.Tensor:
    """Weight 1 + exp(-H) of each sample, with the entropy H in nats (eq. 8), scaled to mean 1.

    The mean is taken over the batch; call the function once per domain. An empty batch gives an
    empty result.

    Shapes: logits (N, K) -> (N,), float32, detached from the graph.
    """
    log_p = logits.detach().float().log_softmax(1)
    weights = 1 + torch.exp((log_p.exp() * log_p).sum(1))
    return weights / mean_over_ranks(weights.mean())
