"""Labeled target images: those of `data.target_labeled`, and a validation set of them."""

import os
from collections.abc import Collection
from pathlib import Path

import torch

from common.errors import UserError
from data.decoded import Decoded
from data.image_set import ImageSet
from data.order import generator


def file_of(images: ImageSet, index: int) -> str | None:
    """The real path of an image; None if the images of the set are not files."""
    if not isinstance(images.images, Decoded):
        return None
    return os.path.realpath(images.images.paths[index])


def without(images: ImageSet | None, labeled: ImageSet) -> ImageSet | None:
    """The set without the images of `labeled`.

    Files are compared by path, images of the same tensor by number. Images of two tensors differ.
    """
    if images is None:
        return None
    labeled_keys = {file_of(labeled, i) or i for i in labeled.indices.tolist()}
    comparable = images.images is labeled.images or isinstance(images.images, Decoded)
    remaining = [
        not comparable or (file_of(images, i) or i) not in labeled_keys
        for i in images.indices.tolist()
    ]
    return images if all(remaining) else images.subset(torch.tensor(remaining))


def hold_out_of_each(
    images: ImageSet, share: float, seed: int, key: str = "data.val_share"
) -> tuple[ImageSet, ImageSet]:
    """Draw a share of the images of each class.

    Args:
        images: the set, with one class per image.
        share: of the images of each class, rounded to the nearest number of images.
        seed: of the draw; both keys draw the same images.
        key: of the share, for messages.

    Returns:
        (the drawn images, the other images).

    Raises:
        UserError: one of the two would have no image of a class that the set has.
    """
    labels = images.labels[images.indices]
    random = generator(seed, "val")
    drawn = torch.zeros(len(images), dtype=bool)
    for k, name in enumerate(images.classes):
        group = (labels == k).nonzero()[:, 0]
        count = round(share * len(group))
        if len(group) > 0 and not 0 < count < len(group):
            purpose = "measure" if count == 0 else "train"
            raise UserError(
                f"{key}: {share} of the {len(group)} images of class {name} "
                f"leaves none to {purpose} on"
            )
        drawn[group[torch.randperm(len(group), generator=random)[:count]]] = True
    return images.subset(drawn), images.subset(~drawn)


def draw_labeled(target: ImageSet, count: int, seed: int, absent: Collection[str] = ()) -> ImageSet:
    """Draw the labeled images of a target.

    Args:
        target: the labeled set.
        count: images per class; of a set with masks, images.
        seed: of the draw.
        absent: classes of which nothing is drawn.

    Raises:
        UserError: the target has no labels, or a class has too few images.
    """
    where = f"data.target_labeled: {count}"
    if target.labels is None:
        raise UserError(
            f"{where} images cannot be drawn: {target.name} has no labels; name a list file instead"
        )
    labels = target.labels[target.indices] if isinstance(target.labels, torch.Tensor) else None
    if labels is None or labels.dim() > 1:
        groups = {"images": torch.arange(len(target))}
    else:
        groups = {
            f"of class {name}": (labels == k).nonzero()[:, 0]
            for k, name in enumerate(target.classes)
            if name not in absent
        }
    random = generator(seed, "target_labeled")
    drawn = []
    for name, group in groups.items():
        if len(group) < count:
            raise UserError(
                f"{where} are requested, but {target.name} has {len(group)} {name}; request fewer"
            )
        drawn.append(group[torch.randperm(len(group), generator=random)[:count]])
    return target.subset(torch.cat(drawn).sort().values)


def list_labeled(images: ImageSet, root: Path) -> str:
    """The text of a list file of these images, one line per image.

    The paths of files below `root` are relative to it, so the file can be read as a list if it lies
    directly below `root`; other paths are absolute. Images that are not files are listed by their
    numbers.

    Raises:
        UserError: a list file cannot hold the name of a file: it is not UTF-8 text, has a line
            break, or begins or ends with a space.
    """
    masks = getattr(images.labels, "masks", images.labels)

    def name_of(path: Path) -> str:
        name = os.path.relpath(path, root)
        name = os.path.abspath(path) if name.startswith(os.pardir) else name
        text = name.encode(errors="replace").decode()
        if name.splitlines() != [name] or "\t" in name or name != text.strip():
            raise UserError(
                f"{images.name}: the name {name!r} is not one line of utf-8 text; rename the file"
            )
        return name

    def words(i: int) -> list[str]:
        files = isinstance(images.images, Decoded)
        name = name_of(images.images.paths[i]) if files else str(i)
        if isinstance(masks, Decoded):
            return [name, name_of(masks.paths[i])]
        return [name, images.classes[masks[i]]] if masks.dim() == 1 else [name]

    lines = [words(i) for i in images.indices.tolist()]
    # A tab where a mask's or its image's path has a space.
    spaced = isinstance(masks, Decoded) and any(" " in word for line in lines for word in line)
    return "".join(("\t" if spaced else " ").join(line) + "\n" for line in lines)
