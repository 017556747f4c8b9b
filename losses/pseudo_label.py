"""Self-training: which pseudo-labels to believe, and the cross-entropy on them.

    confidence, labels = p.max(1)
    accepted = confidence >= threshold
    loss = pseudo_label_loss(log_p_strong, labels, pseudo_label_weights(accepted, "mask"))

Shapes: p and log_p (N, K, ...) with class axis 1; labels, confidence, accepted and weights (N, ...).
"""

import torch
import torch.nn.functional as F
from torch import nn


def pseudo_label_weights(accepted: torch.Tensor, weighting: str) -> torch.Tensor:
    """Weight of each pseudo-label, float32 of the shape of `accepted` (bool).

    mask: 1 where accepted, else 0 (FixMatch, arXiv:2001.07685, eq. 4). confident_fraction: for all alike the accepted
    share of the batch (DACS, arXiv:2007.08702, section 3.2).
    """
    weights = accepted.float()
    return weights if weighting == "mask" else (weights.sum() / max(weights.numel(), 1)).expand_as(weights)


def pseudo_label_loss(log_p: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean over *all* samples and positions of weight * -log p of the label, in nats.

    With no weight above 0, or no sample, it is 0 with zero gradients, attached to the graph.
    """
    return (weights * F.nll_loss(log_p, labels, reduction="none")).sum() / max(labels.numel(), 1)


def align_distribution(p: torch.Tensor, mean_s: torch.Tensor, mean_t: torch.Tensor) -> torch.Tensor:
    """p * mean_s / mean_t, scaled to sum 1 again (AdaMatch, arXiv:2106.04732, section 3.2).

    p: (N, K, ...) target probabilities; mean_s, mean_t: (K,) mean predictions on source and target.
    """
    ratio = (mean_s / mean_t.clamp_min(1e-6)).view(-1, *[1] * (p.dim() - 2))
    return p * ratio / (p * ratio).sum(1, keepdim=True).clamp_min(1e-12)


class ConfidenceHistogram(nn.Module):
    """Running histogram of confidences by predicted class, from which class-balanced thresholds follow (CBST).

    The bins are even in log-odds, fine near 1, where a trained model's confidences lie, and near 1/K, where they begin.
    `counts` (K, bins), a buffer, forgets by `decay` at each `add`; with decay 1 it counts all.
    """

    LOW, HIGH = -9.0, 16.0  # log-odds of 1e-4 and of 1 - 1e-7, beyond which float32 knows 1 alone

    def __init__(self, num_classes: int, bins: int = 1000, decay: float = 0.99):
        super().__init__()
        self.bins, self.decay = bins, decay
        self.register_buffer("counts", torch.zeros(num_classes, bins))

    @torch.no_grad()
    def add(self, confidence: torch.Tensor, labels: torch.Tensor) -> None:
        """confidence: (N, ...) in [0, 1], labels: (N, ...) int64."""
        log_odds = torch.logit(confidence.flatten().float(), eps=1e-7)
        bins = ((log_odds - self.LOW) * (self.bins / (self.HIGH - self.LOW))).long().clamp_(0, self.bins - 1)
        index = labels.flatten() * self.bins + bins
        new = torch.zeros(self.counts.numel(), dtype=torch.int64, device=index.device)
        new.scatter_add_(0, index, torch.ones_like(index))
        self.counts.mul_(self.decay).add_(new.view_as(self.counts))

    @torch.no_grad()
    def thresholds(self, portion: float) -> torch.Tensor:
        """(K,) confidences above which lies the top `portion` of each predicted class, to within one bin.

        The lower edge of the bin at which the share is reached, so that at least the portion is kept (Zou et al. 2018,
        ECCV, algorithm 2, which sorts the whole target set). For a class never predicted it is 1.
        """
        counts = (1024 * self.counts).long()  # on CUDA sums of floats depend on the order of its threads
        from_top = counts.flip(1).cumsum(1)
        total = from_top[:, -1:]
        bins_below = (from_top < portion * total).sum(1)  # from the top, whose sum falls short of the portion
        edge = torch.sigmoid(self.LOW + (self.bins - 1 - bins_below) * ((self.HIGH - self.LOW) / self.bins))
        return torch.where(total[:, 0] > 0, edge, torch.ones_like(edge))
