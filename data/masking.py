"""Images of which random blocks are hidden (MIC; Hoyer et al. 2023, arXiv:2212.01322)."""

import torch

from common import ranks


def usual_block(images: torch.Tensor, labels: torch.Tensor) -> int:
    """The side of a block in the paper, px: a quarter of the image's, or for maps a sixteenth.

    Args:
        images: (N, 3, H, W).
        labels: (N,), or maps (N, H, W).
    """
    return max(min(images.shape[2:]) // (4 if labels.dim() == 1 else 16), 1)


def hide_blocks(
    images: torch.Tensor,
    ratio: float,
    block: int,
    color: torch.Tensor,
    generator: torch.Generator,
) -> torch.Tensor:
    """Images whose square blocks are hidden, each with the same probability (equations 4 and 5).

    Args:
        images: uint8 (N, 3, H, W).
        ratio: probability of a block to be hidden; 0 hides nothing, 1 all.
        block: side of a block in px; those at the right and at the bottom may be cut.
        color: of hidden pixels, (3, 1, 1). With the mean that the network subtracts, they are 0
            for the network, up to half a gray level.
        generator: chooses the blocks, for the rows of all processes; it lives on the CPU.
    """
    height, width = images.shape[2:]
    batch = len(images) * ranks.count()
    grid = batch, 1, -(-height // block), -(-width // block)
    hidden = torch.rand(grid, generator=generator)[ranks.rows(batch)] < ratio
    hidden = hidden.to(images.device, non_blocking=True)
    hidden = hidden.repeat_interleave(block, 2).repeat_interleave(block, 3)
    return torch.where(hidden[:, :, :height, :width], color.round().to(torch.uint8), images)
