"""Gradient reversal (Ganin et al. 2016, arXiv:1505.07818, section 4.2)."""

import torch

from common.ranks import norm_over_ranks


class GradientReversal(torch.autograd.Function):
    """R(x) = x in the forward pass, dR/dx = -coeff * I in the backward pass."""

    @staticmethod
    def forward(
        ctx,
        x: torch.Tensor,
        coeff: float,
        bound: torch.Tensor | None,
        applied: torch.Tensor | None,
    ) -> torch.Tensor:
        ctx.coeff, ctx.bound, ctx.applied = coeff, bound, applied
        return x.view_as(x)

    @staticmethod
    def backward(ctx, grad: torch.Tensor):
        coeff = ctx.coeff
        if ctx.bound is not None:
            norm = norm_over_ranks(grad).clamp_min(1e-30)
            # Not a number where float16 overflows; the scaler then skips the step.
            coeff = (ctx.bound / norm).clamp_max(coeff)
        if ctx.applied is not None:
            ctx.applied.add_(torch.as_tensor(coeff).nan_to_num(0.0))
        return -coeff * grad, None, None, None


def gradient_reversal(
    x: torch.Tensor,
    coeff: float = 1.0,
    bound: torch.Tensor | None = None,
    applied: torch.Tensor | None = None,
) -> torch.Tensor:
    """Identity whose gradient with respect to `x` (of any shape) is multiplied by `-coeff`.

    The parameters of the layers that read the result are trained with their full gradient, for any
    `coeff` and `bound`.

    Args:
        x: what is returned.
        coeff: the paper's lambda.
        bound: () the largest norm of the reversed gradient, over the rows of all processes; a
            longer one is scaled down to it.
        applied: () in the backward pass the coefficient is added to it that was applied: `coeff`,
            or less because of `bound`.
    """
    return GradientReversal.apply(x, coeff, bound, applied)
