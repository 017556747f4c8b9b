"""Trackers get what a run records, and never change or end it."""

import importlib
import json
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from PIL import Image

from common.errors import UserError
from tests.helpers import (
    differing,
    metrics,
    status,
    stop_after,
    street_config,
    tiny_config,
    train,
    train_on,
    weights,
)
from training import log, tracker
from training import run as run_module
from training.tracker import finite_numbers, open_tracker

KINDS = ("tensorboard", "wandb", "trackio")
NO_PACKAGE = "the package {} is not installed; its own tracker test needs it"

# What is used of the three packages; each call becomes a line of calls.jsonl beside the package.
FAKE = """
import json, os, pathlib

PLACE = pathlib.Path(__file__).parent.parent

def note(call, **values):
    if os.environ.get("FAIL") == call:
        raise ConnectionError("no network\\nand more lines")
    with open(PLACE / "calls.jsonl", "a") as file:
        file.write(json.dumps({"call": call, **values}) + "\\n")

class Image:
    def __init__(self, path):
        self.path = path

class Run:
    def define_metric(self, name, step_metric=None):
        note("define", name=name, step_metric=step_metric)

    def log(self, values, step=None):
        step = values.pop("step") if step is None else step
        picture = values.pop("pictures", None)
        if picture:
            return note("picture", step=step, file=picture.path)
        note("log", step=step, values=values)

    def finish(self):
        note("finish")

def init(**values):
    note("init", **values)
    return Run()

def finish():
    note("finish")

class SummaryWriter:
    def __init__(self, log_dir, purge_step):
        note("init", log_dir=log_dir, purge_step=purge_step)

    def add_text(self, name, text, step):
        note("text", text=text)

    def add_scalar(self, name, value, step):
        note("log", step=step, values={name: value})

    def add_image(self, name, pixels, step, dataformats):
        note("picture", step=step, shape=pixels.shape, dataformats=dataformats)

    def flush(self):
        pass

    def close(self):
        note("finish")
"""


@pytest.fixture
def fake(tmp_path, monkeypatch):
    """`fake("wandb")` puts a package of this name first; the returned function reads its calls."""
    place, replaced = tmp_path / "packages", {}

    def make(kind: str, text: str = FAKE):
        (place / kind).mkdir(parents=True)
        (place / kind / "__init__.py").write_text(text)
        for name in (kind, tracker.MODULES[kind]):
            replaced[name] = sys.modules.pop(name, None)
        monkeypatch.syspath_prepend(place)
        if kind == "tensorboard":  # torch's module of this name needs all of the package
            sys.modules[tracker.MODULES[kind]] = importlib.import_module(kind)
        file = place / "calls.jsonl"

        def calls(kind: str | None = None) -> list[dict]:
            lines = file.read_text().splitlines() if file.exists() else []
            found = [json.loads(line) for line in lines]
            return [call for call in found if kind in (None, call["call"])]

        return calls

    yield make
    for name, module in replaced.items():
        sys.modules.pop(name, None)
        if module is not None:
            sys.modules[name] = module


def by_place(lines: list[tuple[int, dict]]) -> dict:
    """{(step, name): value} of several lines; no place may have two values."""
    found = {}
    for step, values in lines:
        for name, value in values.items():
            assert found.setdefault((step, name), value) == value
    return found


def sent(calls: list[dict]) -> dict:
    return by_place([(call["step"], call["values"]) for call in calls if call["call"] == "log"])


def recorded(folder: Path) -> dict:
    """The numbers of metrics.jsonl as a tracker gets them."""
    numbers = [
        (
            line["step"],
            {
                name.replace(".", "/"): value
                for name, value in line.items()
                if name != "step" and type(value) in (int, float)
            },
        )
        for line in metrics(folder)
    ]
    return by_place(numbers)


@pytest.fixture(scope="module")
def plain(tmp_path_factory):
    """The folder of a run without tracker."""
    folder = tmp_path_factory.mktemp("plain")
    assert train("train_source", tiny_config(folder)) == 0
    return folder / "run"


def assert_same_training(plain: Path, run: Path) -> None:
    assert (plain / "metrics.jsonl").read_bytes() == (run / "metrics.jsonl").read_bytes()
    assert differing(weights(plain), weights(run)) == 0


