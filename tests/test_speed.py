"""The benchmark: the same steps as a plain run, beside an honest bare model."""

import re
import signal
import time
from pathlib import Path

import pytest
import torch
import torchvision

import data.decoded
from benchmarks.speed import HEADER, main, measure, run_name, table_line
from common.errors import UserError
from data.classification import TrainBatches
from models.classifier import Classifier
from tests.helpers import ROOT, differing, load_script, weights
from training.log import Log
from training.run import Run

ROUNDS, STEPS, BATCH = 3, 2, 8
TINY = [f"data.batch={BATCH}", "data.select_images=50", "log_every=3"]


@pytest.fixture(autouse=True)
def signals():
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)


def config(method: str) -> list[str]:
    """The demo config of a method on the built-in digits; source-only training is the pair's."""
    names = ["digits"] if method == "source" else ["digits", method]
    return [str(ROOT / "configs" / "demo" / f"{name}.yaml") for name in names]


def turns_of(method: str, *overrides: str):
    script = ROOT / f"train_{method}.py"
    return measure(script, config(method), [*TINY, *overrides], ROUNDS, STEPS)


def edited(folder: Path, *changes: tuple[str, str]) -> Path:
    """train_source.py with pieces of its text replaced."""
    text = (ROOT / "train_source.py").read_text()
    for old, new in changes:
        assert text.count(old) == 1, old
        text = text.replace(old, new)
    file = folder / "train_edited.py"
    file.write_text(text)
    return file


def test_command_prints_a_table_line(command):
    words = ["--config", *config("dann"), *TINY, "--rounds", "7", "--steps", "2"]
    code, out, err = command("benchmarks/speed", ROOT / "train_dann.py", *words)
    assert code == 0, err
    header, rule, line = out.splitlines()
    assert f"{header}\n{rule}" == HEADER
    number = r"(\d+\.\d+)"
    ratio = rf"{number} \({number}-{number}\)"
    run = re.escape(f"train_dann, digits dann, `{' '.join(TINY)}`")
    figures = re.fullmatch(
        rf"\| {run} \| {2 * BATCH} \| {number} \| {number} \| {ratio} \| {ratio} \| - \|", line
    )
    assert figures, line
    for median, low, high in (map(float, figures.groups()[i : i + 3]) for i in (2, 5)):
        assert 0 < low <= median <= high


def test_the_recorded_outcomes_are_named_as_the_commands_print_them():
    text = (ROOT / "benchmarks" / "README.md").read_text()
    assert HEADER in text
    commands = re.findall(r"^    python benchmarks/speed.py (.*)", text.replace("\\\n", ""), re.M)
    assert len(commands) == 7
    for command_line in commands:
        script, option, *words = command_line.split(" --rounds")[0].split()
        assert option == "--config"
        files = [word for word in words if word.endswith(".yaml")]
        overrides = [word for word in words if word not in files]
        assert all((ROOT / file).is_file() for file in (script, *files))
        assert f"\n| {run_name(ROOT / script, files, overrides)} |" in text


def test_the_bare_model_may_be_torchvisions():
    keys = [*TINY, "model.backbone=resnet18", "data.batch=2"]
    turns = measure(ROOT / "train_dann.py", config("dann"), keys, ROUNDS, STEPS, torchvisions=True)
    assert type(turns.bare.model) is torchvision.models.ResNet
    assert turns.bare.forward().shape == (4, 10)
    assert type(turns_of("source").bare.model) is Classifier  # control


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--config", *config("source"), "--rounds", "6"], "at least 7"),
        (["--config", "data.batch=8"], "needs a yaml file"),
    ],
)
def test_a_wrong_command_is_refused(capsys, words, message):
    with pytest.raises(SystemExit) as stop:
        main([str(ROOT / "train_source.py"), *words])
    assert stop.value.code == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("method", "overrides", "images"),
    [
        ("source", [], BATCH),
        ("dann", ["model.bn=concat"], 2 * BATCH),
        ("dann", ["model.bn=separate"], 2 * BATCH),
        ("pseudo", [], 2 * BATCH),  # the teacher's images train nothing
    ],
)
def test_bare_model_sees_as_many_images_as_the_script(method, overrides, images):
    turns = turns_of(method, *overrides)
    assert turns.bare.x.shape == (images, 3, 28, 28)
    assert turns.bare.y.shape == (images,)
    assert len(turns.times) == ROUNDS
    assert all((seconds > 0).all() for seconds in turns.times)


