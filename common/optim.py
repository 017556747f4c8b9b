"""The optimizer of a config."""

import torch

from common.config import OptimConfig
from common.schedules import learning_rate


def build_optimizer(config: OptimConfig, groups: list[dict]) -> torch.optim.Optimizer:
    """SGD with Nesterov momentum, or Adam, over `groups` of {"params", "lr_scale"}; rates are set by `set_rates`."""
    groups = [{**group, "lr": config.lr * group["lr_scale"]} for group in groups if group["params"]]
    common = {"lr": config.lr, "weight_decay": config.weight_decay, "fused": config.fused}
    if config.name == "adam":
        return torch.optim.Adam(groups, betas=tuple(config.betas), **common)
    optimizer = torch.optim.SGD(groups, momentum=config.momentum, nesterov=config.momentum > 0, **common)
    if config.momentum > 0:  # torch's fused kernel would leave it uninitialised where the scaler skips the first step
        for parameter in (p for group in groups for p in group["params"]):
            optimizer.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return optimizer


def set_rates(optimizer: torch.optim.Optimizer, config: OptimConfig, step: int, steps: int) -> float:
    """Set every group's rate for `step` (from 0): the schedule times its `lr_scale`. Returns the rate at scale 1."""
    rate = learning_rate(config, step, steps)
    for group in optimizer.param_groups:
        group["lr"] = rate * group["lr_scale"]
    return rate
