"""Cross-entropy on labels."""

import torch
import torch.nn.functional as F

from common.metrics import labeled_mask
from common.ranks import count, mean_over_ranks


def nll_loss(log_p: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Mean of -log p of the label, in nats, over the labeled samples and positions.

    Of several processes each returns its part of the mean over all: their mean is the loss.

    Without any label it is 0, attached to the graph; torch's mean would be NaN.

    Args:
        log_p: (N, K, ...) from `log_softmax`.
        labels: (N, ...); 255 is not counted, unless there are more than 255 classes.
        smoothing: share of each label that is spread over all classes alike.
    """
    counts = labeled_mask(labels, log_p.shape[1])
    # With "sum", CUDA adds the pixels in an order that differs from run to run.
    reduction = "sum" if log_p.dim() == 2 else "none"
    total = F.nll_loss(log_p, labels.where(counts, -100), reduction=reduction).sum()
    if smoothing > 0:
        spread = -(log_p.mean(1) * counts).sum()
        total = (1 - smoothing) * total + smoothing * spread
    return total / mean_over_ranks(counts.sum()).clamp_min(1 / count())


def cross_entropy(
    logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """`nll_loss` of float32 `log_softmax(logits)`: logits (N, K, ...), labels (N, ...)."""
    return nll_loss(logits.float().log_softmax(1), labels, smoothing)


def supervised_loss(out, labels: torch.Tensor, config) -> tuple[torch.Tensor, dict]:
    """Cross-entropy of a model's output, with that of the auxiliary head where there is one.

    Args:
        out: a `ModelOutput`.
        labels: (N, ...).
        config: the section `model`; its `aux_weight`, the weight of the auxiliary head's
            cross-entropy, and its `label_smoothing` are read.

    Returns:
        (loss, parts): cls_loss + aux_weight * aux_cls_loss, and both terms by name.
    """
    smoothing = config.label_smoothing
    parts = {"cls_loss": cross_entropy(out.logits, labels, smoothing)}
    loss = parts["cls_loss"]
    if out.aux_logits is not None:
        parts["aux_cls_loss"] = cross_entropy(out.aux_logits, labels, smoothing)
        loss = loss + config.aux_weight * parts["aux_cls_loss"]
    return loss, parts
