"""Metrics on labelled data, criteria on unlabelled data, and what is chosen by them."""

import math
from collections.abc import Iterable

import torch
from torch import nn

IGNORE_INDEX = 255


def confusion_matrix(logits: torch.Tensor, labels: torch.Tensor, num_classes: int) -> torch.Tensor:
    """Counts (K, K) int64, row = label, column = prediction, on the logits' device.

    logits: (N, K, ...), labels: (N, ...) with `IGNORE_INDEX` left out.
    """
    predictions, labels = logits.argmax(1).flatten(), labels.flatten()
    kept = (labels != IGNORE_INDEX) | (num_classes > IGNORE_INDEX)
    index = labels[kept] * num_classes + predictions[kept]
    return torch.bincount(index, minlength=num_classes**2).view(num_classes, num_classes)


def accuracies(confusion: torch.Tensor) -> dict[str, float | None]:
    """`accuracy` and `mean_class_accuracy` (over the classes present) in percent; None without any label."""
    confusion = confusion.double().cpu()
    per_class, present = confusion.sum(1), confusion.sum(1) > 0
    if not present.any():
        return {"accuracy": None, "mean_class_accuracy": None}
    hits = confusion.diag()
    return {
        "accuracy": 100 * float(hits.sum() / per_class.sum()),
        "mean_class_accuracy": 100 * float((hits[present] / per_class[present]).mean()),
    }


class Criteria:
    """Label-free criteria, higher is better, in units of log K (float32 log_softmax, float64 sums).

    entropy: minus the mean entropy of the predictions. infomax: entropy of the mean prediction (diversity) minus
    the mean entropy.
    """

    def __init__(self, num_classes: int):
        self.num_classes, self.count = num_classes, 0
        self.entropy = self.mean = 0.0

    def add(self, logits: torch.Tensor) -> None:
        """logits: (N, K, ...)."""
        log_p = logits.float().log_softmax(1).transpose(0, 1).flatten(1)
        p = log_p.exp()
        self.entropy = self.entropy - (p * log_p).sum(dtype=torch.float64)
        self.mean = self.mean + p.sum(1, dtype=torch.float64)
        self.count += p.shape[1]

    def values(self) -> dict[str, float]:
        mean = self.mean / self.count
        entropy = float(self.entropy / self.count) / math.log(self.num_classes)
        diversity = -float(torch.xlogy(mean, mean).sum()) / math.log(self.num_classes)
        return {"entropy": -entropy, "infomax": diversity - entropy}


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    source_val: Iterable,
    target_train: Iterable,
    target_test: Iterable | None,
    num_classes: int,
    device: torch.device,
) -> dict:
    """{"source_val": accuracies, "target": accuracies (None without labels), "criteria": label-free values}.

    The loaders yield (images, labels) and, for `target_train`, images. Precision is the caller's autocast.
    """
    was_training = model.training
    model.eval()
    result = {}
    for name, loader in (("source_val", source_val), ("target", target_test)):
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        for images, labels in loader or ():
            logits = model(images.to(device, non_blocking=True)).logits
            confusion += confusion_matrix(logits, labels.to(device, non_blocking=True), num_classes)
        result[name] = accuracies(confusion)
    criteria = Criteria(num_classes)
    for images in target_train:
        criteria.add(model(images.to(device, non_blocking=True)).logits)
    result["criteria"] = {"source_val": result["source_val"]["accuracy"], **criteria.values()}
    model.train(was_training)
    return result


def _rank(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def choose(history: list[dict], select: str) -> dict:
    """Last, selected and oracle entries of a run.

    history: one {"step", "criteria", "target"} an evaluation. `selected` is the first step with the highest
    `select` criterion. `oracle` is chosen on the target's test labels: a bound, no result.
    """
    selected = max(history, key=lambda e: _rank(e["criteria"][select]))
    oracle = max(history, key=lambda e: _rank(e["target"]["accuracy"]))
    chosen = {"last": history[-1], "selected": selected, "oracle": oracle}
    entries = {name: {"step": e["step"], **e["target"]} for name, e in chosen.items()}
    if history[-1]["target"]["accuracy"] is None:
        entries["oracle"]["step"] = None
    return entries
