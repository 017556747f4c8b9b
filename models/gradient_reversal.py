"""Gradient reversal (Ganin et al. 2016, arXiv:1505.07818, section 4.2)."""

import torch


class GradientReversal(torch.autograd.Function):
    """R(x) = x in the forward pass, dR/dx = -coeff * I in the backward pass."""

    @staticmethod
    def forward(ctx, x: torch.Tensor, coeff: float, bound: torch.Tensor | None) -> torch.Tensor:
        ctx.coeff, ctx.bound = coeff, bound
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        coeff = ctx.coeff
        if ctx.bound is not None:
            norm = grad.float().norm().clamp_min(1e-30)
            coeff = (ctx.bound / norm).clamp_max(coeff)
        return -coeff * grad, None, None


def gradient_reversal(
    x: torch.Tensor, coeff: float = 1.0, bound: torch.Tensor | None = None
) -> torch.Tensor:
    """Identity whose gradient with respect to `x` (of any shape) is multiplied by `-coeff`.

    The parameters of the layers that read the result are trained with their full gradient, for any
    `coeff` and `bound`. With a `bound` (), the norm of the reversed gradient is at most that.
    """
    return GradientReversal.apply(x, coeff, bound)
