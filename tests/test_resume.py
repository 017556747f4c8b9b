"""A run stopped at any step and resumed equals the uninterrupted one to the bit."""

import contextlib
import functools
import os
import shutil
import signal
import warnings

import pytest
import torch

import losses.domain
import models
from common import files, writing
from common.errors import UserError
from data.order import generator
from models import build_model
from tests.helpers import (
    ROOT,
    SCRIPTS,
    SOURCE_FREE,
    any_config,
    differing,
    finetune_config,
    in_a_fork,
    load_script,
    metrics,
    others_slow,
    stop_after,
    stop_within_evaluation,
    street_config,
    summary,
    tiny_config,
    train,
    weights,
)
from training import run
from training.config import load_run_config

LAST = "checkpoints/step_00000010.pt"
SELF_TRAINING = ["threshold_mode=class_balanced", "distribution_alignment=true", "pseudo_warmup=0"]
KEYS = {  # keys that give a script a state to keep: dropout draws from the random generator
    "train_dann": ["disc_norm=dropout"],
    "train_advent": ["adv_weight=0.5", "div_weight=0.5"],
    "train_mmd": ["coral_weight=1"],
    "train_adda": ["disc_norm=dropout"],
    "train_pseudo": [*SELF_TRAINING, "evaluate=teacher"],
    "train_selfsup": ["location_weight=1", "contrastive_weight=1", "strong_augment={blur: {}}"],
}


