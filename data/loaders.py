"""Loaders of whole batches: batch k is a pure function of (seed, domain, k), whatever the number of workers."""

import atexit
import multiprocessing
import signal

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2 import functional as F

from common.config import DataConfig
from data.augment import Augment
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


def _three_channels(images: torch.Tensor) -> torch.Tensor:
    return images.expand(-1, 3, -1, -1).contiguous()


class TrainBatches(Dataset):
    """Batch `step` (from 0) of the endless, shuffled, augmented set: images, and labels where the set has them."""

    def __init__(self, images: ImageSet, config: DataConfig, seed: int, domain: str):
        self.set, self.config, self.seed, self.domain = images, config, seed, domain
        self.order = Order(seed, domain, len(images))
        self.augment = Augment(config.augment, config.size)

    def __getitem__(self, step: int):
        positions = self.order.positions(step * self.config.batch, self.config.batch)
        images = self.set.images[self.set.indices[positions]]
        if images.shape[-1] < self.config.size:
            images = F.center_crop(images, [self.config.size])  # pads with zeros
        images = self.augment(images, generator(self.seed, self.domain, "augment", step))
        if images.shape[-1] > self.config.size:
            images = F.center_crop(images, [self.config.size])
        images = _three_channels(images)
        return images if self.set.labels is None else (images, self.set.labels[positions])


class EvalBatches(Dataset):
    """The set in its own order, cropped or padded at the centre, not augmented."""

    def __init__(self, images: ImageSet, config: DataConfig):
        self.set, self.config = images, config

    def __len__(self) -> int:
        return -(-len(self.set) // self.config.eval_batch)

    def __getitem__(self, k: int):
        part = slice(k * self.config.eval_batch, (k + 1) * self.config.eval_batch)
        images = _three_channels(F.center_crop(self.set.images[self.set.indices[part]], [self.config.size]))
        return images if self.set.labels is None else (images, self.set.labels[part])


def train_loader(images: ImageSet, config: DataConfig, seed: int, domain: str, start: int, steps: int) -> DataLoader:
    """Batches start .. steps - 1 of a domain: uint8 (batch, 3, size, size), with int64 labels if the set has them."""
    return _batch_loader(TrainBatches(images, config, seed, domain), range(start, steps), config.workers)


def eval_loader(images: ImageSet, config: DataConfig) -> DataLoader:
    """Every image of the set once, in order."""
    batches = EvalBatches(images, config)
    return _batch_loader(batches, range(len(batches)), config.workers)
