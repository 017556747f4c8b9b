"""The run folder: when a run saves, how it leaves, and what it writes without being asked."""

import contextlib
import errno
import json
import os
import re
import resource
import shutil
import signal
import socket
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch

from common import provenance
from common.errors import UserError, exit_with
from models import build_model
from tests.helpers import (
    ROOT,
    differing,
    finetune_config,
    in_a_fork,
    load_script,
    metrics,
    stop_after,
    street_config,
    summary,
    tiny_config,
    train,
    weights,
)
from training import log
from training import run as run_module
from training.config import RunConfig, load_run_config
from training.run import SIGNALS, Run


@dataclass
class Config(RunConfig):
    method: ClassVar[str] = "counting"

    def trained_criteria(self):
        return set()


class Counter(torch.nn.Module):
    """A state of a run: the steps taken."""

    def __init__(self):
        super().__init__()
        self.register_buffer("steps", torch.tensor(0))
        self.register_buffer("mean", torch.tensor(0.0))


class Counting:
    """A script without a method: its steps count themselves."""

    def __init__(self, file: Path, *overrides: str, resume=False, dry_run=False, allow=False):
        config = load_run_config(Config, str(file), overrides)
        flags = {"resume": resume, "dry_run": dry_run, "allow_change": allow, "all": False}
        arguments = SimpleNamespace(**flags, command="python train_x.py")
        self.config, self.run = config, Run(config, arguments)
        self.domains = self.run.open_domains()
        self.model, self.counter = build_model(config, self.domains.classes), Counter()
        self.start = self.run.begin(model=self.model, counter=self.counter)

    def loop(self, during=lambda step: None, after=lambda step: None) -> list[int]:
        """Take the steps; `during` is called within each of them, `after` at its end."""
        steps = []
        for step in self.run.steps(self.start):
            during(step)
            self.counter.steps += 1
            steps.append(step)
            self.run.log.add(cls_loss=1.0)
            if self.run.due(step, self.config.log_every):
                self.run.log.write(step)
            if self.run.due(step, self.config.eval_every):
                self.run.evaluate(step, self.model, self.domains.evaluation())
            after(step)
        return steps


def counted(folder: Path, step: int) -> int:
    """The steps that a checkpoint has counted."""
    state = weights(folder, f"checkpoints/step_{step:08d}.pt")
    assert state["step"] == step
    return int(state["counter"]["steps"])


def checkpoints(folder: Path) -> list[int]:
    return sorted(int(file.stem[5:]) for file in (folder / "checkpoints").glob("*.pt"))


def status(folder: Path) -> tuple[str, int]:
    state = json.loads((folder / "status.json").read_text())
    return state["state"], state["step"]


# --- steps


def test_a_run_saves_after_the_steps_where_that_is_due(tmp_path):
    counting = Counting(tiny_config(tmp_path, steps=7, save_every=3))
    saved = []  # step 3 itself is not saved before it is over
    assert counting.loop(after=lambda step: saved.append(counting.run.saved)) == [*range(1, 8)]
    assert saved == [None, None, None, 3, 3, 3, 6]
    assert checkpoints(tmp_path / "run") == [6, 7]  # the newest two, and always the last step
    assert counted(tmp_path / "run", 6) == 6
    assert status(tmp_path / "run") == ("running", 7)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_ends_the_run_after_its_step_which_is_saved(tmp_path, capfd, number):
    """It may come twice, from a group and from a wrapper that passes it on."""
    file = tiny_config(tmp_path, save_every=1000)
    counting, ended = Counting(file), []

    def during(step):
        if step == 3:
            signal.raise_signal(number)
            signal.raise_signal(number)
            signal.raise_signal(SIGNALS[0])

    with pytest.raises(SystemExit) as stop:
        counting.loop(during, ended.append)
    assert stop.value.code == 128 + number
    assert ended == [1, 2, 3]
    assert checkpoints(tmp_path / "run") == [3]
    assert counted(tmp_path / "run", 3) == 3
    assert status(tmp_path / "run") == ("stopped", 3)
    out, err = capfd.readouterr()
    assert f"stopped by {number.name} after step 3" in out
    notice = f"{number.name}: saving after this step; send it again to leave at once\n"
    assert err.count("saving") == err.count(notice) == 1

    again = Counting(file, resume=True)
    assert (again.start, int(again.counter.steps)) == (3, 3)
    assert again.loop() == [4, 5, 6, 7, 8, 9, 10]


