"""ClassMix: classes of a source image pasted onto a target image.

Olsson et al. 2021, arXiv:2007.07936.
"""

import torch

from common import ranks
from common.counts import occurrences
from common.errors import UserError
from common.metrics import IGNORE_INDEX


def class_mask(labels: torch.Tensor, num_classes: int, generator: torch.Generator) -> torch.Tensor:
    """The pixels of a random half, rounded up, of the classes present in each image.

    Args:
        labels: (N, H, W) int64; `IGNORE_INDEX` is never chosen.
        num_classes: K.
        generator: chooses the classes, for the rows of all processes; it lives on the CPU.

    Returns:
        (N, H, W), True on the pixels of the chosen classes.
    """
    device = labels.device
    batch = len(labels) * ranks.count()
    rank = torch.rand(batch, num_classes, generator=generator)[ranks.rows(batch)]
    rank = rank.to(device, non_blocking=True)
    # Ignored pixels have the number after the last class.
    index = torch.where(labels != IGNORE_INDEX, labels, num_classes).flatten(1)
    places = (num_classes + 1) * torch.arange(len(labels), device=device)
    counts = occurrences(index + places[:, None], len(labels) * (num_classes + 1))
    present = counts.view(len(labels), -1)[:, :-1] > 0
    # The n classes that are present have the places 0 .. n - 1 of a random order.
    order = torch.where(present, rank, 2.0).argsort(1).argsort(1)
    chosen = order < (present.sum(1, keepdim=True) + 1) // 2
    chosen = torch.cat([chosen & present, torch.zeros_like(chosen[:, :1])], 1)
    return chosen.gather(1, index).view_as(labels)


def classmix(
    source: tuple[torch.Tensor, torch.Tensor],
    target: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    num_classes: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Paste half of the classes of each source image onto a target image.

    DACS (Tranheden et al. 2020, arXiv:2007.08702, section 3.1).

    Args:
        source: images (N, 3, H, W) and labels (N, H, W); `IGNORE_INDEX` is never pasted.
        target: images (N, 3, H, W), pseudo-labels (N, H, W) and their weights (N, H, W).
        num_classes: K.
        generator: chooses the classes; it lives on the CPU.

    Returns:
        (images, labels, weights) of the target with the pasted pixels, whose weight is 1.

    Raises:
        UserError: source and target images differ in size.
    """
    (x_s, y_s), (x_t, y_t, weights) = source, target
    if x_s.shape != x_t.shape:
        raise UserError(
            "mix: classmix pastes source onto target images, but these are {}x{} and {}x{} px; "
            "give data.source and data.target the same crop".format(*x_s.shape[2:], *x_t.shape[2:])
        )
    pasted = class_mask(y_s, num_classes, generator)
    return (
        torch.where(pasted[:, None], x_s, x_t),
        torch.where(pasted, y_s, y_t),
        weights.masked_fill(pasted, 1.0),
    )
