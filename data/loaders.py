"""Loaders of batches: batch k is a pure function of (seed, role, k), for any number of workers."""

import atexit
import collections
import contextlib
import multiprocessing
import signal
import time
from collections.abc import Callable, Iterator

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info

from common import ranks
from common.errors import UserError
from data.config import DataConfig
from data.image_set import ImageSet
from data.tasks import task_module

# The main process saves on these, and then ends its workers.
STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
CPU = torch.device("cpu")
POLL = 1  # s between looks at the workers while a batch is awaited


class WorkerError(UserError):
    """Workers that give no batch, for a reason that is not the data's."""


# Registered after, and so run before, multiprocessing's own exit handler, which sends the SIGTERM
# that is blocked in workers, and waits for them.
@atexit.register
def _end_workers() -> None:
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()


def _to_shared_memory(batch):
    """In a worker, the batch in shared memory.

    Where there is no room for it, this is an error here. In torch's queue it would be printed, and
    the main process would wait for a batch that never comes.
    """
    if get_worker_info() is not None:
        for tensor in _tensors(batch):
            tensor.share_memory_()
    return batch


def _tensors(batch) -> Iterator[torch.Tensor]:
    if isinstance(batch, torch.Tensor):
        yield batch
    elif isinstance(batch, (tuple, list)):
        for part in batch:
            yield from _tensors(part)


class Loader(DataLoader):
    """A torch DataLoader whose items are batches, and whose iterators are `Batches`.

    Args:
        batches: item k is batch k.
        numbers: of the batches, in order.
        config: the section `data`.
        name: of the set, for messages.
        device: of the run; for CUDA devices batches lie in page-locked memory.
        on_wait: called about once per second while a batch from the workers is awaited; it may
            raise.
    """

    def __init__(
        self,
        batches: Dataset,
        numbers: range,
        config: DataConfig,
        name: str,
        device: torch.device = CPU,
        on_wait: Callable[[], None] | None = None,
    ):
        super().__init__(
            batches,
            batch_size=None,
            sampler=numbers,
            num_workers=config.workers,
            collate_fn=_to_shared_memory,
            timeout=POLL if config.workers else 0,
            pin_memory=device.type == "cuda",
            generator=torch.Generator(),  # so that iter() leaves the global stream alone
        )
        self.name, self.seconds, self.on_wait = name, config.worker_timeout, on_wait

    def __iter__(self) -> "Batches":
        children = multiprocessing.active_children()
        on_child = signal.getsignal(signal.SIGCHLD)
        # Workers inherit the blocked signals, from their first instruction to their last.
        mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOPPING)
        try:
            batches = super().__iter__()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        if signal.getsignal(signal.SIGCHLD) != on_child:
            # torch's handler raises in the middle of a step. `Batches` raises for the next batch.
            signal.signal(signal.SIGCHLD, on_child)
        workers = [p for p in multiprocessing.active_children() if p not in children]
        return Batches(batches, workers, self)