def test_images_forwarded_without_gradient_do_not_count(tmp_path):
    step = "            scaler.scale(loss / config.accumulate).backward()\n"
    forward = "            with torch.no_grad():\n                model(x_s)\n"
    teacher = edited(tmp_path, (step, f"{forward}{step}"))
    assert len(measure(teacher, config("source"), TINY, ROUNDS, STEPS).bare.x) == BATCH


def test_bare_model_is_the_same_network_contiguous_and_apart():
    turns = turns_of("source", "model.channels_last=true")
    own, bare = turns.model.state_dict(), turns.bare.model.state_dict()
    assert {k: v.shape for k, v in own.items()} == {k: v.shape for k, v in bare.items()}
    assert not {v.data_ptr() for v in own.values()} & {v.data_ptr() for v in bare.values()}
    convolution = "backbone.layer2.0.weight"
    assert own[convolution].is_contiguous(memory_format=torch.channels_last)
    assert bare[convolution].is_contiguous()


def test_bare_model_forwards_what_the_classifier_does(monkeypatch):
    batches, batch = {}, TrainBatches.__getitem__
    monkeypatch.setattr(
        TrainBatches, "__getitem__", lambda own, step: batches.setdefault(step, batch(own, step))
    )
    bare = turns_of("source", "model.bottleneck=16").bare
    bare.model.eval()
    normalized = bare.forward()
    del bare.model.normalize  # the network's own takes the images as they are
    last_of_warm_up = batches[STEPS - 1][0]
    torch.testing.assert_close(normalized, bare.model(last_of_warm_up).logits)


@pytest.mark.parametrize("disc_norm", ["batch", "dropout"])  # dropout draws from the global stream
def test_the_measured_run_is_the_plain_run(tmp_path, disc_norm):
    due, overrides = Run.due, [*TINY, "model.bn=separate", f"disc_norm={disc_norm}"]
    turns = turns_of("dann", *overrides)
    assert Run.due is due
    total = (ROUNDS + 1) * STEPS
    rest = [f"{key}={total}" for key in ("steps", "eval_every", "save_every")]
    command = ["--config", *config("dann"), *overrides, *rest, f"out_dir={tmp_path / 'run'}"]
    assert load_script(ROOT / "train_dann.py").main(command) == 0
    assert differing(weights(tmp_path / "run"), dict(turns.model.state_dict())) == 0


def test_a_slower_script_has_a_higher_ratio(monkeypatch):
    add, pause = Log.add, 0.2

    def slow_add(log, **values):
        time.sleep(pause)
        add(log, **values)

    def wall_ratio(turns):
        return float(re.findall(r"\d+\.\d+", table_line("", turns))[2])

    quick = turns_of("source")
    monkeypatch.setattr(Log, "add", slow_add)
    slow = turns_of("source")
    assert wall_ratio(slow) > 2 * wall_ratio(quick)
    assert min(float(seconds[0, 0]) for seconds in slow.times) > pause


def test_image_files_are_decoded_before_the_first_step(pictures, tmp_path, monkeypatch):
    root = pictures("one", {"a": 12, "b": 12}).parent
    pictures("two", {"a": 12, "b": 12})
    events, decode, batch = [], data.decoded.decode, TrainBatches.__getitem__
    monkeypatch.setattr(
        data.decoded, "decode", lambda *args: events.append("decode") or decode(*args)
    )
    monkeypatch.setattr(
        TrainBatches, "__getitem__", lambda *args: events.append("batch") or batch(*args)
    )
    domains = ["data.source={name: folder, path: one}", "data.target={name: folder, path: two}"]
    turns_of(
        "dann", *domains, f"data.root={root}", f"data.cache={tmp_path / 'cache'}", "data.size=16"
    )
    assert events[:48] == ["decode"] * 48
    assert set(events[48:]) == {"batch"}


def test_a_script_that_ends_early_is_an_error(tmp_path):
    loop = ("run.steps(start)", "itertools.islice(run.steps(start), 3)")
    module = ("import torch\n", "import itertools\n\nimport torch\n")
    end = ("    return run.finish(domains)", "    return 0")
    script = edited(tmp_path, loop, module, end)
    with pytest.raises(UserError, match="before the last round"):
        measure(script, config("source"), TINY, ROUNDS, STEPS)
