"""Minimum class confusion (Jin et al. 2020, arXiv:1912.03699)."""

import torch

from common.metrics import where_float64
from common.ranks import mean_over_ranks


def mcc_loss(logits: torch.Tensor, temperature: float = 2.5) -> torch.Tensor:
    """Mean share of a class that is confused with other classes, from 0 to 1 - 1/K (section 3).

        p = softmax(logits / temperature)                               eq. 4
        w_i = 1 + exp(-H(p_i)), H in nats, scaled to mean 1, constant   eq. 6
        C = sum over i of w_i p_i p_i^T, rows scaled to sum 1           eq. 7 and 8
        loss = (sum of C - trace of C) / K                              eq. 9

    Args:
        logits: (N, K, ...) of target images; every position is one prediction.
        temperature: above 0; a larger value lowers the confidence before classes are compared.

    Returns:
        A float32 scalar; 0, attached to the graph, without any prediction.
    """
    rows = logits.float().movedim(1, -1).flatten(0, -2) / temperature
    if len(rows) == 0:
        return rows.sum()
    log_p = where_float64(rows).double().log_softmax(1)  # float64, which autocast leaves alone
    p = log_p.exp()
    weights = 1 + torch.exp((p * log_p).sum(1).detach())
    weights = weights / mean_over_ranks(weights.mean())
    confusion = mean_over_ranks((p * weights[:, None]).T @ p)
    confusion = confusion / confusion.sum(1, keepdim=True)
    return (1 - confusion.trace() / len(confusion)).float()
