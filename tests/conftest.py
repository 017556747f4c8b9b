"""What every test shares: one thread, a working directory of its own, digits drawn once."""

import dataclasses
import functools
import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the commands, too: tests run side by side

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
START_FOLDER = Path.cwd()  # tests run in folders of their own
REAL_DATA = Path(os.environ["DA_DATA"]).resolve() if os.environ.get("DA_DATA") else None
# They begin first: a file is one process's, and none should be left alone with one in the end.
LONG_FILES = ("torchrun", "training", "shot", "ranks", "method", "pseudo", "resume", "finetune")
sys.path.insert(0, str(ROOT))

from common import errors  # noqa: E402
from data import drawn, drawn_street, segmentation  # noqa: E402
from tests import helpers  # noqa: E402


def pytest_addoption(parser):
    group = parser.getgroup("conformance kit (tests/test_method.py)")
    group.addoption("--script", help="the training script to try; default: all of the project")
    group.addoption("--config", nargs="+", help="its yaml files, and key=value overrides")
    parser.addoption("--slow", action="store_true", help="run the tests marked slow, too")


def pytest_collection_modifyitems(config, items):
    order = {f"test_{name}.py": number for number, name in enumerate(LONG_FILES)}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    if config.getoption("--slow"):
        return
    left_out = ["slow"] if config.getoption("--script") else ["slow", "covered"]
    for item in items:
        for name in left_out:
            if item.get_closest_marker(name):
                item.add_marker(pytest.mark.skip(reason=f"{name}: run it with --slow"))


@pytest.fixture(scope="session", autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def no_wait_for_the_disk():
    """`os.fsync` does nothing in this process; the commands that tests start wait for the disk."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", lambda descriptor: None)
        yield


@pytest.fixture(scope="session", autouse=True)
def hang_up_ends_a_process():
    """As at a terminal. Under nohup the tests would inherit that SIGHUP is ignored."""
    signal.signal(signal.SIGHUP, signal.SIG_DFL)


@pytest.fixture(scope="session", autouse=True)
def drawn_once():
    """A session draws the built-in digits once, and few of them. `draw.__wrapped__` draws anew."""
    draw, kept = drawn.draw, {}

    @functools.wraps(draw)
    def once(split, shifted):
        key = (drawn.COUNT[split], split, shifted)
        if key not in kept:
            kept[key] = draw(split, shifted)
        return kept[key]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(drawn, "draw", once)
        patch.setattr(drawn, "COUNT", {"train": 200, "test": 30})
        patch.setattr(drawn_street, "draw", functools.cache(drawn_street.draw))
        patch.setattr(drawn_street, "COUNT", {"train": 12, "test": 5})
        yield


@pytest.fixture(scope="session", autouse=True)
def source_runs(tmp_path_factory):
    """Source models are trained once per session: `helpers.shot_config` and others."""
    helpers.source_runs = tmp_path_factory.mktemp("source_runs")


@pytest.fixture(autouse=True)
def workplace(tmp_path, monkeypatch):
    """Relative paths of a test end in its own folder.

    The machine's data sets are seen by tests marked `data` only.
    """
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("DA_DATA", raising=False)


@pytest.fixture(autouse=True)
def own_handlers():
    """The test process keeps its own signal handlers, and forgets the run of the test."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    before = {number: signal.getsignal(number) for number in numbers}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)
    errors.observe(None)


@pytest.fixture
def real_data():
    """`real_data("MNIST")`: the folder of the variable DA_DATA.

    A test whose set is not there is skipped aloud.
    """

    def root(*parts: str) -> Path:
        if REAL_DATA is None:
            pytest.skip("the variable DA_DATA is not set")
        for part in parts:
            if not (REAL_DATA / part).exists():
                pytest.skip(f"the folder of DA_DATA has no {part}")
        return REAL_DATA

    return root


@pytest.fixture
def pictures(tmp_path):
    """`pictures("photo", {"cat": 3, "dog": 2})`: a folder of seeded png files per class.

    For a number it is a flat one. The folder lies in tmp_path/images. Classes are told apart by
    their color.
    """

    def make(name: str, classes: dict[str, int] | int, side: int = 20) -> Path:
        folder = tmp_path / "images" / name
        flat = isinstance(classes, int)
        random = np.random.default_rng(sum(name.encode()))
        for number, (label, count) in enumerate({"": classes}.items() if flat else classes.items()):
            (folder / label).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                color = 120 * (np.arange(3) == number % 3)
                pixels = random.integers(0, 120, (side, side, 3)) + color
                Image.fromarray(pixels.astype(np.uint8)).save(folder / label / f"{i:03d}.png")
        return folder

    return make


@pytest.fixture
def void_streets(monkeypatch):
    """The masks of the built-in street scenes' training split are void."""
    open_street = segmentation.open_street

    def void(name, train_split):
        images = open_street(name, train_split)
        nothing = torch.full_like(images.labels, 255)
        return dataclasses.replace(images, labels=nothing) if train_split else images

    monkeypatch.setattr(segmentation, "open_street", void)


@pytest.fixture
def command(tmp_path):
    """`command("train_dann", "--config", file)` runs it: (exit code, stdout, stderr)."""

    def call(script: str, *arguments) -> tuple[int, str, str]:
        done = subprocess.run(
            [sys.executable, ROOT / f"{script}.py", *map(str, arguments)],
            cwd=tmp_path,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done.returncode, done.stdout, done.stderr

    return call
