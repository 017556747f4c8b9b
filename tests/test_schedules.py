"""Schedules at their known values, and the rates they set."""

import math

import pytest
import torch

from common.config import OptimConfig
from common.optim import build_optimizer, set_rates
from common.schedules import learning_rate, progress, reversal_coefficient


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
    assert learning_rate(config, 10, 100) == learning_rate(config, 95, 100) == pytest.approx(0, abs=1e-12)


def test_reversal_coefficient():
    for p, expected in ((0, 0), (0.1, 2 / (1 + math.exp(-1)) - 1), (0.5, 2 / (1 + math.exp(-5)) - 1)):
        assert reversal_coefficient("dann", p) == pytest.approx(expected, abs=1e-12)
    assert reversal_coefficient("dann", 1) == pytest.approx(0.99990920426)
    assert reversal_coefficient("dann", 0.3, maximum=0.4, gamma=5.0) == pytest.approx(
        0.4 * (2 / (1 + math.exp(-1.5)) - 1)
    )
    assert [reversal_coefficient("linear", p, 0.5) for p in (0, 0.4, 1, 3)] == pytest.approx([0, 0.2, 0.5, 0.5])
    assert [reversal_coefficient("constant", p, 0.5) for p in (0, 1)] == [0.5, 0.5]


def _group(scale: float, *shape: int) -> dict:
    return {"params": [torch.nn.Parameter(torch.ones(shape))] if shape else [], "lr_scale": scale}


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_groups_hold_real_rates(name):
    config = OptimConfig(name=name, lr=0.2, schedule="poly", weight_decay=0.01)
    optimizer = build_optimizer(config, [_group(0.1, 3), _group(1.0, 2), _group(5.0)])
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02, 0.2])  # an empty group is left out
    assert set_rates(optimizer, config, 50, 100) == pytest.approx(0.2 * 0.5**0.9)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx([0.02 * 0.5**0.9, 0.2 * 0.5**0.9])
    assert [group["lr_scale"] for group in optimizer.param_groups] == [0.1, 1.0]
    set_rates(optimizer, config, 0, 100)
    assert [group["lr"] for group in optimizer.param_groups] == pytest.approx(
        [0.02, 0.2]
    )  # of the step, not of history


def test_sgd_is_nesterov_momentum_with_weight_decay():
    config = OptimConfig(lr=0.1, momentum=0.9, weight_decay=0.01)
    group = _group(1.0, 1)
    optimizer, value, velocity = build_optimizer(config, [group]), 1.0, 0.0
    for gradient in (0.5, -0.3, 0.2):
        group["params"][0].grad = torch.tensor([gradient])
        optimizer.step()
        gradient += 0.01 * value
        velocity = 0.9 * velocity + gradient
        value -= 0.1 * (gradient + 0.9 * velocity)
        assert group["params"][0].item() == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("name", ["sgd", "adam"])
def test_a_first_step_that_the_scaler_skips_leaves_no_trace(monkeypatch, name):
    """torch's fused SGD takes its momentum from uninitialised memory then."""
    monkeypatch.setattr(torch, "empty_like", lambda x, **_: torch.full_like(x, math.nan))
    config, values = OptimConfig(name=name, lr=0.1), []
    for gradients in ([math.inf, 0.5, 0.5], [0.5, 0.5]):
        group = _group(1.0, 3)
        parameter, optimizer, scaler = group["params"][0], build_optimizer(config, [group]), torch.amp.GradScaler("cpu")
        for gradient in gradients:
            optimizer.zero_grad()
            scaler.scale((parameter * gradient).sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        values += [parameter.detach()]
    torch.testing.assert_close(values[0], values[1])
    assert (values[1] < 1).all()  # control: the others were taken
