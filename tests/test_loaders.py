"""Workers that fail, hang or meet a signal: one line, the last step saved, no process left."""

import json
import multiprocessing
import os
import signal
import time

import pytest
import torch
from torch.utils.data import Dataset, _utils, get_worker_info

from common.errors import UserError
from data.classification import EvalBatches, TrainBatches
from data.config import DataConfig, DomainConfig
from data.loaders import Batches, Loader
from data.memory import empty_batch
from tests.helpers import differing, metrics, tiny_config, train, weights

LAST = "checkpoints/step_00000010.pt"


def loader_of(item, **keys) -> Loader:
    """Six batches, number k of which is `item(k)`, from two workers."""

    class Items(Dataset):
        def __getitem__(self, k: int):
            return item(k)

    domains = DomainConfig("drawn_digits"), DomainConfig("drawn_digits_shifted")
    config = DataConfig(*domains, root="images", cache="cache", **{"workers": 2, **keys})
    return Loader(Items(), range(6), config, "data.source (folder photo)")


def fail_at(number: int, failure):
    """Batches of which `number` calls `failure` in its worker."""

    def item(k: int) -> torch.Tensor:
        if k == number:
            failure()
        return torch.full((2,), k)

    return item


def out_of_memory():
    raise MemoryError


def no_tensor():
    raise RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to ..."
    )


FAILURES = {
    "killed": (lambda: os.kill(os.getpid(), signal.SIGKILL), r"ended unexpectedly \(SIGKILL\)"),
    "exit": (lambda: os._exit(3), r"ended unexpectedly \(exit code 3\)"),
    "hung": (lambda: time.sleep(100), r"no batch came .* in 2 seconds \(data\.worker_timeout\)"),
    "memory": (out_of_memory, "is out of memory"),
    "tensor": (no_tensor, "is out of memory"),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_a_failing_worker_is_named_and_none_is_left(failure):
    act, match = FAILURES[failure]
    start, batches = time.monotonic(), iter(loader_of(fail_at(3, act), worker_timeout=2))
    with pytest.raises(
        UserError, match=rf"data\.source \(folder photo\): .*{match}; use "
    ) as error:
        list(batches)
    assert len(str(error.value).splitlines()) == 1
    assert time.monotonic() - start < 10
    assert not multiprocessing.active_children()
    assert len(list(loader_of(fail_at(9, act)))) == 6  # control


def test_an_error_of_the_code_stays_one():
    def mistake():
        raise RuntimeError("shapes differ")

    with pytest.raises(RuntimeError, match="Original Traceback"):
        list(loader_of(fail_at(3, mistake)))
    with pytest.raises(MemoryError):
        list(loader_of(fail_at(3, out_of_memory), workers=0))


def test_a_worker_that_dies_during_a_step_is_told_by_a_later_batch():
    """torch would raise wherever the main process is, in the middle of a step."""
    loader = loader_of(fail_at(1, FAILURES["killed"][0]))
    batches = iter(loader)
    next(batches)
    end = time.monotonic() + 1
    while time.monotonic() < end:  # a step; signals are handled between these lines
        pass
    with pytest.raises(UserError, match="SIGKILL"):
        list(batches)


def test_slow_workers_are_waited_for(monkeypatch):
    monkeypatch.setattr("data.loaders.POLL", 0.1)
    calls = []
    loader = loader_of(fail_at(3, lambda: time.sleep(1)), worker_timeout=30)
    loader.on_wait = lambda: calls.append(1)
    assert torch.equal(torch.stack(list(loader))[:, 0], torch.arange(6))
    assert 2 < len(calls) < 30


def test_no_room_in_shared_memory(monkeypatch):
    def full(tensor):
        raise RuntimeError(
            "unable to allocate shared memory(shm) for file </torch_1>: No space (28)"
        )

    message = r"no room in shared memory \(/dev/shm\); .*--shm-size"
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "share_memory_", full)
        with pytest.raises(UserError, match=message):
            list(loader_of(fail_at(9, time.sleep)))
        assert len(list(loader_of(fail_at(9, time.sleep), workers=0))) == 6  # control
    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", full)  # where batches are made
    with pytest.raises(UserError, match=message):
        list(loader_of(lambda step: empty_batch((2, 3, 8, 8))))
    assert len(list(loader_of(lambda step: empty_batch((2, 3, 8, 8)), workers=0))) == 6


