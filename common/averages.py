"""Averages over steps: the weights of an EMA teacher, and running means of statistics."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel


def decay_at(updates: int, decay: float) -> float:
    """min(1 - 1/(t+1), decay) after t updates: a plain mean at first (Tarvainen & Valpola 2017, arXiv:1703.01780)."""
    return min(1 - 1 / (updates + 1), decay)


class EMATeacher(AveragedModel):
    """A copy of a model on its device, in eval mode, that follows it by an exponential moving average."""

    def __init__(self, model: nn.Module, decay: float):
        super().__init__(model)  # n_averaged, the count of updates, stays on the CPU
        self.decay = decay
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Weights become decay_t * theirs + (1 - decay_t) * the model's, with `decay_at`; buffers are copied.

        torch's own would send its count to the device, and wait for it, at every step.
        """
        weight = 1 - decay_at(int(self.n_averaged), self.decay)
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        for ours, theirs in zip(self.module.buffers(), model.buffers(), strict=True):
            ours.copy_(theirs)
        self.n_averaged += 1


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
