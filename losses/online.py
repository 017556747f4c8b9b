"""Entropy of the predictions on a stream, and how much each of them is learned from.

Minimized over scale and shift of normalization layers the entropy is TENT (Wang et al. 2021,
arXiv:2006.10726). The weights are those of EATA (Niu et al. 2022, arXiv:2204.02610), and what ROID
(Marsden et al. 2024, arXiv:2306.00650) makes its weights of, 1 - cos(p, mean p).
"""

import math

import torch
import torch.nn.functional as F


@torch.no_grad()
def reliable_weights(log_p: torch.Tensor, margin: float | None) -> torch.Tensor:
    """Weights by which certain predictions count more, and uncertain ones nothing.

        w = exp(E0 - H) where H < E0, else 0                            equation 3 of EATA

    with H the entropy of a prediction in nats, and E0 = margin * log K.

    Args:
        log_p: float32 log-probabilities (N, K, ...).
        margin: share of log K; None: all weights are 1, as in TENT.

    Returns:
        (N, ...), without gradient.
    """
    if margin is None:
        return torch.ones_like(log_p[:, 0])
    limit = margin * math.log(log_p.shape[1])
    entropies = -(log_p.exp() * log_p).sum(1)
    return torch.exp(limit - entropies) * (entropies < limit)


@torch.no_grad()
def diversity_weights(log_p: torch.Tensor, mean: torch.Tensor) -> torch.Tensor:
    """Weights by which classes that are predicted often count less.

        w = (1 - cos(p, mean)) / (1 - 1 / sqrt(K))                      equation 3 of ROID

    so that a certain prediction has weight 1 where all classes are predicted equally often, and
    next to none where nearly all predictions are of its class. ROID scales the weights of a batch
    to the range from 0 to 1 instead, which one image cannot have.

    Args:
        log_p: float32 log-probabilities (N, K, ...).
        mean: mean of the recent predictions (K,); zeros, before any, count as equal frequencies.

    Returns:
        (N, ...), without gradient.
    """
    k = len(mean)
    mean = (mean + 1e-6).view(1, k, *[1] * (log_p.dim() - 2))
    cosine = F.cosine_similarity(log_p.exp(), mean, dim=1)
    return (1 - cosine).clamp_min(0) / (1 - k**-0.5)


def weighted_entropy(log_p: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over all predictions of weight times entropy, in nats.

    Args:
        log_p: float32 log-probabilities (N, K, ...).
        weights: (N, ...), constants.

    Returns:
        A scalar; 0, attached to the graph, without any prediction.
    """
    entropies = -(log_p.exp() * log_p).sum(1)
    return (weights * entropies).sum() / max(weights.numel(), 1)