def test_fetch_waits_and_next_does_not():
    batches = iter(loader_of(fail_at(9, time.sleep), workers=0))
    for k in range(6):
        batches.fetch()
        batches.fetch()
        assert next(batches)[0] == k
    batches.fetch()
    with pytest.raises(StopIteration):
        next(batches)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_a_worker_is_immortal_from_its_start(monkeypatch, number):
    loop = _utils.worker._worker_loop

    def slow_start(*args):
        time.sleep(0.5)
        loop(*args)

    monkeypatch.setattr(_utils.worker, "_worker_loop", slow_start)
    batches = iter(loader_of(fail_at(9, time.sleep)))
    for pause in (0, 1):  # before the first line of the worker's loop, and within it
        time.sleep(pause)
        for process in multiprocessing.active_children():
            os.kill(process.pid, number)
    assert len(list(batches)) == 6
    assert signal.pthread_sigmask(signal.SIG_BLOCK, ()) == set()  # control: not this process


# --- runs


def fail_in_worker(monkeypatch, failure, number: int = 6) -> None:
    """Let workers call `failure` in place of batch `number` of the target, from 0."""
    plain = TrainBatches.__getitem__

    def getitem(self, step):
        if step == number and self.role == "target" and get_worker_info() is not None:
            failure()
        return plain(self, step)

    monkeypatch.setattr(TrainBatches, "__getitem__", getitem)


def hang_in_evaluation(monkeypatch) -> None:
    """Let workers hang at the second batch of the labeled target images."""
    plain = EvalBatches.__getitem__

    def getitem(self, k):
        if k == 1 and self.set.name == "drawn_digits_shifted" and get_worker_info() is not None:
            time.sleep(100)
        return plain(self, k)

    monkeypatch.setattr(EvalBatches, "__getitem__", getitem)


def wait_with_signal(batches, problem, wait=Batches._wait):
    os.kill(os.getpid(), signal.SIGTERM)  # while the main process waits for a batch
    wait(batches, problem)


