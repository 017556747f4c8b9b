"""The real scripts, tiny: what moves, what does not, and what is written."""

import os

import pytest
import torch

import models
from common.errors import UserError
from models import gradient_reversal
from tests.helpers import (
    ROOT,
    SCRIPTS,
    TASKS,
    TRAINING,
    any_config,
    config_of,
    differing,
    load_script,
    metrics,
    others_slow,
    street_config,
    summary,
    tiny_config,
    train,
    weights,
)

CONDITIONAL = ["conditional=cdan_e"]
LAYERS = ["feature_layers=[layer3, layer4, pooled]", "layer_weights=[0.5, 0.5, 1]"]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train_source", []),
        ("train_source", ["model.bottleneck=16"]),
        ("train_source", ["model.batch_norm=false", "optim.name=adam"]),
        ("train_dann", []),
        ("train_dann", CONDITIONAL),
        ("train_dann", LAYERS),
        ("train_dann", ["model.bn=separate", "disc_lr=0.1"]),
        ("train_advent", []),
        ("train_advent", ["model.bn=separate", "disc_lr=0.1"]),
    ],
)
def test_every_trainable_parameter_moves(tmp_path, script, arguments):
    config = tiny_config(tmp_path)
    two = ["steps=2", "optim.weight_decay=0"]  # decay would move what has no gradient
    assert train(script, config, *two, f"out_dir={tmp_path}/short", *arguments) == 0
    still = [*(a for a in arguments if "disc_lr" not in a), "optim.lr=1e-30"]
    assert train(script, config, *two, f"out_dir={tmp_path}/still", *still) == 0
    moved, start = (
        weights(tmp_path / run, "checkpoints/step_00000002.pt") for run in ("short", "still")
    )
    for module in ("model", "discriminators"):
        for name, value in moved.get(module, {}).items():
            bias_before_norm = (
                module == "discriminators" and name.endswith((".0.bias", ".3.bias"))
            ) or name == "bottleneck.0.bias"
            if value.is_floating_point() and "running" not in name and not bias_before_norm:
                assert (value != start[module][name]).any(), f"{module}.{name} did not move"


# float16 is emulated on a CPU: up to a minute and a half per script. The conformance kit
# has bfloat16 of all.
PRECISIONS = [("train_source", "bfloat16")]
OTHERS = [(x, amp) for x in SCRIPTS for amp in ("float16", "bfloat16")]
PRECISIONS += [pytest.param(*x, marks=pytest.mark.slow) for x in OTHERS if x not in PRECISIONS]


@pytest.mark.parametrize(("script", "amp"), PRECISIONS)
def test_mixed_precision_trains(tmp_path, script, amp):
    short = ["steps=10", "log_every=5", "eval_every=1000", "data.eval_batch=10", "optim.lr=0.05"]
    short += {"train_adda": ["source_steps=7"]}.get(script, [])
    assert train(script, tiny_config(tmp_path), f"amp={amp}", *short) == 0
    losses = [line["cls_loss"] for line in metrics(tmp_path / "run") if "cls_loss" in line]
    assert losses[-1] < losses[0]
    scaler = weights(tmp_path / "run", "checkpoints/step_00000010.pt")["scaler"]
    assert bool(scaler) == (amp == "float16")
    assert train(script, tiny_config(tmp_path), *short, f"out_dir={tmp_path}/full") == 0
    # control: the precision did change
    assert metrics(tmp_path / "run")[0] != metrics(tmp_path / "full")[0]


def test_the_discriminator_can_learn_and_can_be_fooled(tmp_path):
    config = tiny_config(
        tmp_path,
        steps=60,
        log_every=40,
        eval_every=1000,
        disc_hidden=64,
        reversal_schedule="constant",
    )
    last = {}
    for reversal in (0, 1):
        run = [f"reversal_max={reversal}", f"out_dir={tmp_path}/{reversal}", "data.batch=16"]
        assert train("train_dann", config, *run) == 0
        lines = [line for line in metrics(tmp_path / str(reversal)) if "lr" in line]
        last[reversal] = lines[-1]["domain_accuracy"]
    assert last[0] > 90
    assert last[1] < last[0] - 15