class Batches:
    """The iterator of a `Loader`.

    Raises:
        WorkerError: a worker ended or had no memory, or no batch came in time. No worker is left.
    """

    def __init__(self, batches: Iterator, workers: list, loader: Loader):
        self.batches, self.workers, self.loader = batches, workers, loader
        self.ready: collections.deque = collections.deque()

    def __iter__(self) -> "Batches":
        return self

    def __next__(self):
        return self.ready.popleft() if self.ready else self._load()

    def fetch(self, count: int = 1) -> None:
        """Wait for the next `count` batches, so that `next` does not. After the last do nothing."""
        with contextlib.suppress(StopIteration):
            while len(self.ready) < count:
                self.ready.append(self._load())

    def _load(self):
        start = time.monotonic()
        try:
            while True:
                try:
                    return next(self.batches)
                except (RuntimeError, MemoryError, OSError, EOFError) as error:
                    problem = self._problem(error, time.monotonic() - start)
                    if problem is None:
                        raise
                self._wait(problem)
        except StopIteration:
            raise
        except BaseException:
            for worker in self.workers:  # torch would wait for each, up to ten seconds
                worker.kill()
                worker.join(POLL)
            raise

    def _wait(self, problem: str) -> None:
        if problem:
            raise WorkerError(
                f"{self.loader.name}: {problem}; use fewer data.workers or a smaller data.batch, "
                "or enlarge /dev/shm (docker run --shm-size)"
            )
        if self.loader.on_wait is not None:
            self.loader.on_wait()

    def _problem(self, error: Exception, seconds: float) -> str | None:
        """What to tell of an error; an empty text: wait on; None: the error is not of this kind."""
        text = str(error)
        if not self.workers:
            return None
        for worker in self.workers:
            if not worker.is_alive():
                code = worker.exitcode
                cause = signal.Signals(-code).name if code < 0 else f"exit code {code}"
                return f"a loader process ended unexpectedly ({cause})"
        if isinstance(error, MemoryError) or "DefaultCPUAllocator" in text:
            return "a loader process is out of memory"
        if "shared memory" in text:
            return "a loader process has no room in shared memory (/dev/shm)"
        if not text.startswith("DataLoader timed out"):
            return None
        if seconds < self.loader.seconds:
            return ""
        return (
            f"no batch came from the loader processes in {self.loader.seconds} seconds "
            "(data.worker_timeout)"
        )


def train_loader(
    images: ImageSet,
    config: DataConfig,
    seed: int,
    role: str,
    start: int,
    steps: int,
    strong: dict | None = None,
    parts: int = 1,
    device: torch.device = CPU,
    on_wait: Callable[[], None] | None = None,
    styles: ImageSet | None = None,
    counts: torch.Tensor | None = None,
) -> Loader:
    """The batches of a domain; those of CUDA devices are `Raw`, others are views.

    Args:
        images: the set; a batch has int64 labels where the set has them.
        config: the section `data`.
        seed: of order and augmentation.
        role: source, target or target_labeled; names the random streams and the augmentation.
        start: steps done.
        steps: steps of the run.
        strong: a mapping as `data.augment`; then a batch is a pair of a weak and a strong view.
        parts: batches per step.
        device, on_wait: see `Loader`.
        styles, counts: see `ViewBatches`.

    Shapes: images uint8 (batch, 3, H, W); labels int64 (batch,) or uint8 (batch, H, W).
    """
    raw = device.type == "cuda"
    opener = task_module(config)
    batches = opener.TrainBatches(images, config, seed, role, strong, parts, raw, styles, counts)
    numbers = range(start * parts, steps * parts)
    return Loader(batches, numbers, config, f"data.{role} ({images.name})", device, on_wait)


def eval_loader(
    images: ImageSet, config: DataConfig, shared: bool = True, device: torch.device = CPU
) -> Loader:
    """Every image of the set once, in order.

    Of several processes each has every `ranks.count()`-th batch; all batches, unless `shared`.
    """
    batches = task_module(config).EvalBatches(images, config, config.eval_batch)
    numbers = range(len(batches))
    if shared:
        numbers = numbers[ranks.number() :: ranks.count()]
    return Loader(batches, numbers, config, f"evaluation of {images.name}", device)


def stream_loader(
    images: ImageSet,
    config: DataConfig,
    start: int = 0,
    steps: int | None = None,
    device: torch.device = CPU,
    on_wait: Callable[[], None] | None = None,
) -> Loader:
    """Every image of the set once, in order, `data.batch` at a time, as for an evaluation.

    Args:
        images: the set; a batch has labels where the set has them.
        config: the section `data`.
        start: batches that are left out.
        steps: the last batch, counted from 1; None for the last one of the set.
        device, on_wait: see `Loader`.
    """
    batches = task_module(config).EvalBatches(images, config, config.batch)
    numbers = range(len(batches))[start:steps]
    return Loader(batches, numbers, config, f"data.target ({images.name})", device, on_wait)
