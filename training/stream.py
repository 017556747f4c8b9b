"""What was predicted on a stream, beside the predictions of the unadapted model."""

import math
from collections.abc import Callable

import torch
from torch import nn

from common.averages import RunningMean, class_mean
from common.counts import occurrences
from common.errors import UserError
from common.metrics import confusion_matrix, main_metric
from common.resize import resize_maps
from data import EvaluationSets
from models.card import load_card
from training.collapse import RECENT

UPDATE = 64  # predictions that count as one update of the recent means; fewer in proportion
CONFIDENT = 0.9  # probability from which on a prediction of the unadapted model is confident
AGREED = 0.9  # agreement on the recent confident predictions below which there is an alarm
FEWEST = 128  # recent confident predictions below which the agreement may be chance
FEWEST_OF_CLASS = 16  # recent confident predictions below which a class is one of the others
MIXED = 0.5  # entropy of a mean prediction, as a share of log K, that tells a mixture of classes
LOSS = 1.0  # points below the unadapted model that the end of a labeled stream warns of


def _entropy(p: torch.Tensor) -> float:
    return -float(torch.xlogy(p, p).sum())


def _agreement(counts: torch.Tensor) -> float | None:
    """The mean over classes of the share of confident predictions that the models agree on.

    Classes count alike, as in the mean IoU: most pixels are of a few easy classes, on which any two
    models agree. Classes of few predictions together count as one. Waits for the device.

    Args:
        counts: per class, confident predictions and those that are agreed on (2, K).

    Returns:
        None without a confident prediction.
    """
    sure, agreed = counts.cpu().double()
    few = sure < FEWEST_OF_CLASS
    sure = torch.cat([sure[~few], sure[few].sum()[None]])
    agreed = torch.cat([agreed[~few], agreed[few].sum()[None]])
    least = FEWEST_OF_CLASS if len(sure) > 1 else 0  # of the group, unless there is nothing else
    counted = sure >= max(least, 1e-9)
    return float((agreed[counted] / sure[counted]).mean()) if counted.any() else None


def warn_of_fixed_statistics(start: str | None, prior: float | None) -> None:
    """Print a warning if batch norm is to adapt, but was frozen when the model was trained.

    Its statistics are those of the pretrained weights, and the other weights have learned to live
    with them: statistics of any images, of the source too, change what the network computes.

    Args:
        start: `init_from`.
        prior: of the config; None keeps the statistics.
    """
    if start is None or prior is None:
        return
    try:
        card = load_card(start)
    except UserError:  # weights without a card tell nothing
        return
    if card.model.bn == "frozen":
        print(
            f"warning: {start} was trained with model.bn: frozen, so its statistics are no "
            "statistics of its source; set prior: null to keep them"
        )


