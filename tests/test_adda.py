"""Alternation of discriminator and target encoder: what moves when, and from where."""

import pytest
import torch

import models
from common.errors import UserError
from tests.helpers import (
    TASKS,
    config_of,
    differing,
    metrics,
    stop_after,
    summary,
    tiny_config,
    train,
    weights,
)

LAST = "checkpoints/step_00000010.pt"


def moved(a: dict, b: dict) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


@pytest.mark.parametrize("task", TASKS)
def test_the_source_encoder_and_the_classifier_stay_as_they_are(tmp_path, task):
    """From the switch on, to the bit; and the target encoder, which starts as their copy, moves."""
    config = config_of(task, tmp_path, "train_adda", source_steps=5)
    assert train("train_adda", config, "target_lr=0.01") == 0
    at_switch, end = (
        weights(tmp_path / "run", f"checkpoints/step_{step:08d}.pt") for step in (5, 10)
    )
    assert not moved(at_switch["model"], at_switch["source_model"])
    assert not moved(at_switch["source_model"], end["source_model"])
    changed = moved(end["source_model"], end["model"])
    assert changed
    assert all(name.startswith("backbone.") for name in changed)
    assert any("running_mean" in name for name in changed)
    still = {name for name, value in end["model"].items() if value.is_floating_point()} - changed
    reads_layer4 = {name for name in still if not name.startswith(("head.", "aux_head."))}
    assert reads_layer4 == set()  # all of the encoder moved


def test_the_first_part_is_source_only(tmp_path):
    config = tiny_config(tmp_path)
    assert train("train_adda", config, "source_steps=5") == 0
    same_rates = ["steps=5", "eval_every=5", "save_every=5", f"out_dir={tmp_path}/source"]
    assert train("train_source", config, *same_rates) == 0
    source, adda = (
        weights(tmp_path / run, "checkpoints/step_00000005.pt") for run in ("source", "run")
    )
    assert differing(source["model"], adda["source_model"]) == 0


def test_a_source_run_takes_the_place_of_the_first_part(tmp_path):
    config = tiny_config(tmp_path)
    assert train("train_source", config, f"out_dir={tmp_path}/source", "steps=4") == 0
    assert train("train_adda", config, f"init_from={tmp_path}/source") == 0
    assert not moved(weights(tmp_path / "source"), weights(tmp_path / "run", LAST)["source_model"])
    assert moved(weights(tmp_path / "source"), weights(tmp_path / "run", LAST)["model"])
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    assert list(lines[0]) == [
        *("step", "adv_loss", "disc_loss", "domain_accuracy"),
        *("lr", "disc_lr", "vanished", "drift"),
    ]


def test_each_update_moves_one_network(tmp_path):
    """The encoder's rate does not reach the discriminator, nor any rate the source encoder."""
    config = tiny_config(tmp_path, steps=1, save_every=1)
    assert train("train_source", config, f"out_dir={tmp_path}/source") == 0
    runs = {"plain": [], "disc": ["disc_lr=0.05"], "target": ["target_lr=0.05"]}
    state = {}
    for name, keys in runs.items():
        start = [f"init_from={tmp_path}/source", f"out_dir={tmp_path}/{name}"]
        assert train("train_adda", config, *start, *keys) == 0
        state[name] = weights(tmp_path / name, "checkpoints/step_00000001.pt")
    assert moved(state["plain"]["discriminator"], state["disc"]["discriminator"])
    assert not moved(state["plain"]["discriminator"], state["target"]["discriminator"])
    assert moved(state["plain"]["model"], state["target"]["model"])
    assert moved(
        state["plain"]["model"], state["disc"]["model"]
    )  # it fools the discriminator after its update
    for name in runs:
        assert not moved(state["plain"]["source_model"], state[name]["source_model"])


def test_the_discriminator_can_learn_and_can_be_fooled(tmp_path):
    config = tiny_config(tmp_path, steps=120, log_every=20, eval_every=1000, save_every=1000)
    common = ["source_steps=40", "data.batch=16", "disc_lr=0.002", "disc_hidden=64"]
    last = {}
    for rate in ("1e-30", "0.002"):
        assert (
            train("train_adda", config, *common, f"target_lr={rate}", f"out_dir={tmp_path}/{rate}")
            == 0
        )
        last[rate] = [line for line in metrics(tmp_path / rate) if "lr" in line][-1]
    assert last["1e-30"]["domain_accuracy"] > 90
    assert last["0.002"]["domain_accuracy"] < last["1e-30"]["domain_accuracy"] - 10
    assert last["0.002"]["adv_loss"] < last["1e-30"]["adv_loss"]