def crash_at(monkeypatch, step: int) -> None:
    """Let the next run fail within step `step`, by a mistake of the code."""
    add, seen = log.Log.add, []

    def fail(self, **values):
        add(self, **values)
        seen.append(1)
        if len(seen) == step:
            raise RuntimeError("crash")

    monkeypatch.setattr(log.Log, "add", fail)


# --- what is sent


def test_the_finite_numbers_of_a_line_are_sent():
    line = {
        "step": 4,
        "lr": 0.5,
        "count": 3,
        "target.accuracy": 12.0,
        "target": {"last": {"mean_iou": 1.5, "iou": {"road": None, "sky": 2.5}}},
        "infinite": math.inf,
        "nothing": math.nan,
        "none": None,
        "text": "1.0",
        "list": [1.0],
        "flag": True,
    }
    assert finite_numbers(line) == {
        "lr": 0.5,
        "count": 3,
        "target/accuracy": 12.0,
        "target/last/mean_iou": 1.5,
        "target/last/iou/sky": 2.5,
    }


@pytest.mark.parametrize("kind", KINDS)
def test_a_tracker_gets_every_line_and_changes_nothing(tmp_path, fake, plain, kind):
    calls = fake(kind)
    assert train("train_source", tiny_config(tmp_path, tracker=kind)) == 0
    assert sent(calls()) == recorded(tmp_path / "run")
    steps = {step for step, _ in sent(calls())}
    assert steps == {4, 8, 10}  # control: not only what both lack
    assert (10, "target/accuracy") in sent(calls())
    assert (10, "cls_loss") in sent(calls())
    (begin,), (_,) = calls("init"), calls("finish")
    assert calls()[-1]["call"] == "finish"
    if kind == "tensorboard":
        assert begin["log_dir"] == str(tmp_path / "run/tensorboard")
        assert "    optim.lr: 0.02\n" in calls("text")[0]["text"]
    else:
        assert begin["config"]["optim.lr"] == 0.02
        assert begin["project"] == "domain-adaptation"
    assert_same_training(plain, tmp_path / "run")


def test_wandb_shows_all_over_the_steps_of_the_run(tmp_path, fake):
    calls = fake("wandb")
    open_tracker("wandb", tmp_path, 0, {})
    assert {"call": "define", "name": "*", "step_metric": "step"} in calls()


def test_the_project_may_be_set_outside(tmp_path, fake, monkeypatch):
    calls = fake("wandb")
    monkeypatch.setenv("WANDB_PROJECT", "mine")
    open_tracker("wandb", tmp_path, 0, {})
    assert calls("init")[0]["project"] == "mine"


def test_the_pictures_of_a_run_are_sent(tmp_path, fake):
    calls = fake("wandb")
    config = street_config(tmp_path, "train_source", tracker="wandb", steps=1)
    assert train("train_source", config) == 0
    file = tmp_path / "run/pictures/step_00000001.png"
    assert [(call["step"], call["file"]) for call in calls("picture")] == [(1, str(file))]
    assert file.is_file()


@pytest.mark.parametrize("kind", ["tensorboard", "trackio"])
def test_a_picture_has_its_step(tmp_path, fake, kind):
    calls = fake(kind)
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    open_tracker(kind, tmp_path, 0, {}).picture(7, tmp_path / "a.png")
    (call,) = calls("picture")
    expected = {"file": str(tmp_path / "a.png")}
    if kind == "tensorboard":
        expected = {"shape": [3, 5, 3], "dataformats": "HWC"}
    assert call == {"call": "picture", "step": 7, **expected}


def test_a_dry_run_sends_nothing(tmp_path, fake):
    calls = fake("wandb")
    assert train("train_source", tiny_config(tmp_path, tracker="wandb"), "--dry-run") == 0
    assert calls() == []


def test_process_0_alone_sends(tmp_path, fake):
    calls = fake("wandb")
    config = tiny_config(tmp_path, tracker="wandb", steps=4)
    train_on(2, "train_source", config)
    assert len(calls("init")) == len(calls("finish")) == 1
    assert sent(calls()) == recorded(tmp_path / "run")


# --- a run that goes on


