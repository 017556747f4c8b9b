"""Several processes that train as one: started by torchrun, each has its rows of every batch.

On one process every function returns its argument, or does nothing. Process r of n has the r-th of
n equal parts of every batch. Each computes the loss of its own rows, so that the mean of all
gradients (`average_gradients`) is the gradient of the loss of the whole batch, if the loss is a
mean over rows. A loss or statistic that is not takes `mean_over_ranks`, `gather` or `total` of what
it is computed from. All processes must call these functions in the same order.
"""

import contextlib
import datetime
import hashlib
import json
import os
import sys
import time
import uuid
from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from common.errors import UserError, observe

T = TypeVar("T")

# What the messages of a lost or silent process contain; gloo raises a plain RuntimeError.
LOST = ("gloo", "nccl", "connection closed", "connection reset", "broken pipe", "timed out")
FAILURE = "failure"  # the key under which the first process that fails tells the reason
WAIT = 5.0  # s; how long a process that lost another waits for the reason
ASK = 0.02  # s; how often process 0 looks for questions of the others
CONNECT = 600.0  # s; how long a process waits for the launcher
BUCKET = 1_000_000  # values that are sent at once
TURN = 1.0  # s; how long another process waits for process 0 to print a reason

_launcher: dist.Store | None = None  # outlives a restart
_store: dist.Store | None = None  # of the processes that run now


def count() -> int:
    """The number of processes; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def number() -> int:
    """The number of this process, from 0; process 0 writes all files."""
    return int(os.environ.get("RANK", "0"))


def is_first() -> bool:
    return number() == 0


def local_number() -> int:
    """The number of this process among those of its machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def local_count() -> int:
    """The number of processes on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def restarts() -> int:
    """How often torchrun has restarted the processes (`--max-restarts`)."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))


def rows(batch: int) -> slice:
    """The rows of a batch that this process has; the number of processes divides the batch."""
    share = batch // count()
    return slice(number() * share, (number() + 1) * share)


class _Starting:
    """What `exit_with` knows of this process before it has a run."""

    def sizes(self) -> str:
        return ""

    def failed(self, code: int, reason: str) -> str | None:
        return announce(code, reason)

    def explain(self, error: Exception) -> UserError | None:
        return None


def start() -> None:
    """Let process 0 alone print, and each mistake that several processes make be printed once."""
    global _launcher, _store
    if count() == 1:
        return
    if not is_first():
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, it stays open to the end
    if _launcher is None:
        limit = datetime.timedelta(seconds=CONNECT)
        with _cannot_meet():
            _launcher, _, _ = next(dist.rendezvous("env://", timeout=limit))
        _store = dist.PrefixStore(f"restart {restarts()}", _launcher)
    observe(_Starting())


def join(timeout: float) -> None:
    """Meet the other processes.

    Args:
        timeout: seconds after which a process that waits for another one gives up.

    Raises:
        UserError: the others did not come in time.
    """
    global _store
    if count() == 1 or dist.is_initialized():
        return
    start()
    limit = datetime.timedelta(seconds=timeout)
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    with _cannot_meet():
        store = dist.PrefixStore(f"start {_start_number(timeout)}", _launcher)
        rank = {"rank": number(), "world_size": count()}
        dist.init_process_group(backend, store=store, timeout=limit, **rank)
        _store = store


@contextlib.contextmanager
def _cannot_meet():
    """Raise `UserError` in place of torch's errors when the processes cannot connect."""
    try:
        yield
    except (RuntimeError, ValueError, KeyError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"process {number()} of {count()} cannot meet the others ({reason}); "
            "start all of them by one torchrun command per machine (docs/run.md)"
        ) from None


