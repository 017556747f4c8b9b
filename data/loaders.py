"""Loaders of batches: batch k is a pure function of (seed, role, k), for any number of workers."""

import atexit
import multiprocessing
import signal

import torch
from torch.utils.data import DataLoader, Dataset

from data.augment import Augment
from data.config import DataConfig
from data.image_set import ImageSet
from data.order import generator
from data.tasks import task_module


def _worker_init(worker: int) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the main process saves, then ends its workers
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


# Registered after, and so run before, multiprocessing's own exit handler, which sends the SIGTERM
# that workers ignore, and waits for them.
@atexit.register
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
        generator=torch.Generator(),  # so that iter() leaves the global stream alone
    )


class TwoViews(Dataset):
    """(weak view, strong view) of unlabeled batches.

    The strong view is the weak one, augmented further by the operations of `strong`.
    """

    def __init__(self, batches: Dataset, strong: dict):
        self.batches, self.strong = batches, Augment(strong, batches.config.size)

    def __getitem__(self, step: int):
        weak = self.batches[step]
        random = generator(self.batches.seed, self.batches.role, "strong", step)
        return weak, self.strong(weak, random)


def train_loader(
    images: ImageSet,
    config: DataConfig,
    seed: int,
    role: str,
    start: int,
    steps: int,
    strong: dict | None = None,
) -> DataLoader:
    """Batches start .. steps - 1 of a domain.

    Args:
        images: the set; a batch has int64 labels where the set has them.
        config: the section `data`.
        seed: of order and augmentation.
        role: source, target or target_labeled; names the random streams and the augmentation.
        start: steps done.
        steps: steps of the run.
        strong: a mapping as `data.augment`; then a batch is a pair of a weak and a strong view.

    Shapes: images uint8 (batch, 3, H, W); labels (batch,) or (batch, H, W).
    """
    batches = task_module(config).TrainBatches(images, config, seed, role)
    if strong is not None:
        batches = TwoViews(batches, strong)
    return _batch_loader(batches, range(start, steps), config.workers)


def eval_loader(images: ImageSet, config: DataConfig) -> DataLoader:
    """Every image of the set once, in order."""
    batches = task_module(config).EvalBatches(images, config)
    return _batch_loader(batches, range(len(batches)), config.workers)
