"""Images with labels by class name."""

import bisect
import itertools
from dataclasses import dataclass, replace

import torch

from common.runtime import UserError


class Joined:
    """Several `images` or `masks` end to end: `joined[index]`, with images as three channels."""

    def __init__(self, parts: list, lengths: list[int]):
        self.parts, self.starts = parts, [0, *itertools.accumulate(lengths)]
        self.shapes = [s for part, n in zip(parts, lengths, strict=True) for s in _shapes(part, n)]

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        items = []
        for i in index.tolist():
            number = bisect.bisect_right(self.starts, i) - 1
            item = self.parts[number][torch.tensor([i - self.starts[number]])][0]
            items.append(item.expand(3, -1, -1) if item.dim() == 3 else item)
        return torch.stack(items)


def _shapes(images: object, count: int) -> list[tuple[int, ...]]:
    images = images.masks if isinstance(images, Renumbered) else images
    return images.shapes if hasattr(images, "shapes") else [tuple(images.shape[1:])] * count


class Renumbered:
    """`masks[index]` with every class number replaced by `mapping[number]`; `IGNORE_INDEX` stays."""

    def __init__(self, masks: object, mapping: torch.Tensor):
        self.masks, self.table = masks, torch.arange(256, dtype=torch.uint8)
        self.table[: len(mapping)] = mapping.to(torch.uint8)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return self.masks.shapes

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self.table[self.masks[index].long()]


@dataclass(frozen=True)
class ImageSet:
    """Images of one domain and split.

    images: `images[index]` -> uint8 (n, C, H, W), C 1 or 3, for an int64 index (n,); a tensor or a `Decoded`.
    labels: of all `images`, into `classes`: int64 (N,), or masks, `labels[index]` -> uint8 (n, H, W) with 255 ignored;
    None for unlabelled images.
    indices: (N,) int64, the images that belong to the set.
    crop: height and width of training crops of maps, or None for whole images.
    """

    name: str
    images: object
    labels: object | None
    classes: list[str] | None
    indices: torch.Tensor
    crop: tuple[int, int] | None = None

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, positions: torch.Tensor) -> "ImageSet":
        return replace(self, indices=self.indices[positions])

    def unlabelled(self) -> "ImageSet":
        return replace(self, labels=None)

    def relabelled(self, classes: list[str], of: str = "source") -> "ImageSet":
        """The same set with labels into `classes`, those `of` another set, matched by name.

        Raises:
            UserError: the names differ.
        """
        if self.labels is None or self.classes == classes:
            return self
        if set(classes) != set(self.classes):
            extra, lacking = sorted(set(self.classes) - set(classes)), sorted(set(classes) - set(self.classes))
            raise UserError(
                f"{self.name}: its classes differ from the {of}'s: "
                f"only here: {', '.join(extra) or 'none'}; only in the {of}: {', '.join(lacking) or 'none'}"
            )
        mapping = torch.tensor([classes.index(name) for name in self.classes])
        whole = isinstance(self.labels, torch.Tensor) and self.labels.dim() == 1
        return replace(
            self, labels=mapping[self.labels] if whole else Renumbered(self.labels, mapping), classes=classes
        )


def join(sets: list[ImageSet]) -> ImageSet:
    """The labelled sets as one, with classes and crop of the first. Raises `UserError` where classes differ."""
    if len(sets) == 1:
        return sets[0]
    sets = [sets[0], *(images.relabelled(sets[0].classes) for images in sets[1:])]
    lengths = [len(images.images) for images in sets]
    starts = [0, *itertools.accumulate(lengths)]
    labels = [images.labels for images in sets]
    whole = all(isinstance(part, torch.Tensor) and part.dim() == 1 for part in labels)
    return replace(
        sets[0],
        name=" + ".join(images.name for images in sets),
        images=Joined([images.images for images in sets], lengths),
        labels=torch.cat(labels) if whole else Joined(labels, lengths),
        indices=torch.cat([images.indices + start for images, start in zip(sets, starts, strict=False)]),
    )


def image_set(name: str, images, labels, classes: list[str] | None, crop=None) -> ImageSet:
    """An `ImageSet` of all `images`; `labels` a sequence of class numbers, masks, or None."""
    labels = torch.tensor(labels) if isinstance(labels, list) else labels
    return ImageSet(name, images, labels, classes, torch.arange(len(images)), crop and tuple(crop))