def _start_number(timeout: float) -> int:
    """The number of this start of the processes; the same on all of them.

    The launcher's store outlives a restart, and with it the addresses of processes that died, and
    each machine's launcher counts the restarts that it has asked for itself. So process 0 counts
    the starts. It answers the questions of the others, old ones too, until all have confirmed this
    number; a process that died asks, but confirms nothing.
    """
    store = dist.PrefixStore("starts", _launcher)
    if not is_first():
        question = uuid.uuid4().hex
        store.set(f"question of {number()}", question)
        store.wait([question], datetime.timedelta(seconds=timeout))
        store.set(f"{store.get(question).decode()} confirmed by {number()}", "")
        return int(store.get(question))
    begin, this, missing = time.monotonic(), store.add("count", 1), set(range(1, count()))
    while missing:
        if time.monotonic() - begin > timeout:
            raise RuntimeError(f"process {min(missing)} did not come within {timeout:.0f} s")
        for other in list(missing):
            if store.check([f"{this} confirmed by {other}"]):
                missing.remove(other)
            elif store.check([f"question of {other}"]):
                store.set(store.get(f"question of {other}").decode(), str(this))
        time.sleep(ASK)
    return this


def leave() -> None:
    """End the connection to the other processes."""
    global _launcher, _store
    if count() > 1 and dist.is_initialized():
        dist.destroy_process_group()
    _launcher = _store = None


def announce(code: int, reason: str) -> str | None:
    """Tell the other processes that this one fails.

    Returns:
        What this process prints; None if another process prints it.
    """
    if count() == 1:
        return reason
    if _store is None:
        return reason if is_first() else None
    with contextlib.suppress(RuntimeError):
        if _store.add(f"{FAILURE} count", 1) == 1:
            _store.set(FAILURE, json.dumps([code, f"process {number()}: {reason}"]))
        if is_first():
            return reason if _tell(reason) else None
        with contextlib.suppress(RuntimeError):  # process 0 may fail for the same reason
            _store.wait([_key(reason)], datetime.timedelta(seconds=TURN))
            return None
        if not _tell(reason):
            return None
    return f"process {number()}: {reason}"


def _key(reason: str) -> str:
    return hashlib.sha256(reason.encode(errors="replace")).hexdigest()


def _tell(reason: str) -> bool:
    """Whether this process is the first to tell the reason, and so prints it."""
    return _store.add(_key(reason), 1) == 1


def lost(error: Exception) -> UserError | None:
    """The reason why another process ended, if `error` comes from the lost connection to it."""
    text = str(error).lower()
    if count() == 1 or not isinstance(error, RuntimeError) or not any(x in text for x in LOST):
        return None
    code, reason = 1, "another process ended, or did not answer in time"
    with contextlib.suppress(RuntimeError, AttributeError):
        _store.wait([FAILURE], datetime.timedelta(seconds=WAIT))
        code, reason = json.loads(_store.get(FAILURE))
        _tell(reason)  # that process has printed it
    return UserError(reason, code)


def barrier() -> None:
    """Wait until all processes are here."""
    total(torch.zeros(()))


def first_on_machine(function: Callable[[], T]) -> T:
    """`function()`, in the first process of each machine before all others, such as a download."""
    result = function() if local_number() == 0 else None
    barrier()
    return function() if local_number() > 0 else result


def total(x: torch.Tensor) -> torch.Tensor:
    """The sum over all processes, without gradient."""
    if count() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x)
    return x


def most(x: torch.Tensor) -> torch.Tensor:
    """The largest value over all processes, elementwise."""
    if count() == 1:
        return x
    x = x.detach().clone()
    dist.all_reduce(x, dist.ReduceOp.MAX)
    return x


