"""Centroid pseudo-labels of SHOT (Liang et al. 2020, arXiv:2002.08546, equations 4 to 6).

Features (N, D, ...) have unit length along axis 1, from `unit_features`; centroids are (K, D), of unit length too, or 0
for a class without any. The nearest centroid is that of the largest cosine.
"""

import torch
import torch.nn.functional as F
from torch import nn


def unit_features(features: torch.Tensor) -> torch.Tensor:
    """(N, D, ...) -> (N, D + 1, ...), float32: a 1 appended, as in the authors' code, then scaled to length 1."""
    features = features.float()
    return F.normalize(torch.cat([features, torch.ones_like(features[:, :1])], 1), dim=1)


def at_features(p: torch.Tensor, features: torch.Tensor) -> torch.Tensor:
    """Probabilities (N, K, H, W) resized bilinearly to where features (N, D, H', W') lie; (N, K) as they are."""
    return p if p.dim() == 2 else F.interpolate(p, size=features.shape[2:], mode="bilinear", align_corners=False)


def at_images(labels: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
    """Labels (N, H', W') enlarged to the resolution of logits (N, K, H, W) by the nearest; (N,) as they are."""
    if logits.dim() == 2:
        return labels
    return F.interpolate(labels[:, None].float(), size=logits.shape[2:], mode="nearest-exact")[:, 0].long()


def centroid_sums(features: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """Sum over samples and positions of p_k * feature: (N, D, ...) and (N, K, ...) -> (K, D)."""
    return p.transpose(0, 1).flatten(1) @ features.transpose(0, 1).flatten(1).T


def nearest_centroid(features: torch.Tensor, centroids: torch.Tensor) -> torch.Tensor:
    """Class of the centroid nearest to each feature: (N, D, ...) and (K, D) -> int64 (N, ...)."""
    cosine = torch.einsum("nd...,kd->nk...", features, centroids)
    absent = (centroids == 0).all(1).view(-1, *[1] * (features.dim() - 2))
    return cosine.masked_fill(absent, -2.0).argmax(1)


class CentroidMemory(nn.Module):
    """The centroids of a run, `centroids` (K, width + 1), saved with it."""

    def __init__(self, num_classes: int, width: int):
        super().__init__()
        self.register_buffer("centroids", torch.zeros(num_classes, width + 1))
