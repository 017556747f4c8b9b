"""Schedules at known values, the optimizer, and the rates that are set in it."""

import math

import pytest
import torch
from torch import nn

from common.errors import UserError
from models import build_classifier
from models.config import ModelConfig
from training.optim import (
    OptimConfig,
    build_optimizer,
    clip_gradients,
    learning_rate,
    set_rates,
)
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


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
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


@pytest.mark.parametrize("schedule", ["constant", "inverse_decay", "poly", "cosine"])
def test_warm_up_rises_to_the_schedule(schedule):
    cold = OptimConfig(lr=0.2, schedule=schedule)
    warm = OptimConfig(lr=0.2, schedule=schedule, warmup=4)
    shares = [
        learning_rate(warm, step, 100) / learning_rate(cold, step, 100) for step in (0, 1, 2, 3, 50)
    ]
    assert shares == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])


def test_the_power_of_poly():
    config = OptimConfig(lr=0.2, schedule="poly", poly_power=1.0)
    assert [learning_rate(config, step, 100) for step in (0, 25, 100)] == pytest.approx(
        [0.2, 0.15, 0.0]
    )
    with pytest.raises(ValueError, match="poly_power is for schedule: poly"):
        OptimConfig(poly_power=1.0)


def test_adamw_decays_matrices_alone_and_apart_from_the_gradient():
    config = OptimConfig(name="adamw", lr=0.1, weight_decay=0.5)
    layer = nn.Linear(2, 2)
    nn.init.ones_(layer.weight), nn.init.ones_(layer.bias)
    optimizer = build_optimizer(config, {"params": list(layer.parameters()), "lr_scale": 0.5})
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.5, 0.0]
    assert [g["lr"] for g in optimizer.param_groups] == [0.05, 0.05]
    for parameter in layer.parameters():
        parameter.grad = torch.full_like(parameter, 1e-3)
    optimizer.step()
    # The first step of Adam is the rate times the sign of the gradient, whatever its size.
    assert layer.bias.tolist() == pytest.approx([0.95, 0.95], abs=1e-4)
    assert layer.weight[0].tolist() == pytest.approx([0.95 - 0.05 * 0.5] * 2, abs=1e-4)
    with torch.device("meta"):
        names = {
            p: name
            for backbone in ("convnext_tiny", "dinov2_vits14")
            for name, p in build_classifier(
                ModelConfig(backbone=backbone), 5, "."
            ).named_parameters()
        }
    groups = build_optimizer(
        OptimConfig(name="adamw", weight_decay=0.5, fused=False),
        {"params": list(names), "lr_scale": 1.0},
    ).param_groups
    decaying, fixed = ({names[p] for p in group["params"]} for group in groups)
    assert {"backbone.1.0.layer_scale", "backbone.class_token", "head.bias"} <= fixed
    assert {"backbone.1.0.block.0.weight", "backbone.encoder.pos_embedding"} <= decaying
    adam = build_optimizer(
        OptimConfig(name="adam", lr=0.1, weight_decay=0.5),
        {"params": list(layer.parameters()), "lr_scale": 1.0},
    )
    assert [g["weight_decay"] for g in adam.param_groups] == [0.5]  # control: L2 on all


def test_layer_decay_lowers_the_rate_per_block():
    """As the code of MAE: 1 for the head and the last norm, 0.75 for the last block, and so on."""
    with torch.device("meta"):
        model = build_classifier(ModelConfig(backbone="vit_b_16"), 5, ".")
    config = OptimConfig(name="adamw", lr=1.0, layer_decay=0.75, fused=False)
    optimizer = build_optimizer(config, model)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    assert len(rates) == len(list(model.parameters()))
    expected = {"head.": 0, "backbone.encoder.ln.": 0}
    expected |= {"backbone.conv_proj": 13, "backbone.class_token": 13}
    expected |= {"backbone.encoder.pos_embedding": 13}
    expected |= {f"backbone.encoder.layers.encoder_layer_{i}.": 12 - i for i in range(12)}
    for name, parameter in model.named_parameters():
        (power,) = [power for prefix, power in expected.items() if name.startswith(prefix)]
        assert rates[parameter] == pytest.approx(0.75**power), name
    scaled = OptimConfig(lr=1.0, backbone_lr_scale=0.1, layer_decay=0.5, fused=False)
    groups = build_optimizer(scaled, model).param_groups
    assert [g["lr"] for g in groups[-2:]] == pytest.approx([0.1, 1.0])
    with pytest.raises(UserError, match=r"optim.layer_decay: .* no blocks; leave it out"):
        build_optimizer(config, build_classifier(ModelConfig(), 5, "."))


def test_what_lies_between_blocks_has_the_rate_of_the_block_after_it():
    with torch.device("meta"):
        model = build_classifier(ModelConfig(backbone="convnext_tiny"), 5, ".")
    optimizer = build_optimizer(OptimConfig(lr=1.0, layer_decay=0.5, fused=False), model)
    rates = {p: group["lr"] for group in optimizer.param_groups for p in group["params"]}
    powers = {"0.0.weight": 19, "1.0.layer_scale": 18, "2.1.weight": 15, "3.0.layer_scale": 15}
    powers |= {"7.2.layer_scale": 1, "pool_norm.weight": 0}
    for name, power in powers.items():
        assert rates[model.backbone.get_parameter(name)] == 0.5**power


def test_gradients_are_clipped_by_the_norm_of_all():
    def gradients(*values: float) -> list[float]:
        group = _group(1.0, len(values))
        optimizer = build_optimizer(OptimConfig(), group, _group(0.1, 1))
        group["params"][0].grad = torch.tensor(values)
        clip_gradients(optimizer, 1.0)
        return group["params"][0].grad.tolist()

    assert gradients(3.0, 4.0) == pytest.approx([0.6, 0.8])
    assert gradients(0.3, 0.4) == pytest.approx([0.3, 0.4])
    assert not math.isfinite(sum(gradients(math.inf, 1.0)))  # for the checks that come after
    group = _group(1.0, 1)
    group["params"][0].grad = torch.tensor([3.0])
    clip_gradients(build_optimizer(OptimConfig(), group), None)
    assert group["params"][0].grad.tolist() == [3.0]


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw"])
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
