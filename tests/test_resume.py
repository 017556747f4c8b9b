"""A run stopped at any step and resumed equals the uninterrupted one to the bit."""

import contextlib
import functools
import signal

import pytest
import torch

import losses.domain
import models
from common.errors import UserError
from tests.helpers import (
    SCRIPTS,
    differing,
    metrics,
    stop_after,
    stop_within_evaluation,
    street_config,
    summary,
    tiny_config,
    train,
    weights,
)

LAST = "checkpoints/step_00000010.pt"
SELF_TRAINING = ["threshold_mode=class_balanced", "distribution_alignment=true", "pseudo_warmup=0"]
KEYS = {  # keys that give a script a state to keep: dropout draws from the random generator
    "train_dann": ["disc_norm=dropout"],
    "train_advent": ["adv_weight=0.5", "div_weight=0.5"],
    "train_mmd": ["coral_weight=1"],
    "train_adda": ["disc_norm=dropout"],
    "train_pseudo": [*SELF_TRAINING, "evaluate=teacher"],
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


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(("workers", "workers_after"), [(0, 0), (2, 0)])
def test_exact_on_maps(tmp_path, monkeypatch, script, workers, workers_after):
    """Segmentation: joint crops, an auxiliary head, and for AdvEnt two discriminators."""
    config, keys = street_config(tmp_path, script), KEYS.get(script, [])
    assert train(script, config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train(script, config, *keys, f"data.workers={workers}") == 143
    assert train(script, config, *keys, f"data.workers={workers_after}", "--resume") == 0
    assert _same_run(tmp_path / "whole", tmp_path / "run") == 0


@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize(
    ("stop", "workers", "workers_after"), [(1, 0, 0), (3, 0, 0), (7, 2, 2), (6, 2, 0), (9, 0, 2)]
)
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


@pytest.mark.parametrize(
    "lost", ["nothing", "teacher", "mean_s", "mean_t", "confidence_s", "histogram"]
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
    "float16": ["amp=float16", "eval_every=1000", "data.select_images=20"],
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

    for file in (tmp_path / "run/checkpoints").iterdir():
        file.unlink()
    with monkeypatch.context() as patch:
        stop_after(patch, 1)  # from the start, and before the first evaluation
        assert train("train_source", config, "--resume") == 143
    assert not model.exists()


@pytest.mark.parametrize("lost", ["optimizer", "random state", "batch norm"])
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
    elif lost == "random state":
        state["rng"] = torch.Generator().manual_seed(5).get_state()
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


def test_damaged_newest_falls_back_and_none_usable_is_exit_4(tmp_path, capsys, whole):
    config = tiny_config(tmp_path)
    assert train("train_source", config) == 0
    (tmp_path / "run/status.json").write_text('{"state": "running", "step": 10, "steps": 10}')
    newest = tmp_path / "run" / LAST
    newest.write_bytes(newest.read_bytes()[:1000])
    assert train("train_source", config, "--resume") == 0
    assert "step_00000010.pt: does not match" in capsys.readouterr().out
    assert _same_run(whole["train_source"], tmp_path / "run") == 0
    (tmp_path / "run/status.json").write_text('{"state": "running", "step": 10, "steps": 10}')
    for file in (tmp_path / "run/checkpoints").glob("*.pt"):
        file.write_bytes(b"")
    with pytest.raises(UserError, match="none of its 2 checkpoints can be used") as error:
        train("train_source", config, "--resume")
    assert error.value.code == 4


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
    with pytest.raises(UserError, match=r"step 8: adv_loss is inf; .* --resume --allow-change$"):
        train("train_dann", tiny_config(tmp_path))
    assert [file.name for file in (tmp_path / "run/checkpoints").glob("*.pt")] == [
        "step_00000005.pt"
    ]


def test_not_finite_stops_with_exit_3_and_keeps_the_last_good_checkpoint(tmp_path):
    with pytest.raises(UserError, match="cls_loss is nan") as error:
        train("train_source", tiny_config(tmp_path), "optim.lr=1e20", "save_every=1", "log_every=1")
    assert error.value.code == 3
    for file in (tmp_path / "run/checkpoints").glob("*.pt"):
        assert all(
            torch.isfinite(v).all() for v in weights(file.parent, file.name)["model"].values()
        )