class StreamRecord(nn.Module):
    """Scores the predictions of a stream as they are made, and watches them without labels.

    The unadapted model predicts the same images. Where it is confident it is mostly right, so an
    adapted model that contradicts many of these predictions may have become worse. Where it sees a
    mixture of classes, an adapted model whose mean prediction has a much smaller entropy has
    collapsed. A stream of few classes at a time is not judged by the second, since a model that
    gains on it looks the same.

    Args:
        sets: of the run; its classes, and how a confusion matrix is measured.
        alarm: called with the step and the reason of each new alarm.

    Attributes:
        adapted, unadapted: confusion matrices (K, K); zeros without labels.
        pairs: counts (K, K) of predictions, a row per class of the unadapted model and a column per
            class of the adapted one.
        confident: per class, how many predictions of the unadapted model are confident, and on how
            many of these the adapted model agrees (2, K).
        recent: the mean prediction of the adapted and of the unadapted model over the last `RECENT`
            updates (2, K).
        recent_confident: what `confident` counts, over these (2, K).
        images, resets: how many there were.
        in_doubt: 1 while the models disagree, of which one alarm is raised.
    """

    def __init__(self, sets: EvaluationSets, alarm: Callable[[int, str], None]):
        super().__init__()
        self.classes, self.measure, self.alarm = sets.classes, sets.measure, alarm
        k = len(self.classes)
        for name, shape in {"adapted": (k, k), "unadapted": (k, k), "pairs": (k, k)}.items():
            self.register_buffer(name, torch.zeros(shape, dtype=torch.int64))
        self.register_buffer("confident", torch.zeros(2, k, dtype=torch.int64))
        for name in ("images", "resets", "in_doubt"):
            self.register_buffer(name, torch.zeros((), dtype=torch.int64))
        self.register_buffer("recent_confident", torch.zeros(2, k))
        self.recent = RunningMean(torch.zeros(2, k), 1 - 1 / RECENT)

    @torch.no_grad()
    def add(
        self, logits: torch.Tensor, unadapted: torch.Tensor, labels: torch.Tensor | None
    ) -> None:
        """Add the predictions on a batch.

        Args:
            logits, unadapted: of the adapted and of the unadapted model (N, K, ...).
            labels: (N, ...), or None. Logits of maps are enlarged to labels of another size.
        """
        k = len(self.classes)
        p, q = (x.float().log_softmax(1).exp() for x in (logits, unadapted))
        confidence, predicted = q.max(1)
        sure = confidence >= CONFIDENT
        agreed = sure & (p.argmax(1) == predicted)
        # What does not count gets the number after the last class.
        counts = [occurrences(predicted.where(x, k), k + 1)[:k] for x in (sure, agreed)]
        counts = torch.stack(counts)
        self.images += len(logits)
        self.confident += counts
        self.pairs += confusion_matrix(logits, predicted, k)
        update = min(sure.numel() / UPDATE, 1.0)
        self.recent.update(torch.stack([class_mean(p), class_mean(q)]), update)
        self.recent_confident *= (1 - 1 / RECENT) ** update
        self.recent_confident += counts
        if labels is not None:
            for matrix, scores in ((self.adapted, logits), (self.unadapted, unadapted)):
                if scores.shape[2:] != labels.shape[1:]:
                    scores = resize_maps(scores, labels.shape[1:])
                matrix += confusion_matrix(scores, labels, k)

    @property
    def mean_prediction(self) -> torch.Tensor:
        """The mean of the adapted model's recent predictions (K,); zeros before any."""
        return self.recent.value[0]

    def has_collapsed(self, share: float) -> bool:
        """Whether the entropy of the recent mean prediction is below `share` of the unadapted's.

        Never where the unadapted model sees no mixture of classes. Waits for the device.
        """
        adapted, unadapted = map(_entropy, self.recent.value.cpu())
        filled = float(self.recent.updates) >= 1
        return (
            filled
            and unadapted >= MIXED * math.log(len(self.classes))
            and adapted < share * unadapted
        )

    def reset(self) -> None:
        """Forget the recent predictions, since the adapted model is the unadapted one again."""
        self.resets += 1
        self.in_doubt.zero_()
        self.recent.value.zero_()
        self.recent.updates.zero_()
        self.recent_confident.zero_()

    def look_for_harm(self, step: int) -> None:
        """Raise an alarm where the models begin to disagree. Waits for the device."""
        agreement = _agreement(self.recent_confident)
        doubt = agreement is not None and agreement < AGREED
        doubt = doubt and float(self.recent_confident[0].sum()) >= FEWEST
        if doubt and not self.in_doubt:
            self.alarm(
                step,
                f"the adapted model agrees with {100 * agreement:.0f} % of the predictions that "
                "the unadapted model is confident of, mean over the classes: the adaptation may "
                "have hurt",
            )
        self.in_doubt.fill_(doubt)

    def report(self) -> dict[str, float | None]:
        """The figures so far, for a line of metrics.jsonl. Waits for the device.

        Returns:
            `stream.<metric>` and `stream.unadapted_<metric>`, None without labels, and
            `confident_agreement`, the mean over the classes of the agreement on recent predictions
            that the unadapted model is confident of, None without any.
        """
        adapted, unadapted = self.measure(self.adapted), self.measure(self.unadapted)
        name = main_metric(adapted)
        return {
            f"stream.{name}": adapted[name],
            f"stream.unadapted_{name}": unadapted[name],
            "confident_agreement": _agreement(self.recent_confident),
        }

    def facts(self) -> dict:
        """What summary.json contains about the entire stream."""
        pairs = self.pairs.cpu()
        counts = {"adapted": pairs.sum(0).tolist(), "unadapted": pairs.sum(1).tolist()}
        return {
            "images": int(self.images),
            "adapted": self.measure(self.adapted),
            "unadapted": self.measure(self.unadapted),
            "agreement": float(pairs.trace() / pairs.sum()),
            "confident_agreement": _agreement(self.confident),
            "predicted": {
                name: dict(zip(self.classes, row, strict=True)) for name, row in counts.items()
            },
            "resets": int(self.resets),
        }


def describe_stream(stream: dict, alarms: list[dict]) -> list[str]:
    """Sentences about the `facts` of a stream, and about the alarms of its run."""
    name = main_metric(stream["adapted"])
    figures = (stream["adapted"][name], stream["unadapted"][name])
    lines = [f"stream of {stream['images']} images: no labels to score with"]
    if None not in figures:
        adapted, unadapted = figures
        lines = [
            f"stream of {stream['images']} images: {name} {adapted:.2f} as predicted, "
            f"{unadapted:.2f} by the unadapted model"
        ]
        if adapted < unadapted - LOSS:
            lines.append("warning: the adaptation has hurt; take the unadapted model")
    lines.append(
        f"the two models agree on {100 * stream['agreement']:.1f} % of the predictions; "
        f"{stream['resets']} resets"
    )
    if alarms:
        first, more = alarms[0], len(alarms) - 1
        lines.append(
            f"warning: an alarm at step {first['step']} ({more} more later): {first['reason']}"
        )
    return lines
