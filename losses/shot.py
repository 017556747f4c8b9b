"""Centroid pseudo-labels of SHOT (Liang et al. 2020, arXiv:2002.08546, equations 4 to 6).

Features (N, D, ...) come from `unit_features` and have length 1 along axis 1. Centroids (K, D) have
length 1 too, or are 0 for a class without samples. The nearest centroid has the largest cosine.
"""

import torch
import torch.nn.functional as F
from torch import nn

from common.resize import resize_maps


def unit_features(features: torch.Tensor) -> torch.Tensor:
    """Append a 1 to each feature, as in the authors' code, and scale it to length 1.

    Shapes: (N, D, ...) -> (N, D + 1, ...), float32.
    """
    features = features.float()
    return F.normalize(torch.cat([features, torch.ones_like(features[:, :1])], 1), dim=1)


def at_features(p: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Resize probabilities bilinearly to the resolution of the features.

    Shapes: p (N, K, H, W), features (N, D, H', W') -> (N, K, H', W'). p (N, K) is not changed.
    """
    if p.dim() == 2:
        return p
    return resize_maps(p, features.shape[2:])


def at_images(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Enlarge labels to the resolution of the logits, by nearest neighbor.

    Shapes: labels (N, H', W'), logits (N, K, H, W) -> (N, H, W). Labels (N,) are not changed.
    """
    if logits.dim() == 2:
        return labels
    size = logits.shape[2:]
    enlarged = F.interpolate(labels[:, None].float(), size=size, mode="nearest-exact")
    return enlarged[:, 0].long()


def centroid_sums(features: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Sum of p_k * feature over samples and positions: (N, D, ...) and (N, K, ...) -> (K, D)."""
    return p.transpose(0, 1).flatten(1) @ features.transpose(0, 1).flatten(1).T


def nearest_centroid(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Class of the centroid nearest to each feature: (N, D, ...) and (K, D) -> int64 (N, ...)."""
    cosine = torch.einsum("nd...,kd->nk...", features, centroids)
    absent = (centroids == 0).all(1).view(-1, *[1] * (features.dim() - 2))
    return cosine.masked_fill(absent, -2.0).argmax(1)


class CentroidMemory(nn.Module):
    """The centroids of a run, saved with it: the buffer `centroids` (K, width + 1)."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(num_classes, width + 1))
