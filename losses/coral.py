"""Correlation alignment (Deep CORAL, Sun and Saenko 2016, arXiv:1607.01719)."""

import torch

from common.metrics import where_float64
from common.ranks import gather


def covariance(x: torch.Tensor) -> torch.Tensor:
    """Sample covariance of rows: (N, D) -> (D, D); 0 for N below 2.

    It is computed in float64, which autocast does not change.
    """
    x = where_float64(x).double()
    centered = x - x.mean(0) if len(x) else x
    return centered.T @ centered / max(len(x) - 1, 1)


def coral_loss(x_s: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius distance between the covariances of the domains, over 4 D^2 (eq. 1).

    Args:
        x_s: (N, D) features of source images.
        x_t: (M, D) features of target images.

    Returns:
        A float32 scalar; 0 if both are the same samples.
    """
    difference = covariance(gather(x_s)) - covariance(gather(x_t))
    return (difference.square().sum() / (4 * x_s.shape[1] ** 2)).float()
