"""--resume --allow-change: which keys may change, that they act, and that this is recorded."""

import signal

import pytest
import torch

from common.config import parse_yaml
from common.errors import UserError
from tests.helpers import metrics, stop_after, summary, tiny_config, train, weights
from training.changes import may_change

ALLOW = ["--resume", "--allow-change"]
STOPPED = 128 + signal.SIGTERM


def stopped_run(tmp_path, monkeypatch, script="train_source", step=6, **keys):
    """The config of a run that was stopped after `step`."""
    config = tiny_config(tmp_path, **keys)
    with monkeypatch.context() as patch:
        stop_after(patch, step)
        assert train(script, config) == STOPPED
    return config


def resolved(tmp_path) -> dict:
    return parse_yaml((tmp_path / "run/config.yaml").read_text(), "config.yaml")


def test_the_keys_that_may_change():
    allowed = "steps eval_every amp optim.lr optim.backbone_lr_scale target_lr disc_lr finetune_lr"
    assert all(map(may_change, allowed.split()))
    refused = "seed data.batch optim.momentum model.backbone head_steps data.source.steps lr.x"
    assert not any(map(may_change, refused.split()))


def test_a_change_needs_the_flag_and_an_allowed_key(tmp_path, monkeypatch):
    config = stopped_run(tmp_path, monkeypatch)
    before = (tmp_path / "run/config.yaml").read_bytes()
    for arguments, match in (
        (
            ["--resume", "optim.lr=0.1"],
            r"\(optim\.lr 0\.02 -> 0\.1\); undo .* --allow-change to",
        ),
        (["--resume", "seed=1"], r"\(seed 0 -> 1\); undo the change or choose another"),
        (["--resume", "seed=1", "steps=20"], r"undo the change or choose another"),
        ([*ALLOW, "seed=1", "steps=20"], r"undo the change of seed, which --allow-change does not"),
        (["--allow-change"], r"--allow-change goes with --resume"),
    ):
        with pytest.raises(UserError, match=match) as error:
            train("train_source", config, *arguments)
        assert error.value.code == 2
    assert (tmp_path / "run/config.yaml").read_bytes() == before
    assert train("train_source", config, *ALLOW) == 0  # control: nothing has changed
    assert "changed" not in summary(tmp_path / "run")


def test_a_changed_rate_is_used_and_recorded(tmp_path, monkeypatch):
    """Also after a second stop, when the command no longer needs the flag."""
    schedule = "{lr: 0.02, schedule: constant}"
    config = stopped_run(tmp_path, monkeypatch, optim=schedule, log_every=1)
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train("train_source", config, *ALLOW, "optim.lr=0.01", "eval_every=3") == STOPPED
    assert resolved(tmp_path)["optim"]["lr"] == 0.01
    with pytest.raises(UserError, match=r"optim\.lr 0\.01 -> 0\.02"):
        train("train_source", config, "--resume", "eval_every=3")
    assert train("train_source", config, "--resume", "optim.lr=0.01", "eval_every=3") == 0
    rates = {line["step"]: line["lr"] for line in metrics(tmp_path / "run") if "lr" in line}
    assert rates == {step: 0.02 if step <= 6 else 0.01 for step in range(1, 11)}
    assert summary(tmp_path / "run")["changed"] == [
        {"step": 6, "key": "eval_every", "before": 4, "now": 3},
        {"step": 6, "key": "optim.lr", "before": 0.02, "now": 0.01},
    ]


@pytest.mark.parametrize("change", ["target_lr=0.5", "disc_lr=0.5"])
def test_a_rate_that_only_the_optimizer_keeps(tmp_path, monkeypatch, change):
    """ADDA sets it once, before the state of the optimizer is loaded."""
    config = stopped_run(tmp_path, monkeypatch, "train_adda", source_steps=3)
    assert train("train_adda", config, *ALLOW, change) == 0
    last = weights(tmp_path / "run", "checkpoints/step_00000010.pt")
    rates = {
        f"{name}_lr": last[f"{name}_optimizer"]["param_groups"][0]["lr"]
        for name in ("target", "disc")
    }
    key = change.split("=")[0]
    assert rates.pop(key) == 0.5
    assert set(rates.values()) != {0.5}  # control: the other one is as before


def test_the_scale_of_the_backbone_is_used(tmp_path, monkeypatch):
    config = stopped_run(tmp_path, monkeypatch)
    assert train("train_source", config, *ALLOW, "optim.backbone_lr_scale=0.5") == 0
    groups = weights(tmp_path / "run", "checkpoints/step_00000010.pt")["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {0.5, 1.0}


@pytest.mark.parametrize("change", [("float32", "float16"), ("float16", "float32")])
def test_the_precision_may_change(tmp_path, monkeypatch, change):
    before, now = change
    keys = {"amp": before, "eval_every": 1000, "steps": 3}
    config = stopped_run(tmp_path, monkeypatch, step=2, **keys)
    assert train("train_source", config, *ALLOW, f"amp={now}") == 0
    last = weights(tmp_path / "run", "checkpoints/step_00000003.pt")
    assert bool(last["scaler"]) == (now == "float16")
    assert all(torch.isfinite(v).all() for v in last["model"].values())


def test_a_finished_run_may_take_more_steps(tmp_path):
    config = tiny_config(tmp_path)
    assert train("train_source", config) == 0
    for steps in (7, 10):
        with pytest.raises(UserError, match=f"is at step 10 already, and steps is {steps}; set"):
            train("train_source", config, *ALLOW, f"steps={steps}", "amp=bfloat16")
    assert train("train_source", config, *ALLOW, "steps=14") == 0
    result = summary(tmp_path / "run")
    assert result["steps"] == result["target"]["last"]["step"] == 14
    assert result["changed"] == [{"step": 10, "key": "steps", "before": 10, "now": 14}]
    lines = metrics(tmp_path / "run")
    assert [line["step"] for line in lines if "cls_loss" not in line] == [4, 8, 10, 12, 14]
    assert resolved(tmp_path)["steps"] == 14
    assert train("train_source", config, "--resume", "steps=14") == 0  # finished already
