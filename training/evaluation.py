"""Evaluation of a model on the sets of a run, and the choice of an evaluation."""

import itertools
import math
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from tqdm import tqdm

from common import ranks
from common.errors import UserError
from common.metrics import Criteria, ValidationLoss, confusion_matrix, main_metric
from common.resize import resize_maps
from common.transfer import read
from data import EvaluationSets, to_views
from training.predictions import Sample

EXAMPLES = 4  # target images whose predictions `evaluate` returns
SOURCE_MARGIN = 2.0  # points of source validation that may be lost, see `source_margin`
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
            row = images[0], logits[0].argmax(0), None if labels is None else labels[0]
            self.numbered.append((number, row))

    def rows(self) -> list[tuple]:
        """Those of all processes, on the CPU.

        Shapes: uint8 image (3, H, W), prediction (H, W), label (H', W') or None.
        """
        own = [
            (number, tuple(None if x is None else x.cpu() for x in row))
            for number, row in self.numbered
        ]
        numbered = itertools.chain(*ranks.gather_objects(own))
        return [row for _, row in sorted(numbered, key=lambda pair: pair[0])]


def predict_labeled(model: nn.Module, loader: Iterable, device: torch.device) -> Iterator[tuple]:
    """(images, logits, labels) of each batch, the latter two on the device.

    Logits are enlarged to labels of another size, never the other way round.
    """
    for images, labels in with_progress(loader):
        logits = model(to_views(images, device)).logits
        if logits.shape[2:] != labels.shape[1:]:
            logits = resize_maps(logits, labels.shape[1:])
        yield images, logits, to_views(labels, device)


def count_pairs(
    model: nn.Module,
    loader: Iterable | None,
    sets: EvaluationSets,
    device: torch.device,
    loss: ValidationLoss | None = None,
    examples: Examples | None = None,
) -> torch.Tensor:
    """The confusion matrix of a labeled set, on the device; zeros for None.

    `loss` and `examples` are added to.
    """
    k = len(sets.classes)
    confusion = torch.zeros(k, k, dtype=torch.int64, device=device)
    for images, logits, labels in predict_labeled(model, () if loader is None else loader, device):
        confusion += confusion_matrix(logits, labels, k)
        if loss is not None:
            loss.add(logits, labels)
        if examples is not None:
            examples.add(images, logits, labels)
    return ranks.total(confusion)


def add_criteria(
    model: nn.Module,
    loader: Iterable,
    criteria: Criteria,
    sample: Sample,
    examples: Examples | None,
    device: torch.device,
) -> None:
    """Add the predictions on unlabeled images to `criteria`, `sample` and `examples`."""
    for images in with_progress(loader):
        logits = model(to_views(images, device)).logits
        criteria.add(logits)
        sample.add(logits)
        if examples is not None:
            examples.add(images, logits, None)
    criteria.share()


@torch.inference_mode()
def evaluate(
    model: nn.Module, sets: EvaluationSets
) -> tuple[dict, list[tuple], torch.Tensor | None]:
    """Measure a model in eval mode; its mode is restored. Precision is the caller's autocast.

    Returns:
        (metrics, examples, sample). metrics: `source_val` and `target`, in which each metric is
        None without labels, and `criteria`: `source_val`, the label-free ones, and `neg_val_loss`,
        minus the loss in nats, each if there is a set for it; higher is better;
        `source_count`, the number of labels that `source_val` is measured on;
        `predicted`, how many of the unlabeled target images (pixels) are predicted as each class;
        and `confusion`, the target's confusion matrix (K, K), None without labels.
        examples: the rows of `Examples`.
        sample: the logits of a `Sample` of the unlabeled target images, float16 (M, K), or None.

    Raises:
        UserError: no pixel of a set has a label.
    """
    device = next(model.parameters()).device
    was_training = model.training
    model.eval()
    loss, criteria = ValidationLoss(device), Criteria(len(sets.classes), device)
    shown = sets.target_test if sets.target_test is not None else sets.target_train
    examples = None if shown is None else Examples(shown)
    sample = None
    source = count_pairs(model, sets.source_val, sets, device)
    validation = loss if sets.val_loss else None
    target = count_pairs(model, sets.target_test, sets, device, validation, examples)
    loss.share()
    if sets.target_train is not None:
        unlabeled = None if sets.target_test is not None else examples
        sample = Sample(sets.target_train)
        add_criteria(model, sets.target_train, criteria, sample, unlabeled, device)
    # Until here nothing has waited for the device.
    source, target, *sums = read([source, target, *loss.sums, *criteria.sums])
    loss.sums, criteria.sums = sums[:2], sums[2:]
    model.train(was_training)
    metrics = _figures(sets, source, target, loss, criteria)
    rows = [] if examples is None else examples.rows()
    return metrics, rows, None if sample is None else sample.rows()


