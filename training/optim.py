"""The `optim` section of a config, its optimizer and its learning rate."""

import math
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import nn

from common.config import not_negative, positive, range_rules
from common.errors import require
from training.schedules import progress


@dataclass
class OptimConfig:
    name: Literal["sgd", "adam", "adamw"] = "sgd"  # optimizer
    lr: float = positive(0.01, most=1000)  # rate of the new layers
    backbone_lr_scale: float = not_negative(1.0, most=1000)  # the backbone's; pretrained: 0.1
    momentum: float = 0.9  # sgd only
    nesterov: bool = True  # sgd only: whether the momentum is Nesterov's
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # adam, adamw
    weight_decay: float = not_negative(1e-3, most=1000)  # L2; adamw: decoupled, not on vectors
    layer_decay: float | None = positive(None, most=1)  # rate of a block / rate of the next one
    clip_norm: float | None = positive(None)  # largest norm of an optimizer's gradients; null: none
    schedule: Literal["constant", "inverse_decay", "poly", "cosine"] = "inverse_decay"  # of lr
    poly_power: float = positive(0.9, most=100)  # of schedule: poly
    warmup: int = not_negative(0)  # steps in which the rate of the schedule rises from 0
    schedule_progress: int | Literal["total"] = positive("total")  # steps it takes; total: the run
    fused: bool = True  # torch's fused kernels: same update, fewer passes over memory

    def __post_init__(self):
        defaults = OptimConfig.__dataclass_fields__
        own_betas = self.betas != defaults["betas"].default_factory()
        own_momentum = self.momentum != defaults["momentum"].default
        require(
            *range_rules(self),
            (
                self.name != "sgd" or not own_betas,
                "betas are for name: adam or adamw; leave them out",
            ),
            (self.name == "sgd" or not own_momentum, "momentum is for name: sgd; leave it out"),
            (self.name == "sgd" or self.nesterov, "nesterov is for name: sgd; leave it out"),
            (
                self.schedule == "poly" or self.poly_power == defaults["poly_power"].default,
                "poly_power is for schedule: poly; leave it out",
            ),
            (0 <= self.momentum < 1, "momentum must lie in [0, 1)"),
            (
                len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
                "betas must be two numbers in [0, 1)",
            ),
        )


def build_optimizer(config: OptimConfig, *parts: nn.Module | dict) -> torch.optim.Optimizer:
    """SGD with momentum (Nesterov's by default), Adam or AdamW; `set_rates` sets the rates.

    AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) does not decay vectors: biases, scales and
    shifts, the class token.

    Args:
        config: the section `optim`.
        parts: what to train. A network gives its own groups (`param_groups`: the backbone at
            `backbone_lr_scale`, by `layer_decay` less in lower blocks), another module one group at
            scale 1, and a dict of `params` and `lr_scale` is a group.
    """
    groups = []
    for part in parts:
        if isinstance(part, dict):
            groups.append(part)
        elif hasattr(part, "param_groups"):
            groups += part.param_groups(config.backbone_lr_scale, config.layer_decay)
        else:
            groups.append({"params": list(part.parameters()), "lr_scale": 1.0})
    if config.name == "adamw":
        groups = [part for group in groups for part in _by_decay(group, config.weight_decay)]
    groups = [{**group, "lr": config.lr * group["lr_scale"]} for group in groups if group["params"]]
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": config.fused}
    if config.name != "sgd":
        kind = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW}[config.name]
        return kind(groups, betas=tuple(config.betas), **common)
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, **common)
    if config.momentum > 0:
        # The fused kernel would leave the buffer uninitialized if the scaler skips the first step.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def _by_decay(group: dict, weight_decay: float) -> list[dict]:
    """A group of AdamW in two: what decays, and vectors, of which one side alone is above 1."""
    parts = {True: [], False: []}
    for parameter in group["params"]:
        parts[sum(side > 1 for side in parameter.shape) > 1].append(parameter)
    return [
        {**group, "params": params, "weight_decay": weight_decay * decays}
        for decays, params in parts.items()
    ]


def clip_gradients(optimizer: torch.optim.Optimizer, clip_norm: float | None) -> None:
    """Scale the gradients of all parameters of `optimizer` so that their norm is at most this.

    Gradients of a `GradScaler` must be unscaled before. A norm that is not finite leaves gradients
    that are not, which the checks of a run notice. With None nothing happens.
    """
    if clip_norm is not None:
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        nn.utils.clip_grad_norm_(parameters, clip_norm)


@torch.no_grad()
def forget_moments(optimizer: torch.optim.Optimizer) -> None:
    """Set all that an optimizer remembers, such as its momentum, to 0."""
    for state in optimizer.state.values():
        for tensor in state.values():
            tensor.zero_()


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of the new layers at `step` (from 0) of `steps`, with p the progress.

    inverse_decay: lr / (1 + 10 p)^0.75 (Ganin et al. 2016, section 5.2.2); with schedule_progress
    10000 it is the lr * (1 + 0.001 step)^-0.75 of common libraries. poly: lr (1 - p)^poly_power.
    cosine: lr (1 + cos(pi p)) / 2. In the first `warmup` steps it is multiplied by (step + 1) /
    warmup.
    """
    p = progress(step, steps, config.schedule_progress)
    capped = min(p, 1.0)
    scale = {
        "constant": 1.0,
        "inverse_decay": (1 + 10 * p) ** -0.75,
        "poly": (1 - capped) ** config.poly_power,
        "cosine": 0.5 * (1 + math.cos(math.pi * capped)),
    }
    rising = min((step + 1) / config.warmup, 1.0) if config.warmup else 1.0
    return config.lr * scale[config.schedule] * rising


def set_rates(
    optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int
) -> float:
    """Set the learning rate of every group: the rate of the schedule times its `lr_scale`.

    Args:
        optimizer: of `build_optimizer`.
        config: the section `optim`.
        step: the current step, from 0.
        steps: steps of the run.

    Returns:
        The rate at scale 1.
    """
    rate = learning_rate(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    return rate
