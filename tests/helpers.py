"""Tiny runs of the real scripts, in this process."""

import dataclasses
import hashlib
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch.distributed import TCPStore

from common.errors import UserError, exit_with
from training import evaluation, log
from training import run as run_module

ROOT = Path(__file__).resolve().parents[1]
SOURCE_STREET = "source: {name: drawn_street, crop: [64, 64]}, "
TASKS = ("classification", "segmentation")
source_runs = Path()  # conftest.py: the folder of source models that many tests start from


def page_of(script: Path) -> Path:
    """The page in docs/ of a script of the project; a script under work has none."""
    return ROOT / f"docs/{re.sub('^(train|adapt)_', '', script.stem)}.md"


def load_script(path: Path):
    """A fresh module of a script, as `python path` would see it."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[path.stem] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


TRAINING = [*sorted(ROOT.glob("train_*.py")), ROOT / "finetune.py", ROOT / "adapt_online.py"]
# Those that take one config, with both domains: their Config does not change the section `data`.
# They are told by their text, so that a script under work breaks its own tests alone.
# `any_config` makes a config for each of TRAINING.
SCRIPTS = [path.stem for path in TRAINING if not re.search(r"^    data: ", path.read_text(), re.M)]
SOURCE_FREE = ("train_shot", "train_aad")  # they start from a model, which they train here
ONLY_CLASSIFICATION = ("train_aad",)
RUNS = [
    (path.stem, task)
    for task in TASKS
    for path in TRAINING
    if task == "classification" or path.stem not in ONLY_CLASSIFICATION
]


def others_slow(values, always: tuple) -> list:
    """Values of a parameter, of which all but `always` run with --slow only."""
    return [
        value if value in always else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]


def tiny_config(folder: Path, **changes) -> Path:
    """A config of ten steps on the built-in digits; `changes` are top-level lines of yaml.

    Images have 16 px, which takes half the time of 28 px.
    """
    lines = {
        "out_dir": folder / "run",
        "steps": 10,
        "eval_every": 4,
        "save_every": 5,
        "log_every": 4,
        "data": "{source: {name: drawn_digits}, target: {name: drawn_digits_shifted}, "
        "batch: 8, eval_batch: 20, select_images: 30, "
        f"root: {folder}/images, cache: {folder}/cache, "
        "size: 16, augment: {affine: {degrees: 10, scale: [0.9, 1.1]}, "
        "photometric: {gain: [0.5, 1.5], noise: 0.1}}}",
        "optim": "{lr: 0.02}",
        **changes,
    }
    file = folder / "config.yaml"
    file.write_text("".join(f"{key}: {value}\n" for key, value in lines.items()))
    return file


STREET_KEYS = {  # of a method on the street scenes; a script that is not named takes its defaults
    "train_dann": {
        "feature_layers": "[layer3, layer4]",
        "layer_weights": "[0.5, 1]",
        "disc_hidden": 32,
    },
    "train_mmd": {"feature_layers": "[layer3, layer4]", "coral_weight": 1},
    "train_advent": {"disc_hidden": 8},
    "train_adda": {
        "feature_layer": "layer4",
        "feature_locations": "true",
        "disc_hidden": 32,
        "source_steps": 3,
    },
    "train_mic": {"mix": "classmix", "mask_block": 16, "threshold": 0.1},
    "train_pseudo": {
        "mix": "classmix",
        "strong_augment": "{jitter: {gamma: [0.7, 1.5]}, cutout: {}}",
    },
}


def street_config(folder: Path, script: str, **changes) -> Path:
    """`tiny_config` on the built-in street scenes, with an auxiliary head."""
    lines = {
        "data": f"{{task: segmentation, {SOURCE_STREET}"
        "target: {name: drawn_street_dusk, crop: [64, 64]}, "
        "batch: 2, eval_batch: 3, select_images: 4, "
        f"root: {folder}/images, cache: {folder}/cache, "
        "augment: {zoom: {scale: [0.8, 1.5]}, flip: {}, jitter: {gamma: [0.7, 1.5]}}}",
        "model": "{backbone: mobilenet_v2, output_stride: 16, aux_weight: 0.1}",
        **STREET_KEYS.get(script, {}),
        **changes,
    }
    return tiny_config(folder, **lines)


def config_of(task: str, folder: Path, script: str, **changes) -> Path:
    """A config of one of SCRIPTS for the task."""
    if task == "segmentation":
        return street_config(folder, script, **changes)
    return tiny_config(folder, **changes)


def _without_source(config: Path, task: str, file: Path, lines: dict) -> Path:
    """Write `config` without its source domain and with `lines` in place of its own to `file`."""
    source = {"classification": "source: {name: drawn_digits}, ", "segmentation": SOURCE_STREET}
    text = config.read_text()
    assert source[task] in text
    unchanged = [line for line in text.splitlines() if line.split(":")[0] not in lines]
    changed = (f"{key}: {value}" for key, value in lines.items())
    file.write_text("\n".join([*unchanged, *changed]).replace(source[task], ""))
    return file


def _source_run(folder: Path, task: str, changes: dict) -> Path:
    """The config of ten steps of train_source.py, and a copy of such a run in folder/source."""
    folder.mkdir(parents=True, exist_ok=True)
    model = {key: changes[key] for key in ("model",) if key in changes}
    config = config_of(task, folder, "train_source", out_dir=folder / "source", **model)
    text = config.read_text().replace(str(folder), "")
    trained = source_runs / hashlib.sha256(text.encode()).hexdigest()
    if not trained.exists():
        assert train("train_source", config) == 0
        shutil.copytree(folder / "source", trained)
    else:
        shutil.copytree(trained, folder / "source")
    return config


def shot_config(folder: Path, task: str = "classification", **changes) -> Path:
    """Ten steps of train_shot.py from a run of train_source.py, which is put into folder/source."""
    config = _source_run(folder, task, changes)
    lines = {
        "out_dir": folder / "run",
        "init_from": folder / "source",
        "centroid_every": 4,
        "strong_augment": "{photometric: {gain: [0.5, 1.5], noise: 0.2}}",
        **changes,
    }
    return _without_source(config, task, folder / "shot.yaml", lines)


def aad_config(folder: Path, task: str = "classification", **changes) -> Path:
    """Ten steps of train_aad.py from a run of train_source.py, which is put into folder/source."""
    config = _source_run(folder, task, changes)
    lines = {"out_dir": folder / "run", "init_from": folder / "source", **changes}
    return _without_source(config, task, folder / "aad.yaml", lines)


def online_config(folder: Path, task: str = "classification", **changes) -> Path:
    """Ten steps of adapt_online.py from a run of train_source.py.

    Without `init_from` this is put into folder/source. It is so unsure that all predictions are
    learned from.
    """
    if "init_from" in changes:
        config = config_of(task, folder, "train_source")
    else:
        config = _source_run(folder, task, changes)
        changes = {"init_from": folder / "source", **changes}
    lines = {"out_dir": folder / "run", "ent_margin": "null", **changes}
    file = _without_source(config, task, folder / "online.yaml", lines)
    if task == "segmentation":  # the tests' target has twelve scenes
        file.write_text(file.read_text().replace("batch: 2,", "batch: 1,"))
    return file


def finetune_config(folder: Path, task: str = "classification", **changes) -> Path:
    """Up to ten steps of finetune.py, four of them on the head, on the target's images."""
    lines = {"head_steps": 4, "finetune_lr": 0.01, "patience": 20, **changes}
    config = config_of(task, folder, "finetune")
    return _without_source(config, task, folder / "finetune.yaml", lines)