def _same_run(a, b) -> int:
    last_a, last_b = weights(a, LAST), weights(b, LAST)
    del last_a["seconds"], last_b["seconds"]
    summary_a, summary_b = summary(a), summary(b)
    del summary_a["seconds"], summary_b["seconds"]
    assert summary_a == summary_b
    assert metrics(a) == metrics(b)
    return differing(last_a, last_b) + differing(weights(a), weights(b))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The uninterrupted run of each script."""
    folders = {}
    for script in SCRIPTS:
        folder = tmp_path_factory.mktemp(script)
        assert train(script, tiny_config(folder), *KEYS.get(script, [])) == 0
        folders[script] = folder / "run"
    return folders


@pytest.mark.parametrize("script", others_slow(SCRIPTS, ("train_mic",)))
@pytest.mark.parametrize(
    ("workers", "workers_after"), [pytest.param(0, 0, marks=pytest.mark.slow), (2, 0)]
)
def test_exact_on_maps(tmp_path, monkeypatch, script, workers, workers_after):
    """Segmentation: joint crops, an auxiliary head, and for AdvEnt two discriminators."""
    config, keys = street_config(tmp_path, script), KEYS.get(script, [])
    assert train(script, config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train(script, config, *keys, f"data.workers={workers}") == 143
    assert train(script, config, *keys, f"data.workers={workers_after}", "--resume") == 0
    assert _same_run(tmp_path / "whole", tmp_path / "run") == 0


STOPS = [(1, 0, 0), (3, 0, 0), (7, 2, 2), (6, 2, 0), (9, 0, 2)]
SHOWN = [*((script, STOPS[1]) for script in SCRIPTS), ("train_pseudo", STOPS[4])]
STOPPED = [
    pytest.param(script, *stop, marks=[pytest.mark.slow] * ((script, stop) not in SHOWN))
    for script in SCRIPTS
    for stop in STOPS
]


@pytest.mark.parametrize(("script", "stop", "workers", "workers_after"), STOPPED)
def test_stopped_and_resumed_is_exact(
    tmp_path, monkeypatch, whole, script, stop, workers, workers_after
):
    config, keys = tiny_config(tmp_path), KEYS.get(script, [])
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert train(script, config, *keys, f"data.workers={workers}") == 143
    assert (tmp_path / f"run/checkpoints/step_{stop:08d}.pt").is_file()
    assert train(script, config, *keys, f"data.workers={workers_after}", "--resume") == 0
    assert _same_run(whole[script], tmp_path / "run") == 0


@pytest.mark.parametrize("script", SCRIPTS)
def test_stopped_within_the_last_evaluation_and_resumed_is_exact(
    tmp_path, monkeypatch, whole, script
):
    """The run leaves before the next batch; what was not evaluated then is when it is resumed."""
    config, keys = tiny_config(tmp_path), KEYS.get(script, [])
    evaluated = [line["step"] for line in metrics(whole[script]) if "criteria.infomax" in line]
    with monkeypatch.context() as patch:
        batches = stop_within_evaluation(patch, len(evaluated))
        assert train(script, config, *keys) == 143
    assert len(batches) == 1
    state = weights(tmp_path / "run", LAST)
    assert (state["step"], state["evaluation_due"]) == (10, True)
    assert 10 not in [entry["step"] for entry in state["history"]]
    assert train(script, config, *keys, "--resume") == 0
    assert _same_run(whole[script], tmp_path / "run") == 0


@pytest.mark.parametrize("end", ["within the step", "within the evaluation", "killed after it"])
def test_stopped_while_an_evaluation_is_made_up_for(tmp_path, monkeypatch, whole, end):
    config, keys = tiny_config(tmp_path), KEYS.get("train_pseudo")
    with monkeypatch.context() as patch:
        stop_within_evaluation(patch, 2)
        assert train("train_pseudo", config, *keys) == 143
    with monkeypatch.context() as patch:
        if end == "within the step":
            stop_after(patch, 1)
        elif end == "within the evaluation":
            stop_within_evaluation(patch, 1)
        else:
            stop_after(patch, 2, signal.SIGUSR1)  # within step 9, and before it is saved
            signal.signal(signal.SIGUSR1, lambda number, frame: {}["killed"])
        with contextlib.suppress(KeyError):
            assert train("train_pseudo", config, *keys, "--resume") == 143
            assert end != "killed after it"
    signal.signal(signal.SIGUSR1, signal.SIG_DFL)
    if end == "killed after it":  # the line of the log and that of the evaluation
        assert [line["step"] for line in metrics(tmp_path / "run")].count(8) == 2
    assert train("train_pseudo", config, *keys, "--resume") == 0
    assert _same_run(whole["train_pseudo"], tmp_path / "run") == 0


OTHER = {  # another value in place of a statistic, by its number of axes
    0: lambda confidence: 100 * confidence,
    1: lambda mean: torch.arange(10.0) ** 3 / 2025,
    2: lambda histogram: histogram.flip(-1),
}


STATISTICS = ("teacher", "mean_s", "mean_t", "confidence_s", "histogram")


@pytest.mark.parametrize(
    "lost", others_slow(("nothing", *STATISTICS), ("nothing", "mean_s", "histogram"))
)
def test_every_statistic_of_self_training_is_kept(tmp_path, monkeypatch, lost):
    """Exact with all of them, and another training without any one."""
    relative = ["threshold_mode=relative", "threshold=0.3"]
    keys = [*SELF_TRAINING, *(relative if lost == "confidence_s" else []), "ema_decay=0.9"]
    config = tiny_config(tmp_path, strong_augment="{cutout: {}}")
    assert train("train_pseudo", config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_pseudo", config, *keys) == 143
    file = tmp_path / "run/checkpoints/step_00000006.pt"
    state = weights(tmp_path / "run", "checkpoints/step_00000006.pt")
    for name, value in state["statistics"].items():
        if name in (f"{lost}.value", f"{lost}.counts"):
            value.copy_(OTHER[value.dim()](value))
    if lost == "teacher":
        for value in state["teacher"].values():
            value.zero_()
    if lost != "nothing":
        file.with_name(file.name + ".sha256").unlink()
        torch.save(state, file)
    assert train("train_pseudo", config, *keys, "--resume") == 0
    changed = differing(*(weights(tmp_path / run, LAST)["model"] for run in ("whole", "run")))
    assert changed == 0 if lost == "nothing" else changed > 1000


EVERYTHING = {
    "adam, own statistics, dropout": [
        "optim.name=adam",
        "optim.lr=1e-3",
        "model.bn=separate",
        "disc_norm=dropout",
    ],
    "random map": ["conditional=cdan_e", "conditional_map=64"],
    # Emulated on a CPU, so that few images take long.
    "float16": ["amp=float16", "eval_every=1000", "data.select_images=4", "data.batch=2"],
}


@pytest.mark.parametrize("keys", EVERYTHING.values(), ids=EVERYTHING)
def test_exact_with_other_states(tmp_path, monkeypatch, keys):
    """What else has a state: Adam, domain statistics, a random map as buffers, the loss scale."""
    config = tiny_config(tmp_path)
    if "amp=float16" in keys:
        # Overflows at first, so that steps are skipped and the scale falls before the stop.
        huge = functools.partial(torch.amp.GradScaler, init_scale=2.0**40)
        monkeypatch.setattr(torch.amp, "GradScaler", huge)
    assert train("train_dann", config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_dann", config, *keys) == 143
    stopped = weights(tmp_path / "run", "checkpoints/step_00000006.pt")
    if "amp=float16" in keys:
        assert stopped["scaler"]["scale"] < 2.0**40
    if "conditional=cdan_e" in keys:
        assert stopped["multilinear"]
    assert train("train_dann", config, *keys, "--resume") == 0
    assert _same_run(tmp_path / "whole", tmp_path / "run") == 0


@pytest.mark.parametrize("workers", [0, 2])
def test_exact_with_images_from_a_cache_file(tmp_path, monkeypatch, pictures, workers):
    pictures("photo", {"cat": 12, "dog": 12})
    pictures("sketch", {"cat": 6, "dog": 6})
    data = (
        "{source: {name: folder, path: photo}, target: {name: folder, path: sketch}, "
        f"size: 16, batch: 4, root: {tmp_path}/images, cache: {tmp_path}/cache, cache_gb: 0, "
        "augment: {crop: {}, flip: {}}}"
    )
    config = tiny_config(tmp_path, data=data)
    assert train("train_dann", config, "data.cache_gb=1", f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_dann", config, f"data.workers={workers}") == 143
    assert train("train_dann", config, "--resume") == 0
    assert _same_run(tmp_path / "whole", tmp_path / "run") == 0


def test_the_selected_weights_are_those_of_the_history(tmp_path, monkeypatch, whole):
    """Resuming puts model.pt back, where a later evaluation had overwritten it."""
    config = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_source", config) == 143
    selected = weights(tmp_path / "run")
    model = tmp_path / "run/model.pt"
    torch.save({name: torch.zeros_like(value) for name, value in selected.items()}, model)
    with monkeypatch.context() as patch:
        stop_after(patch, 1)  # goes on, and stops before the next evaluation
        assert train("train_source", config, "--resume") == 143
    assert differing(selected, weights(tmp_path / "run")) == 0


@pytest.mark.parametrize("lost", ["optimizer", "seed of a step", "batch norm"])
def test_control_a_lost_state_is_seen(tmp_path, monkeypatch, whole, lost):
    config = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        train("train_dann", config, "disc_norm=dropout")
    file = tmp_path / "run/checkpoints/step_00000006.pt"
    state = weights(tmp_path / "run", "checkpoints/step_00000006.pt")
    if lost == "optimizer":
        for entry in state["optimizer"]["state"].values():
            entry["momentum_buffer"].zero_()
    elif lost == "seed of a step":
        monkeypatch.setattr(run, "generator", lambda *purpose: generator("other", *purpose))
    else:
        for name, value in state["model"].items():
            if "running" in name:
                value.zero_()
    file.with_name(file.name + ".sha256").unlink()
    torch.save(state, file)
    assert train("train_dann", config, "disc_norm=dropout", "--resume") == 0
    folders = whole["train_dann"], tmp_path / "run"
    changed = differing(*(weights(folder, LAST)["model"] for folder in folders))
    assert changed > (100 if lost == "batch norm" else 1000)


def test_same_seed_same_weights_other_seed_other_weights(tmp_path, whole):
    config, other = tiny_config(tmp_path), ["seed=1", f"out_dir={tmp_path}/other"]
    assert train("train_dann", config, "disc_norm=dropout") == 0
    assert _same_run(whole["train_dann"], tmp_path / "run") == 0
    assert train("train_dann", config, "disc_norm=dropout", *other) == 0
    a, b = (
        torch.cat([v.flatten().float() for v in weights(tmp_path / run).values()])
        for run in ("run", "other")
    )
    assert (a != b).float().mean() > 0.9


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:abc\nsize 12345\n"
DAMAGE = {
    "empty": lambda content: b"",
    "one byte": lambda content: content[:1],
    "1,000 bytes": lambda content: content[:1000],
    "half": lambda content: content[: len(content) // 2],
    "last byte": lambda content: content[:-1],
    "zeros": lambda content: bytes(len(content)),
    "html": lambda content: b"<html><body>404 Not Found</body></html>",
    "pointer": lambda content: POINTER,
}


def running(folder) -> None:
    """Let a finished run be one that was killed at its last step."""
    status = '{"method": "source", "state": "running", "step": 10, "steps": 10}'
    (folder / "status.json").write_text(status)


def test_damaged_newest_falls_back_and_none_usable_is_exit_4(tmp_path, capsys, whole):
    config = tiny_config(tmp_path)
    assert train("train_source", config) == 0
    folder, newest = tmp_path / "run", tmp_path / "run" / LAST
    for number, damage in enumerate(DAMAGE.values()):
        running(folder)
        newest.write_bytes(damage(newest.read_bytes()))
        if number % 2:  # as a file that was copied without its hash
            newest.with_name(newest.name + ".sha256").unlink()
        assert train("train_source", config, "--resume") == 0
        out = capsys.readouterr().out
        reason = "is not a readable checkpoint" if number % 2 else "does not match"
        assert f"step_00000010.pt: {reason}" in out
        assert "resuming after step 5" in out
    assert _same_run(whole["train_source"], folder) == 0
    running(folder)
    for file in (folder / "checkpoints").glob("*.pt"):
        file.write_bytes(b"")
    before = {p.name: p.read_bytes() for p in folder.iterdir() if p.is_file()}
    with pytest.raises(UserError, match="none of its 2 checkpoints can be used") as error:
        train("train_source", config, "--resume")
    assert error.value.code == 4
    del before[".lock"]
    assert {name: (folder / name).read_bytes() for name in before} == before


class Hostile:
    def __reduce__(self):
        return os.mkdir, ("executed",)


@pytest.mark.parametrize("forced", [False, True])
def test_a_hostile_checkpoint_is_not_executed(tmp_path, monkeypatch, forced):
    """Neither on --resume nor by init_from, whatever the variable of torch says."""
    if forced:
        monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    config = tiny_config(tmp_path)
    assert train("train_source", config) == 0
    running(tmp_path / "run")
    for file in (LAST, "checkpoints/step_00000005.pt", "model.pt"):
        torch.save({"model": Hostile()}, tmp_path / "run" / file)
        (tmp_path / "run" / f"{file}.sha256").unlink()
    start = [f"init_from={tmp_path}/run/model.pt", f"out_dir={tmp_path}/other"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for arguments in (["--resume"], start):
            with pytest.raises(UserError) as error:
                train("train_source", config, *arguments)
            assert error.value.code in (2, 4)
            assert "weights_only" not in str(error.value)
        assert not (tmp_path / "executed").exists()
        torch.load(tmp_path / "run/model.pt", weights_only=False)  # control
    assert (tmp_path / "executed").exists()


def train_and_die(config, kill: str, saves: int) -> None:
    """Train, and be killed while the file number `saves` is saved."""
    write_atomically, saved = files.write_atomically, []

    def die_if(now: bool) -> None:
        if now:
            os.kill(os.getpid(), signal.SIGKILL)

    def interrupted(path, write) -> None:
        is_file = path.suffix == ".pt"
        saved.extend([path] if is_file else [])
        due = is_file and len(saved) == saves

        def write_and_die(temporary) -> None:
            write(temporary)
            if kill == "half written":
                temporary.truncate(1000)
            die_if(kill in ("half written", "written"))

        write_atomically(path, write_and_die if due else write)
        die_if(due and kill == "replaced")
        die_if(path.suffix == ".sha256" and len(saved) == saves and kill == "hashed")

    files.write_atomically = writing.write_atomically = interrupted
    train("train_source", config)


def test_a_checkpoint_of_before_is_refused(tmp_path, monkeypatch):
    """Its predictions are of images that the seed had drawn."""
    config = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 3)
        assert train("train_source", config) == 143
    file = tmp_path / "run/checkpoints/step_00000003.pt"
    saved = files.load_tensors(file)
    saved["predictions"] = saved.pop("sampled_predictions")
    files.save_tensors(file, saved)
    with pytest.raises(UserError, match="was written by another script or version") as error:
        train("train_source", config, "--resume")
    assert error.value.code == 4


@pytest.mark.parametrize("kill", ["half written", "written", "replaced", "hashed"])
def test_a_kill_while_saving_loses_the_last_save_at_most(tmp_path, whole, kill):
    """Ten kills in all, of checkpoints and of model.pt; every file that is left loads."""
    for saves in (1, 2, 4) if kill in ("half written", "replaced") else (2, 4):
        folder = tmp_path / str(saves)
        folder.mkdir()
        config = tiny_config(folder)
        assert in_a_fork(lambda c=config, s=saves: train_and_die(c, kill, s)) == -signal.SIGKILL
        kept = list((folder / "run").rglob("*.pt"))
        for file in kept:
            files.load_tensors(file)
        assert kept or saves == 1
        assert train("train_source", config, "--resume") == 0
        assert not list((folder / "run").rglob(".*.tmp"))
        assert _same_run(whole["train_source"], folder / "run") == 0


# --- other data


DATA_CHANGES = {
    "added": lambda images: shutil.copy(images / "sketch/cat/000.png", images / "sketch/cat/9.png"),
    "removed": lambda images: (images / "photo/cat/011.png").unlink(),
    "another class": lambda images: (images / "photo/cat/011.png").rename(
        images / "photo/dog/zz.png"
    ),
    "class renamed": lambda images: [
        (images / d / "cat").rename(images / d / "zebra") for d in ("photo", "sketch")
    ],
    "class added": lambda images: [
        shutil.copytree(images / d / "cat", images / d / "zebra") for d in ("photo", "sketch")
    ],
    "replaced": lambda images: [
        file.write_bytes(file.read_bytes() + b"1") for file in (images / "photo").rglob("*.png")
    ],
}


def test_a_run_does_not_go_on_with_other_data(tmp_path, monkeypatch, pictures):
    """But it does with a copy elsewhere, whose files have other times."""
    pictures("photo", {"cat": 12, "dog": 12})
    images = pictures("sketch", {"cat": 6, "dog": 6}).parent
    data = (
        "{source: {name: folder, path: photo}, target: {name: folder, path: sketch}, "
        f"size: 16, batch: 4, root: {images}, cache: {tmp_path}/cache}}"
    )
    config = tiny_config(tmp_path, data=data)
    assert train("train_source", config, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_source", config) == 143
    for number, (name, change) in enumerate(DATA_CHANGES.items()):
        copy = tmp_path / "copies" / str(number)
        shutil.copytree(images, copy)
        change(copy)
        with pytest.raises(UserError, match="was trained on other data") as error:
            train("train_source", config, "--resume", f"data.root={copy}")
        assert error.value.code == 2, name
        assert "remove" not in str(error.value)
    copy = tmp_path / "copies" / "same"
    shutil.copytree(images, copy, copy_function=shutil.copyfile)
    assert train("train_source", config, "--resume", f"data.root={copy}") == 0
    assert _same_run(tmp_path / "whole", tmp_path / "run") == 0


# --- without what the run started from


@pytest.mark.parametrize(
    "script",
    others_slow((*SOURCE_FREE, "finetune", "train_dann", "train_adda"), ("train_shot", "finetune")),
)
def test_a_run_goes_on_without_the_run_it_started_from(tmp_path, monkeypatch, script):
    """All of it is in the checkpoint, the names of the classes too."""
    if script in SOURCE_FREE:
        config = any_config(script, tmp_path)
    else:
        source = tiny_config(tmp_path, out_dir=tmp_path / "source")
        assert train("train_source", source) == 0
        start = {"init_from": tmp_path / "source"}
        make = finetune_config if script == "finetune" else tiny_config
        config = make(tmp_path, **start)
    assert train(script, config, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train(script, config) == 143
    retrained = tmp_path / "source/model.pt.sha256"  # of other weights
    retrained.write_text(f"{'0' * 64}  model.pt\n")
    with pytest.raises(UserError, match=r"source has been trained again since .*run began"):
        train(script, config, "--resume")
    shutil.rmtree(tmp_path / "source")
    assert train(script, config, "--resume") == 0
    assert _same_run(tmp_path / "whole", tmp_path / "run") == 0
    text = (tmp_path / "run/config.yaml").read_text()
    assert f"init_from: {tmp_path}/source" in text  # what the run was trained with
    with pytest.raises(UserError, match="there is no"):  # control
        train(script, config, f"out_dir={tmp_path}/another")


def test_a_run_goes_on_without_its_imagenet_weights(tmp_path, monkeypatch):
    """And a run that starts from another one needs none."""
    torch.manual_seed(1)
    keys = {"model": "{backbone: mobilenet_v2, weights: weights.pth}", "steps": 3}
    config = street_config(tmp_path, "train_source", **keys)
    script = load_script(ROOT / "train_source.py")
    plain = load_run_config(script.Config, str(config), ["model.weights=null"])
    (tmp_path / "images").mkdir()
    file = tmp_path / "images/weights.pth"
    state = build_model(plain, ["a", "b"]).backbone.state_dict()
    torch.save({f"features.{name}": value for name, value in state.items()}, file)
    assert train("train_source", config, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train("train_source", config) == 143
    file.unlink()
    assert train("train_source", config, "--resume") == 0
    last = "checkpoints/step_00000003.pt"
    models = [weights(tmp_path / run, last)["model"] for run in ("whole", "run")]
    assert differing(*models) == 0
    assert "weights: weights.pth" in (tmp_path / "run/config.yaml").read_text()
    start = [f"init_from={tmp_path}/run", f"out_dir={tmp_path}/second"]
    assert train("train_source", config, *start) == 0
    trained = load_run_config(script.Config, f"{tmp_path}/run/config.yaml")
    model = build_model(trained, summary(tmp_path / "run")["classes"], initialize=False)
    model.load_state_dict(weights(tmp_path / "run"))
    with pytest.raises(UserError, match="there is no file"):  # control
        train("train_source", config, f"out_dir={tmp_path}/third")


def test_killed_before_the_first_checkpoint_starts_again(tmp_path, monkeypatch, whole):
    config = tiny_config(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr("training.run.Run.save", lambda self, step: {}["killed"])
        with pytest.raises(KeyError):
            train("train_source", config)
    assert train("train_source", config, "--resume") == 0
    assert _same_run(whole["train_source"], tmp_path / "run") == 0


def test_float16_without_a_finite_gradient_is_exit_3(tmp_path, monkeypatch):
    """Every step is skipped, so nothing is learned; the losses stay finite."""
    build_model = models.build_model

    def built(*arguments, **named):
        model = build_model(*arguments, **named)
        model.head.bias.register_hook(lambda gradient: gradient * float("nan"))
        return model

    keys = ["amp=float16", "steps=24", "log_every=1", "eval_every=1000", "data.batch=2"]
    config = tiny_config(tmp_path)
    monkeypatch.setattr(models, "build_model", built)
    with pytest.raises(UserError, match=r"step 17: amp: float16: .* in 17 steps or more") as error:
        train("train_source", config, *keys)
    assert error.value.code == 3
    assert not (tmp_path / "run/summary.json").exists()


def test_an_infinite_loss_of_the_method_is_named(tmp_path, monkeypatch):
    """One batch is enough, and nothing of it is saved."""
    domain_loss, seen = losses.domain.domain_loss, []

    def infinite(*arguments, **named):
        seen.append(1)
        return domain_loss(*arguments, **named) * (float("inf") if len(seen) == 8 else 1)

    monkeypatch.setattr(losses.domain, "domain_loss", infinite)
    with pytest.raises(UserError, match=r"step 8: adv_loss is inf; .* --resume --allow-change, or"):
        train("train_dann", tiny_config(tmp_path))
    assert [file.name for file in (tmp_path / "run/checkpoints").glob("*.pt")] == [
        "step_00000005.pt"
    ]


def test_not_finite_stops_with_exit_3_and_keeps_the_last_good_checkpoint(tmp_path):
    keys = ["optim.lr=1000", "optim.weight_decay=1000", "save_every=1", "log_every=1"]
    with pytest.raises(UserError, match="cls_loss is nan") as error:
        train("train_source", tiny_config(tmp_path), *keys)
    assert error.value.code == 3
    for file in (tmp_path / "run/checkpoints").glob("*.pt"):
        assert all(
            torch.isfinite(v).all() for v in weights(file.parent, file.name)["model"].values()
        )