def test_a_dry_run_takes_one_step_and_writes_nothing(tmp_path):
    file = tiny_config(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    counting = Counting(file, dry_run=True)
    assert counting.loop() == [1]
    assert counting.run.finish(counting.domains) == 0
    assert sorted(tmp_path.rglob("*")) == before
    assert Counting(file).loop() == [*range(1, 11)]  # control
    assert sorted(tmp_path.rglob("*")) != before


# --- watch


@pytest.mark.parametrize("save_every", [3, 1000], ids=["saved before", "not yet saved"])
def test_a_signal_within_a_pass_ends_the_run_as_after_the_step_before(tmp_path, save_every):
    file = tiny_config(tmp_path, save_every=save_every)
    counting, seen = Counting(file), []

    class Batches(list):
        def __iter__(self):
            for number in super().__iter__():
                if number == 2:
                    signal.raise_signal(signal.SIGTERM)
                yield number

    def during(step):
        if step == 4:
            seen.extend(counting.run.watch((10, 11), 3))  # control: without a signal all pass
            for number in counting.run.watch(Batches(range(5)), 3):
                seen.append(number)

    with pytest.raises(SystemExit) as stop:
        counting.loop(during)
    assert stop.value.code == 128 + signal.SIGTERM
    assert seen == [10, 11, 0, 1]
    assert checkpoints(tmp_path / "run") == [3]
    assert counted(tmp_path / "run", 3) == 3
    assert status(tmp_path / "run") == ("stopped", 3)
    assert Counting(file, resume=True).start == 3


def test_a_signal_within_a_pass_before_the_first_step(tmp_path):
    file = tiny_config(tmp_path)
    counting = Counting(file)
    signal.raise_signal(signal.SIGTERM)
    with pytest.raises(SystemExit):
        next(iter(counting.run.watch([0], 0)))
    assert status(tmp_path / "run") == ("stopped", 0)
    assert Counting(file, resume=True).start == 0


def test_a_watched_loader_is_the_loader_otherwise(tmp_path):
    loader = torch.utils.data.DataLoader(range(6), batch_size=4)
    watched = Counting(tiny_config(tmp_path)).run.watch(loader, 0)
    assert (len(watched), watched.dataset) == (2, range(6))
    assert [batch.tolist() for batch in watched] == [[0, 1, 2, 3], [4, 5]]


# --- signals, in processes of their own


def fork(main, log: Path) -> int:
    """Start a script's `main` in a process with a group of its own. Returns its number."""
    process = os.fork()
    if process:
        return process
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        exit_with(main)
    except SystemExit as end:
        code = end.code
    finally:
        os._exit(code)


def wait_for(condition, seconds: float = 30.0):
    """The first value of `condition` that is not None, asked for until then."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        if (value := condition()) is not None:
            return value
        time.sleep(0.01)
    pytest.fail("a process did not do what it was waited for")


def exit_code(process: int) -> int | None:
    done, state = os.waitpid(process, os.WNOHANG)
    return os.waitstatus_to_exitcode(state) if done else None


def test_signals_to_the_group_lose_no_step(tmp_path):
    """Five times, each at another moment; the result is that of the uninterrupted run."""
    config, log, folder = tiny_config(tmp_path), tmp_path / "log.txt", tmp_path / "run"
    assert train("train_source", config, "steps=60", f"out_dir={tmp_path}/whole") == 0

    def logged() -> int:
        """Steps logged, of which a run that is stopped must keep each."""
        file = folder / "metrics.jsonl"
        text = file.read_text() if file.exists() else ""
        lines = text[: text.rfind("\n") + 1].splitlines()  # one may be half written
        return max((json.loads(line)["step"] for line in lines), default=0)

    for number in (10, 20, 30, 40, 50):
        keys = ["steps=60", "log_every=1", "save_every=1000", "--resume"]
        process = fork(lambda keys=keys: train("train_source", config, *keys), log)
        wait_for(lambda number=number: True if logged() >= number else None)
        os.killpg(process, signal.SIGTERM)
        begin = time.monotonic()
        assert wait_for(lambda process=process: exit_code(process)) == 143, log.read_text()
        assert time.monotonic() - begin < 20
        with pytest.raises(ProcessLookupError):
            os.killpg(process, 0)
        state, step = status(folder)
        assert (state, step) == ("stopped", logged())
        assert checkpoints(folder)[-1] == step
    assert train("train_source", config, "steps=60", "log_every=1", "--resume") == 0
    assert differing(*(weights(tmp_path / name) for name in ("whole", "run"))) == 0


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("second", [None, *SIGNALS[:2]], ids=["once", "SIGTERM", "SIGINT"])
def test_a_second_signal_leaves_at_once(tmp_path, second, workers):
    """It comes after a second, of whichever kind; the older checkpoint stays good.

    No worker is left; those of a process that was killed notice it after some seconds.
    """
    file, log, folder = tiny_config(tmp_path, save_every=2), tmp_path / "log.txt", tmp_path / "run"

    def main():
        counting = Counting(file, f"data.workers={workers}")
        next(counting.domains.batches("source", 0, 100))
        counting.loop(during=lambda step: time.sleep(3) if step == 5 else None)

    process = fork(main, log)
    wait_for(lambda: True if folder.exists() and checkpoints(folder)[-1:] == [4] else None)
    time.sleep(0.2)
    os.killpg(process, signal.SIGINT)
    time.sleep(1.2)
    begin = time.monotonic()
    if second:
        os.killpg(process, second)
    code = wait_for(lambda: exit_code(process))
    assert code == (-second if second else 130), log.read_text()
    assert checkpoints(folder)[-1] == (4 if second else 5)
    if second:
        assert time.monotonic() - begin < 1
    assert wait_for(lambda: is_gone(process))
    assert Counting(file, resume=True).start == (4 if second else 5)


def is_gone(group: int) -> bool | None:
    """True if no process of the group is left, else None."""
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return True


def test_a_hang_up_that_is_ignored_stays_ignored(tmp_path):
    """As nohup asks; else it stops a run as SIGTERM does."""
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    counting = Counting(tiny_config(tmp_path))
    assert counting.loop(during=lambda step: signal.raise_signal(signal.SIGHUP))[-1] == 10


# --- failures


def fail(main, capsys) -> tuple[int, str]:
    """(exit code, sentence) of a run that ends with one line."""
    with pytest.raises(SystemExit) as stop:
        exit_with(main)
    return stop.value.code, capsys.readouterr().err.splitlines()[-1].removeprefix("error: ")


def raise_at(monkeypatch, step: int, error: Exception) -> None:
    """Let step `step` of the next run end with an error."""
    add, seen = log.Log.add, []

    def failing(self, **values):
        add(self, **values)
        seen.append(1)
        if len(seen) == step:
            raise error

    monkeypatch.setattr(log.Log, "add", failing)


FAILURES = {
    2: UserError("x.png: cannot be read; remove it"),
    3: UserError("step 3: cls_loss is nan; start again", 3),
    5: OSError(errno.ENOSPC, "No space left on device", "x"),
    1: ZeroDivisionError("a mistake"),
}


@pytest.mark.parametrize("code", FAILURES)
def test_a_failure_stands_in_status_json(tmp_path, monkeypatch, capsys, code):
    """And the same command starts again, if nothing is saved; other files stay."""
    config, folder = tiny_config(tmp_path), tmp_path / "run"
    assert train("train_source", config, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        raise_at(patch, 3, FAILURES[code])
        if code == 1:
            with pytest.raises(ZeroDivisionError):
                exit_with(lambda: train("train_source", config))
            reason = "ZeroDivisionError: a mistake"
        else:
            found, reason = fail(lambda: train("train_source", config), capsys)
            assert found == code
    state = json.loads((folder / "status.json").read_text())
    assert (state["state"], state["step"], state["method"]) == ("failed", 0, "source")
    assert (state["code"], state["reason"]) == (code, reason)
    (folder / "notes.txt").write_text("mine")
    (folder / "model.pt").write_text("mine too")
    assert train("train_source", config) == 0
    assert metrics(folder) == metrics(tmp_path / "whole")
    assert differing(weights(tmp_path / "whole"), weights(folder)) == 0
    assert (folder / "notes.txt").read_text() == "mine"
    assert status(folder) == ("finished", 10)


def test_a_failure_after_a_checkpoint_keeps_the_folder_in_use(tmp_path, monkeypatch, capsys):
    config, folder = tiny_config(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        raise_at(patch, 8, FAILURES[2])
        assert fail(lambda: train("train_source", config), capsys)[0] == 2
    assert status(folder) == ("failed", 5)
    code, reason = fail(lambda: train("train_source", config), capsys)
    assert code == 2
    assert "is used; add --resume" in reason
    assert status(folder) == ("failed", 5)
    assert train("train_source", config, "--resume") == 0
    assert status(folder) == ("finished", 10)


def test_a_refused_run_says_nothing_in_the_folder_of_another(tmp_path, monkeypatch, capsys):
    config, folder = tiny_config(tmp_path), tmp_path / "run"
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_source", config) == 143
    before = (folder / "status.json").read_bytes()
    for arguments in ([], ["--resume", "seed=5"], ["--resume", "data.source.name=mnist"]):
        assert fail(lambda a=arguments: train("train_source", config, *a), capsys)[0] == 2
        assert (folder / "status.json").read_bytes() == before
    killed = json.dumps({**json.loads(before), "state": "running", "step": 0})
    (folder / "status.json").write_text(killed)
    for file in (folder / "checkpoints").iterdir():
        file.unlink()
    reason = fail(lambda: train("train_source", config), capsys)[1]
    assert "is used; add --resume" in reason  # it may be a run that is alive


def test_a_number_that_is_not_finite_is_not_saved(tmp_path, capsys):
    """In whatever object it is; the checkpoint before stays."""
    counting = Counting(tiny_config(tmp_path, save_every=2))

    def during(step):
        if step == 5:
            counting.counter.mean.fill_(float("nan"))

    code, reason = fail(lambda: counting.loop(during), capsys)
    assert code == 3
    assert reason.startswith("step 6: the counter's mean is not finite; lower optim.lr, ")
    assert reason.endswith("--allow-change, or start again in another out_dir")
    assert checkpoints(tmp_path / "run") == [2, 4]
    assert status(tmp_path / "run") == ("failed", 4)


def test_after_a_damaged_checkpoint_two_good_ones_are_kept(tmp_path):
    file, folder = tiny_config(tmp_path, save_every=3, steps=20), tmp_path / "run"
    counting = Counting(file)
    with pytest.raises(SystemExit):
        counting.loop(lambda step: signal.raise_signal(signal.SIGTERM) if step == 10 else None)
    assert checkpoints(folder) == [9, 10]
    newest = folder / "checkpoints/step_00000010.pt"
    newest.write_bytes(newest.read_bytes()[:1000])
    again, seen = Counting(file, resume=True), []
    assert again.start == 9
    again.loop(after=lambda step: seen.append(checkpoints(folder)))
    assert seen[1] == [9, 10]  # after step 11: nothing is removed before something is saved
    assert seen[3] == [9, 12]  # after step 13
    assert [counted(folder, step) for step in (18, 20)] == [18, 20]


# --- end_after


@pytest.mark.parametrize("end", [None, 4], ids=["control", "ends early"])
def test_the_step_a_run_ends_after_is_its_last(tmp_path, end):
    """It is saved, logged, evaluated and drawn as the last of `config.steps` is."""
    every = {"steps": 6, "eval_every": 4, "log_every": 1000, "save_every": 1000}
    counting = Counting(street_config(tmp_path, "train_source", **every))
    run, folder, last = counting.run, tmp_path / "run", end or 6

    def after(step):
        if step == end:
            assert not run.due(step, 1000)  # control
            run.end_after(step)
            assert run.due(step, 1000)
            run.log.flush(step)

    assert counting.loop(after=after)[-1] == last
    assert run.finish(counting.domains) == 0
    assert checkpoints(folder) == [last]
    assert counted(folder, last) == last
    assert [line["step"] for line in metrics(folder) if "cls_loss" in line] == [last]
    evaluated = [line["step"] for line in metrics(folder) if "cls_loss" not in line]
    assert evaluated == sorted({4, last})
    assert [file.name for file in (folder / "pictures").iterdir()] == [f"step_{last:08d}.png"]
    assert summary(folder)["steps"] == summary(folder)["target"]["last"]["step"] == last
    assert status(folder) == ("finished", last)


def test_a_run_that_has_ended_takes_no_step(tmp_path):
    counting = Counting(tiny_config(tmp_path, steps=2))
    counting.run.end_after(0)
    assert counting.loop() == []


# --- what is written without being asked for


def test_the_drawn_images_are_listed(tmp_path):
    """A script opens its domains and begins; it cannot forget the lists."""
    file = tiny_config(tmp_path)
    with_labels = Counting(file, "data.target_labeled=2")
    text = (tmp_path / "run/target_labeled.txt").read_text()
    assert text == with_labels.domains.lists["target_labeled.txt"]
    assert len(text.splitlines()) >= len(with_labels.domains.target_labeled) == 20
    Counting(file, f"out_dir={tmp_path}/without")
    assert not list((tmp_path / "without").glob("*.txt"))  # control


def test_the_drawn_images_of_fine_tuning_are_listed(tmp_path):
    assert train("finetune", finetune_config(tmp_path), "steps=1", "head_steps=1") == 0
    assert {file.name for file in (tmp_path / "run").glob("*.txt")} == {"train.txt", "val.txt"}


@pytest.mark.parametrize("commit", ["1234567890-dirty", None])
def test_the_summary_names_the_commit(tmp_path, monkeypatch, commit):
    monkeypatch.setattr(run_module, "code_version", lambda: commit)
    assert train("train_source", tiny_config(tmp_path), "steps=1") == 0
    assert "commit" in summary(tmp_path / "run")
    assert summary(tmp_path / "run")["commit"] == commit


@pytest.mark.skipif(shutil.which("git") is None, reason="there is no git")
def test_the_commit_is_that_of_the_code(tmp_path, monkeypatch):
    """Of a repository that begins here; a folder of one that begins above is not described."""
    file = tmp_path / "project" / "common" / "provenance.py"
    file.parent.mkdir(parents=True)
    file.write_text("")
    monkeypatch.setattr(provenance, "__file__", str(file))
    for name in [name for name in os.environ if name.startswith("GIT_")]:  # within a hook of git
        monkeypatch.delenv(name)

    def git(folder: Path, *words: str) -> str:
        who = ["-c", "user.name=tester", "-c", "user.email=tester@localhost"]
        command = ["git", "-C", str(folder), *who, *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git(tmp_path, "init", "--quiet")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "--quiet", "--message", "above")
    assert provenance.code_version() is None
    project = tmp_path / "project"
    git(project, "init", "--quiet")
    assert provenance.code_version() is None  # no commit yet
    git(project, "add", ".")
    git(project, "commit", "--quiet", "--message", "here")
    commit = git(project, "rev-parse", "HEAD")[:10]
    assert provenance.code_version() == commit
    file.write_text("changed")
    assert provenance.code_version() == f"{commit}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # without git
    assert provenance.code_version() is None


# --- what is refused


@pytest.fixture
def begin_and_wait():
    """`begin_and_wait(file)` begins a run in a fork, which waits to be killed: its process id."""
    forks = []

    def begin(file: Path) -> int:
        ready, begun = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                counting = Counting(file)
                os.write(begun, b"1")
                signal.pause()
                counting.loop()
            finally:
                os._exit(1)
        forks.append(pid)
        os.close(begun)
        assert os.read(ready, 1) == b"1"
        os.close(ready)
        return pid

    yield begin
    for pid in forks:
        with contextlib.suppress(ChildProcessError):  # the test has ended it
            if os.waitpid(pid, os.WNOHANG) == (0, 0):
                kill(pid)


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


def test_two_runs_in_one_folder(tmp_path, begin_and_wait):
    """The second is refused with the name of the first; after a SIGKILL the folder is free."""
    file = tiny_config(tmp_path)
    first = begin_and_wait(file)
    before = {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != ".lock"}
    match = rf"run is in use by another run \(process {first} on {socket.gethostname()}\); wait"
    for keys, resume in (([], True), (["seed=1"], True), ([], False)):
        with pytest.raises(UserError, match=match) as error:
            Counting(file, *keys, resume=resume)
        assert error.value.code == 2
    assert Counting(file, resume=True, dry_run=True).loop() == [1]  # it needs no lock
    now = {p: p.read_bytes() for p in (tmp_path / "run").iterdir() if p.name != ".lock"}
    assert now == before
    kill(first)
    assert Counting(file, resume=True).loop() == [*range(1, 11)]


def test_two_runs_that_start_at_once(tmp_path, begin_and_wait):
    """Both find the folder empty; the second to begin is refused, even when the first has ended."""
    file = tiny_config(tmp_path)
    config = load_run_config(Config, str(file))
    arguments = SimpleNamespace(resume=False, dry_run=False, all=False, command="python x.py")
    second = Run(config, arguments)
    model = build_model(config, second.open_domains().classes)
    first = begin_and_wait(file)
    with pytest.raises(UserError, match=rf"in use by another run \(process {first} on"):
        second.begin(model=model)
    kill(first)
    second = Run(load_run_config(Config, f"{file}", [f"out_dir={tmp_path}/other"]), arguments)
    second.open_domains()
    assert in_a_fork(lambda: Counting(file, f"out_dir={tmp_path}/other").loop()) == 0
    with pytest.raises(UserError, match=r"another run has begun in \S+other; choose another"):
        second.begin(model=model)


# --- what is left of a run


def finished_run(tmp_path: Path) -> tuple[Path, Path]:
    """(config, folder) of a run of ten steps."""
    file = tiny_config(tmp_path)
    counting = Counting(file)
    counting.loop()
    assert counting.run.finish(counting.domains) == 0
    return file, tmp_path / "run"


def lose(*names: str):
    def act(folder: Path) -> None:
        for name in names:
            (folder / name).unlink()

    return act


def damage(name: str, content: bytes = b"x"):
    return lambda folder: (folder / name).write_bytes(content)


LOSSES = {
    "summary": lose("summary.json"),
    "damaged summary": damage("summary.json", b'{"cl\xff'),
    "model": lose("model.pt"),
    "model and hash": lose("model.pt", "model.pt.sha256"),
    "damaged model": damage("model.pt"),
    "both": lose("summary.json", "model.pt"),
}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_finished_run_writes_anew_what_it_lost(tmp_path, loss):
    file, folder = finished_run(tmp_path)
    before, model = summary(folder), (folder / "model.pt").read_bytes()
    LOSSES[loss](folder)
    again = Counting(file, resume=True)
    assert again.start == 10
    assert again.loop() == []
    assert again.run.finish(again.domains) == 0
    assert {**summary(folder), "seconds": 0} == {**before, "seconds": 0}
    assert (folder / "model.pt").read_bytes() == model
    with pytest.raises(SystemExit) as stop:  # control: now it is finished
        Counting(file, resume=True)
    assert stop.value.code == 0


def test_a_finished_run_needs_no_checkpoints(tmp_path):
    """They may be removed to save space, unless something else is lost."""
    file, folder = finished_run(tmp_path)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(SystemExit) as stop:
        Counting(file, resume=True)
    assert stop.value.code == 0
    (folder / "summary.json").unlink()
    with pytest.raises(UserError, match="its checkpoints are gone") as error:
        Counting(file, resume=True)
    assert error.value.code == 4


@pytest.mark.parametrize("status_too", [False, True])
def test_a_run_whose_checkpoints_are_gone_does_not_start_anew(tmp_path, status_too):
    file = tiny_config(tmp_path)
    counting = Counting(file)
    with pytest.raises(SystemExit):
        counting.loop(lambda step: signal.raise_signal(signal.SIGTERM) if step == 7 else None)
    folder = tmp_path / "run"
    shutil.rmtree(folder / "checkpoints")
    if status_too:
        (folder / "status.json").unlink()
    before = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert folder / "model.pt" in before
    with pytest.raises(UserError, match="its checkpoints are gone; restore them, or") as error:
        Counting(file, resume=True)
    assert error.value.code == 4
    now = {p: p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}
    assert now == before


def test_a_run_killed_before_its_first_checkpoint_removes_no_model(tmp_path):
    file = tiny_config(tmp_path)
    counting = Counting(file)
    with pytest.raises(ZeroDivisionError):
        counting.loop(after=lambda step: 1 / 0 if step == 4 else None)  # evaluated, not saved
    model = (tmp_path / "run/model.pt").read_bytes()
    again = Counting(file, resume=True)
    assert again.start == 0
    assert (tmp_path / "run/model.pt").read_bytes() == model
    again.loop()
    steps = [line["step"] for line in metrics(tmp_path / "run") if "cls_loss" not in line]
    assert steps == [4, 8, 10]  # each evaluation once


def test_what_removed_checkpoints_leave_is_removed(tmp_path):
    """A kill may leave the hash of a removed checkpoint, and files that were being written."""
    file, folder = finished_run(tmp_path)
    (folder / "summary.json").unlink()
    checkpoint_folder = folder / "checkpoints"
    for name in ("step_00000003.pt.sha256", ".step_00000003.pt.77.tmp", "mine.pt.sha256"):
        (checkpoint_folder / name).write_text("x")
    (checkpoint_folder / ".folder.tmp").mkdir()
    Counting(file, resume=True)
    names = [f"step_{step:08d}.pt{end}" for step in (5, 10) for end in ("", ".sha256")]
    assert {p.name for p in checkpoint_folder.iterdir()} == {
        *names,
        "mine.pt.sha256",
        ".folder.tmp",
    }


def test_folders_with_the_names_of_checkpoints_are_left_alone(tmp_path):
    file = tiny_config(tmp_path, save_every=2)
    names = ("step_00000001.pt", "step_00000099.pt", "step_00000002.pt.sha256")
    counting = Counting(file)
    for name in names:
        (tmp_path / "run/checkpoints" / name).mkdir(parents=True)
    with pytest.raises(UserError, match=r"step_00000002\.pt: cannot be written") as error:
        counting.loop()
    assert error.value.code == 5
    (tmp_path / "run/checkpoints" / names[-1]).rmdir()
    assert Counting(file, resume=True).loop() == [*range(1, 11)]
    assert all((tmp_path / "run/checkpoints" / name).is_dir() for name in names[:-1])
    assert checkpoints(tmp_path / "run") == [1, 8, 10, 99]


def test_a_drawn_list_that_is_no_text_is_refused(tmp_path):
    file = tiny_config(tmp_path)
    counting = Counting(file, "data.target_labeled=2")
    counting.loop()
    drawn = tmp_path / "run/target_labeled.txt"
    drawn.write_bytes(drawn.read_bytes()[:-2] + b"\xff\n")
    with pytest.raises(UserError, match=r"target_labeled\.txt is gone, or was drawn from other"):
        Counting(file, "data.target_labeled=2", resume=True)


def test_another_machine_is_told(tmp_path, monkeypatch, capsys):
    file = tiny_config(tmp_path)
    machines = iter(["a desk", "a desk", "a server"])
    monkeypatch.setattr(run_module, "describe_machine", lambda device: next(machines))

    def stopped(step: int, **flags) -> Counting:
        counting = Counting(file, **flags)
        with pytest.raises(SystemExit):
            counting.loop(lambda s: signal.raise_signal(signal.SIGTERM) if s == step else None)
        return capsys.readouterr().out

    stopped(2)
    assert "warning" not in stopped(4, resume=True)  # control
    last = Counting(file, resume=True)
    assert re.search(
        r"warning: \S+run was trained on a desk, and now on a server: the result may differ",
        capsys.readouterr().out,
    )
    last.loop()
    last.run.finish(last.domains)
    assert summary(tmp_path / "run")["machine"] == "a desk; a server"


@pytest.mark.parametrize("kind", ["file", "read only"])
def test_an_out_dir_that_cannot_be_written(tmp_path, kind):
    out_dir = {
        "file": tmp_path / "config.yaml" / "run",
        "read only": Path("/proc/run"),
    }[kind]
    file = tiny_config(tmp_path, out_dir=out_dir)
    with pytest.raises(UserError, match=r"out_dir|cannot be written") as error:
        Counting(file)
    assert error.value.code in (2, 5)


def test_a_disk_that_is_full_at_a_checkpoint(tmp_path):
    """Exit 5; the run goes on from the checkpoint before, and no temporary is left."""
    file = tiny_config(tmp_path, save_every=3)

    def run() -> None:
        def after(step):
            if step == 5:
                limit = (100_000, resource.RLIM_INFINITY)
                resource.setrlimit(resource.RLIMIT_FSIZE, limit)

        Counting(file).loop(after=after)

    assert in_a_fork(run) == 5
    folder = tmp_path / "run"
    assert checkpoints(folder) == [3]
    assert not list(folder.rglob(".*.tmp"))
    assert status(folder)[1] == 3
    again = Counting(file, resume=True)
    assert (again.start, int(again.counter.steps)) == (3, 3)


def test_a_checkpoint_does_not_grow_with_the_figures(tmp_path):
    """metrics.jsonl has them all; a checkpoint has what the choice of a step needs."""
    file = street_config(tmp_path, "train_source", eval_every=1)
    counting = Counting(file)
    counting.loop()
    counting.run.finish(counting.domains)
    folder = tmp_path / "run"
    history = weights(folder, "checkpoints/step_00000010.pt")["history"]
    assert [entry["step"] for entry in history] == [*range(1, 11)]
    whole = {entry["step"] for entry in history if "source_val" in entry}
    assert whole <= {entry["step"] for entry in summary(folder)["target"].values()}
    assert 10 in whole
    before = summary(folder)
    (folder / "summary.json").unlink()
    again = Counting(file, resume=True)
    again.run.finish(again.domains)
    assert {**summary(folder), "seconds": 0} == {**before, "seconds": 0}


def test_state_that_is_not_named_is_refused(tmp_path):
    """The check itself is tested with training/state.py; here that a run makes it."""
    config = load_run_config(Config, str(tiny_config(tmp_path)))
    run = Run(
        config, SimpleNamespace(resume=False, dry_run=False, all=False, command="python x.py")
    )
    model = build_model(config, run.open_domains().classes)
    forgotten = torch.nn.Linear(1, 1)
    with pytest.raises(UserError, match="forgotten"):
        run.begin(model=model)
    assert not (tmp_path / "run").exists()
    assert run.begin(model=model, forgotten=forgotten) == 0


def test_the_folder_of_another_method_is_named_as_such(tmp_path):
    """With and without --resume, which would not help."""
    config = tiny_config(tmp_path)
    assert train("train_source", config) == 0
    for arguments in ([], ["--resume"]):
        with pytest.raises(UserError, match=r"is a run of method source, not dann; choose another"):
            train("train_dann", config, *arguments)
    with pytest.raises(UserError, match="is used; add --resume"):  # control
        train("train_source", config)


def test_the_commit_is_that_of_the_start(tmp_path, monkeypatch):
    """A commit during the run does not change it; a resume by other code is named too."""
    commits = iter(["first", "second", "third"])
    monkeypatch.setattr(run_module, "code_version", lambda: next(commits))
    config = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_source", config) == 128 + signal.SIGTERM
    assert train("train_source", config, "--resume") == 0
    assert summary(tmp_path / "run")["commit"] == "first, second"
    assert train("train_source", config, f"out_dir={tmp_path}/other") == 0
    assert summary(tmp_path / "other")["commit"] == "third"


def test_a_state_created_after_begin_is_refused(tmp_path):
    """`run.begin` cannot know it; the first step does not begin."""
    text = (ROOT / "train_source.py").read_text()
    line = "    evaluation = domains.evaluation()\n"
    assert line in text
    script = tmp_path / "train_late.py"
    script.write_text(text.replace(line, line + "    projector = torch.nn.Linear(2, 2)\n"))
    with pytest.raises(UserError, match=r"projector \(Linear\) has a state that is not saved"):
        load_script(script).main(["--config", str(tiny_config(tmp_path))])