def any_config(script: str, folder: Path, task: str = "classification", **changes) -> Path:
    """A config of ten steps for any of TRAINING."""
    if script in SCRIPTS:
        return config_of(task, folder, script, **changes)
    make = {
        "train_shot": shot_config,
        "train_aad": aad_config,
        "finetune": finetune_config,
        "adapt_online": online_config,
    }
    return make[script](folder, task, **changes)


def batches_in_pieces(domains, role: str, steps: int, patch) -> dict[str, list[torch.Tensor]]:
    """The images of each step's batch: as a whole, of two processes, and in two parts.

    Args:
        domains: of `open_domains`.
        role, steps: as for `Domains.batches`.
        patch: pytest's monkeypatch.
    """
    pieces = {"whole": [x for x, *_ in domains.batches(role, 0, steps)]}
    processes = []
    for number in range(2):
        with patch.context() as environment:
            environment.setenv("WORLD_SIZE", "2")
            environment.setenv("RANK", str(number))
            processes.append([x for x, *_ in domains.batches(role, 0, steps)])
    pieces["processes"] = [torch.cat(pair) for pair in zip(*processes, strict=True)]
    halves = [x for x, *_ in dataclasses.replace(domains, parts=2).batches(role, 0, steps)]
    pieces["parts"] = [torch.cat(halves[2 * k : 2 * k + 2]) for k in range(steps)]
    return pieces


