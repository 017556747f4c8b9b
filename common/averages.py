"""Averages over steps: the weights of an EMA teacher, and running means of statistics."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def decay_at(updates: int, decay: float) -> float:
    """min(1 - 1/(t+1), decay) after t updates: a plain mean at first (Tarvainen & Valpola 2017, arXiv:1703.01780)."""
    return min(1 - 1 / (updates + 1), decay)


def ema_teacher(model: nn.Module, decay: float) -> AveragedModel:
    """A copy of `model`, always in eval mode, whose `update_parameters(model)` follows it.

    Weights become decay_t * theirs + (1 - decay_t) * the model's, with `decay_at`; buffers are copied. Make it once the
    model is on its device: the count of updates then stays on the CPU, where reading it costs no synchronisation.
    """

    def average(teacher: list[torch.Tensor], student: list[torch.Tensor], updates: torch.Tensor) -> None:
        torch._foreach_lerp_(teacher, student, 1 - decay_at(int(updates), decay))

    return AveragedModel(model, multi_avg_fn=average).eval().requires_grad_(False)


def class_mean(p: torch.Tensor) -> torch.Tensor:
    """Mean over all samples and positions: (N, K, ...) -> (K,)."""
    return p.transpose(0, 1).flatten(1).mean(1)


class RunningMean(nn.Module):
    """Exponential mean `value` of the tensors given to `update`, with `decay_at`; before the first it is `start`."""

    def __init__(self, start: torch.Tensor, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("value", start.clone())
        self.register_buffer("updates", torch.zeros((), dtype=torch.int64))

    @torch.no_grad()
    def update(self, new: torch.Tensor) -> None:
        self.updates += 1
        weight = (1 / self.updates).clamp_min(1 - self.decay)  # 1 - decay_at(updates so far), on the device
        self.value += weight * (new - self.value)