def test_lambda_and_layer_weights_scale_the_reversed_gradient_alone(tmp_path):
    """One step of SGD moves the network up the domain loss in proportion to both.

    The discriminator's step does not depend on them.
    """
    config = tiny_config(tmp_path, model="{bn: frozen}")
    plain = [
        "steps=1",
        "optim.momentum=0",
        "optim.weight_decay=0",
        "reversal_schedule=constant",
        "optim.lr=1",
        "reversal_bound=null",
    ]
    runs = {
        "off": ["reversal_max=0"],
        "one": ["reversal_max=0.01"],
        "four": ["reversal_max=0.04"],
        "layer": ["reversal_max=0.01", "layer_weights=[4]"],
        "twice": ["reversal_max=0.01", "adv_weight=2"],
    }
    state = {}
    for name, keys in runs.items():
        assert train("train_dann", config, *plain, *keys, f"out_dir={tmp_path}/{name}") == 0
        state[name] = weights(tmp_path / name, "checkpoints/step_00000001.pt")
    moved = {name: state[name]["model"]["backbone.layer1.0.0.weight"] for name in runs}
    step = moved["one"] - moved["off"]
    assert step.abs().max() > 1e-5
    for name, factor in (("four", 4), ("layer", 4), ("twice", 2)):
        torch.testing.assert_close(moved[name] - moved["off"], factor * step, rtol=0.02, atol=1e-6)
    for name in ("one", "four", "layer"):
        assert differing(state[name]["discriminators"], state["off"]["discriminators"]) == 0
    assert differing(state["twice"]["discriminators"], state["off"]["discriminators"]) > 100


MAPS = "{backbone: mobilenet_v2, output_stride: 16, aux_weight: 0.1, bn: frozen}"


@pytest.mark.parametrize("task", TASKS)
def test_advent_moves_one_network_at_a_time(tmp_path, task):
    """The model's update leaves the discriminator, and that one's update leaves the model."""
    model = {"classification": "{bn: frozen}", "segmentation": MAPS}[task]
    lines = {"model": model, "optim": "{lr: 0.02, weight_decay: 0}"}
    config = config_of(task, tmp_path, "train_advent", **lines)
    day = {"classification": "drawn_digits", "segmentation": "drawn_street"}[task]
    crop = ", crop: [64, 64]" if task == "segmentation" else ""
    runs = {
        "source": ["adv_weight=1e-30", "ent_weight=0"],
        "other_disc": ["adv_weight=1e-30", "ent_weight=0", "disc_lr=0.01"],
        "fooling": ["adv_weight=5", "ent_weight=0"],
        "other_target": ["adv_weight=5", "ent_weight=0", f"data.target={{name: {day}{crop}}}"],
        "entropy": ["adv_weight=1e-30", "ent_weight=5"],
        "diversity": ["adv_weight=1e-30", "ent_weight=0", "div_weight=5"],
    }
    if task == "segmentation":
        runs["aux"] = ["adv_weight=1e-30", "ent_weight=0", "aux_adv_weight=5"]
    state = {}
    for name, keys in runs.items():
        short = ["steps=1", "disc_lr=0.001", *keys, f"out_dir={tmp_path}/{name}"]
        assert train("train_advent", config, *short) == 0
        state[name] = weights(tmp_path / name, "checkpoints/step_00000001.pt")
    assert differing(state["source"]["model"], state["other_disc"]["model"]) == 0
    assert differing(state["source"]["discriminators"], state["other_disc"]["discriminators"]) > 100
    # it is the target that fools
    assert differing(state["fooling"]["model"], state["other_target"]["model"]) > 100
    for name in runs.keys() - {"source", "other_disc", "other_target"}:
        assert differing(state["source"]["discriminators"], state[name]["discriminators"]) == 0
        assert differing(state["source"]["model"], state[name]["model"]) > 100
    config = config_of(task, tmp_path, "train_source", **lines)
    assert train("train_source", config, "steps=1", f"out_dir={tmp_path}/plain") == 0
    for name, value in weights(tmp_path / "plain", "checkpoints/step_00000001.pt")["model"].items():
        torch.testing.assert_close(state["source"]["model"][name], value, rtol=1e-5, atol=1e-6)


def test_advent_makes_the_target_as_sure_as_the_source(tmp_path):
    """Fooling a discriminator of self-information lowers the target's entropy."""
    config = tiny_config(
        tmp_path, steps=60, eval_every=1000, log_every=40, optim="{lr: 0.02, schedule: constant}"
    )
    last = {}
    for weight in ("1e-30", "1"):
        keys = [f"adv_weight={weight}", "ent_weight=0", "disc_lr=0.01", "disc_hidden=64"]
        assert train("train_advent", config, *keys, f"out_dir={tmp_path}/{weight}") == 0
        last[weight] = [line for line in metrics(tmp_path / weight) if "lr" in line][-1]
    assert last["1e-30"]["domain_accuracy"] > 70  # it does learn
    assert last["1e-30"]["disc_loss"] < 0.6
    assert last["1"]["ent_loss"] < 0.9 * last["1e-30"]["ent_loss"]


@pytest.mark.parametrize(
    ("select", "part"), [("infomax", True), ("neg_entropy", True), ("source_val", False)]
)
@pytest.mark.parametrize("script", ["train_advent", "train_pseudo"])
def test_what_is_trained_is_no_judge_of_it(tmp_path, script, select, part):
    assert train(script, tiny_config(tmp_path), "steps=1", f"select={select}") == 0
    assert summary(tmp_path / "run")["selection"]["part_of_training_loss"] == part