@pytest.mark.parametrize(("shift", "low", "high"), [(1.0, 90, 100), (0.0, 40, 60)])
def test_batch_norm_of_the_discriminator_sees_both_domains(tmp_path, monkeypatch, shift, low, high):
    """Source features N(0, 1), target features N(shift, 1), in 16 dimensions.

    The best accuracy is 97.7 % for a shift of 1. Normalized alone, the two would be the same. The
    encoder, whose features these do not depend on, cannot confuse the discriminator.
    """

    def draw(features, locations):
        from_target = features.requires_grad
        return torch.randn_like(features) + shift * from_target + 0 * features

    monkeypatch.setattr(models, "feature_vectors", draw)
    config = tiny_config(tmp_path, steps=60, eval_every=1000, save_every=1000, log_every=20)
    keys = ["source_steps=1", "disc_norm=batch", "disc_lr=0.002", "disc_hidden=64"]
    assert train("train_adda", config, *keys, "model.bottleneck=16", "data.batch=32") == 0
    last = [line for line in metrics(tmp_path / "run") if "lr" in line][-1]
    assert low < last["domain_accuracy"] <= high
    # The encoder's turn judges the target as the discriminator's turn does.
    assert last["adv_loss"] > 1 if shift else last["adv_loss"] < 1


@pytest.mark.parametrize(("stop", "workers"), [(3, 2), (5, 0), (8, 2)])
def test_resume_is_exact_on_either_side_of_the_switch(tmp_path, monkeypatch, stop, workers):
    config, keys = tiny_config(tmp_path, log_every=3), ["source_steps=5", "disc_norm=dropout"]
    assert train("train_adda", config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert train("train_adda", config, *keys, f"data.workers={workers}") == 143
    assert train("train_adda", config, *keys, "--resume") == 0
    whole, resumed = (weights(tmp_path / run, LAST) for run in ("whole", "run"))
    del whole["seconds"], resumed["seconds"]
    assert differing(whole, resumed) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


def test_a_mean_counts_the_steps_that_had_the_loss(tmp_path):
    """A line that straddles the switch: each loss by its own number of steps."""
    config = tiny_config(tmp_path, eval_every=10)
    for every in (1, 10):
        assert (
            train(
                "train_adda",
                config,
                "source_steps=4",
                f"log_every={every}",
                f"out_dir={tmp_path}/{every}",
            )
            == 0
        )
    single, (line,) = (
        [m for m in metrics(tmp_path / str(every)) if "lr" in m] for every in (1, 10)
    )
    assert line["cls_loss"] == pytest.approx(sum(m["cls_loss"] for m in single[:4]) / 4, rel=1e-5)
    assert line["adv_loss"] == pytest.approx(sum(m["adv_loss"] for m in single[4:]) / 6, rel=1e-5)


def test_what_is_asked_of_the_steps(tmp_path):
    config = tiny_config(tmp_path)
    for keys, match in (
        (["source_steps=10"], "source_steps must be at least 0 and less than steps"),
        (["source_steps=0"], "source_steps: 0 needs init_from, a source model to adapt"),
        (["feature_layer=fc"], "feature_layer: no layer 'fc'; there are layer1"),
        (["init_from=nowhere"], "init_from: there is no nowhere"),
    ):
        with pytest.raises(UserError, match=match):
            train("train_adda", config, *keys)
    assert not (tmp_path / "run").exists()
    assert train("train_adda", config) == 0
    assert (
        "source_steps: 5" in (tmp_path / "run/config.yaml").read_text()
    )  # null is half of the steps
    assert summary(tmp_path / "run")["method"] == "adda"


def test_a_dry_run_takes_a_turn_of_both(tmp_path, capsys):
    assert train("train_adda", tiny_config(tmp_path), "--dry-run") == 0
    assert "disc_loss" in capsys.readouterr().out


def test_the_unadapted_model_is_not_selected(tmp_path):
    config = tiny_config(tmp_path, eval_every=1, source_steps=5)
    assert train("train_adda", config) == 0
    assert [m["step"] for m in metrics(tmp_path / "run") if "criteria.infomax" in m] == [
        6,
        7,
        8,
        9,
        10,
    ]


@pytest.mark.parametrize("key", ["optim.nesterov=false", "optim.momentum=0.5"])
def test_keys_of_sgd_are_of_the_first_part(tmp_path, key):
    """Both optimizers of the second part are Adam, which has neither."""
    config = tiny_config(tmp_path)
    assert train("train_adda", config, f"out_dir={tmp_path}/plain") == 0
    assert train("train_adda", config, f"out_dir={tmp_path}/changed", key) == 0
    assert differing(weights(tmp_path / "plain"), weights(tmp_path / "changed")) > 100
