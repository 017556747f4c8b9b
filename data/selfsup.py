"""Self-supervised problems: images are transformed, and the network must tell how.

Sun et al. 2019, arXiv:1909.11825, section 3.2; the numbers of the classes are those of the authors'
code.
"""

from collections.abc import Callable

import torch

from common import ranks


def rotations(images: torch.Tensor) -> list[torch.Tensor]:
    """Squares (N, C, S, S) turned by 0, 90, 180 and 270 degrees, counterclockwise."""
    return [images.rot90(turns, (2, 3)) for turns in range(4)]


def digit_rotations(images: torch.Tensor) -> list[torch.Tensor]:
    """Squares (N, C, S, S) as they are, transposed, mirrored, and turned by 90 degrees, clockwise.

    A 6 turned by 180 degrees is a 9, which is why the authors' code has these for digits.
    """
    return [images, images.mT, images.flip(3), images.mT.flip(3)]


def flips(images: torch.Tensor) -> list[torch.Tensor]:
    """Images (N, C, H, W) as they are, and upside down."""
    return [images, images.flip(2)]


def quadrants(images: torch.Tensor) -> list[torch.Tensor]:
    """The quarters (N, C, H // 2, W // 2): top left, top right, bottom left, bottom right."""
    height, width = (side // 2 for side in images.shape[2:])
    halves = images[:, :, :height], images[:, :, height : 2 * height]
    return [half[..., start : start + width] for half in halves for start in (0, width)]


def square_crops(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """A square of each image, as large as possible, at a random place: (N, C, H, W), any dtype.

    Args:
        images: those of this process; squares are returned as they are.
        generator: chooses the places, for the rows of all processes; it lives on the CPU.
    """
    height, width = images.shape[2:]
    if height == width:
        return images
    side, axis = min(height, width), 1 if height > width else 2
    batch = len(images) * ranks.count()
    starts = torch.randint(abs(height - width) + 1, (batch,), generator=generator)
    starts = starts[ranks.rows(batch)].tolist()
    pairs = zip(images, starts, strict=True)
    return torch.stack([image.narrow(axis, start, side) for image, start in pairs])


def make_problem(
    images: torch.Tensor,
    transform: Callable[[torch.Tensor], list[torch.Tensor]],
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Transform each image in one of K ways at random, and say in which.

    Args:
        images: (N, C, H, W), those of this process; those that are not square are cropped.
        transform: gives the K results for each of the squares, of one size; one of the above.
        generator: chooses, for the rows of all processes; it lives on the CPU.

    Returns:
        (images, labels): the transformed squares, and int64 (N,) from 0 to K - 1.
    """
    results = torch.stack(transform(square_crops(images, generator)))
    batch = len(images) * ranks.count()
    labels = torch.randint(len(results), (batch,), generator=generator)[ranks.rows(batch)]
    labels = labels.to(images.device, non_blocking=True)
    return results[labels, torch.arange(len(images), device=images.device)], labels
