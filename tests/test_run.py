"""The run folder: when a run saves, how it leaves, and what it writes without being asked."""

import errno
import json
import os
import shutil
import signal
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
    TRAINING,
    any_config,
    differing,
    finetune_config,
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

    def __init__(self, file: Path, *overrides: str, resume=False, dry_run=False):
        config = load_run_config(Config, str(file), overrides)
        self.config, self.run = config, Run(config, SimpleNamespace(resume=resume, dry_run=dry_run))
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

    def batches():
        for number in range(5):
            if number == 2:
                signal.raise_signal(signal.SIGTERM)
            yield number

    def during(step):
        if step == 4:
            seen.extend(counting.run.watch((10, 11), 3))  # control: without a signal all pass
            for number in counting.run.watch(batches(), 3):
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
        return max((line["step"] for line in metrics(folder)), default=0) if file.exists() else 0

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


@pytest.mark.parametrize("second", [None, *SIGNALS[:2]], ids=["once", "SIGTERM", "SIGINT"])
def test_a_second_signal_leaves_at_once(tmp_path, second):
    """It comes after a second, of whichever kind; the older checkpoint stays good."""
    file, log, folder = tiny_config(tmp_path, save_every=2), tmp_path / "log.txt", tmp_path / "run"

    def main():
        counting = Counting(file)
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
    assert Counting(file, resume=True).start == (4 if second else 5)


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
    assert reason.endswith("and go on with --resume --allow-change")
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


@pytest.mark.parametrize("script", [file.stem for file in TRAINING])
def test_several_processes_are_refused(tmp_path, monkeypatch, capsys, script):
    config = any_config(script, tmp_path)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match="WORLD_SIZE") as error:
        train(script, config)
    assert error.value.code == 2
    with pytest.raises(SystemExit) as stop:
        exit_with(lambda: train(script, config))
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("error: WORLD_SIZE")
    assert not (tmp_path / "run").exists()
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert train(script, config, "--dry-run") == 0  # control


def test_state_that_is_not_named_is_refused(tmp_path):
    """The check itself is tested with training/state.py; here that a run makes it."""
    config = load_run_config(Config, str(tiny_config(tmp_path)))
    run = Run(config, SimpleNamespace(resume=False, dry_run=False))
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
