"""Evaluation of a model on the sets of a run, and the choice of an evaluation."""

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import tqdm

from common import ranks
from common.errors import UserError
from common.metrics import Criteria, ValidationLoss, confusion_matrix, main_metric
from data import EvaluationSets, to_views

EXAMPLES = 4  # target images whose predictions `evaluate` returns
BAR_AFTER = 3  # seconds of a pass over a set from which a progress bar is shown


def with_progress(loader: Iterable) -> Iterable:
    """The batches of a pass, with a progress bar on a terminal if it takes long; it vanishes."""
    off = None if ranks.is_first() else True
    return tqdm(loader, "evaluation", leave=False, delay=BAR_AFTER, disable=off, unit="batch")


class Examples:
    """A few images of a loader with their predictions, for pictures of segmentation."""

    def __init__(self, loader: Iterable):
        batches = getattr(loader, "dataset", loader)  # those of all processes
        self.step = max(len(batches) // EXAMPLES, 1)
        self.number = ranks.number()  # of the next batch
        self.numbered: list[tuple] = []

    def add(self, images: torch.Tensor, logits: torch.Tensor, labels: torch.Tensor | None) -> None:
        """Add the next batch: images (N, 3, H, W), logits (N, K, ...), labels (N, ...) or None."""
        number, self.number = self.number, self.number + ranks.count()
        due = number % self.step == 0 and number // self.step < EXAMPLES
        if due and logits.dim() > 2:
            label = None if labels is None else labels[0].cpu()
            row = images[0].cpu(), logits[0].argmax(0).cpu(), label
            self.numbered.append((number, row))

    def rows(self) -> list[tuple]:
        """Those of all processes, on the CPU.

        Shapes: uint8 image (3, H, W), prediction (H, W), label (H', W') or None.
        """
        numbered = itertools.chain(*ranks.gather_objects(self.numbered))
        return [row for _, row in sorted(numbered, key=lambda pair: pair[0])]


def predict_labeled(model: nn.Module, loader: Iterable, device: torch.device) -> Iterator[tuple]:
    """(images, logits, labels) of each batch, the latter two on the device.

    Logits are enlarged to labels of another size, never the other way round.
    """
    for images, labels in with_progress(loader):
        logits = model(to_views(images, device)).logits
        if logits.shape[2:] != labels.shape[1:]:
            size = labels.shape[1:]
            logits = F.interpolate(logits, size=size, mode="bilinear", align_corners=False)
        yield images, logits, to_views(labels, device)


def source_figures(model: nn.Module, sets: EvaluationSets, device: torch.device) -> dict:
    """Metrics on the held-out source images; each is None without a source."""
    k = len(sets.classes)
    confusion = torch.zeros(k, k, dtype=torch.int64, device=device)
    held_out = () if sets.source_val is None else sets.source_val
    for _, logits, labels in predict_labeled(model, held_out, device):
        confusion += confusion_matrix(logits, labels, k)
    figures = sets.measure(ranks.total(confusion))
    if sets.source_val is not None and figures[main_metric(figures)] is None:
        raise UserError(
            "source_val: none of the held-out source images has a labeled pixel; "
            "correct its masks or its ids"
        )
    return figures


def target_figures(
    model: nn.Module, sets: EvaluationSets, device: torch.device
) -> tuple[dict, float | None, list]:
    """(metrics, validation loss in nats or None, examples) on the labeled target images."""
    k = len(sets.classes)
    confusion = torch.zeros(k, k, dtype=torch.int64, device=device)
    if sets.target_test is None:
        return sets.measure(confusion), None, []
    loss, examples = ValidationLoss(device), Examples(sets.target_test)
    for images, logits, labels in predict_labeled(model, sets.target_test, device):
        confusion += confusion_matrix(logits, labels, k)
        examples.add(images, logits, labels)
        if sets.val_loss:
            loss.add(logits, labels)
    loss.share()
    return sets.measure(ranks.total(confusion)), loss.value(), examples.rows()


def label_free_criteria(
    model: nn.Module, sets: EvaluationSets, device: torch.device
) -> tuple[dict[str, float], dict[str, int], list]:
    """(criteria, predictions per class, examples) on the unlabeled target images, if any."""
    if sets.target_train is None:
        return {}, {}, []
    criteria, examples = Criteria(len(sets.classes), device), Examples(sets.target_train)
    for images in with_progress(sets.target_train):
        logits = model(to_views(images, device)).logits
        criteria.add(logits)
        examples.add(images, logits, None)
    criteria.share()
    predicted = dict(zip(sets.classes, criteria.predicted(), strict=True))
    return criteria.values(), predicted, examples.rows()


@torch.inference_mode()
def evaluate(model: nn.Module, sets: EvaluationSets) -> tuple[dict, list]:
    """Measure a model in eval mode; its mode is restored. Precision is the caller's autocast.

    Returns:
        (metrics, examples). metrics: `source_val` and `target`, in which each metric is None
        without labels, and `criteria`: `source_val`, the label-free ones, and `neg_val_loss`,
        minus the loss in nats, each if there is a set for it; higher is better; and
        `predicted`, how many of the unlabeled target images (pixels) are predicted as each class.
        examples: the rows of `Examples`.

    Raises:
        UserError: no pixel of a set has a label.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    source = source_figures(model, sets, device)
    target, val_loss, examples = target_figures(model, sets, device)
    label_free, predicted, unlabeled_examples = label_free_criteria(model, sets, device)
    criteria = {} if sets.source_val is None else {"source_val": source[main_metric(source)]}
    criteria |= label_free
    if sets.val_loss:
        if val_loss is None:
            raise UserError(
                "target_test: none of the validation images has a labeled pixel; "
                "correct its masks or its ids"
            )
        criteria["neg_val_loss"] = -val_loss
    model.train(was_training)
    metrics = {"source_val": source, "target": target, "criteria": criteria, "predicted": predicted}
    return metrics, examples if sets.target_test is not None else unlabeled_examples


def _rank(value: float | None) -> float:
    return -math.inf if value is None or math.isnan(value) else value


def compact(history: list[dict], select: str) -> list[dict]:
    """The history with the figures that `choose` reads, and whole entries for those it returns.

    It grows by a few numbers per evaluation, however many classes there are; metrics.jsonl has all
    figures. A part that ends with an entry `part_ends` is chosen from on its own, too.
    """
    if not history:
        return []
    whole, begin = {entry["step"] for entry in choose(history, select).values()}, 0
    if None in whole:  # without labels the oracle is the first entry
        whole.add(history[0]["step"])
    for end, entry in enumerate(history, 1):
        if entry.get("part_ends") or end == len(history):
            whole.add(choose(history[begin:end], select)["selected"]["step"])
            begin = end
    figure = main_metric(history[-1]["target"])

    def short(entry: dict) -> dict:
        rest = {name: value for name, value in entry.items() if name != "source_val"}
        return {**rest, "target": {figure: entry["target"][figure]}}

    return [entry if entry["step"] in whole else short(entry) for entry in history]


def choose(history: list[dict], select: str) -> dict:
    """Last, selected and oracle entries of a run.

    Args:
        history: {"step", "criteria", "target", "collapsed"} of each evaluation; the last is the
            reason that `CollapseMonitor.judge` gives, or None.
        select: the criterion whose highest value selects, of equal values the first one; or `last`.
            A collapsed evaluation is selected by a criterion only if all are collapsed.

    Returns:
        `last`, `selected` and `oracle`: the step and the target metrics of an evaluation. The
        oracle is chosen with the test labels of the target: it is a bound, not a result.
    """
    if select == "last":
        selected = history[-1]
    else:
        candidates = [e for e in history if not e["collapsed"]] or history
        selected = max(candidates, key=lambda e: _rank(e["criteria"][select]))
    figure = main_metric(history[-1]["target"])
    oracle = max(history, key=lambda e: _rank(e["target"][figure]))
    chosen = {"last": history[-1], "selected": selected, "oracle": oracle}
    entries = {name: {"step": e["step"], **e["target"]} for name, e in chosen.items()}
    if history[-1]["target"][figure] is None:
        entries["oracle"]["step"] = None
    return entries
