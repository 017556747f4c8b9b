"""Gradient reversal (Ganin et al. 2016, arXiv:1505.07818, section 4.2)."""

import torch


class GradientReversal(torch.autograd.Function):
    """R(x) = x forward, dR/dx = -coeff * I backward."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, coeff: float) -> torch.Tensor:
        ctx.coeff = coeff
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return -ctx.coeff * grad, None


def gradient_reversal(x: torch.Tensor, coeff: float = 1.0) -> torch.Tensor:
    """Identity whose gradient with respect to `x` (any shape) is multiplied by `-coeff`.

    Parameters of whatever follows train at full strength, whatever `coeff` is.
    """
    return GradientReversal.apply(x, coeff)
