"""The conformance kit: what every training script must hold, a copied one too.

    python -m pytest tests/test_method.py
    python -m pytest tests/test_method.py --script train_mine.py --config pair.yaml mine.yaml

Without --script it runs over all training scripts of the project, each with its demo config (the
file in configs/demo/ whose first line names it) at 16 px. Words such as `mine_weight=2` behind the
files override keys. Runs take a few steps on the config's own data; they write into temporary
folders.
"""

import ast
import dataclasses
import json
import math
import shlex
import signal
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from common.errors import UserError
from common.metrics import main_metric
from data import LabeledDataConfig, classification, segmentation
from data.image_set import ImageSet, Renumbered
from data.loaders import Batches
from tests.conftest import REAL_DATA, START_FOLDER
from tests.helpers import (
    ROOT,
    TRAINING,
    Processes,
    differing,
    load_script,
    metrics,
    stop_after,
    stop_within_evaluation,
    summary,
)
from tests.test_laws import imports
from training.config import load_run_config

# The project's own scripts have sharper tests for it: of these it runs with --slow alone.
covered = pytest.mark.covered
STEPS = 6
RELAX = "an override such as threshold=0.1 or a shorter warm-up after --config starts it earlier"
PARTED = 1e-5  # rounding moves no weight by as much in these steps
LAST = f"checkpoints/step_{STEPS:08d}.pt"


@dataclass(frozen=True)
class Method:
    """A script with the config that it is tried on."""

    script: Path
    files: tuple[str, ...]
    overrides: tuple[str, ...]

    @property
    def config_class(self) -> type:
        return load_script(self.script).Config

    def load(self, *overrides: str):
        return load_run_config(self.config_class, self.files, [*self.overrides, *overrides])

    def run(self, folder: Path, *arguments: str) -> int:
        """Train for a few steps in `folder`; returns the exit code."""
        handlers = {n: signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)}
        command = ["--config", *self.files, *self.overrides, *self.short(folder), *arguments]
        try:
            return load_script(self.script).main(command)
        except SystemExit as stop:
            return stop.code
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)

    def short(self, folder: Path) -> list[str]:
        """Overrides that make a run short and let it write to `folder` alone."""
        config = load_run_config(self.config_class, self.files, self.overrides)
        segments = config.data.task == "segmentation"
        keys = {
            "out_dir": folder,
            "steps": STEPS,
            "eval_every": 3,
            "save_every": 3,
            "log_every": 2,
            "data.batch": min(config.data.batch, 2 if segments else 8),
            "data.select_images": min(config.data.select_images, 8 if segments else 60),
            "data.cache": folder.parent / "cache",
            "data.root": absolute_root(config.data.root),
        }
        for spec in dataclasses.fields(config):  # such as head_steps, which must not exceed steps
            value = getattr(config, spec.name)
            if spec.name.endswith("_steps") and isinstance(value, int) and value > 0:
                keys[spec.name] = STEPS // 2
        return [f"{key}={value}" for key, value in keys.items()]


def absolute_root(root: str) -> Path:
    """`data.root` against the folder that pytest was started in."""
    if REAL_DATA is not None and root == "datasets":
        return REAL_DATA
    return START_FOLDER / root


def demo_command(script: Path) -> list[str]:
    """The words of the first line of the script's demo config on images with a class each.

    Nothing if there is no such config.
    """
    for file in sorted((ROOT / "configs/demo").glob("*.yaml")):
        words = shlex.split(file.read_text().splitlines()[0].removeprefix("#"))
        if words[:2] == ["python", script.name] and "configs/demo/street.yaml" not in words:
            return words
    return []


def method_of(script: Path, words: list[str], folder: Path) -> Method:
    """A `Method` from the words after --config, relative to `folder`."""
    overrides = tuple(word for word in words if "=" in word and not word.endswith(".yaml"))
    files = tuple(str(folder / word) for word in words if word not in overrides)
    return Method(script, files, overrides)


def pytest_generate_tests(metafunc):
    given = metafunc.config.getoption("--script")
    if given:
        words = metafunc.config.getoption("--config") or []
        methods = [method_of(START_FOLDER / given, words, START_FOLDER)]
    else:
        small = "data.size=16"
        methods = [method_of(s, [*demo_command(s)[3:], small], ROOT) for s in TRAINING]
    metafunc.parametrize("method", methods, ids=lambda m: m.script.stem, scope="module")


