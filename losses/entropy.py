"""Entropy of predictions as a loss (Vu et al. 2019, arXiv:1811.12833), and their diversity.

Every function takes float32 log-probabilities, so that they are computed once for all losses:

    log_p = logits.float().log_softmax(1)
    loss = entropy_loss(information_map(log_p)) + diversity_loss(log_p)

Shapes: (N, K) or (N, K, ...), class axis 1. Entropies are in units of log K: 1 for a uniform
prediction, 0 for a certain one.
"""

import math

import torch

from common.averages import class_mean


def attached(x: torch.Tensor, weight: float) -> torch.Tensor:
    """x, without gradient if the loss that is computed from it has weight 0.

    Such a loss is logged, and costs no backward pass.

    Args:
        x: what the loss is computed from.
        weight: of the loss, at least 0.
    """
    return x if weight > 0 else x.detach()


def information_map(log_p: torch.Tensor) -> torch.Tensor:
    """Weighted self-information -p log p / log K of every class, of the shape of `log_p`.

    Its sum over axis 1 is the entropy (section 3.2). A class of probability 0 contributes 0, with
    gradient 0.
    """
    return log_p.exp() * log_p / -math.log(log_p.shape[1])


def entropy_loss(information: torch.Tensor) -> torch.Tensor:
    """Mean entropy over all samples and positions of an `information_map` (MinEnt, section 3.1).

    It is 0 without any prediction.
    """
    return information.sum() / max(information.numel() // information.shape[1], 1)


def diversity_loss(log_p: torch.Tensor) -> torch.Tensor:
    """1 - entropy of the mean prediction: 0 if all classes are predicted equally often.

    Minimized together with `entropy_loss` it is information maximization, which keeps confident
    predictions from collapsing to one class. It is 0 without any prediction.
    """
    if log_p.numel() == 0:
        return log_p.sum()
    mean = class_mean(log_p.exp())
    tiny = torch.finfo(mean.dtype).tiny  # keeps the log finite for a class of probability 0
    log_mean = mean.clamp_min(tiny).log()
    return 1 + (mean * log_mean).sum() / math.log(len(mean))