def same_run(a, b) -> bool:
    last_a, last_b = weights(a, LAST), weights(b, LAST)
    del last_a["seconds"], last_b["seconds"]
    changed = differing(last_a, last_b) + differing(weights(a), weights(b))
    return changed == 0 and metrics(a) == metrics(b)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The run folder without workers."""
    folder = tmp_path_factory.mktemp("whole")
    assert train("train_dann", tiny_config(folder)) == 0
    return folder / "run"


@pytest.mark.parametrize("failure", ["killed", "hung"])
def test_the_last_step_is_saved_where_no_batch_comes(tmp_path, monkeypatch, whole, failure):
    config = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        fail_in_worker(patch, FAILURES[failure][0])
        with pytest.raises(UserError, match=r"data\.target \(drawn_digits_shifted\): "):
            train("train_dann", config, "data.workers=2", "data.worker_timeout=2")
    newest = max((tmp_path / "run/checkpoints").glob("step_*.pt")).name
    step = weights(tmp_path / "run", f"checkpoints/{newest}")["step"]
    # A worker that is killed takes the batches with it that it had not handed over yet.
    assert step == 6 if failure == "hung" else 0 < step <= 6
    assert train("train_dann", config, "--resume") == 0
    assert same_run(whole, tmp_path / "run")


@pytest.mark.parametrize("number", [6, 7])
def test_the_last_step_is_saved_whichever_part_of_a_batch_is_missing(tmp_path, monkeypatch, number):
    config, keys = tiny_config(tmp_path), ["accumulate=2", "data.workers=2", "save_every=100"]
    with monkeypatch.context() as patch:
        fail_in_worker(patch, FAILURES["hung"][0], number)
        with pytest.raises(UserError, match="no batch came"):
            train("train_dann", config, *keys, "data.worker_timeout=2")
    assert weights(tmp_path / "run", "checkpoints/step_00000003.pt")["step"] == 3


def test_the_last_step_is_saved_where_no_batch_of_an_evaluation_comes(tmp_path, monkeypatch, whole):
    """The evaluation takes place when the run is resumed."""
    config = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        hang_in_evaluation(patch)
        with pytest.raises(UserError, match=r"evaluation of drawn_digits_shifted: no batch came"):
            train("train_dann", config, "data.workers=2", "data.worker_timeout=2", "save_every=100")
    assert weights(tmp_path / "run", "checkpoints/step_00000004.pt")["evaluation_due"]
    assert not any(
        "eval" in line or "criteria.infomax" in line for line in metrics(tmp_path / "run")
    )
    assert train("train_dann", config, "save_every=100", "--resume") == 0
    assert same_run(whole, tmp_path / "run")


@pytest.mark.parametrize(("hang", "step"), [(None, 6), (hang_in_evaluation, 4)])
def test_a_signal_while_no_batch_comes(tmp_path, monkeypatch, whole, hang, step):
    config, start = tiny_config(tmp_path), time.monotonic()
    with monkeypatch.context() as patch:
        hang(patch) if hang else fail_in_worker(patch, FAILURES["hung"][0])
        patch.setattr(Batches, "_wait", wait_with_signal)
        assert train("train_dann", config, "data.workers=2", "data.worker_timeout=60") == 143
    assert time.monotonic() - start < 40
    assert weights(tmp_path / "run", f"checkpoints/step_{step:08d}.pt")["step"] == step
    assert train("train_dann", config, "--resume") == 0
    assert same_run(whole, tmp_path / "run")


GROUP_KEYS = ["eval_every=1", "steps=30"]


def run_in_group(config, folder) -> None:
    """In a forked process: train with workers, as the leader of a process group."""
    os.setsid()
    with open(folder / "output.txt", "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    keys = [f"out_dir={folder}/run", "data.workers=2", *GROUP_KEYS]
    os._exit(train("train_source", config, *keys))


def test_a_signal_to_the_group_never_costs_the_save(tmp_path):
    """Every evaluation starts workers, so that the signal often meets one at its start.

    A run that is resumed equals an uninterrupted one.
    """
    config, fork = tiny_config(tmp_path), multiprocessing.get_context("fork")
    for turn in range(3):
        folder = tmp_path / str(turn)
        folder.mkdir()
        process = fork.Process(target=run_in_group, args=(config, folder))
        process.start()
        end = time.monotonic() + 60
        lines = folder / "run" / "metrics.jsonl"
        while not (lines.exists() and lines.read_text()):
            assert time.monotonic() < end, (folder / "output.txt").read_text()
            time.sleep(0.01)
        time.sleep(0.1 * turn)
        os.killpg(process.pid, signal.SIGTERM)
        process.join(30)
        assert process.exitcode == 143, (folder / "output.txt").read_text()
        status = json.loads((folder / "run" / "status.json").read_text())
        assert status["state"] == "stopped"
        assert weights(folder / "run", f"checkpoints/step_{status['step']:08d}.pt")
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)  # nothing is left of the group
    assert train("train_source", config, *GROUP_KEYS, f"out_dir={tmp_path}/whole") == 0
    assert train("train_source", config, *GROUP_KEYS, f"out_dir={folder}/run", "--resume") == 0
    assert differing(weights(tmp_path / "whole"), weights(folder / "run")) == 0
    assert metrics(tmp_path / "whole") == metrics(folder / "run")
