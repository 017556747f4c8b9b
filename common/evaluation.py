"""Metrics on labelled data, criteria on unlabelled data, and what is chosen by them."""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import nn

from common.runtime import UserError

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


def ious(confusion: torch.Tensor, classes: list[str], over: list[str] | None = None) -> dict:
    """Intersection over union, in percent, from one confusion matrix over a whole set.

    `mean_iou` is the mean over the classes that have a label in the set, or over those of them named in `over`;
    `pixel_accuracy` the share of labelled pixels; `iou` the figure of each class by name, None without a label.
    """
    confusion = confusion.double().cpu()
    labelled, hits = confusion.sum(1), confusion.diag()
    values = (100 * hits / (labelled + confusion.sum(0) - hits)).tolist()
    iou = {name: value if n > 0 else None for name, value, n in zip(classes, values, labelled.tolist(), strict=True)}
    counted = [iou[name] for name in over or classes if iou[name] is not None]
    total = float(labelled.sum())
    return {
        "mean_iou": sum(counted) / len(counted) if counted else None,
        "pixel_accuracy": 100 * float(hits.sum()) / total if total else None,
        "iou": iou,
    }


def main_metric(metrics: dict) -> str:
    """The name of the figure a run is judged by, of `accuracies` or of `ious`."""
    return "mean_iou" if "mean_iou" in metrics else "accuracy"


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


EXAMPLES = 4  # target images whose predictions `evaluate` hands back


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    source_val: Iterable | None,
    target_train: Iterable | None,
    target_test: Iterable | None,
    classes: list[str],
    measure: Callable[[torch.Tensor], dict],
    device: torch.device,
    val_loss: bool = False,
) -> dict:
    """{"source_val": figures, "target": figures (None without labels), "criteria": label-free values, "examples"}.

    Without `source_val` its figures are None too, and it is no criterion. Without `target_train` there are no
    label-free criteria. With `val_loss` minus the mean cross-entropy on the target, in nats, is a criterion: for where
    the target's labels are there to be used.

    The loaders yield (images, labels) and, for `target_train`, images. `measure` makes figures of a confusion matrix.
    Logits are enlarged to labels of another size, never the other way round. `examples` are a few target images, (uint8
    image, prediction, label or None) on the CPU, for maps only. Precision is the caller's autocast.
    """
    was_training, num_classes = model.training, len(classes)
    model.eval()
    result, examples = {}, []
    nats, labelled = (torch.zeros((), dtype=torch.float64, device=device) for _ in range(2))

    def keep_example(loader: Iterable, number: int, images: torch.Tensor, logits: torch.Tensor, labels) -> None:
        step = max(len(loader) // EXAMPLES, 1)
        if logits.dim() > 2 and number % step == 0 and number < step * EXAMPLES:
            label = None if labels is None else labels[0].cpu()
            examples.append((images[0].cpu(), logits[0].argmax(0).cpu(), label))

    for name, loader in (("source_val", source_val), ("target", target_test)):
        confusion = torch.zeros(num_classes, num_classes, dtype=torch.int64, device=device)
        for number, (images, labels) in enumerate(loader or ()):
            logits = model(images.to(device, non_blocking=True)).logits
            if logits.shape[2:] != labels.shape[1:]:
                logits = F.interpolate(logits, size=labels.shape[1:], mode="bilinear", align_corners=False)
            labels = labels.to(device, non_blocking=True)
            confusion += confusion_matrix(logits, labels, num_classes)
            if val_loss and name == "target":
                kept = (labels != IGNORE_INDEX) | (num_classes > IGNORE_INDEX)
                of_label = logits.float().log_softmax(1).gather(1, (labels * kept)[:, None])[:, 0]
                nats, labelled = nats + (of_label * kept).sum(dtype=torch.float64), labelled + kept.sum()
            if name == "target":
                keep_example(loader, number, images, logits, labels)
        result[name] = measure(confusion)
    criteria = Criteria(num_classes)
    for number, images in enumerate(target_train or ()):
        logits = model(images.to(device, non_blocking=True)).logits
        criteria.add(logits)
        if target_test is None:
            keep_example(target_train, number, images, logits, None)
    source_figure = result["source_val"][main_metric(result["source_val"])]
    if source_figure is None and source_val is not None:
        raise UserError(
            "source_val: none of the held-out source images has a labelled pixel; mend its masks or its ids"
        )
    result["criteria"] = {
        **({"source_val": source_figure} if source_val is not None else {}),
        **(criteria.values() if target_train is not None else {}),
    }
    if val_loss:
        if labelled == 0:
            raise UserError(
                "target_test: none of the validation images has a labelled pixel; mend its masks or its ids"
            )
        result["criteria"]["val_loss"] = float(nats / labelled)
    result["examples"] = examples
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
    figure = main_metric(history[-1]["target"])
    oracle = max(history, key=lambda e: _rank(e["target"][figure]))
    chosen = {"last": history[-1], "selected": selected, "oracle": oracle}
    entries = {name: {"step": e["step"], **e["target"]} for name, e in chosen.items()}
    if history[-1]["target"][figure] is None:
        entries["oracle"]["step"] = None
    return entries