def mean_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The mean over all processes of what each has computed from its rows.

    The gradient is that of the own part. After `average_gradients` it is exact for a loss that all
    processes compute from this mean alike.
    """
    if count() == 1:
        return x
    x = x if x.is_floating_point() else x.float()
    mean = total(x) / count()
    return x + (mean - x.detach()) if x.requires_grad else mean


def norm_over_ranks(x: torch.Tensor) -> torch.Tensor:
    """The Euclidean norm of the rows of all processes together, without gradient."""
    norm = x.detach().float().norm()
    return norm if count() == 1 else total(norm.square()).sqrt()


def gather(x: torch.Tensor) -> torch.Tensor:
    """The rows of all processes in the order of the batch: (N, ...) -> (N * count(), ...).

    The own rows carry `count()` times the gradient, and the others none: the mean of the gradients
    (`average_gradients`) of a loss that all processes compute from these rows alike is exact.
    """
    if count() == 1:
        return x
    own = x.detach().contiguous()
    parts = [torch.empty_like(own) for _ in range(count())]
    dist.all_gather(parts, own)
    if x.requires_grad:
        parts[number()] = own + count() * (x - own)  # the value is that of x
    return torch.cat(parts)


def gather_objects(value: T) -> list[T]:
    """The values of all processes, in order; plain Python values."""
    if count() == 1:
        return [value]
    values: list = [None] * count()
    dist.all_gather_object(values, value)
    return values


def agree(flag: bool) -> bool:
    """Whether the flag is set on any process."""
    return bool(most(torch.tensor(int(flag)))) if count() > 1 else flag


class Agreement:
    """`agree` once per step, without waiting for it: each answer is that of the step before.

    On one process it is that of the step itself.
    """

    def __init__(self):
        self.flag, self.work = torch.zeros((), dtype=torch.int32), None

    def reached(self, flag: bool) -> bool:
        """Whether the flag was set on any process; the same on all."""
        if count() == 1:
            return flag
        answer = False
        if self.work is not None:
            self.work.wait()
            answer = bool(self.flag)
        self.flag = torch.tensor(int(flag), dtype=torch.int32)
        self.work = dist.all_reduce(self.flag, dist.ReduceOp.MAX, async_op=True)
        return answer

    def end(self) -> None:
        """Wait for what is still on its way."""
        if self.work is not None:
            self.work.wait()


def check_same(values: dict[str, object], remedy: str) -> None:
    """Raise `UserError` if a value is not the same on all processes.

    Args:
        values: by the name that the message gives them; numbers and texts.
        remedy: the end of the message.
    """
    everywhere = gather_objects({name: str(value) for name, value in values.items()})
    for name in everywhere[0]:
        seen = [other.get(name, "nothing") for other in everywhere]
        if len(set(seen)) > 1:
            shown = ", ".join(seen if max(map(len, seen)) < 60 else sorted(set(seen))[:2])
            raise UserError(f"{name} differs between the processes ({shown:.300}); {remedy}")


def running_statistics(modules: tuple[nn.Module | None, ...]) -> list[torch.Tensor]:
    """The running means and variances of batch norm that are being updated."""
    layers = [m for module in modules if module is not None for m in module.modules()]
    norms = [m for m in layers if isinstance(m, BatchNorm) and m.training and m.track_running_stats]
    return [buffer for m in norms for buffer in (m.running_mean, m.running_var)]


def in_memory_order(x: torch.Tensor) -> torch.Tensor:
    """A view whose dimensions are in the order of memory, so that flattening does not permute.

    The gradients of convolutions are channels-last where the model is.
    """
    return x.permute(sorted(range(x.dim()), key=x.stride, reverse=True))


def buckets(tensors: list[torch.Tensor]) -> list[list[torch.Tensor]]:
    """The tensors in order, in groups of at least `BUCKET` values; the last one may have fewer."""
    groups, size = [], BUCKET
    for tensor in tensors:
        if size >= BUCKET:
            groups.append([])
            size = 0
        groups[-1].append(tensor)
        size += tensor.numel()
    return groups


@torch.no_grad()
def average_gradients(optimizer: torch.optim.Optimizer, *modules: nn.Module | None) -> None:
    """Take the mean over all processes of the gradients that an optimizer will use.

    It stands between backward and step. Gradients that are not finite spread to all processes, so
    that a loss scaler skips the step on all of them.

    Args:
        optimizer: its parameters have gradients on all processes, or on none.
        modules: the running statistics of their batch norm are averaged too, so that all processes
            evaluate and save the same model; None for one that a config leaves out.
    """
    if count() == 1:
        return
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    tensors = [p.grad for p in parameters if p.grad is not None] + running_statistics(modules)
    works = []
    for bucket in buckets([in_memory_order(tensor) for tensor in tensors]):
        # The copying of one bucket overlaps with the communication of those before.
        flat = torch.cat([tensor.flatten() for tensor in bucket])
        works.append((bucket, flat, dist.all_reduce(flat, async_op=True)))
    for bucket, flat, work in works:
        work.wait()
        flat /= count()
        means = flat.split([tensor.numel() for tensor in bucket])
        torch._foreach_copy_(bucket, [m.view_as(t) for m, t in zip(means, bucket, strict=True)])
