"""Conditioning of CDAN (Long et al. 2018, arXiv:1705.10667)."""

import math

import torch
from torch import nn


class MultilinearMap(nn.Module):
    """features (N, D), probabilities (N, K) -> their outer product (N, D*K), or a random map of it (eq. 6).

    Beyond `max_features` outputs, Rf f * Rg g / sqrt(random_features) stands in for the product, with fixed
    standard-normal matrices kept as buffers (saved with the run). `out_features` is the width of the result.
    """

    def __init__(self, in_features: int, num_classes: int, max_features: int = 4096, random_features: int = 1024):
        super().__init__()
        self.randomized = in_features * num_classes > max_features
        self.out_features = random_features if self.randomized else in_features * num_classes
        if self.randomized:
            self.register_buffer("random_f", torch.randn(in_features, random_features))
            self.register_buffer("random_g", torch.randn(num_classes, random_features))

    def forward(self, features: torch.Tensor, probabilities: torch.Tensor) -> torch.Tensor:
        if self.randomized:
            return (features @ self.random_f) * (probabilities @ self.random_g) / math.sqrt(self.out_features)
        return torch.einsum("nd,nk->ndk", features, probabilities.to(features.dtype)).flatten(1)


def entropy_weights(logits: torch.Tensor) -> torch.Tensor:
    """1 + exp(-H) with H in nats (eq. 8), scaled to mean 1 over the batch: (N, K) -> (N,), float32, detached.

    Call it once a domain. An empty batch gives an empty result.
    """
    log_p = logits.detach().float().log_softmax(1)
    weights = 1 + torch.exp((log_p.exp() * log_p).sum(1))
    return weights / weights.mean()