def train(script: str, config: Path, *arguments: str) -> int:
    """Run a script's main; a finished run's exit 0 comes back as 0."""
    numbers = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
    handlers = {number: signal.getsignal(number) for number in numbers}
    try:
        return load_script(ROOT / f"{script}.py").main(["--config", str(config), *arguments])
    except SystemExit as stop:
        return stop.code
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def stop_after(monkeypatch, step: int, number: signal.Signals = signal.SIGTERM) -> None:
    """Send this process a signal during step `step` of the next run."""
    add, seen = log.Log.add, []

    def add_and_stop(self, **values):
        add(self, **values)
        seen.append(1)
        if len(seen) == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(log.Log, "add", add_and_stop)


def stop_within_evaluation(monkeypatch, number: int) -> list[int]:
    """Send this process a signal within the first batch of evaluation `number` of the next run.

    Returns a list that grows by one entry per labeled batch of that evaluation.
    """
    measure, confusion_matrix = evaluation.evaluate, evaluation.confusion_matrix
    seen, batches = [], []

    def counted(*arguments, **named):
        seen.append(1)
        return measure(*arguments, **named)

    def stopped(*arguments):
        if len(seen) == number:
            batches.append(1)
            if len(batches) == 1:
                os.kill(os.getpid(), signal.SIGTERM)
        return confusion_matrix(*arguments)

    monkeypatch.setattr(run_module, "evaluate", counted)
    monkeypatch.setattr(evaluation, "confusion_matrix", stopped)
    return batches


def in_a_fork(function) -> int:
    """Call the function in a fork of this process: its exit code, 0 after it returned."""
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            function()
            code = 0
        except UserError as error:
            code = error.code
        except SystemExit as stop:
            code = stop.code
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _end_as(function: Callable[[], int], log: Path) -> None:
    """End this fork with the exit code of `exit_with(function)`; its output goes to `log`."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    code = 1
    try:
        exit_with(function)
    except SystemExit as stop:
        code = stop.code
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        os._exit(code or 0)


class Processes:
    """Forks of this process that can meet, as torchrun would start them.

    Args:
        count: of the processes.
        function: called in each of them with its number; the exit code, or None for 0.
        folder: for what each prints, in `process_<number>.log`.
    """

    def __init__(self, count: int, function: Callable[[int], int | None], folder: Path):
        self.folder, self.pids = folder, []
        place = socket.create_server(("127.0.0.1", 0), backlog=128)
        port = place.getsockname()[1]
        for number in range(count):
            pid = os.fork()
            if pid == 0:
                os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"  # it is the launcher's
                os.environ["MASTER_ADDR"] = "127.0.0.1"
                os.environ["MASTER_PORT"] = str(port)
                os.environ["RANK"] = os.environ["LOCAL_RANK"] = str(number)
                os.environ["WORLD_SIZE"] = str(count)
                _end_as(partial(function, number), folder / f"process_{number}.log")
            self.pids.append(pid)
        # After the forks: a thread of the server that holds a lock would leave it locked in them.
        self.store = TCPStore(
            "127.0.0.1",
            port,
            is_master=True,
            wait_for_workers=False,
            master_listen_fd=place.detach(),
        )

    def wait(self, seconds: float = 300) -> list[int]:
        """Their exit codes. Those that do not end in time are killed."""
        codes, end = {}, time.monotonic() + seconds
        while len(codes) < len(self.pids):
            for pid in set(self.pids) - codes.keys():
                if time.monotonic() > end:
                    os.kill(pid, signal.SIGKILL)
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    codes[pid] = os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        return [codes[pid] for pid in self.pids]

    def printed(self, number: int) -> str:
        return (self.folder / f"process_{number}.log").read_text()


def start_on(
    count: int,
    script: str,
    config: Path,
    *arguments: str,
    prepare: Callable[[int], None] = lambda number: None,
) -> Processes:
    """A run of `count` processes; `prepare` is called in each before its script begins."""
    words = ["--config", str(config), *arguments]

    def main(number: int) -> int:
        prepare(number)
        return load_script(ROOT / f"{script}.py").main(words)

    return Processes(count, main, config.parent)


def train_on(count: int, script: str, config: Path, *arguments: str, **named) -> Processes:
    """`start_on` of a run that must end well."""
    processes = start_on(count, script, config, *arguments, **named)
    codes = processes.wait()
    assert codes == [0] * count, "\n".join(processes.printed(i) for i in range(count))
    return processes


def differing(a, b) -> int:
    """How many numbers of two nested states differ; structure must agree."""
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape
        return int((a != b).sum())
    if isinstance(a, dict):
        assert list(a) == list(b)
        return sum(differing(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        return sum(map(differing, a, b))
    return int(a != b)


def weights(folder: Path, file: str = "model.pt") -> dict:
    return torch.load(folder / file, weights_only=True)


def summary(folder: Path) -> dict:
    return json.loads((folder / "summary.json").read_text())


def metrics(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def status(folder: Path) -> dict:
    return json.loads((folder / "status.json").read_text())
