"""The files of a domain and their labels, before any of the files is read."""

from dataclasses import dataclass
from pathlib import Path

import torch

from data.decoded import ImageDecoder, MaskDecoder


@dataclass(frozen=True)
class Listing:
    """What a domain consists of.

    Attributes:
        name: for messages.
        images: the files; or a tensor, uint8 (N, C, H, W), where the images are no files.
        labels: class numbers, int64 (N,); or the masks, files or a tensor, uint8 (N, H, W); or None
            without labels.
        classes: the class names, by number; None without labels.
        skipped: which files of its folder are no images; "" for none.
        decode: reads an image file; None without files.
        decode_mask: reads a mask file; None without such files.
        by_pixel: whether labels are masks, or would be if there were any.
    """

    name: str
    images: list[Path] | torch.Tensor
    labels: torch.Tensor | list[Path] | None
    classes: list[str] | None
    skipped: str = ""
    decode: ImageDecoder | None = None
    decode_mask: MaskDecoder | None = None
    by_pixel: bool = False

    def __len__(self) -> int:
        return len(self.images)

    @property
    def files(self) -> list[Path]:
        """The image files; none for a tensor."""
        return [] if isinstance(self.images, torch.Tensor) else self.images

    @property
    def masks(self) -> torch.Tensor | list[Path] | None:
        """The masks, or None for a set without masks."""
        return self.labels if self.by_pixel else None

    @property
    def class_numbers(self) -> torch.Tensor | None:
        """The class number of each image, or None for a set with masks or without labels."""
        return None if self.by_pixel else self.labels
