"""Averages over steps: the weights of an EMA teacher, and running means of statistics."""

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from common.ranks import mean_over_ranks


def decay_at(updates: int, decay: float) -> float:
    """min(1 - 1 / (t + 1), decay) after t updates.

    The average is a plain mean at first (Tarvainen and Valpola 2017, arXiv:1703.01780).
    """
    return min(1 - 1 / (updates + 1), decay)


class EMATeacher(AveragedModel):
    """A copy of a model, in eval mode, with the exponential moving average of the model's weights.

    The copy lives on the model's device.

    Args:
        model: the model to follow.
        decay: largest decay of the average.
        copy_buffers: whether `update_parameters` copies the model's buffers, which are batch norm's
            running statistics. They are statistics of other images and of other weights than the
            teacher's; without the copy the teacher's own forwards in train mode update its own.
    """

    def __init__(self, model: nn.Module, decay: float, copy_buffers: bool):
        super().__init__(model)  # n_averaged, the number of updates, stays on the CPU
        self.decay, self.copy_buffers = decay, copy_buffers
        self.eval().requires_grad_(False)

    @torch.no_grad()
    def update_parameters(self, model: nn.Module) -> None:
        """Average the weights of `model` into the teacher's; with `copy_buffers` copy its buffers.

        The teacher's weights become d * teacher + (1 - d) * model, with d from `decay_at`. The
        update of the base class would send its counter to the device at every step, and wait for
        the transfer.
        """
        weight = 1 - decay_at(int(self.n_averaged), self.decay)
        torch._foreach_lerp_(list(self.module.parameters()), list(model.parameters()), weight)
        if self.copy_buffers:
            for kind in {buffer.dtype for buffer in model.buffers()}:  # one kernel for each
                averaged, current = (
                    [buffer for buffer in module.buffers() if buffer.dtype == kind]
                    for module in (self.module, model)
                )
                torch._foreach_copy_(averaged, current)
        self.n_averaged += 1


def class_mean(p: torch.Tensor) -> torch.Tensor:
    """Mean over all samples and positions, of all processes: (N, K, ...) -> (K,)."""
    return mean_over_ranks(p.transpose(0, 1).flatten(1).mean(1))


class RunningMean(nn.Module):
    """Exponential moving average of the tensors given to `update`, with the decay of `decay_at`.

    Attributes:
        value: the average; `start` before the first update.
        updates: the number of updates so far; one by part of a batch counts as its share.
    """

    def __init__(self, start: torch.Tensor, decay: float):
        super().__init__()
        self.decay = decay
        self.register_buffer("value", start.clone())
        self.register_buffer("updates", torch.zeros(()))

    @torch.no_grad()
    def update(self, new: torch.Tensor, share: float | torch.Tensor = 1.0) -> None:
        """Average a tensor in.

        Args:
            new: the tensor.
            share: of a whole update that it counts as, from 0 to 1; 0 changes nothing.
        """
        self.updates += share
        # At share 1: 1 - decay_at(updates before this one), computed on the device.
        weight = share * (1 / self.updates.clamp_min(1e-30)).clamp_min(1 - self.decay)
        self.value += weight * (new - self.value)


@torch.no_grad()
def pull(model: nn.Module, towards: nn.Module, share: float) -> None:
    """Move the trainable parameters of `model` by this share of the way to those of `towards`."""
    pairs = zip(model.parameters(), towards.parameters(), strict=True)
    for parameter, goal in pairs:
        if parameter.requires_grad:
            parameter.lerp_(goal, share)
