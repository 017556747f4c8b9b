"""Views of the images of a batch: what is drawn in the loaders, and computed there or on a GPU."""

from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from data.augment import Augment
from data.config import DataConfig
from data.image_set import ImageSet
from data.order import Draws, Order
from data.rare_classes import RareClassOrder
from data.style import fourier_style


class Raw(NamedTuple):
    """A batch whose views are still to be computed, and all that is needed for it.

    Attributes:
        images: uint8 (N, C, H, W).
        labels: int64 (N,), uint8 (N, H, W), or None.
        weak, strong: an `Augment`; `strong` is applied to the weak view, or is None.
        numbers: those that `weak` and `strong` have drawn.
    """

    images: torch.Tensor
    labels: torch.Tensor | None
    weak: Augment
    strong: Augment | None
    numbers: tuple[list[torch.Tensor], list[torch.Tensor]]

    def views(self) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Images, (images, labels), or of unlabeled images (weak view, strong view).

        They are computed on the device that the images are on, and may overwrite them.
        """
        images = self.weak.apply(self.images, self.numbers[0])
        if self.strong is not None:
            return images, self.strong.apply(images.clone(), self.numbers[1])
        return images if self.labels is None else (images, self.labels)


def to_views(batch, device: torch.device):
    """A batch of a loader on the device, with its augmentation.

    Args:
        batch: images, labels, or a tuple of them; or `Raw`, of which the device computes the views.
            Other objects that have a method `to`, such as features, are moved as they are.
        device: of the result.

    Returns:
        Images uint8 (N, 3, H, W); or a tuple: (images, labels) with int64 labels (N,) or (N, H, W),
        or (weak view, strong view).
    """
    if isinstance(batch, Raw):
        images, labels = (None if x is None else x.to(device, non_blocking=True) for x in batch[:2])
        batch = batch._replace(images=images, labels=labels).views()
    if isinstance(batch, tuple):
        return tuple(_to_device(part, device) for part in batch)
    return _to_device(batch, device)


def _to_device(part, device: torch.device):
    part = part.to(device, non_blocking=True)
    is_mask = isinstance(part, torch.Tensor) and part.dtype == torch.uint8 and part.dim() == 3
    # Masks travel as uint8: as int64 they would be eight times larger.
    return part.long() if is_mask else part


class ViewBatches(Dataset):
    """The batches of the endless, shuffled, augmented set; item k is batch k, from 0.

    Each process loads its rows of it (`ranks.rows`). A subclass has `load` and `augment`.

    Args:
        images: the set.
        config: the section `data`.
        seed: of order and augmentation.
        role: source, target or target_labeled; names the random streams and the augmentation.
        strong: the operations of a strong view, or None.
        parts: batches per step of the run.
        raw: whether an item is a `Raw`, of which the caller computes the views.
        styles: the target's set, or None; with `data.fda` each image takes the style of the target
            image that has its place in the target's batch.
        counts: labels of each class in each image, int64 (N, K), for rare class sampling, or None.
    """

    def __init__(
        self,
        images: ImageSet,
        config: DataConfig,
        seed: int,
        role: str,
        strong: dict | None = None,
        parts: int = 1,
        raw: bool = False,
        styles: ImageSet | None = None,
        counts: torch.Tensor | None = None,
    ):
        self.styles = None
        if styles is not None:
            self.styles = type(self)(styles, config, seed, "target", None, parts)
        self.set, self.config, self.seed, self.role = images, config, seed, role
        self.weak, self.raw = self.augment(config.augment_of(role)), raw
        self.strong = None if strong is None else self.augment(strong)
        batch = config.batch_of(role) // parts
        self.order = Order(seed, role, len(images), batch)
        if counts is not None:
            temperature = config.rare_class_temperature
            self.order = RareClassOrder(seed, role, counts, batch, temperature)

    def augment(self, spec: dict) -> Augment:
        """What is done to the images that `load` returns, of these operations of a config."""
        raise NotImplementedError

    def load(
        self, index: torch.Tensor, positions: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The images of the set with these numbers, (n, C, H, W), and their labels, if any.

        Args:
            index: the numbers, int64 (n,).
            positions: of the images in the endless order, (n,).
        """
        raise NotImplementedError

    def draws(self, positions: torch.Tensor, purpose: str) -> Draws:
        return Draws(positions, self.seed, self.role, purpose)

    def stored(self, number: int) -> torch.Tensor:
        """The images of a batch before their augmentation."""
        positions, places = self.order.rows(number)
        return self.load(self.set.indices[places], positions)[0]

    def __getitem__(self, number: int):
        positions, places = self.order.rows(number)
        images, labels = self.load(self.set.indices[places], positions)
        if self.styles is not None:
            images = fourier_style(images, self.styles.stored(number), self.config.fda)
        weak, strong = self.weak.draw(self.draws(positions, "augment")), []
        if self.strong is not None:
            strong = self.strong.draw(self.draws(positions, "strong"))
        batch = Raw(images, labels, self.weak, self.strong, (weak, strong))
        return batch if self.raw else batch.views()
