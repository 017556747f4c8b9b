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
    name: Literal["sgd", "adam"] = "sgd"  # optimizer
    lr: float = positive(0.01, most=1000)  # rate of the new layers
    backbone_lr_scale: float = not_negative(1.0, most=1000)  # the backbone's; pretrained: 0.1
    momentum: float = 0.9  # sgd only
    nesterov: bool = True  # sgd only: whether the momentum is Nesterov's
    betas: list[float] = field(default_factory=lambda: [0.9, 0.999])  # adam only
    weight_decay: float = not_negative(1e-3, most=1000)  # L2, on every trained parameter
    schedule: Literal["constant", "inverse_decay", "poly", "cosine"] = "inverse_decay"  # of lr
    schedule_progress: int | Literal["total"] = positive("total")  # steps it takes; total: the run
    fused: bool = True  # torch's fused kernels: same update, fewer passes over memory

    def __post_init__(self):
        defaults = OptimConfig.__dataclass_fields__
        own_betas = self.betas != defaults["betas"].default_factory()
        own_momentum = self.momentum != defaults["momentum"].default
        require(
            *range_rules(self),
            (self.name == "adam" or not own_betas, "betas are for name: adam; leave them out"),
            (self.name == "sgd" or not own_momentum, "momentum is for name: sgd; leave it out"),
            (self.name == "sgd" or self.nesterov, "nesterov is for name: sgd; leave it out"),
            (0 <= self.momentum < 1, "momentum must lie in [0, 1)"),
            (
                len(self.betas) == 2 and all(0 <= b < 1 for b in self.betas),
                "betas must be two numbers in [0, 1)",
            ),
        )


def build_optimizer(config: OptimConfig, *parts: nn.Module | dict) -> torch.optim.Optimizer:
    """SGD with momentum (Nesterov's by default), or Adam; `set_rates` sets the rates.

    Args:
        config: the section `optim`.
        parts: what to train. A network gives its own groups (`param_groups`: the backbone at
            `backbone_lr_scale`), another module one group at scale 1, and a dict of `params` and
            `lr_scale` is a group.
    """
    groups = []
    for part in parts:
        if isinstance(part, dict):
            groups.append(part)
        elif hasattr(part, "param_groups"):
            groups += part.param_groups(config.backbone_lr_scale)
        else:
            groups.append({"params": list(part.parameters()), "lr_scale": 1.0})
    groups = [{**group, "lr": config.lr * group["lr_scale"]} for group in groups if group["params"]]
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": config.fused}
    if config.name == "adam":
        return torch.optim.Adam(groups, betas=tuple(config.betas), **common)
    nesterov = config.nesterov and config.momentum > 0
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=nesterov, **common)
    if config.momentum > 0:
        # The fused kernel would leave the buffer uninitialized if the scaler skips the first step.
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of the new layers at `step` (from 0) of `steps`, with p the progress.

    inverse_decay: lr / (1 + 10 p)^0.75 (Ganin et al. 2016, section 5.2.2); with schedule_progress
    10000 it is the lr * (1 + 0.001 step)^-0.75 of common libraries. poly: lr (1 - p)^0.9.
    cosine: lr (1 + cos(pi p)) / 2.
    """
    p = progress(step, steps, config.schedule_progress)
    capped = min(p, 1.0)
    scale = {
        "constant": 1.0,
        "inverse_decay": (1 + 10 * p) ** -0.75,
        "poly": (1 - capped) ** 0.9,
        "cosine": 0.5 * (1 + math.cos(math.pi * capped)),
    }
    return config.lr * scale[config.schedule]


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
