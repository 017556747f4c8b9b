"""Schedules at known values, the optimizer, and the rates that are set in it."""

import math

import pytest
import torch
from torch import nn

from models import build_classifier
from models.config import ModelConfig
from training.optim import OptimConfig, build_optimizer, learning_rate, set_rates
from training.schedules import progress, reversal_coefficient


def test_progress_is_of_the_run_or_of_a_number_of_steps():
    assert progress(0, 200) == 0
    assert progress(50, 200) == 0.25
    assert progress(50, 200, "total") == 0.25
    assert progress(50, 200, 10000) == 0.005
    assert progress(300, 200, 100) == 3  # past its end


@pytest.mark.parametrize(
    ("schedule", "start", "middle", "end"),
    [
        ("constant", 1, 1, 1),
        ("inverse_decay", 1, 6**-0.75, 11**-0.75),
        ("poly", 1, 0.5**0.9, 0),
        ("cosine", 1, 0.5, 0),
    ],
)
def test_learning_rate(schedule, start, middle, end):
    config = OptimConfig(lr=0.2, schedule=schedule)
    for step, expected in ((0, start), (50, middle), (100, end)):
        assert learning_rate(config, step, 100) == pytest.approx(0.2 * expected, abs=1e-12)


def test_inverse_decay_over_10000_steps_is_that_of_the_libraries():
    config = OptimConfig(lr=0.01, schedule="inverse_decay", schedule_progress=10000)
    for step in (0, 1, 500, 30000):
        assert learning_rate(config, step, 700) == pytest.approx(0.01 * (1 + 0.001 * step) ** -0.75)


@pytest.mark.parametrize("schedule", ["poly", "cosine"])
def test_a_rate_past_its_end_stays_at_zero(schedule):
    config = OptimConfig(lr=0.2, schedule=schedule, schedule_progress=10)
    rates = [learning_rate(config, step, 100) for step in (10, 95)]
    assert rates == pytest.approx([0, 0], abs=1e-12)
    assert rates[0] == rates[1]


def test_reversal_coefficient():
    for p, expected in (
        (0, 0),
        (0.1, 2 / (1 + math.exp(-1)) - 1),
        (0.5, 2 / (1 + math.exp(-5)) - 1),
    ):
        assert reversal_coefficient("dann", p) == pytest.approx(expected, abs=1e-12)
    assert reversal_coefficient("dann", 1) == pytest.approx(0.99990920426)
    assert reversal_coefficient("dann", 0.3, maximum=0.4, gamma=5.0) == pytest.approx(
        0.4 * (2 / (1 + math.exp(-1.5)) - 1)
    )
    assert [reversal_coefficient("linear", p, 0.5) for p in (0, 0.4, 1, 3)] == pytest.approx(
        [0, 0.2, 0.5, 0.5]
    )
    assert [reversal_coefficient("constant", p, 0.5) for p in (0, 1)] == [0.5, 0.5]


def _group(scale: float, *shape: int) -> dict:
    return {"params": [torch.nn.Parameter(torch.ones(shape))] if shape else [], "lr_scale": scale}


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_groups_hold_real_rates(name):
    config = OptimConfig(name=name, lr=0.2, schedule="poly", weight_decay=0.01)
    optimizer = build_optimizer(config, _group(0.1, 3), _group(1.0, 2), _group(5.0))
    # An empty group is left out.
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.2])
    assert set_rates(optimizer, config, 50, 100) == pytest.approx(0.2 * 0.5**0.9)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.02 * 0.5**0.9, 0.2 * 0.5**0.9]
    )
    assert [group["lr_scale"] for group in optimizer.param_groups] == [0.1, 1.0]
    set_rates(optimizer, config, 0, 100)
    # A rate depends on the step alone, not on the rates before.
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.2])


def test_parts_of_an_optimizer():
    """A network gives its own groups; another module or a group dict is one group."""
    torch.manual_seed(0)
    model, head = build_classifier(ModelConfig(), 5, "."), nn.Linear(4, 1)
    group, config = _group(3.0, 2), OptimConfig(lr=0.2, backbone_lr_scale=0.1)
    groups = build_optimizer(config, model, head, group).param_groups
    assert [g["lr_scale"] for g in groups] == [0.1, 1.0, 1.0, 3.0]
    assert [g["lr"] for g in groups] == pytest.approx([0.02, 0.2, 0.2, 0.6])
    expected = [
        *(list(m.parameters()) for m in (model.backbone, model.head, head)),
        group["params"],
    ]
    for ours, parameters in zip(groups, expected, strict=True):
        assert [id(p) for p in ours["params"]] == [id(p) for p in parameters]
    model.backbone.requires_grad_(False)
    frozen = build_optimizer(config, model).param_groups
    assert [g["lr_scale"] for g in frozen] == [1.0]  # nothing of the backbone is trained


@pytest.mark.parametrize("nesterov", [True, False])
def test_sgd_has_momentum_and_weight_decay(nesterov):
    """Nesterov's momentum adds the gradient to what the velocity moves; the usual one does not."""
    config = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01, nesterov=nesterov)
    group = _group(1.0, 1)
    optimizer, value, velocity = build_optimizer(config, group), 1.0, 0.0
    for gradient in (0.5, -0.3, 0.2):
        group["params"][0].grad = torch.tensor([gradient])
        optimizer.step()
        gradient += 0.01 * value
        velocity = 0.9 * velocity + gradient
        value -= 0.1 * (gradient + 0.9 * velocity if nesterov else velocity)
        assert group["params"][0].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_first_step_that_the_scaler_skips_leaves_no_trace(monkeypatch, name):
    """torch's fused SGD would take its momentum from uninitialised memory."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, math.nan))
    config, values = OptimConfig(name=name, lr=0.1), []
    for gradients in ([math.inf, 0.5, 0.5], [0.5, 0.5]):
        group = _group(1.0, 3)
        parameter = group["params"][0]
        optimizer = build_optimizer(config, group)
        scaler = torch.amp.GradScaler("cpu")
        for gradient in gradients:
            optimizer.zero_grad()
            scaler.scale((parameter * gradient).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        values += [parameter.detach()]
    torch.testing.assert_close(values[0], values[1])
    assert (values[1] < 1).all()  # control: the other steps were taken
