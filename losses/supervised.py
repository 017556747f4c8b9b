"""Cross-entropy on labels."""

import torch
import torch.nn.functional as F

from common.evaluation import IGNORE_INDEX


def nll_loss(log_p: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Mean of -log p of the label, in nats, over what is labelled; 0, attached to the graph, where nothing is.

    log_p: (N, K, ...) from `log_softmax`; labels: (N, ...) with `IGNORE_INDEX` left out. (With more than 255 classes
    every number is a class.) torch's own mean is NaN where every label is ignored.
    """
    ignored = IGNORE_INDEX if log_p.shape[1] <= IGNORE_INDEX else -1
    reduction = "sum" if log_p.dim() == 2 else "none"  # for maps CUDA's own sum depends on the order of its threads
    total = F.nll_loss(log_p, labels, ignore_index=ignored, reduction=reduction).sum()
    return total / (labels != ignored).sum().clamp_min(1)


def cross_entropy(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """`nll_loss` of float32 `log_softmax(logits)`: logits (N, K, ...), labels (N, ...)."""
    return nll_loss(logits.float().log_softmax(1), labels)


def supervised_loss(out, labels: torch.Tensor, aux_weight: float) -> torch.Tensor:
    """`cross_entropy` of a `ModelOutput`'s logits, and `aux_weight` times that of its auxiliary ones, if it has any."""
    loss = cross_entropy(out.logits, labels)
    return loss if out.aux_logits is None else loss + aux_weight * cross_entropy(out.aux_logits, labels)
