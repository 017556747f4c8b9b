"""ClassMix: classes of a source image pasted onto a target image (Olsson et al. 2021, arXiv:2007.07936)."""

import torch

from common.evaluation import IGNORE_INDEX
from common.runtime import UserError


def class_mask(labels: torch.Tensor, num_classes: int, generator: torch.Generator) -> torch.Tensor:
    """True (N, H, W) on the pixels of a random half, rounded up, of the classes present in each label map.

    labels: int64 (N, H, W); `IGNORE_INDEX` is never chosen. The generator lives on the CPU.
    """
    rank = torch.rand(len(labels), num_classes, generator=generator).to(labels.device, non_blocking=True)
    index = torch.where(labels != IGNORE_INDEX, labels, num_classes).flatten(1)
    present = torch.zeros(len(labels), num_classes + 1, device=labels.device).scatter_(1, index, 1.0)[:, :-1] > 0
    order = torch.where(present, rank, 2.0).argsort(1).argsort(1)  # 0 .. n - 1 for the n classes present
    chosen = order < (present.sum(1, keepdim=True) + 1) // 2
    chosen = torch.cat([chosen & present, torch.zeros_like(chosen[:, :1])], 1)  # and what is ignored, last
    return chosen.gather(1, index).view_as(labels)


def classmix(
    source: tuple[torch.Tensor, torch.Tensor],
    target: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    num_classes: int,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Paste half of each source image's classes onto a target image (DACS, arXiv:2007.08702, section 3.1).

    Args:
        source: images (N, 3, H, W) and labels (N, H, W), of which `IGNORE_INDEX` is never pasted.
        target: images, pseudo-labels and the weights of these, of the same sizes.
        generator: of the choice of classes.

    Returns images, labels and weights of the target with what is pasted, whose weight is 1.

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
    return torch.where(pasted[:, None], x_s, x_t), torch.where(pasted, y_s, y_t), weights.masked_fill(pasted, 1.0)
