"""Gradient reversal (Ganin et al. 2016, arXiv:1505.07818, section 4.2)."""

import torch


class GradientReversal(torch.autograd.Function):
    """R(x) = x in the forward pass, dR/dx = -coeff * I in the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, coeff: float) -> torch.Tensor:
        ctx.coeff = coeff
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        return -ctx.coeff * grad, None


def gradient_reversal(x: torch.Tensor, coeff: float = 1.0) -> torch.Tensor:
    """Identity whose gradient with respect to `x` (of any shape) is multiplied by `-coeff`.

    The parameters of the layers that read the result are trained with their full gradient, for any
    `coeff`.
    """
    return GradientReversal.apply(x, coeff)
