"""Correlation alignment (Deep CORAL, Sun and Saenko 2016, arXiv:1607.01719)."""

import torch


def covariance(x: torch.Tensor) -> torch.Tensor:
    """Sample covariance (D, D) of rows (N, D), in float64, which autocast leaves alone; 0 for N below 2."""
    centred = x.double() - x.double().mean(0) if len(x) else x.double()
    return centred.T @ centred / max(len(x) - 1, 1)


def coral_loss(x_s: torch.Tensor, x_t: torch.Tensor) -> torch.Tensor:
    """Squared Frobenius distance of the domains' covariances over 4 D^2 (eq. 1).

    x_s: (N, D), x_t: (M, D). Returns a float32 scalar, 0 for equal samples.
    """
    return ((covariance(x_s) - covariance(x_t)).square().sum() / (4 * x_s.shape[1] ** 2)).float()
