"""Images with labels by class name."""

from dataclasses import dataclass, replace

import torch

from common.runtime import UserError


@dataclass(frozen=True)
class ImageSet:
    """Images of one domain and split.

    images: `images[index]` -> uint8 (n, C, S, S), C 1 or 3, for an int64 index (n,); a tensor or a `DecodedImages`.
    labels: (N,) int64 into `classes`, or None for unlabelled images.
    indices: (N,) int64, the images that belong to the set.
    """

    name: str
    images: object
    labels: torch.Tensor | None
    classes: list[str] | None
    indices: torch.Tensor

    def __len__(self) -> int:
        return len(self.indices)

    def subset(self, positions: torch.Tensor) -> "ImageSet":
        return replace(
            self, indices=self.indices[positions], labels=None if self.labels is None else self.labels[positions]
        )

    def unlabelled(self) -> "ImageSet":
        return replace(self, labels=None)

    def relabelled(self, classes: list[str]) -> "ImageSet":
        """The same set with labels into `classes`, matched by name. Raises `UserError` where the names differ."""
        if self.labels is None:
            return self
        if set(classes) != set(self.classes):
            extra, lacking = sorted(set(self.classes) - set(classes)), sorted(set(classes) - set(self.classes))
            raise UserError(
                f"{self.name}: its classes differ from the source's: "
                f"only here: {', '.join(extra) or 'none'}; only in the source: {', '.join(lacking) or 'none'}"
            )
        mapping = torch.tensor([classes.index(name) for name in self.classes])
        return replace(self, labels=mapping[self.labels], classes=classes)


def image_set(name: str, images, labels, classes: list[str] | None) -> ImageSet:
    """An `ImageSet` of all `images`."""
    labels = None if labels is None else torch.as_tensor(labels, dtype=torch.int64)
    return ImageSet(name, images, labels, classes, torch.arange(len(images)))
