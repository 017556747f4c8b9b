"""Metrics of predictions with labels, and criteria of predictions without labels."""

import math

import torch

from common.counts import occurrences
from common.ranks import total

IGNORE_INDEX = 255  # the label of a pixel that is neither trained nor evaluated on


def where_float64(x: torch.Tensor) -> torch.Tensor:
    """The tensor, on the CPU if its device knows no float64, as Apple's GPUs."""
    return x.cpu() if x.device.type == "mps" else x


def labeled_mask(labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """True where a label is not `IGNORE_INDEX`; with more than 255 classes, everywhere."""
    return (labels != IGNORE_INDEX) | (num_classes > IGNORE_INDEX)


def confusion_matrix(logits: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Counts (K, K) int64 on the logits' device; rows are labels, columns are predictions.

    Args:
        logits: (N, K, ...).
        labels: (N, ...); `IGNORE_INDEX` is not counted.
        num_classes: K.
    """
    pairs = labels * num_classes + logits.argmax(1)
    # What is not counted gets the number after the last pair.
    pairs = pairs.where(labeled_mask(labels, num_classes), num_classes**2)
    return occurrences(pairs, num_classes**2 + 1)[:-1].view(num_classes, num_classes)


def accuracies(confusion: torch.Tensor, classes: list[str]) -> dict:
    """Shares of correct predictions in percent.

    Args:
        confusion: counts (K, K) of `confusion_matrix`.
        classes: the K class names.

    Returns:
        A dict of `accuracy`; `mean_class_accuracy`, the mean over the classes that have a label;
        both are None without any label; and `class_accuracy`, the accuracy on the images of each
        class by name, None for a class without a label.
    """
    confusion = confusion.cpu().double()
    hits, counts = confusion.diag(), confusion.sum(1)
    present = counts > 0
    shares = (100 * hits / counts).tolist()
    per_class = {
        name: share if has_label else None
        for name, share, has_label in zip(classes, shares, present.tolist(), strict=True)
    }
    accuracy = mean = None
    if present.any():
        accuracy = 100 * float(hits.sum() / counts.sum())
        mean = 100 * float((hits[present] / counts[present]).mean())
    return {"accuracy": accuracy, "mean_class_accuracy": mean, "class_accuracy": per_class}


def ious(confusion: torch.Tensor, classes: list[str], over: list[str] | None = None) -> dict:
    """Intersection over union in percent, from the confusion matrix of an entire set.

    Args:
        confusion: counts (K, K) of `confusion_matrix`.
        classes: the K class names.
        over: the classes over which the mean is taken; None for all.

    Returns:
        A dict of `mean_iou`, the mean over the classes that have a label in the set;
        `pixel_accuracy`, the share of labeled pixels that are predicted correctly; and `iou`, the
        value of each class by name, None for a class without a label.
    """
    confusion = confusion.cpu().double()
    labels_per_class, hits = confusion.sum(1), confusion.diag()
    values = (100 * hits / (labels_per_class + confusion.sum(0) - hits)).tolist()
    iou = {
        name: value if count > 0 else None
        for name, value, count in zip(classes, values, labels_per_class.tolist(), strict=True)
    }
    present = [iou[name] for name in over or classes if iou[name] is not None]
    total = float(labels_per_class.sum())
    return {
        "mean_iou": sum(present) / len(present) if present else None,
        "pixel_accuracy": 100 * float(hits.sum()) / total if total else None,
        "iou": iou,
    }


def main_metric(metrics: dict) -> str:
    """The metric that ranks the evaluations of a run: `mean_iou` if present, else `accuracy`."""
    return "mean_iou" if "mean_iou" in metrics else "accuracy"


class Criteria:
    """Label-free criteria in units of log K, higher is better; and counts of predicted classes.

    neg_entropy: minus the mean entropy of the predictions. infomax: the entropy of the mean
    prediction (diversity) minus the mean entropy. Both use a float32 log_softmax and float64 sums.

    Args:
        num_classes: K.
        device: of the logits.

    Attributes:
        sums: over all predictions, their number, the negative entropy, the probabilities (K,) and
            the number of predictions of each class (K,). A caller may put copies in their place.
    """

    def __init__(self, num_classes: int, device: torch.device | str = "cpu"):
        self.num_classes = num_classes
        # Tensors from the start: a process may have no batch.
        counts = torch.zeros(num_classes, dtype=torch.int64, device=device)
        zero = where_float64(torch.zeros((), device=device)).double()
        self.sums = [zero, zero, zero.repeat(num_classes), counts]

    def add(self, logits: torch.Tensor) -> None:
        """Add a batch of logits (N, K, ...)."""
        log_p = logits.float().log_softmax(1).transpose(0, 1).flatten(1)
        p = log_p.exp()
        count, entropy, probabilities, counts = self.sums
        self.sums = [
            count + p.shape[1],
            entropy + where_float64(p * log_p).sum(dtype=torch.float64),
            probabilities + where_float64(p).sum(1, dtype=torch.float64),
            counts + occurrences(log_p.argmax(0), self.num_classes),
        ]

    def share(self) -> None:
        """Add up what all processes have added."""
        self.sums = [total(x) for x in self.sums]

    def predicted(self) -> list[int]:
        """How many predictions each class has."""
        return self.sums[3].tolist()

    def values(self) -> dict[str, float]:
        count, entropy, probabilities, _ = self.sums
        mean = probabilities / count
        negative_entropy = float(entropy / count) / math.log(self.num_classes)
        diversity = -float(torch.xlogy(mean, mean).sum()) / math.log(self.num_classes)
        return {"neg_entropy": negative_entropy, "infomax": diversity + negative_entropy}


class ValidationLoss:
    """Mean cross-entropy on labels, in nats, from a float32 log_softmax and float64 sums.

    Args:
        device: of the logits.

    Attributes:
        sums: the log-likelihood and the number of labels. A caller may put copies in their place.
    """

    def __init__(self, device: torch.device | str = "cpu"):
        zero = where_float64(torch.zeros((), device=device))
        self.sums = [zero.double(), zero.long()]

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch of logits (N, K, ...) and labels (N, ...); `IGNORE_INDEX` is not counted."""
        counts = labeled_mask(labels, logits.shape[1])
        log_p = logits.float().log_softmax(1).gather(1, (labels * counts)[:, None])[:, 0]
        log_likelihood, count = self.sums
        self.sums = [
            log_likelihood + where_float64(log_p * counts).sum(dtype=torch.float64),
            count + where_float64(counts).sum(),
        ]

    def share(self) -> None:
        """Add up what all processes have added."""
        self.sums = [total(x) for x in self.sums]

    def value(self) -> float | None:
        """The mean; None without any label."""
        log_likelihood, count = self.sums
        return -float(log_likelihood / count) if count > 0 else None
