"""What the predictions of a model on a labeled set show: figures, calibration, every image."""

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from common.metrics import labeled_mask, where_float64
from training.evaluation import predict_labeled

BINS = 15  # of confidence, as in Guo et al. 2017, arXiv:1706.04599


@dataclass
class Predictions:
    """The predictions of a model on the N images of a labeled set.

    Attributes:
        classes: the K class names.
        images: the name of each image.
        rows: (E, 4) int64: number of an image, label, predicted class, and how many of the image's
            labels have these two: 1 for a class per image, pixels for a mask.
        confidence: (N,) largest probability, of a mask its mean over the labeled pixels.
        entropy: (N,) of the probabilities, in nats, likewise.
        bins: (3, `BINS`) float64: number of labels, number of correct predictions, and sum of the
            confidences, by confidence; bin b is for those in (b / BINS, (b + 1) / BINS].
        log_likelihood: sum over the labels, in nats.
        maps: whether each image has a mask.
        measure: computes the metrics of a confusion matrix (K, K).
    """

    classes: list[str]
    images: list[str]
    rows: torch.Tensor
    confidence: torch.Tensor
    entropy: torch.Tensor
    bins: torch.Tensor
    log_likelihood: float
    maps: bool
    measure: Callable[[torch.Tensor], dict]

    def confusion(self, weights: torch.Tensor | None = None) -> torch.Tensor:
        """Counts (K, K); rows are labels, columns are predictions.

        Args:
            weights: (N,) how often each image counts; None for once.

        Returns:
            int64, or with weights float64.
        """
        image, label, prediction, count = self.rows.unbind(1)
        k = len(self.classes)
        count = count if weights is None else count * weights[image]
        sums = torch.zeros(k * k, dtype=count.dtype)
        return sums.index_add_(0, label * k + prediction, count).view(k, k)

    def labels(self) -> torch.Tensor:
        """How many labels of each class each image has: int64 (N, K)."""
        image, label, _, count = self.rows.unbind(1)
        sums = torch.zeros(len(self.images) * len(self.classes), dtype=torch.int64)
        sums.index_add_(0, image * len(self.classes) + label, count)
        return sums.view(len(self.images), len(self.classes))

    def shares(self) -> torch.Tensor:
        """(N,) share of each image's labels that are predicted correctly; nan without a label."""
        image, label, prediction, count = self.rows.unbind(1)
        sums = torch.zeros(2, len(self.images), dtype=torch.float64)
        sums[0].index_add_(0, image, count.double())
        sums[1].index_add_(0, image, (count * (label == prediction)).double())
        return sums[1] / sums[0]

    def image_ious(self) -> torch.Tensor:
        """(N,) mean IoU of each image in percent, over the classes in its mask; nan without."""
        image, label, prediction, count = self.rows.unbind(1)
        n, k = len(self.images), len(self.classes)
        hits, labels, predictions = torch.zeros(3, n * k, dtype=torch.float64)
        hits.index_add_(0, image * k + label, (count * (label == prediction)).double())
        labels.index_add_(0, image * k + label, count.double())
        predictions.index_add_(0, image * k + prediction, count.double())
        iou = (hits / (labels + predictions - hits)).where(labels > 0, math.nan)
        return 100 * iou.view(n, k).nanmean(1)

    def calibration(self) -> dict[str, float | None]:
        """The calibration, in percent; all None without labels.

        Returns:
            `ece`, the expected calibration error: the mean, over all labels, of the distance
            between the accuracy and the mean confidence in a label's bin (Guo et al. 2017,
            arXiv:1706.04599, eq. 3); `ece_by_chance`, what it would be in the mean if the
            confidences were true probabilities, since a bin has few labels (pixels are taken as
            independent); `overconfidence`, the mean confidence minus the accuracy; `confidence`.
        """
        count, correct, confidence = self.bins
        total = count.sum()
        if total == 0:
            return dict.fromkeys(("ece", "ece_by_chance", "overconfidence", "confidence"))
        p = (confidence / count.clamp_min(1)).clamp(0, 1)
        return {
            "ece": 100 * float((correct - confidence).abs().sum() / total),
            "ece_by_chance": 100 * float((2 / math.pi * p * (1 - p) * count).sqrt().sum() / total),
            "overconfidence": 100 * float((confidence.sum() - correct.sum()) / total),
            "confidence": 100 * float(confidence.sum() / total),
        }

    def figures(self) -> dict:
        """All figures: the metrics of the task, calibration, and the loss in nats per label."""
        count = float(self.bins[0].sum())
        loss = -self.log_likelihood / count if count else None
        return {**self.measure(self.confusion()), **self.calibration(), "loss": loss}


