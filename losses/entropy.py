"""Entropy of predictions as a loss (Vu et al. 2019, arXiv:1811.12833), and their diversity.

All start from log-probabilities of the class axis, float32 from `log_softmax`, so that one of them serves every loss:

    log_p = logits.float().log_softmax(1)
    loss = entropy_loss(information_map(log_p)) + diversity_loss(log_p)

Shapes: (N, K) or (N, K, ...), class axis 1. Entropies are in units of log K: a uniform prediction has 1, a sure one 0.
"""

import math

import torch

from common.averages import class_mean


def information_map(log_p: torch.Tensor) -> torch.Tensor:
    """-p log p / log K of every class: the weighted self-information (section 3.2), of the shape of `log_p`.

    Its sum over axis 1 is the entropy. A class of probability 0 counts 0, with gradient 0.
    """
    return log_p.exp() * log_p / -math.log(log_p.shape[1])


def entropy_loss(information: torch.Tensor) -> torch.Tensor:
    """Mean entropy over all samples and positions (MinEnt, section 3.1) of an `information_map`; 0 without any."""
    return information.sum() / max(information.numel() // information.shape[1], 1)


def diversity_loss(log_p: torch.Tensor) -> torch.Tensor:
    """1 - entropy of the mean prediction: 0 where all classes are predicted equally often; 0 without any prediction.

    Minimised with `entropy_loss` it is information maximisation, which keeps sure predictions from becoming one class.
    """
    if log_p.numel() == 0:
        return log_p.sum()
    mean = class_mean(log_p.exp())
    log_mean = mean.clamp_min(torch.finfo(mean.dtype).tiny).log()  # finite for a class of probability 0
    return 1 + (mean * log_mean).sum() / math.log(len(mean))
