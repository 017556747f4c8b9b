"""Margin disparity discrepancy (MDD; Zhang et al. 2019, arXiv:1904.05801)."""

import torch


def disagreement_loss(logits: torch.Tensor, predictions: torch.Tensor) -> torch.Tensor:
    """Mean of -log(1 - p_k), in nats, with p = softmax(logits) and k the class predicted there.

    It is 0 where a classifier is certain that the predicted class is wrong, and grows without bound
    as it comes to agree: the disparity on the target (section 4), with its sign changed. log(1 -
    p_k) is computed as the logsumexp of log p over the other classes. It is exact however close p_k
    is to 1 (near 0, where the loss is 0, to about 1e-7), and no entry of its gradient exceeds 1.

    Args:
        logits: (N, K, ...) of the adversarial classifier.
        predictions: int64 (N, ...), the classes that the model predicts, from 0 to K - 1.

    Returns:
        A float32 scalar; 0, attached to the graph, without any prediction.
    """
    log_p = logits.float().log_softmax(1)
    others = log_p.scatter(1, predictions[:, None], -torch.inf)
    return -others.logsumexp(1).sum() / max(predictions.numel(), 1)
