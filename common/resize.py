"""Bilinear resizing of maps."""

from collections.abc import Iterator, Sequence

import torch


def _weights(old: int, new: int, device: torch.device, corners: bool = False) -> torch.Tensor:
    """How much each of `old` positions counts for each of `new` ones: float32 (new, old)."""
    if corners:
        centers = torch.arange(new, device=device) * ((old - 1) / max(new - 1, 1))
    else:
        centers = (torch.arange(new, device=device) + 0.5) * (old / new) - 0.5
    distance = centers.clamp(0, old - 1)[:, None] - torch.arange(old, device=device)
    return (1 - distance.abs()).clamp_min(0)


def resize_maps(x: torch.Tensor, size: Sequence[int], corners: bool = False) -> torch.Tensor:
    """Resize maps bilinearly, as `interpolate(x, size, mode="bilinear", align_corners=corners)`.

    It is computed by two matrix products, of the columns and of the rows. The gradient of torch's
    own kernel depends on the order of the threads of a GPU; in its deterministic mode torch takes a
    slow path instead.

    Args:
        x: (N, K, H, W); autocast decides the precision, as of any matrix product.
        size: (H', W').
        corners: whether the corner positions of both coincide, and not the edges of the maps.

    Returns:
        (N, K, H', W').
    """
    rows, columns = (
        _weights(old, new, x.device, corners).to(x.dtype)
        for old, new in zip(x.shape[2:], size, strict=True)
    )
    return rows @ (x @ columns.T)


def resized_strips(
    x: torch.Tensor, size: Sequence[int], height: int
) -> Iterator[tuple[slice, torch.Tensor]]:
    """`resize_maps` in strips, which need little memory where the result is large.

    Args:
        x: (N, K, H, W).
        size: (H', W').
        height: rows of a strip.

    Returns:
        An iterator over (rows, (N, K, rows, W')).
    """
    columns = x if x.shape[3] == size[1] else x @ _weights(x.shape[3], size[1], x.device).to(x).T
    weights = _weights(x.shape[2], size[0], x.device).to(x)
    for first in range(0, size[0], height):
        rows = slice(first, min(first + height, size[0]))
        same = x.shape[2] == size[0]
        yield rows, columns[:, :, rows] if same else weights[rows] @ columns
