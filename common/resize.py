"""Bilinear resizing of maps."""

from collections.abc import Sequence

import torch


def _weights(old: int, new: int, device: torch.device) -> torch.Tensor:
    """How much each of `old` positions counts for each of `new` ones: float32 (new, old)."""
    centers = (torch.arange(new, device=device) + 0.5) * (old / new) - 0.5
    distance = centers.clamp(0, old - 1)[:, None] - torch.arange(old, device=device)
    return (1 - distance.abs()).clamp_min(0)


def resize_maps(x: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize maps bilinearly, as `interpolate(x, size, mode="bilinear", align_corners=False)`.

    It is computed by two matrix products, of the columns and of the rows. The gradient of torch's
    own kernel depends on the order of the threads of a GPU; in its deterministic mode torch takes a
    slow path instead.

    Args:
        x: (N, K, H, W); autocast decides the precision, as of any matrix product.
        size: (H', W').

    Returns:
        (N, K, H', W').
    """
    rows, columns = (
        _weights(old, new, x.device).to(x.dtype) for old, new in zip(x.shape[2:], size, strict=True)
    )
    return rows @ (x @ columns.T)