def _figures(
    sets: EvaluationSets,
    source_confusion: torch.Tensor,
    target_confusion: torch.Tensor,
    loss: ValidationLoss,
    criteria: Criteria,
) -> dict:
    """The metrics that `evaluate` returns, from sums on the CPU."""
    source, target = sets.measure(source_confusion), sets.measure(target_confusion)
    values, predicted = {}, {}
    if sets.source_val is not None:
        values["source_val"] = source[main_metric(source)]
        if values["source_val"] is None:
            raise UserError(
                "source_val: none of the held-out source images has a labeled pixel; "
                "correct its masks or its ids"
            )
    if sets.target_train is not None:
        values |= criteria.values()
        predicted = dict(zip(sets.classes, criteria.predicted(), strict=True))
    if sets.val_loss:
        if loss.value() is None:
            raise UserError(
                "target_test: none of the validation images has a labeled pixel; "
                "correct its masks or its ids"
            )
        values["neg_val_loss"] = -loss.value()
    confusion = target_confusion if target_confusion.any() else None
    return {
        "source_val": source,
        "target": target,
        "source_count": int(source_confusion.sum()),
        "criteria": values,
        "predicted": predicted,
        "confusion": confusion,
    }


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
        large = ("source_val", "confusion")
        rest = {name: value for name, value in entry.items() if name not in large}
        return {**rest, "target": {figure: entry["target"][figure]}}

    return [entry if entry["step"] in whole else short(entry) for entry in history]


def source_margin(count: int, margin: float = SOURCE_MARGIN) -> float:
    """Points of source validation that may be lost: `margin`, but at least two images.

    Args:
        count: labels (images or pixels) that the validation is measured on; 0 if unknown.
        margin: in points.
    """
    return max(margin, 200 / count) if count else margin


def _select(history: list[dict], select: str) -> dict:
    """The evaluation with the highest criterion, of equal values the first one.

    A collapsed evaluation is selected only if all are. One whose source validation is more than
    `source_margin` below the best so far is not selected either, unless `source_vetoes` is false.
    As evaluations come one by one and only the selected weights are kept, one that the best source
    validation yet rules out is replaced by the evaluation that has it.
    """
    selected, best = history[0], -math.inf

    def is_vetoed(entry: dict) -> bool:
        if not entry.get("source_vetoes", True):
            return False
        source_val = _rank(entry["criteria"].get("source_val", math.inf))
        return source_val < best - source_margin(entry.get("source_count", 0))

    for entry in history:
        if entry["collapsed"] and not selected["collapsed"]:
            continue
        recovered = selected["collapsed"] and not entry["collapsed"]
        if recovered:
            best = -math.inf  # of the evaluations that have not collapsed
        best = max(best, _rank(entry["criteria"].get("source_val")))
        if is_vetoed(selected) or recovered:
            selected = entry
        elif not is_vetoed(entry):
            higher = _rank(entry["criteria"][select]) > _rank(selected["criteria"][select])
            selected = entry if higher else selected
    return selected


def choose(history: list[dict], select: str) -> dict:
    """Last, selected and oracle entries of a run.

    Args:
        history: {"step", "criteria", "target", "collapsed"} of each evaluation; the last is the
            reason that `CollapseMonitor.judge` gives, or None. `source_vetoes`: whether source
            validation rules evaluations out; true if left out.
        select: the criterion whose highest value selects, see `_select`; or `last`.

    Returns:
        `last`, `selected` and `oracle`: the step and the target metrics of an evaluation. The
        oracle is chosen with the test labels of the target: it is a bound, not a result.
    """
    selected = history[-1] if select == "last" else _select(history, select)
    figure = main_metric(history[-1]["target"])
    oracle = max(history, key=lambda e: _rank(e["target"][figure]))
    chosen = {"last": history[-1], "selected": selected, "oracle": oracle}
    entries = {name: {"step": e["step"], **e["target"]} for name, e in chosen.items()}
    if history[-1]["target"][figure] is None:
        entries["oracle"]["step"] = None
    return entries
