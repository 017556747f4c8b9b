"""Entropy of a stream's predictions, of those that can be learned from.

Minimized over scale and shift of normalization layers it is TENT (Wang et al. 2021,
arXiv:2006.10726); the weights are those of EATA (Niu et al. 2022, arXiv:2204.02610).
"""

import math

import torch

IMAGES = 64  # of a full batch, which learning rate and other shares are for


@torch.no_grad()
def sure_weights(log_p: torch.Tensor, margin: float | None) -> torch.Tensor:
    """Weights of predictions, by which sure ones count more and unsure ones nothing.

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


def weighted_entropy(log_p: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over all predictions of weight times entropy, in nats.

    Args:
        log_p: float32 log-probabilities (N, K, ...).
        weights: (N, ...), of `sure_weights`.

    Returns:
        A scalar; 0, attached to the graph, without any prediction.
    """
    entropies = -(log_p.exp() * log_p).sum(1)
    return (weights * entropies).sum() / max(weights.numel(), 1)