class _Sums:
    """What `predict` adds up; see `Predictions`."""

    def __init__(self, num_classes: int):
        self.k, self.number = num_classes, 0
        self.rows, self.confidence, self.entropy = [], [], []
        self.bins = torch.zeros(3, BINS, dtype=torch.float64)
        self.log_likelihood = 0.0

    def add(self, logits: torch.Tensor, labels: torch.Tensor) -> None:
        """Add a batch of logits (N, K, ...) and labels (N, ...)."""
        log_p = logits.float().log_softmax(1)
        prediction = logits.argmax(1)
        confidence, entropy = log_p.amax(1).exp(), -(log_p * log_p.exp()).sum(1)
        counts = labeled_mask(labels, self.k)
        own = log_p.gather(1, (labels * counts)[:, None])[:, 0]
        self.log_likelihood += float(where_float64(own * counts).sum(dtype=torch.float64))
        # One number per image, label and prediction; those without a label are left out.
        number = torch.arange(len(labels), device=labels.device)
        number = number.view(-1, *[1] * (labels.dim() - 1)).expand_as(labels)
        codes = (number * self.k + labels) * self.k + prediction
        codes, repeats = codes[counts].unique(return_counts=True)
        image, label = codes // self.k**2 + self.number, codes // self.k % self.k
        self.rows.append(torch.stack([image, label, codes % self.k, repeats], 1).cpu())
        self.number += len(labels)

        def mean(x: torch.Tensor) -> torch.Tensor:
            x, weights = (y.flatten(1) if y.dim() > 1 else y[:, None] for y in (x, counts))
            return ((x * weights).sum(1) / weights.sum(1)).cpu()

        self.confidence.append(mean(confidence))
        self.entropy.append(mean(entropy))
        self._add_bins(confidence[counts].cpu(), (prediction == labels)[counts].cpu())

    def _add_bins(self, confidence: torch.Tensor, correct: torch.Tensor) -> None:
        """Add confidences (M,) and whether each prediction is correct (M,)."""
        confidence = confidence.double()
        number = ((confidence * BINS).ceil().long() - 1).clamp(0, BINS - 1)
        values = torch.stack([torch.ones_like(confidence), correct.double(), confidence])
        self.bins.index_add_(1, number, values)


@torch.inference_mode()
def predict(
    model: nn.Module,
    loader: Iterable,
    classes: list[str],
    images: Sequence[str],
    measure: Callable[[torch.Tensor], dict],
) -> Predictions:
    """Predict a labeled set. Precision is the caller's autocast.

    Args:
        model: in eval mode.
        loader: (images, labels), each image once and in order.
        classes: the class names.
        images: the name of each image, for tables.
        measure: computes the metrics of a confusion matrix (K, K).
    """
    sums, maps = _Sums(len(classes)), False
    device = next(model.parameters()).device
    for _, logits, labels in predict_labeled(model, loader, device):
        sums.add(logits, labels)
        maps = labels.dim() > 1
    return Predictions(
        classes=classes,
        images=list(images),
        rows=torch.cat(sums.rows),
        confidence=torch.cat(sums.confidence),
        entropy=torch.cat(sums.entropy),
        bins=sums.bins,
        log_likelihood=sums.log_likelihood,
        maps=maps,
        measure=measure,
    )
