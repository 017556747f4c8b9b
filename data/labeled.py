"""The few labelled target images of `data.target_labeled`."""

import os
from pathlib import Path

import torch

from common.runtime import UserError
from data.decoded import Decoded
from data.image_set import ImageSet
from data.order import generator


def file_of(images: ImageSet, index: int) -> str | None:
    """The real path of an image; None where the set is no set of files."""
    return os.path.realpath(images.images.paths[index]) if isinstance(images.images, Decoded) else None


def without(images: ImageSet | None, labeled: ImageSet) -> ImageSet | None:
    """The set without the images of `labeled`, by their files, or by their numbers in the same tensor."""
    if images is None:
        return None
    taken = {file_of(labeled, i) or i for i in labeled.indices.tolist()}
    same = images.images is labeled.images or isinstance(images.images, Decoded)
    kept = [not same or (file_of(images, i) or i) not in taken for i in images.indices.tolist()]
    return images if all(kept) else images.subset(torch.tensor(kept))


def hold_out_of_each(images: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(`share` of the images of each class, to the nearest image, the rest) by `seed`.

    Raises:
        UserError: either would be left without an image of some class.
    """
    labels, random, held = images.labels[images.indices], generator(seed, "val"), torch.zeros(len(images), dtype=bool)
    for k, name in enumerate(images.classes):
        group = (labels == k).nonzero()[:, 0]
        count = round(share * len(group))
        if not 0 < count < len(group):
            left = "validate" if count == 0 else "train"
            raise UserError(
                f"data.val_share: {share} of the {len(group)} images of class {name} leaves none to {left} on"
            )
        held[group[torch.randperm(len(group), generator=random)[:count]]] = True
    return images.subset(held), images.subset(~held)


def draw_labeled(target: ImageSet, count: int, seed: int) -> ImageSet:
    """`count` images of each class, or of a set with masks `count` images, by `seed`.

    Raises:
        UserError: the target has no labels, or a class too few images.
    """
    asked = f"data.target_labeled: {count}"
    if target.labels is None:
        raise UserError(f"{asked} images cannot be drawn: {target.name} has no labels; name a list file instead")
    labels = target.labels[target.indices] if isinstance(target.labels, torch.Tensor) else None
    if labels is None or labels.dim() > 1:
        groups = {"images": torch.arange(len(target))}
    else:
        groups = {f"of class {name}": (labels == k).nonzero()[:, 0] for k, name in enumerate(target.classes)}
    random, drawn = generator(seed, "target_labeled"), []
    for name, group in groups.items():
        if len(group) < count:
            raise UserError(f"{asked} are asked for, {target.name} has {len(group)} {name}; ask for fewer")
        drawn.append(group[torch.randperm(len(group), generator=random)[:count]])
    return target.subset(torch.cat(drawn).sort().values)


def list_labeled(images: ImageSet, root: Path) -> str:
    """Lines that are a list file of these images in a file just below `root`; of a set without files, their numbers."""
    masks = getattr(images.labels, "masks", images.labels)

    def words(i: int) -> list[str]:
        name = os.path.relpath(images.images.paths[i], root) if isinstance(images.images, Decoded) else str(i)
        if isinstance(masks, Decoded):
            return [name, os.path.relpath(masks.paths[i], root)]
        return [name, images.classes[masks[i]]] if masks.dim() == 1 else [name]

    lines = [" ".join(words(i)) + "\n" for i in images.indices.tolist()]
    for line in lines:
        if not line.isprintable() and line != line.encode(errors="replace").decode():
            raise UserError(f"{images.name}: the name {line.strip()!r} is no utf-8 text; rename the file")
    return "".join(lines)