@pytest.mark.parametrize(
    ("keys", "select", "part"),
    [
        (["div_weight=1"], "infomax", True),
        (["div_weight=1"], "neg_entropy", False),
        ([], "infomax", False),
    ],
)
@pytest.mark.parametrize(
    ("script", "off"), [("train_advent", "ent_weight=0"), ("train_pseudo", "pseudo_weight=0")]
)
def test_diversity_alone_trains_infomax_alone(tmp_path, script, off, keys, select, part):
    assert train(script, tiny_config(tmp_path), "steps=1", off, *keys, f"select={select}") == 0
    assert summary(tmp_path / "run")["selection"]["part_of_training_loss"] == part


def test_the_last_weights_are_kept_without_a_criterion(tmp_path, capsys):
    config = tiny_config(tmp_path)
    assert train("train_pseudo", config, "select=last") == 0
    assert "warning: select:" not in capsys.readouterr().out
    result = summary(tmp_path / "run")
    (last,) = [line for line in metrics(tmp_path / "run") if line.get("criteria.source_val")][-1:]
    assert result["selection"].pop("source_count") > 0
    assert result["selection"] == {
        "criterion": "last",
        "value": None,
        **{name: last[f"criteria.{name}"] for name in ("source_val", "neg_entropy", "infomax")},
        "source_vetoes": False,  # batch norm trains
        "part_of_training_loss": False,
    }
    assert result["target"]["selected"] == result["target"]["last"]
    last = weights(tmp_path / "run", "checkpoints/step_00000010.pt")["model"]
    assert differing(weights(tmp_path / "run"), last) == 0
    keys = ["select=neg_entropy", f"out_dir={tmp_path}/other"]  # control
    assert train("train_pseudo", config, *keys) == 0
    assert "warning: select: neg_entropy" in capsys.readouterr().out
    assert summary(tmp_path / "other")["selection"]["value"] < 0


