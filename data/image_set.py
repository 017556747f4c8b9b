"""Sets of images, with labels whose classes have names."""

import bisect
import itertools
from collections.abc import Collection
from dataclasses import dataclass, replace

import torch

from common.errors import UserError


def one(images: object, i: int) -> torch.Tensor:
    """`images[[i]][0]`, for the `images` or masks of a set; a view where they are in memory."""
    return images.one(i) if hasattr(images, "one") else images[i]


class Joined:
    """The `images` or `labels` of several sets, one after the other: `joined[index]`.

    Images are expanded to three channels.
    """

    def __init__(self, parts: list, lengths: list[int]):
        self.parts = parts
        self.starts = [0, *itertools.accumulate(lengths)]
        self.shapes = [s for part, n in zip(parts, lengths, strict=True) for s in _shapes(part, n)]

    def one(self, i: int) -> torch.Tensor:
        number = bisect.bisect_right(self.starts, i) - 1
        item = one(self.parts[number], i - self.starts[number])
        return item.expand(3, -1, -1) if item.dim() == 3 else item

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        items = [self.one(i) for i in index.tolist()]
        if items[0].dim() == 2:
            return torch.stack(items)
        return torch.stack([item.movedim(0, -1) for item in items]).movedim(-1, 1)


def _shapes(images: object, count: int) -> list[tuple[int, ...]]:
    """The shape of each of `count` images."""
    images = images.masks if isinstance(images, Renumbered) else images
    return images.shapes if hasattr(images, "shapes") else [tuple(images.shape[1:])] * count


class Renumbered:
    """`masks[index]` with `mapping[number]` in place of every class number.

    Numbers beyond the mapping, such as `IGNORE_INDEX`, do not change.
    """

    def __init__(self, masks: object, mapping: torch.Tensor):
        self.masks = masks
        self.table = torch.arange(256, dtype=torch.uint8)
        self.table[: len(mapping)] = mapping.to(torch.uint8)

    @property
    def shapes(self) -> list[tuple[int, ...]]:
        return self.masks.shapes

    def one(self, i: int) -> torch.Tensor:
        return self._renumbered(one(self.masks, i))

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return self._renumbered(self.masks[index])

    def _renumbered(self, masks: torch.Tensor) -> torch.Tensor:
        return self.table.index_select(0, masks.flatten().int()).view(masks.shape)


@dataclass(frozen=True)
class ImageSet:
    """Images of one domain and split.

    Attributes:
        name: for messages.
        images: `images[index]` -> uint8 (n, C, H, W), C 1 or 3, for an int64 index (n,); a tensor
            or a `Decoded`.
        labels: class numbers of all `images`, int64 (M,); or their masks, `labels[index]` -> uint8
            (n, H, W), with `IGNORE_INDEX` ignored; or None for unlabeled images.
        classes: the class names, by number; None without labels.
        indices: (N,) int64, the numbers of the images that belong to the set.
        crop: segmentation: height and width of training crops, or None for entire images.
        skipped: which files of its folder are no images; "" for none.
    """

    name: str
    images: object
    labels: object | None
    classes: list[str] | None
    indices: torch.Tensor
    crop: tuple[int, int] | None = None
    skipped: str = ""

    def __len__(self) -> int:
        return len(self.indices)

    def label_shares(self, limit: int) -> list[float] | None:
        """The share of each class in the labels, or None without any.

        Of masks, at most about `limit` are read, evenly spread over the set.
        """
        if are_class_numbers(self.labels):
            parts = [self.labels[self.indices]]
        else:
            chosen = self.indices[:: max(len(self) // limit, 1)]
            parts = (self.labels[index[None]].long().flatten() for index in chosen)
        counts = sum(torch.bincount(part, minlength=256) for part in parts)[: len(self.classes)]
        return (counts / counts.sum()).tolist() if counts.sum() > 0 else None

    def subset(self, positions: torch.Tensor) -> "ImageSet":
        """The images at these positions of `indices`, as int64 numbers or a bool mask."""
        return replace(self, indices=self.indices[positions])

    def unlabeled(self) -> "ImageSet":
        """The same images without labels."""
        return replace(self, labels=None)

    def relabeled(
        self,
        classes: list[str],
        of: str = "source",
        absent: Collection[str] = (),
        remedy: str = "",
    ) -> "ImageSet":
        """The same set with the class numbers of another set; the classes are matched by name.

        Args:
            classes: the class names of the other set, by number.
            of: the role of the other set, for messages.
            absent: classes of the other set that this one lacks.
            remedy: what to do if the names differ, for messages.

        Raises:
            UserError: the names differ, or an absent class is among them.
        """
        if self.labels is None or (self.classes == classes and not absent):
            return self
        if present := sorted(set(self.classes) & set(absent)):
            raise UserError(
                f"data.absent_classes: {self.name} has the class {present[0]}; "
                "take it out of the list"
            )
        if set(classes) != set(self.classes) | set(absent):
            extra = ", ".join(sorted(set(self.classes) - set(classes))) or "none"
            missing = ", ".join(sorted(set(classes) - set(self.classes) - set(absent))) or "none"
            raise UserError(
                f"{self.name}: its classes differ from the {of}'s: "
                f"only here: {extra}; only in the {of}: {missing}" + remedy
            )
        mapping = torch.tensor([classes.index(name) for name in self.classes])
        if are_class_numbers(self.labels):
            labels = mapping[self.labels]
        else:
            labels = Renumbered(self.labels, mapping)
        return replace(self, labels=labels, classes=classes)


def are_class_numbers(labels: object) -> bool:
    """Whether labels are one number per image, and not masks."""
    return isinstance(labels, torch.Tensor) and labels.dim() == 1


def join(sets: list[ImageSet]) -> ImageSet:
    """Several labeled sets as one, with the classes and the crop of the first.

    Raises:
        UserError: the class names differ.
    """
    if len(sets) == 1:
        return sets[0]
    sets = [sets[0], *(images.relabeled(sets[0].classes) for images in sets[1:])]
    lengths = [len(images.images) for images in sets]
    starts = [0, *itertools.accumulate(lengths)]
    labels = [images.labels for images in sets]
    class_numbers = all(are_class_numbers(part) for part in labels)
    indices = [images.indices + start for images, start in zip(sets, starts, strict=False)]
    return replace(
        sets[0],
        name=" + ".join(images.name for images in sets),
        skipped="; ".join(images.skipped for images in sets if images.skipped),
        images=Joined([images.images for images in sets], lengths),
        labels=torch.cat(labels) if class_numbers else Joined(labels, lengths),
        indices=torch.cat(indices),
    )


def image_set(
    name: str, images, labels, classes: list[str] | None, crop=None, skipped: str = ""
) -> ImageSet:
    """An `ImageSet` of all `images`.

    Args:
        name, images, classes, crop, skipped: see `ImageSet`.
        labels: as in `ImageSet`, or a list of class numbers.
    """
    labels = torch.tensor(labels) if isinstance(labels, list) else labels
    indices = torch.arange(len(images))
    return ImageSet(name, images, labels, classes, indices, crop and tuple(crop), skipped)
