"""Loaders of whole batches: batch k is a pure function of (seed, domain, k), whatever the number of workers."""

import atexit
import multiprocessing
import signal

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from common.config import DataConfig
from common.runtime import UserError
from data.augment import Augment, JointAugment
from data.image_set import ImageSet
from data.order import Order, generator


def _worker_init(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process saves, then ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


@atexit.register  # after, and so run before, multiprocessing's own, which sends the SIGTERM they ignore and waits
def _end_workers() -> None:
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch's handler would report them as killed
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _batch_loader(batches: Dataset, numbers: range, workers: int) -> DataLoader:
    return DataLoader(
        batches,
        batch_size=None,
        sampler=numbers,
        num_workers=workers,
        worker_init_fn=_worker_init,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator(),
    )  # iter() leaves the global stream alone


def _shape(images: object | None, index: int) -> tuple[int, ...] | None:
    return images.shapes[index] if hasattr(images, "shapes") else None  # else a tensor, or nothing: one size


def _three_channels(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1).contiguous()


class TrainBatches(Dataset):
    """Batch `step` (from 0) of the endless, shuffled, augmented set: images, and labels where the set has them."""

    def __init__(self, images: ImageSet, config: DataConfig, seed: int, domain: str):
        self.set, self.config, self.seed, self.domain = images, config, seed, domain
        self.order = Order(seed, domain, len(images))
        self.augment = Augment(config.augment_of(domain), config.size)

    def __getitem__(self, step: int):
        index = self.set.indices[self.order.positions(step * self.config.batch, self.config.batch)]
        images = self.set.images[index]
        if images.shape[-1] < self.config.size:
            images = F.center_crop(images, [self.config.size])  # pads with zeros
        images = self.augment(images, generator(self.seed, self.domain, "augment", step))
        if images.shape[-1] > self.config.size:
            images = F.center_crop(images, [self.config.size])
        images = _three_channels(images)
        return images if self.set.labels is None else (images, self.set.labels[index])


class EvalBatches(Dataset):
    """The set in its own order, cropped or padded at the centre, not augmented."""

    def __init__(self, images: ImageSet, config: DataConfig):
        self.set, self.config = images, config

    def __len__(self) -> int:
        return -(-len(self.set) // self.config.eval_batch)

    def __getitem__(self, k: int):
        index = self.set.indices[k * self.config.eval_batch : (k + 1) * self.config.eval_batch]
        images = _three_channels(F.center_crop(self.set.images[index], [self.config.size]))
        return images if self.set.labels is None else (images, self.set.labels[index])


class TrainMaps(Dataset):
    """Batch `step` (from 0) of the endless, shuffled, augmented set: images, and their masks where the set has them."""

    def __init__(self, images: ImageSet, config: DataConfig, seed: int, domain: str):
        self.set, self.config, self.seed, self.domain = images, config, seed, domain
        self.order = Order(seed, domain, len(images))
        self.augment = JointAugment(config.augment_of(domain), images.crop)

    def __getitem__(self, step: int):
        random = generator(self.seed, self.domain, "augment", step)
        images, masks = [], []
        for index in self.set.indices[self.order.positions(step * self.config.batch, self.config.batch)].split(1):
            mask = None if self.set.labels is None else self.set.labels[index][0]
            image, mask = self.augment(self.set.images[index][0], mask, random)
            images.append(image)
            masks.append(mask)
        if any(image.shape != images[0].shape for image in images):
            raise UserError(
                f"{self.set.name}: its images differ in size, and a batch has one size; "
                f"set data.{self.domain.removesuffix('_labeled')}.crop or resize, or data.batch: 1"
            )
        images = torch.stack(images)
        return images if self.set.labels is None else (images, torch.stack(masks).long())


class TwoViews(Dataset):
    """(weak view, strong view) of unlabelled batches: the strong one is the weak one, augmented further by `strong`."""

    def __init__(self, batches: TrainBatches | TrainMaps, strong: dict):
        self.batches, self.strong = batches, Augment(strong, batches.config.size)

    def __getitem__(self, step: int):
        weak = self.batches[step]
        return weak, self.strong(weak, generator(self.batches.seed, self.batches.domain, "strong", step))


class EvalMaps(Dataset):
    """The set in its own order, whole images with masks at their own size; a batch ends where sizes change."""

    def __init__(self, images: ImageSet, config: DataConfig):
        self.set, self.batches = images, []
        last = None
        for index in images.indices.tolist():
            size = tuple(_shape(x, index) for x in (images.images, images.labels))
            if size != last or len(self.batches[-1]) == config.eval_batch:
                self.batches.append([])
            self.batches[-1].append(index)
            last = size

    def __len__(self) -> int:
        return len(self.batches)

    def __getitem__(self, k: int):
        index = torch.tensor(self.batches[k])
        images = self.set.images[index]
        return images if self.set.labels is None else (images, self.set.labels[index].long())


def train_loader(
    images: ImageSet | None,
    config: DataConfig,
    seed: int,
    domain: str,
    start: int,
    steps: int,
    strong: dict | None = None,
) -> DataLoader:
    """Batches start .. steps - 1 of a domain: uint8 (batch, 3, H, W), with int64 labels where the set has them.

    With `strong`, a mapping as `data.augment`, pairs of a weak and a strong view of unlabelled images. None of no set.
    """
    if images is None:
        return _batch_loader([], range(0), 0)
    batches = {"classification": TrainBatches, "segmentation": TrainMaps}[config.task](images, config, seed, domain)
    if strong is not None:
        batches = TwoViews(batches, strong)
    return _batch_loader(batches, range(start, steps), config.workers)


def eval_loader(images: ImageSet, config: DataConfig) -> DataLoader:
    """Every image of the set once, in order."""
    batches = {"classification": EvalBatches, "segmentation": EvalMaps}[config.task](images, config)
    return _batch_loader(batches, range(len(batches)), config.workers)