@pytest.fixture(scope="module")
def ready(method, tmp_path_factory) -> Method:
    """The method, with a source model where its config starts from one that is not there."""
    if not method.files:
        pytest.fail(
            f"no config to try {method.script.name} on: name yaml files after --config, or write "
            f"one to configs/demo/ whose first line is `# python {method.script.name} --config ...`"
        )
    start = method.load().init_from
    if start is None or (START_FOLDER / start).exists():
        found = () if start is None else (f"init_from={START_FOLDER / start}",)
        return dataclasses.replace(method, overrides=(*method.overrides, *found))
    folder = tmp_path_factory.mktemp("source") / "run"
    size = tuple(word for word in method.overrides if word.startswith("data.size="))
    pair = Method(ROOT / "train_source.py", method.files[:1], size)
    try:
        assert pair.run(folder) == 0
    except UserError as error:
        pytest.fail(f"init_from: there is no run {start}, and none could be trained ({error})")
    return dataclasses.replace(method, overrides=(*method.overrides, f"init_from={folder}"))


@pytest.fixture(scope="module")
def whole(ready, tmp_path_factory) -> Path:
    """The folder of the method's uninterrupted run."""
    folder = tmp_path_factory.mktemp(ready.script.stem) / "run"
    assert ready.run(folder) == 0
    return folder


def tensors(folder: Path, file: str = LAST) -> dict:
    return torch.load(folder / file, weights_only=True)


def test_the_script_is_one_of_the_family(method):
    """The rules that guard correctness; tests/test_laws.py has those of style."""
    stems = {file.stem for file in ROOT.glob("*.py")}
    modules = set(imports(ast.parse(method.script.read_text())))
    assert not stems & modules, "a script imports no other: it would change with that one"
    config = method.config_class
    assert "trained_criteria" in vars(config), (
        "Config must state trained_criteria() itself: which of neg_entropy and infomax the loss "
        "improves directly; these do not measure the run independently (docs/selection.md)"
    )
    others = [script for script in TRAINING if script.resolve() != method.script.resolve()]
    same = [s.name for s in others if f'ClassVar[str] = "{config.method}"' in s.read_text()]
    assert not same, (
        f"Config.method is {config.method!r}, the name of another script ({same[0]}): --resume and "
        "tables tell methods apart by it"
    )