def test_a_resumed_run_goes_on_in_the_same_tracked_run(tmp_path, fake, plain, monkeypatch):
    """It begins without tracker; a tracker may be set when it goes on."""
    calls, config = fake("wandb"), tiny_config(tmp_path)
    for steps, words in ((3, ()), (4, ("--resume", "tracker=wandb"))):
        with monkeypatch.context() as patch:
            stop_after(patch, steps)
            assert train("train_source", config, *words) == 143
    assert calls()[-1]["call"] == "finish"  # of the stopped run
    assert train("train_source", config, "--resume", "tracker=wandb") == 0
    assert sent(calls()) == recorded(tmp_path / "run")
    first, second = calls("init")
    assert first["id"] == second["id"]
    assert second["resume"] == "allow"
    assert len(calls("finish")) == 2
    assert_same_training(plain, tmp_path / "run")


@pytest.mark.parametrize(("kind", "name"), [("wandb", "id"), ("trackio", "name")])
def test_a_run_that_starts_anew_is_a_new_tracked_run(tmp_path, fake, kind, name):
    calls = fake(kind)
    for step in (0, 5, 0):
        open_tracker(kind, tmp_path, step, {})
    first, second, third = (call[name] for call in calls("init"))
    assert first == second != third
    assert calls("init")[1]["resume"] == "allow"


def test_tensorboard_forgets_later_steps(tmp_path, fake):
    calls = fake("tensorboard")
    for step in (0, 7):
        open_tracker("tensorboard", tmp_path, step, {})
    assert [call["purge_step"] for call in calls("init")] == [1, 8]


# --- a tracker that fails


WARNING = (
    "warning: tracker: {} failed (ConnectionError: no network); the run goes on without it, "
    "and metrics.jsonl has all figures"
)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("call", ["init", "log", "picture", "finish"])
def test_a_failure_is_one_warning(tmp_path, fake, monkeypatch, kind, call):
    calls, told = fake(kind), []
    monkeypatch.setenv("FAIL", call)
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    opened = open_tracker(kind, tmp_path, 0, {}, told.append)
    for step in (1, 2):
        opened.log(step, {"loss": 1.0})
        opened.picture(step, tmp_path / "a.png")
    opened.finish()
    opened.finish()
    assert told == [WARNING.format(kind)]
    sent_before = {"init": 0, "log": 0, "picture": 1, "finish": 2}[call]
    assert len(calls("log")) == sent_before  # nothing after the failure


@pytest.mark.parametrize("call", ["init", "log"])
def test_a_failing_tracker_does_not_end_the_run(tmp_path, fake, plain, monkeypatch, capsys, call):
    fake("wandb")
    monkeypatch.setenv("FAIL", call)
    assert train("train_source", tiny_config(tmp_path, tracker="wandb")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line for line in lines if "tracker:" in line] == [WARNING.format("wandb")]
    assert status(tmp_path / "run")["state"] == "finished"
    assert_same_training(plain, tmp_path / "run")


def test_a_summary_is_there_before_the_tracker_ends(tmp_path, fake, monkeypatch):
    fake("wandb")
    seen = []
    monkeypatch.setattr(
        tracker._Wandb, "finish", lambda self: seen.append(status(tmp_path / "run")["state"])
    )
    assert train("train_source", tiny_config(tmp_path, tracker="wandb", steps=1)) == 0
    assert seen == ["finished"]


# --- without the package


def block(monkeypatch, kind: str) -> None:
    """Let the import of a package fail, as where it is not installed."""
    monkeypatch.setitem(sys.modules, kind, None)
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)


@pytest.mark.parametrize("words", [(), ("--dry-run",)])
@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_package_is_told_at_once(tmp_path, monkeypatch, kind, words):
    block(monkeypatch, kind)
    opened = []
    monkeypatch.setattr(run_module, "open_domains", lambda *_: opened.append(1))
    with pytest.raises(UserError) as error:
        train("train_source", tiny_config(tmp_path, tracker=kind), *words)
    assert str(error.value) == (
        f"tracker: {kind} needs the package {kind}; pip install {kind}, or set tracker: none"
    )
    assert not opened
    assert not (tmp_path / "run").exists()


def test_a_folder_of_its_name_is_no_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", ModuleType("wandb"))  # as that of a folder
    with pytest.raises(UserError, match="needs the package wandb; pip install wandb"):
        tracker.import_tracker("wandb")