CLIPPED = [(path.stem, "float32") for path in TRAINING]
CLIPPED += [pytest.param("train_dann", "float16", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("script", "amp"), CLIPPED)
def test_gradients_are_clipped_after_they_are_unscaled(tmp_path, script, amp):
    """A step of plain SGD with clipped gradients is as long as rate times norm; scaled ones would
    be clipped to a shorter one.
    """
    config = any_config(script, tmp_path, optim="{lr: 1.0, schedule: constant, momentum: 0}")
    steps = 1 if amp == "float32" else 6  # the scaler skips the first ones
    keys = [f"steps={steps}", f"eval_every={steps}", f"save_every={steps}", f"amp={amp}"]
    norm = 1e-4 if script == "adapt_online" else 0.01  # an unsure model has small gradients there
    keys += ["optim.weight_decay=0", f"optim.clip_norm={norm}"]
    if script == "train_adda":  # its second part has another optimizer
        keys += ["steps=2", "source_steps=1", "target_lr=1e-30"]
    if script == "finetune":
        keys += ["head_steps=1"]
    if script == "adapt_online":
        keys += ["source_pull=0", "lr_images=8", "diversity=false"]
    found = {}
    for name, rate in (("start", 1e-30), ("end", 1.0)):
        words = [*keys, f"optim.lr={rate}", f"out_dir={tmp_path}/{name}"]
        assert train(script, config, *words) == 0
        found[name] = weights(tmp_path / name)
    names = [name for name in found["end"] if "running" not in name and "num_" not in name]
    moved = [(found["end"][name] - found["start"][name]).flatten() for name in names]
    length = float(torch.cat(moved).norm())
    assert 0.3 * norm < length < 1.01 * norm * steps


def test_entropy_falls_and_diversity_holds_it(tmp_path):
    """MinEnt makes predictions sure; with diversity they stay spread over the classes."""
    config = tiny_config(tmp_path, steps=30, eval_every=1000, log_every=20)
    last = {}
    for name, keys in {
        "source": ["ent_weight=0"],
        "minent": ["ent_weight=2"],
        "infomax": ["ent_weight=2", "div_weight=2"],
    }.items():
        keys = ["adv_weight=0", *keys, f"out_dir={tmp_path}/{name}"]
        assert train("train_advent", config, *keys) == 0
        last[name] = [line for line in metrics(tmp_path / name) if "lr" in line][-1]
    assert last["minent"]["ent_loss"] < 0.5 * last["source"]["ent_loss"]
    assert last["infomax"]["div_loss"] < 0.5 * last["minent"]["div_loss"]


def test_without_reversal_the_encoder_is_source_only(tmp_path):
    """With frozen batch norm and lambda 0 the network gets source-only's gradients."""
    config = tiny_config(tmp_path, model="{bn: frozen}")
    runs = {
        "source": ("train_source", []),
        "zero": ("train_dann", ["reversal_max=0"]),
        "one": ("train_dann", ["reversal_schedule=constant"]),
        "bounded": ("train_dann", ["reversal_schedule=constant", "reversal_bound=1e-9"]),
    }
    models = {}
    for name, (script, arguments) in runs.items():
        assert train(script, config, f"out_dir={tmp_path}/{name}", *arguments) == 0
        models[name] = weights(tmp_path / name, "checkpoints/step_00000010.pt")["model"]
    gap = {
        name: max(
            float((models[name][k] - v).abs().max())
            for k, v in models["source"].items()
            if v.is_floating_point()
        )
        for name in models
    }
    assert gap["zero"] < 1e-5
    assert gap["bounded"] < 1e-5
    assert gap["one"] > 1e-3  # control


def test_mcc_in_dann_is_that_of_train_mcc(tmp_path):
    """Without the reversed gradient, the network of train_dann.py is that of train_mcc.py."""
    config, state = tiny_config(tmp_path), {}
    runs = {
        "dann": ("train_dann", ["reversal_max=0"]),
        "both": ("train_dann", ["reversal_max=0", "mcc_weight=2", "temperature=1.5"]),
        "mcc": ("train_mcc", ["mcc_weight=2", "temperature=1.5"]),
    }
    for name, (script, arguments) in runs.items():
        assert train(script, config, f"out_dir={tmp_path}/{name}", *arguments) == 0
        state[name] = weights(tmp_path / name, "checkpoints/step_00000010.pt")["model"]
    assert differing(state["dann"], state["mcc"]) > 1000  # control
    for name, value in state["mcc"].items():
        torch.testing.assert_close(state["both"][name], value, rtol=1e-4, atol=1e-5)
    assert all("mcc_loss" in line for line in metrics(tmp_path / "both") if "lr" in line)


@pytest.mark.parametrize(
    "keys", [pytest.param(["model.bn=concat"], marks=pytest.mark.slow), ["model.bn=separate"]]
)
def test_a_bound_of_the_reversal_that_is_never_reached_changes_nothing(tmp_path, keys):
    config, state = tiny_config(tmp_path), {}
    for bound in ("null", "1e9", "0.1"):
        keys = [*keys, "reversal_schedule=constant", f"reversal_bound={bound}"]
        assert train("train_dann", config, *keys, f"out_dir={tmp_path}/{bound}") == 0
        state[bound] = weights(tmp_path / bound, "checkpoints/step_00000010.pt")["model"]
        applied = [line["reversal_applied"] for line in metrics(tmp_path / bound) if "lr" in line]
        assert all(coeff == 1 for coeff in applied) == (bound != "0.1")
        assert all(0 < coeff <= 1 for coeff in applied)
    for name, value in state["null"].items():
        torch.testing.assert_close(state["1e9"][name], value, rtol=1e-4, atol=1e-5)
    assert differing(state["null"], state["0.1"]) > 100


@pytest.mark.parametrize("amp", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
def test_the_bound_of_the_reversal_is_of_the_classifier(tmp_path, monkeypatch, amp):
    """The classifier's gradient at the features is the whole gradient without the reversed one."""
    records = []

    def spy(x, coeff, bound, applied):
        record, inner = {"bound": bound}, x.view_as(x)
        inner.register_hook(lambda grad: record.update(reversed=grad.float()))
        x.register_hook(lambda grad: record.update(whole=grad.float()))
        records.append(record)
        return gradient_reversal(inner, coeff, bound, applied)

    monkeypatch.setattr(models, "gradient_reversal", spy)
    keys = ["model.bn=separate", "reversal_schedule=constant", "reversal_max=100", f"amp={amp}"]
    assert train("train_dann", tiny_config(tmp_path), *keys, "reversal_bound=0.1") == 0
    assert len(records) == 20  # ten steps, two domains
    for of_source, of_target in zip(records[::2], records[1::2], strict=True):
        norm = (of_source["whole"] - of_source["reversed"]).norm()
        for record in (of_source, of_target):
            torch.testing.assert_close(record["bound"], 0.1 * norm, rtol=0.02, atol=0)
            torch.testing.assert_close(record["reversed"].norm(), 0.1 * norm, rtol=0.02, atol=0)


ADAPTATION = [script for script in SCRIPTS if script != "train_source"]


WATCHED = [(script, "classification") for script in ADAPTATION]
WATCHED += [("train_dann", "segmentation")]
WATCHED += [pytest.param("train_pseudo", "segmentation", marks=pytest.mark.slow)]


@pytest.mark.parametrize(("script", "task"), WATCHED)
def test_every_adaptation_watches_its_target_predictions(tmp_path, script, task):
    assert train(script, config_of(task, tmp_path, script)) == 0
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    assert all(line["drift"] >= 0 for line in lines[1:])  # ADDA: from its second part on
    result = summary(tmp_path / "run")
    assert isinstance(result["collapse_alarms"], list)
    collapsed = [line for line in metrics(tmp_path / "run") if line.get("collapsed")]
    assert ("last" in result["collapsed"]) == any(line["step"] == 10 for line in collapsed)
    for line in metrics(tmp_path / "run"):
        counts = [v for name, v in line.items() if name.startswith("predicted.")]
        assert len(counts) == (0 if "lr" in line else len(result["classes"]))
    history = weights(tmp_path / "run", "checkpoints/step_00000010.pt")["history"]
    assert not any("predicted" in entry for entry in history)  # a thousand classes would fill it


@pytest.fixture(scope="module")
def collapsing(tmp_path_factory):
    """A config, and keys of train_advent.py with which a trained model loses classes.

    Entropy alone is lowest where every image has the same class.
    """
    folder = tmp_path_factory.mktemp("collapsing")
    config = tiny_config(folder)
    source = ["steps=30", "data.batch=32", "optim.lr=0.05", "data.size=28"]
    assert train("train_source", config, *source, f"out_dir={folder}/source") == 0
    keys = ["adv_weight=0", "ent_weight=8", "optim.lr=0.01", "data.batch=16", "steps=60"]
    keys += ["eval_every=10", "select=neg_entropy", f"init_from={folder}/source"]
    keys += ["data.size=28", "out_dir=run"]
    keys += ["data.select_images=60"]  # of fewer it is not sure that a class has vanished
    return [str(config), *keys]


def test_a_collapsed_evaluation_is_neither_selected_nor_silent(tmp_path, capsys, collapsing):
    assert train("train_advent", *collapsing) == 0
    result, out = summary(tmp_path / "run"), capsys.readouterr().out
    assert list(result["collapsed"]) == ["last"]
    reason = result["collapsed"]["last"]
    assert "the target predictions" in reason
    assert f"warning: last: the predictions on the target have collapsed: {reason}" in out
    evaluations = {m["step"]: m for m in metrics(tmp_path / "run") if "collapsed" in m}
    best = max(evaluations, key=lambda step: evaluations[step]["criteria.neg_entropy"])
    assert evaluations[best]["collapsed"] is not None  # control: the criterion likes it
    step = result["target"]["selected"]["step"]
    assert evaluations[step]["collapsed"] is None
    assert result["selection"]["value"] == evaluations[step]["criteria.neg_entropy"]
    first = min(step for step, record in evaluations.items() if record["collapsed"])
    said = f"evaluation: {evaluations[first]['collapsed']}"  # what goes on is no new alarm
    assert any(alarm["reason"] == said for alarm in result["collapse_alarms"])
    for alarm in result["collapse_alarms"]:
        assert f"step {alarm['step']}  alarm: {alarm['reason']}" in out


def test_a_script_that_does_not_watch_is_watched_at_its_evaluations(tmp_path, collapsing):
    """A copy without the line of the monitor."""
    text = (ROOT / "train_advent.py").read_text()
    line = "        run.monitor.add(out_t.logits)\n"
    assert text.count(line) == 1
    script = tmp_path / "train_mine.py"
    script.write_text(text.replace(line, ""))
    assert load_script(script).main(["--config", *collapsing]) == 0
    result = summary(tmp_path / "run")
    assert result["collapse_alarms"]
    assert all(a["reason"].startswith("evaluation: ") for a in result["collapse_alarms"])
    assert list(result["collapsed"]) == ["last"]


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_a_run_leaves(tmp_path, script):
    assert train(script, tiny_config(tmp_path, eval_every=1000, save_every=1000)) == 0
    folder = tmp_path / "run"
    assert {p.name for p in folder.iterdir()} == {
        ".lock",
        "config.yaml",
        "metrics.jsonl",
        "status.json",
        "summary.json",
        "MODEL.md",
        "model.pt",
        "model.pt.sha256",
        "model.yaml",
        "predictions.pt",
        "predictions.pt.sha256",
        "checkpoints",
    }
    assert {p.name for p in (folder / "checkpoints").iterdir()} == {
        "step_00000010.pt",
        "step_00000010.pt.sha256",
    }
    result = summary(folder)
    assert result["method"] == script.removeprefix("train_")
    assert (result["steps"], result["seed"]) == (10, 0)
    threads = f"1 of {os.cpu_count()} cores, "  # conftest.py asks for one thread
    assert result["machine"].startswith(threads)
    assert set(result["target"]) == {"last", "selected", "oracle"}
    for entry in result["target"].values():
        assert entry["step"] == 10
        assert 0 <= entry["accuracy"] <= 100
        assert 0 <= entry["mean_class_accuracy"] <= 100
    assert result["selection"]["criterion"] == "infomax"
    assert [line["step"] for line in metrics(folder) if "lr" in line] == [4, 8, 10]
    assert all(isinstance(value, torch.Tensor) for value in weights(folder).values())


def test_logged_metrics_of_dann(tmp_path):
    assert train("train_dann", tiny_config(tmp_path), "disc_lr=0.5", "log_every=1") == 0
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    assert list(lines[0]) == [
        "step",
        "cls_loss",
        "adv_loss",
        "domain_accuracy",
        "reversal_applied",
        "reversal_coeff",
        "lr",
        "disc_lr",
        "vanished",
        "drift",
    ]
    assert lines[0]["reversal_coeff"] == 0
    assert lines[5]["reversal_coeff"] == pytest.approx(2 / (1 + 2.718281828459045**-5) - 1)
    assert lines[0]["lr"] == pytest.approx(0.02)
    assert lines[5]["lr"] == pytest.approx(0.02 / 6**0.75)
    assert lines[5]["disc_lr"] == pytest.approx(0.5 / 6**0.75)


@pytest.mark.parametrize(
    "script", others_slow(SCRIPTS, ("train_source", "train_dann", "train_mic"))
)
def test_label_smoothing_of_the_source(tmp_path, script):
    """The key reaches the loss, and so the weights."""
    config = tiny_config(tmp_path)
    for share in ("0", "0.3"):
        keys = [f"model.label_smoothing={share}", f"out_dir={tmp_path}/{share}"]
        assert train(script, config, *keys) == 0
    plain, smoothed = (weights(tmp_path / share) for share in ("0", "0.3"))
    assert differing(plain, smoothed) > 1000
    with pytest.raises(UserError, match="label_smoothing must be below 1"):
        train(script, config, "model.label_smoothing=1")


def test_every_script_trains_with_weight_norm(tmp_path):
    """Its two parameters are copied, averaged, frozen and saved like others."""
    for script in SCRIPTS:
        config = tiny_config(tmp_path, steps=2, save_every=2, out_dir=tmp_path / script)
        assert train(script, config, "model.weight_norm=true") == 0
        head = {name for name in weights(tmp_path / script) if name.startswith("head.")}
        length, direction = (f"head.parametrizations.weight.original{i}" for i in (0, 1))
        assert head == {"head.bias", length, direction}


@pytest.mark.parametrize(("keys", "width"), [([], 5120), (["conditional_map=48"], 48)])
def test_the_discriminator_of_cdan_reads_the_full_product_by_default(tmp_path, keys, width):
    """512 features times 10 classes; random features of it only where the config asks for them."""
    config = tiny_config(tmp_path, steps=1, save_every=1)
    keys = ["conditional=cdan", "model.bottleneck=512", "disc_hidden=8", *keys]
    assert train("train_dann", config, *keys) == 0
    state = weights(tmp_path / "run", "checkpoints/step_00000001.pt")
    assert state["discriminators"]["0.layers.0.weight"].shape == (8, width)


@pytest.mark.parametrize("task", others_slow(TASKS, ("classification",)))
@pytest.mark.parametrize("script", ["train_dann", "train_mmd", "train_adda"])
def test_the_logits_are_a_feature_layer(tmp_path, script, task):
    """A discriminator has an input per class, and a loss on the logits moves the classifier."""
    config = config_of(task, tmp_path, script, steps=4, save_every=4)
    if script == "train_adda":
        keys = ["feature_layer=logits", "feature_locations=false", "source_steps=2"]
        pooled = ["feature_layer=layer4"]
    else:
        keys, pooled = ["feature_layers=[logits]"], ["feature_layers=[layer4]"]
    if script == "train_dann":
        keys += ["layer_weights=[1]", "reversal_schedule=constant"]
    state = {}
    for name, layer in (("logits", []), ("layer4", pooled)):
        assert train(script, config, *keys, *layer, f"out_dir={tmp_path}/{name}") == 0
        state[name] = weights(tmp_path / name, "checkpoints/step_00000004.pt")
    model, other = state["logits"]["model"], state["layer4"]["model"]
    num_classes = len(summary(tmp_path / "logits")["classes"])
    first = {"train_dann": ("discriminators", "0.layers.0.weight")}
    first |= {"train_adda": ("discriminator", "layers.0.weight")}
    if script in first:
        part, weight = first[script]
        assert state["logits"][part][weight].shape[1] == num_classes
    head = [name for name in model if name.startswith("head.") and name.endswith("weight")]
    moved = any((model[name] != other[name]).any() for name in head)
    assert moved == (script != "train_adda")  # where the classifier is frozen


@pytest.mark.parametrize("arguments", [[], ["model.bn=separate"], ["conditional=cdan_e"]])
def test_a_batch_of_one(tmp_path, arguments):
    """One row of each domain; without batch norm, which cannot use one value per channel."""
    config, without_norm = tiny_config(tmp_path), ["data.batch=1", "model.batch_norm=false"]
    assert train("train_dann", config, *without_norm, *arguments) == 0
    frozen = ["data.batch=1", "model.bn=frozen", f"out_dir={tmp_path}/source"]
    assert train("train_source", config, *frozen) == 0


def test_init_from_continues_with_the_weights(tmp_path):
    config = tiny_config(tmp_path)
    assert train("train_source", config) == 0
    still = ["optim.lr=1e-30", "optim.weight_decay=0", "model.bn=frozen"]
    onward = [f"init_from={tmp_path}/run", f"out_dir={tmp_path}/next"]
    assert train("train_dann", config, *onward, *still) == 0
    before, after = weights(tmp_path / "run"), weights(tmp_path / "next")
    assert all(torch.equal(before[name], after[name]) for name in before)


ALWAYS = ("train_source",)  # the others with --slow; the kit runs them all


@pytest.mark.parametrize(
    "script",
    [
        pytest.param(script, marks=() if script in ALWAYS else pytest.mark.slow)
        for script in SCRIPTS
    ],
)
def test_classification_as_a_real_command(tmp_path, command, script):
    code, out, err = command(script, "--config", tiny_config(tmp_path))
    assert (code, err) == (0, ""), err
    result = summary(tmp_path / "run")
    for name, entry in result["target"].items():
        assert list(entry) == ["step", "accuracy", "mean_class_accuracy", "class_accuracy"]
        assert list(entry["class_accuracy"]) == [str(digit) for digit in range(10)]
        assert f"target {name:8} step {entry['step']}  accuracy {entry['accuracy']:.2f}" in out
    assert result["target"]["oracle"]["accuracy"] >= result["target"]["last"]["accuracy"]
    assert not (tmp_path / "run/pictures").exists()


@pytest.mark.parametrize("script", SCRIPTS)
def test_what_segmentation_prints_and_leaves(tmp_path, capsys, recwarn, script):
    short = {"steps": 2, "eval_every": 1, "log_every": 1}
    if script == "train_adda":
        short["source_steps"] = 1
    assert train(script, street_config(tmp_path, script, pictures="every", **short)) == 0
    out, err = capsys.readouterr()
    # Files that earlier tests left open are closed at any time.
    warned = [str(w.message) for w in recwarn if w.category is not ResourceWarning]
    assert (err, warned) == ("", [])
    folder = tmp_path / "run"
    result = summary(folder)
    assert result["selection"]["criterion"] == "neg_entropy"  # the default for maps
    for name, entry in result["target"].items():
        assert list(entry) == ["step", "mean_iou", "pixel_accuracy", "iou"]
        assert list(entry["iou"]) == result["classes"]
        present = [v for v in entry["iou"].values() if v is not None]
        assert entry["mean_iou"] == pytest.approx(sum(present) / len(present))
        assert f"target {name:8} step {entry['step']}  mean_iou {entry['mean_iou']:.2f}" in out
    assert result["target"]["oracle"]["mean_iou"] >= result["target"]["last"]["mean_iou"]
    rows = [line.split() for line in out.splitlines() if line.strip()]
    table = [row for row in rows if row[0] in result["classes"]]
    assert [name for name, *_ in table] == result["classes"]
    for name, *cells in table:
        values = [
            result["target"][column]["iou"][name] for column in ("last", "selected", "oracle")
        ]
        assert cells == ["-" if v is None else f"{v:.1f}" for v in values]
    pictures = sorted(p.name for p in (folder / "pictures").iterdir())
    evaluated = (2,) if script == "train_adda" else (1, 2)  # its source part is not evaluated
    assert pictures == [f"step_{step:08d}.png" for step in evaluated]
    lines = [line for line in metrics(folder) if "lr" in line]
    assert {"cls_loss", "aux_cls_loss"} <= set(lines[0])
    if script == "train_advent":
        heads = {
            f"{head}{name}"
            for head in ("", "aux_")
            for name in ("ent_loss", "adv_loss", "disc_loss")
        }
        assert heads <= set(lines[0])


def test_pictures_are_drawn_at_the_end_alone_unless_asked_for(tmp_path):
    assert train("train_source", street_config(tmp_path, "train_source")) == 0
    assert [p.name for p in (tmp_path / "run/pictures").iterdir()] == ["step_00000010.png"]


@pytest.mark.parametrize(
    ("script", "arguments"),
    [
        ("train_source", []),
        ("train_source", ["model.head=deeplab_v3"]),
        ("train_dann", ["disc_locations=true", "model.bn=separate"]),
        # the paper's
        ("train_advent", ["model.bn=separate", "model.bn_affine=frozen", "data.batch=1"]),
    ],
)
def test_every_trainable_parameter_of_a_segmenter_moves(tmp_path, script, arguments):
    config = street_config(tmp_path, script)
    two = ["steps=2", "optim.weight_decay=0", "eval_every=1000", *arguments]
    assert train(script, config, *two, f"out_dir={tmp_path}/short") == 0
    assert train(script, config, *two, f"out_dir={tmp_path}/still", "optim.lr=1e-30") == 0
    file = "checkpoints/step_00000002.pt"
    still, moved = (weights(tmp_path / run, file) for run in ("still", "short"))
    if script != "train_source":  # a discriminator per head, or per layer: each learns
        keys = ["optim.lr=1e-30", "disc_lr=1e-30", f"out_dir={tmp_path}/unlearned"]
        assert train(script, config, *two, *keys) == 0
        start = weights(tmp_path / "unlearned", file)["discriminators"]
        assert {name.split(".")[0] for name in start} == {"0", "1"}
        for name, value in moved["discriminators"].items():
            before_norm = script == "train_dann" and name.endswith((".0.bias", ".3.bias"))
            if value.is_floating_point() and "running" not in name and not before_norm:
                assert (value != start[name]).any(), f"discriminators.{name} did not move"
    moved, start = moved["model"], still["model"]
    norms = {name.removesuffix(".running_mean") for name in moved if name.endswith(".running_mean")}
    fixed = {name for name in norms if name.startswith("backbone")}
    fixed = fixed if "model.bn_affine=frozen" in arguments else set()
    for name, value in moved.items():
        if not value.is_floating_point() or "running" in name:
            continue
        if name.rsplit(".", 1)[0] in fixed:
            assert (value == start[name]).all(), f"{name} moved"
        else:
            assert (value != start[name]).any(), f"{name} did not move"


def test_a_mask_that_is_all_void_trains_nothing_and_stays_finite(tmp_path, void_streets):
    config = street_config(tmp_path, "train_advent", model=MAPS)
    for name, steps in (("short", 1), ("long", 10)):
        keys = [
            "ent_weight=0",
            "adv_weight=0",
            "optim.weight_decay=0",
            f"steps={steps}",
            f"out_dir={tmp_path}/{name}",
        ]
        assert train("train_advent", config, *keys) == 0
        lines = [line for line in metrics(tmp_path / name) if "lr" in line]
        assert all(line["cls_loss"] == line["aux_cls_loss"] == 0 for line in lines)
        # The auxiliary head follows the main one: MinEnt without entropy.
        assert "adv_loss" not in lines[0]
    states = [weights(tmp_path / name) for name in ("short", "long")]
    assert differing(*states) == 0


def test_locations_give_the_discriminator_more_to_judge(tmp_path):
    """Pooled, it sees one vector per image; by location as many as the map has."""
    config = street_config(tmp_path, "train_dann")
    for name in ("true", "false"):
        keys = [f"disc_locations={name}", f"out_dir={tmp_path}/{name}"]
        assert train("train_dann", config, *keys) == 0
    assert differing(weights(tmp_path / "true"), weights(tmp_path / "false")) > 1000


def test_domains_of_two_sizes(tmp_path):
    """As ADVENT trains; one forward on both domains needs equal crops."""
    config = street_config(tmp_path, "train_dann")
    sizes = ["data.target.crop=[32, 96]", "eval_every=1000", "steps=2"]
    for bn in ("separate", "frozen"):
        keys = [f"model.bn={bn}", "disc_locations=true", f"out_dir={tmp_path}/{bn}"]
        assert train("train_dann", config, *sizes, *keys) == 0
    with pytest.raises(UserError, match=r"64x64.* 32x96"):
        train("train_dann", config, *sizes)


@pytest.mark.parametrize("amp", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
def test_mixed_precision_on_maps(tmp_path, amp):
    """Two networks, two optimizers, entropies in float32: finite, and close to full precision."""
    config = street_config(tmp_path, "train_advent", model=MAPS)
    short = ["steps=2", "log_every=1", "eval_every=1000", "adv_weight=0.5", "ent_weight=0.5"]
    for precision in (amp, "float32"):
        keys = [*short, f"amp={precision}", f"out_dir={tmp_path}/{precision}"]
        assert train("train_advent", config, *keys) == 0
    low, full = (
        next(line for line in metrics(tmp_path / p) if "lr" in line) for p in (amp, "float32")
    )
    assert low != full
    for name in ("cls_loss", "ent_loss", "adv_loss", "disc_loss", "aux_cls_loss", "aux_disc_loss"):
        assert low[name] == pytest.approx(full[name], rel=0.02), name
