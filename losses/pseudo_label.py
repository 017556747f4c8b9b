"""Self-training: which pseudo-labels to accept, and the cross-entropy on them.

    confidence, labels = p.max(1)
    accepted = confidence >= threshold
    loss = pseudo_label_loss(log_p_strong, labels, pseudo_label_weights(accepted, "mask"))

Shapes: p and log_p (N, K, ...) with class axis 1; labels, confidence, accepted and weights
(N, ...).
"""

import torch
import torch.nn.functional as F
from torch import nn

from common.averages import RunningMean, class_mean
from common.counts import occurrences
from common.metrics import labeled_mask
from common.ranks import mean_over_ranks, total


def pseudo_label_weights(accepted: torch.Tensor, weighting: str) -> torch.Tensor:
    """Weight of each pseudo-label, float32 of the shape of `accepted` (bool).

    mask: 1 where accepted, else 0 (FixMatch, arXiv:2001.07685, eq. 4). confident_fraction: the
    accepted share of the batch, for all pseudo-labels (DACS, arXiv:2007.08702, section 3.2).
    """
    weights = accepted.float()
    if weighting == "mask":
        return weights
    return mean_over_ranks(weights.sum() / max(weights.numel(), 1)).expand_as(weights)


def pseudo_label_loss(
    log_p: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor
) -> torch.Tensor:
    """Mean over *all* samples and positions of weight * -log p of the label, in nats.

    With no weight above 0, or no sample, it is 0 with zero gradients, attached to the graph.
    """
    return (weights * F.nll_loss(log_p, labels, reduction="none")).sum() / max(labels.numel(), 1)


def align_distribution(p: torch.Tensor, mean_s: torch.Tensor, mean_t: torch.Tensor) -> torch.Tensor:
    """p * mean_s / mean_t, scaled to sum 1 again (AdaMatch, arXiv:2106.04732, section 3.2).

    Args:
        p: (N, K, ...) target probabilities.
        mean_s, mean_t: (K,) mean predictions on source and target.
    """
    ratio = (mean_s / mean_t.clamp_min(1e-6)).view(-1, *[1] * (p.dim() - 2))
    return p * ratio / (p * ratio).sum(1, keepdim=True).clamp_min(1e-12)


def class_balanced_labels(
    p: torch.Tensor, thresholds: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Labels argmax p / threshold, accepted where that ratio is 1 or more (CBST, Zou et al. 2018).

    A rare class, whose threshold is low, is so chosen before one of higher probability that misses
    its own: of p = (0.55, 0.45) and thresholds (0.95, 0.40) it is the second.

    Args:
        p: (N, K, ...) target probabilities.
        thresholds: (K,) confidences, such as `ConfidenceHistogram.thresholds`.

    Returns:
        (labels int64, accepted bool), both (N, ...).
    """
    ratio, labels = (p / thresholds.view(-1, *[1] * (p.dim() - 2))).max(1)
    return labels, ratio >= 1


class ConfidenceHistogram(nn.Module):
    """Running histogram of confidences by predicted class, for class-balanced thresholds (CBST).

    The bins are of equal width in log-odds: fine near 1, where the confidences of a trained model
    lie, and near 1/K, where they begin.

    Args:
        num_classes: K.
        bins: number of bins.
        decay: factor of the old counts at each `add`; with 1 nothing is forgotten.

    Attributes:
        counts: (K, bins), a buffer.
    """

    LOW, HIGH = -9.0, 16.0  # log-odds of 1e-4, and of 1 - 1e-7, the last step of float32 before 1

    def __init__(self, num_classes: int, bins: int = 1000, decay: float = 0.99):
        super().__init__()
        self.bins, self.decay = bins, decay
        self.register_buffer("counts", torch.zeros(num_classes, bins))

    @torch.no_grad()
    def add(self, confidence: torch.Tensor, labels: torch.Tensor) -> None:
        """Count a batch: confidence (N, ...) in [0, 1], predicted labels (N, ...) int64."""
        log_odds = torch.logit(confidence.flatten().float(), eps=1e-7)
        position = (log_odds - self.LOW) * (self.bins / (self.HIGH - self.LOW))
        bins = position.long().clamp_(0, self.bins - 1)
        new = total(occurrences(labels.flatten() * self.bins + bins, self.counts.numel()))
        self.counts.mul_(self.decay).add_(new.view_as(self.counts))

    @torch.no_grad()
    def thresholds(self, portion: float) -> torch.Tensor:
        """Confidences (K,) above which the top `portion` of each predicted class lies.

        They are exact to one bin: a threshold is the lower edge of the bin in which the portion is
        reached, so that at least the portion is accepted. Zou et al. 2018, ECCV, algorithm 2, sort
        the confidences of the entire target set instead. A class that was never predicted has
        threshold 1.
        """
        # Integers: on CUDA a sum of floats depends on the order of the threads.
        counts = (1024 * self.counts).long()
        from_top = counts.flip(1).cumsum(1)
        total = from_top[:, -1:]
        # Bins from the top that together contain less than the portion.
        short_bins = (from_top < portion * total).sum(1)
        bin_width = (self.HIGH - self.LOW) / self.bins
        edge = torch.sigmoid(self.LOW + (self.bins - 1 - short_bins) * bin_width)
        return torch.where(total[:, 0] > 0, edge, torch.ones_like(edge))


class PredictionStatistics(nn.Module):
    """Running statistics of predictions, for thresholds and alignment; saved with the run.

    Attributes:
        mean_s, mean_t: running mean prediction (K,) on the labeled source and on the target,
            uniform at first.
        confidence_s: running mean confidence on the labeled source, 1 at first.
        histogram: `ConfidenceHistogram` of the target.
    """

    def __init__(self, num_classes: int, decay: float = 0.99):
        super().__init__()
        uniform = torch.full((num_classes,), 1 / num_classes)
        self.mean_s = RunningMean(uniform, decay)
        self.mean_t = RunningMean(uniform, decay)
        self.confidence_s = RunningMean(torch.ones(()), decay)
        self.histogram = ConfidenceHistogram(num_classes)

    def add_source(self, p_s: torch.Tensor, y_s: torch.Tensor) -> None:
        """Add the source probabilities (N, K, ...) of one batch, with the labels y_s (N, ...).

        Ignored positions do not count. A batch without any label leaves the means as they are.
        """
        labeled = labeled_mask(y_s, p_s.shape[1])
        share = mean_over_ranks(labeled.float().mean())
        mean = class_mean(p_s * labeled.unsqueeze(1)) / share
        confidence = mean_over_ranks((p_s.amax(1) * labeled).mean()) / share
        self.mean_s.update(torch.where(share > 0, mean, self.mean_s.value))
        self.confidence_s.update(torch.where(share > 0, confidence, self.confidence_s.value))