@pytest.mark.parametrize("text", ["raise TypeError('a\\nb')", "import no_such_package"])
def test_a_package_that_cannot_be_imported_is_told(fake, text):
    fake("trackio", text)
    with pytest.raises(UserError, match=r"trackio cannot be imported \((Type|ModuleNotFound)Error"):
        tracker.import_tracker("trackio")


def test_a_run_without_tracker_imports_none(tmp_path, monkeypatch):
    for kind in KINDS:
        block(monkeypatch, kind)
    assert train("train_source", tiny_config(tmp_path, steps=1)) == 0
    assert not list((tmp_path / "run").glob("t*"))


# --- the packages themselves


def test_tensorboard_shows_each_figure_once(tmp_path, monkeypatch):
    """A run that breaks at step 7 goes on from step 5; what it wrote of step 6 is replaced."""
    pytest.importorskip("tensorboard", reason=NO_PACKAGE.format("tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    config = tiny_config(tmp_path, tracker="tensorboard", log_every=2)
    with monkeypatch.context() as patch:
        crash_at(patch, 7)
        with pytest.raises(RuntimeError, match="crash"):
            train("train_source", config)
    assert metrics(tmp_path / "run")[-1]["step"] == 6
    Image.new("RGB", (5, 3)).save(tmp_path / "a.png")
    assert train("train_source", config, "--resume", "optim.lr=0.04", "--allow-change") == 0
    folder = tmp_path / "run/tensorboard"
    assert len(list(folder.iterdir())) == 2
    shown = EventAccumulator(str(folder), {"scalars": 0}).Reload()
    events = [(tag, event) for tag in shown.Tags()["scalars"] for event in shown.Scalars(tag)]
    expected = recorded(tmp_path / "run")
    assert len(events) == len(expected)
    for tag, event in events:
        assert event.value == float(torch.tensor(expected[event.step, tag], dtype=torch.float32))
    rates = {event.step: event.value for event in shown.Scalars("lr")}
    assert rates[6] > rates[4]  # control: of the run that goes on
    text = shown.Tensors("config/text_summary")[-1].tensor_proto.string_val[0].decode()
    assert "optim.lr: 0.04" in text


def test_tensorboard_shows_a_picture(tmp_path):
    pytest.importorskip("tensorboard", reason=NO_PACKAGE.format("tensorboard"))
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    Image.new("RGB", (5, 3), "red").save(tmp_path / "a.png")
    opened = open_tracker("tensorboard", tmp_path, 0, {})
    opened.picture(3, tmp_path / "a.png")
    opened.finish()
    (event,) = EventAccumulator(str(tmp_path / "tensorboard")).Reload().Images("pictures")
    assert (event.step, event.width, event.height) == (3, 5, 3)


def test_wandb_offline(tmp_path, command, monkeypatch):
    pytest.importorskip("wandb", reason=NO_PACKAGE.format("wandb"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    config = street_config(tmp_path, "train_source", tracker="wandb", steps=2)
    code, out, err = command("train_source", "--config", config)
    assert code == 0, err
    assert "warning: tracker" not in out
    name = (tmp_path / "run/tracker_id").read_text().strip()
    (file,) = (tmp_path / "run/wandb").glob(f"offline-run-*-{name}/run-{name}.wandb")
    for word in (b"target/mean_iou", b"cls_loss", b"optim.lr", b"pictures"):
        assert word in file.read_bytes()


def test_trackio_locally(tmp_path, command, monkeypatch):
    pytest.importorskip("trackio", reason=NO_PACKAGE.format("trackio"))
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    config = street_config(tmp_path, "train_source", tracker="trackio", steps=2)
    code, out, err = command("train_source", "--config", config)
    assert code == 0, err
    assert "warning: tracker" not in out
    stored = b"".join(p.read_bytes() for p in (tmp_path / "trackio").rglob("*") if p.is_file())
    name = (tmp_path / "run/tracker_id").read_text().strip()
    for word in (f"run-{name}".encode(), b"target/mean_iou", b"cls_loss", b"optim.lr"):
        assert word in stored
    assert list((tmp_path / "trackio").rglob("*.png"))