def test_a_dry_run_writes_nothing(ready, tmp_path, capsys):
    assert ready.run(tmp_path / "run", "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == []


@covered
@pytest.mark.parametrize(
    ("stop", "number", "workers"),
    [(stop_after, 4, 0), (stop_after, 4, 2), (stop_within_evaluation, 1, 0)],
    ids=["0 workers", "2 workers", "within an evaluation"],
)
def test_resume_is_exact(ready, whole, tmp_path, monkeypatch, stop, number, workers):
    """Stopped in the middle and resumed: no number differs from the uninterrupted run."""
    folder = tmp_path / "run"
    with monkeypatch.context() as patch:
        stop(patch, number)
        assert ready.run(folder, f"data.workers={workers}") == 128 + signal.SIGTERM
    assert ready.run(folder, f"data.workers={workers}", "--resume") == 0
    assert metrics(folder) == metrics(whole), (
        "the log differs after a resume: something that learns or remembers is not in the "
        "checkpoint (create it before run.begin and name it there; a plain tensor belongs in a "
        "buffer), or a random number does not come from data.order.generator(seed, purpose, step)"
    )
    before, after = tensors(whole), tensors(folder)
    lost = {name: differing(before[name], after[name]) for name in before if name != "seconds"}
    lost = {name: count for name, count in lost.items() if count}
    assert not lost, (
        f"numbers that differ after a resume: {lost}; create everything that learns or remembers "
        "before run.begin and name it there, and draw random numbers from "
        "data.order.generator(seed, purpose, step)"
    )
    assert differing(tensors(whole, "model.pt"), tensors(folder, "model.pt")) == 0


@covered
def test_two_processes_train_one_model(ready, tmp_path):
    """At each evaluation the run itself compares what the processes have learned."""
    processes = Processes(2, lambda number: ready.run(tmp_path / "run"), tmp_path)
    codes = processes.wait()
    printed = "\n".join(map(processes.printed, (0, 1)))
    if ready.config_class.one_process:
        assert codes == [2, 2]
        assert printed.strip().startswith("error: torchrun: ")
        assert len(printed.strip().splitlines()) == 1
        return
    assert codes == [0, 0], (
        f"two processes, as torchrun starts them, do not train one model: {printed}\n"
        "(docs/run.md, Several processes; docs/new_method.md)"
    )


@covered
def test_two_processes_train_what_one_trains(ready, tmp_path):
    """Without batch norm and dropout, whose statistics and draws are those of a process."""
    if ready.config_class.one_process:
        pytest.skip("the method says that it runs in one process (one_process)")
    keys = ["model.bn=frozen", "model.bn_running=both", "model.dropout=0", "optim.name=sgd"]
    keys += ["optim.lr=0.005"]  # without batch norm a larger one may diverge, and rounding with it
    keys += ["disc_norm=none"] if hasattr(ready.load(), "disc_norm") else []
    assert ready.run(tmp_path / "one", *keys) == 0
    processes = Processes(2, lambda number: ready.run(tmp_path / "two", *keys), tmp_path)
    codes = processes.wait()
    assert codes == [0, 0], "\n".join(map(processes.printed, (0, 1)))
    one, two = (tensors(tmp_path / name)["model"] for name in ("one", "two"))
    floats = [name for name in one if one[name].is_floating_point()]
    difference = max(float((one[name] - two[name]).abs().max()) for name in floats)
    assert difference < PARTED, (
        f"weights that two processes train are up to {difference:.1e} from those of one: a loss or "
        "a statistic that is no mean over images is computed from the rows of one process "
        "(common/ranks.py; docs/new_method.md, Several processes)"
    )


def test_every_part_of_a_batch_is_taken(ready, tmp_path, monkeypatch):
    """With `accumulate` a step takes that many batches of each set that it trains on."""
    taken, plain = Counter(), Batches.__next__

    def counted(batches):
        taken[batches.loader.name] += batches.loader.name.startswith("data.")
        return plain(batches)

    monkeypatch.setattr(Batches, "__next__", counted)
    try:
        assert ready.run(tmp_path / "whole") == 0
        whole = dict(taken)
        taken.clear()
        assert ready.run(tmp_path / "parts", "accumulate=2") == 0
    except UserError as error:
        if "accumulate: " in str(error):
            pytest.skip(f"refused: {error}")
        raise
    assert dict(taken) == {name: 2 * count for name, count in whole.items()}, (
        "a step does not take all parts of a batch: loop over range(config.accumulate), as "
        "train_source.py does (docs/new_method.md, 7)"
    )


def change_sets(monkeypatch, change, hit) -> list[ImageSet]:
    """Let `change` replace each `ImageSet` on opening for which `hit(role, train)` holds.

    Returns a list that the replaced sets are added to.
    """
    replaced: list[ImageSet] = []
    for module in (classification, segmentation):
        opened = module.open_set

        def changed(domain, role, config, train, *rest, opened=opened, **named):
            images = opened(domain, role, config, train, *rest, **named)
            if images is None or not hit(role, train):
                return images
            replaced.append(images)
            return change(images)

        monkeypatch.setattr(module, "open_set", changed)
    return replaced


def shift_labels(images: ImageSet) -> ImageSet:
    """Every label becomes the next class."""
    if images.labels is None:
        return images
    count = len(images.classes)
    following = torch.arange(1, count + 1) % count
    if isinstance(images.labels, torch.Tensor) and images.labels.dim() == 1:
        return dataclasses.replace(images, labels=following[images.labels])
    return dataclasses.replace(images, labels=Renumbered(images.labels, following))


def needs_target_labels(method: Method) -> bool:
    data = method.load().data
    return isinstance(data, LabeledDataConfig) or data.target_labeled is not None


@covered
def test_target_labels_do_not_train_or_select(ready, whole, tmp_path, monkeypatch):
    if needs_target_labels(ready):
        pytest.skip("this config trains on target labels: they are meant to be used")
    shifted = change_sets(
        monkeypatch, shift_labels, lambda role, train: role in ("target", "target_test")
    )
    folder = tmp_path / "run"
    assert ready.run(folder) == 0
    assert differing(tensors(whole)["model"], tensors(folder)["model"]) == 0, (
        "other target labels, other weights: the method has read labels of the target"
    )
    before, after = summary(whole)["target"], summary(folder)["target"]
    for name in ("last", "selected"):
        assert before[name]["step"] == after[name]["step"], "target labels have selected a step"
    if before["oracle"]["step"] is not None:  # there are labels
        assert any(images.labels is not None for images in shifted), "control: labels were shifted"


class Negative:
    """The negative of images: `images[index]`."""

    def __init__(self, images):
        self.images = images
        if not isinstance(images, torch.Tensor):
            self.shapes = images.shapes

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        return 255 - self.images[index]

    @property
    def shape(self) -> torch.Size:
        return self.images.shape


def negative(images: ImageSet) -> ImageSet:
    pixels = images.images
    replaced = 255 - pixels if isinstance(pixels, torch.Tensor) else Negative(pixels)
    return dataclasses.replace(images, images=replaced)


def frozen_norm(method: Method) -> list[str]:
    """Overrides that fix batch norm, so that target images act through the losses alone."""
    keys = ["model.bn=frozen", "model.bn_running=both"]
    try:
        method.load(*keys)
    except UserError:
        return []
    return keys


def test_target_images_move_the_weights(ready, tmp_path, monkeypatch):
    """Other target images, other weights; in source-only training the same weights."""
    keys = frozen_norm(ready)
    assert ready.run(tmp_path / "plain", *keys) == 0
    change_sets(monkeypatch, negative, lambda role, train: role == "target" and train)
    assert ready.run(tmp_path / "negative", *keys) == 0
    changed = differing(*(tensors(tmp_path / name)["model"] for name in ("plain", "negative")))
    if ready.config_class.method == "source":
        assert changed == 0, (
            "source-only training has seen a target image; is Config.method another one?"
        )
    else:
        assert changed > 0, (
            f"no loss depends on the target's images within {STEPS} steps: the method adapts "
            f"nothing, or not yet; {RELAX}"
        )


def loss_weights(method: Method) -> list[str]:
    """Overrides that change the method's own loss weights: to 0, or to twice where 0 is refused."""
    config = method.load()
    own = vars(method.config_class).get("__annotations__", {})
    overrides = []
    for key in (key for key in own if key.endswith("_weight")):
        weight = getattr(config, key)
        if not weight:  # 0, or null
            continue
        try:
            method.load(f"{key}=0")
            overrides.append(f"{key}=0")
        except UserError:
            overrides.append(f"{key}={2 * weight}")
    return overrides


def test_the_loss_of_the_method_moves_the_weights(ready, whole, tmp_path):
    overrides = loss_weights(ready)
    if not overrides:
        pytest.skip("no key of this method's own ends in _weight and is above 0")
    moved = {}
    for override in overrides:
        assert ready.run(tmp_path / override, override) == 0
        moved[override] = differing(tensors(whole)["model"], tensors(tmp_path / override)["model"])
    assert any(moved.values()), (
        f"another weight of the loss trains the same for {STEPS} steps: {moved}; the loss is not "
        f"added, has no gradient, or is not active yet; {RELAX}"
    )


@pytest.mark.parametrize("amp", [pytest.param("float16", marks=covered), "bfloat16"])
def test_mixed_precision_trains(ready, tmp_path, amp):
    keys = [f"amp={amp}", "steps=2", "log_every=1", "eval_every=1000"]
    halved = [f"{key.split('=')[0]}=1" for key in ready.short(tmp_path) if "_steps=" in key]
    assert ready.run(tmp_path / "run", *keys, *halved) == 0
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    figures = [v for line in lines for v in line.values() if isinstance(v, float)]
    assert figures
    assert all(math.isfinite(figure) for figure in figures)


def test_a_run_leaves_what_others_read(whole):
    """summary.json for tables and for init_from, model.pt, the resolved config."""
    result = json.loads((whole / "summary.json").read_text())
    assert {"method", "target", "classes", "commit", "selection"} <= set(result)
    assert (whole / "config.yaml").is_file()
    assert all(value.isfinite().all() for value in tensors(whole, "model.pt").values())


def test_evaluate_has_the_figures_of_the_summary(whole):
    """model.pt, described by model.yaml, is the selected step, on the same images."""
    result = json.loads((whole / "summary.json").read_text())
    target = result["target"]["selected"]
    if target[main_metric(target)] is None:
        pytest.skip("the config has no labeled target images to evaluate on")
    evaluate = load_script(ROOT / "evaluate.py")
    predictions = evaluate.predict_run(evaluate.open_run(whole))
    figures = predictions.figures()
    assert {name: figures[name] for name in target if name != "step"} == {
        name: value for name, value in target.items() if name != "step"
    }
    assert predictions.confusion().tolist() == result["confusion"]["selected"]
