"""Alarms if the predictions on the target collapse; shares of accepted pseudo-labels per class."""

from collections.abc import Callable, Sequence

import torch
from torch import nn

from common.averages import RunningMean, class_mean
from common.counts import occurrences
from common.ranks import count, mean_over_ranks, total

VANISHED = 0.05  # a class has vanished if its share is below this factor of its expected share
COLLAPSED = 0.05  # expected share of the vanished classes from which an evaluation is collapsed
FEWEST = 5  # expected predictions in an evaluation below which none may be chance
DRIFT = 0.3  # largest total variation between recent and running mean prediction without an alarm
RECENT, RUNNING = 20, 200  # batches over which the two means are taken
WHOLE = 8  # predictions from which on a batch counts as one; a smaller one counts in proportion


class AcceptedShares(nn.Module):
    """Counts of rejected and of accepted pseudo-labels per class, since the last report."""

    def __init__(self, classes: list[str]):
        super().__init__()
        self.classes = classes
        self.register_buffer("counts", torch.zeros(2, len(classes), dtype=torch.int64))

    @torch.no_grad()
    def add(self, labels: torch.Tensor, accepted: torch.Tensor) -> None:
        """Count pseudo-labels int64 (N, ...), of which `accepted` bool (N, ...) are accepted."""
        new = occurrences(labels + len(self.classes) * accepted, self.counts.numel())
        self.counts += total(new).view_as(self.counts)

    def report(self) -> dict[str, float | None]:
        """The accepted shares since the last report; the counts are reset to 0.

        Waits once for the device.

        Returns:
            `accepted`, the accepted share of all pseudo-labels, and `accepted.<class>`, that of the
            pseudo-labels of one class, None if it was never predicted.
        """
        rejected, accepted = self.counts.tolist()
        self.counts.zero_()
        shares = {
            f"accepted.{name}": yes / (no + yes) if no + yes else None
            for name, no, yes in zip(self.classes, rejected, accepted, strict=True)
        }
        return {"accepted": sum(accepted) / max(sum(rejected + accepted), 1), **shares}


class CollapseMonitor(nn.Module):
    """Watches the predictions on the target without using its labels; a `Run` has one and saves it.

    A model that goes wrong predicts fewer and fewer classes, and no loss shows it: in self-training
    confidence grows meanwhile, and of a constant feature the best prediction is the mean label of
    the source, for every image.

    A class has vanished if its share of the predictions is below `VANISHED` times its expected
    share: the largest share that it ever had, but at most its share of the source labels, since an
    untrained network predicts rare classes as often as others. One class holds nearly all
    predictions if all others together have vanished.

    Args:
        classes: the class names.
        source_shares: the share of each class in the source labels, or None without a source.
        absent: classes that the target is known not to have.
        tell: called with the text of each new alarm.

    Attributes:
        alarms: every {"step", "reason"} that was raised.
        current: what the last report found wrong: names of classes, "one class" and "drift".
        judged: what the last evaluation found wrong, likewise.
        evaluated: the largest share of each class in the evaluations so far.
        recent, running: mean prediction (K,) over the last `RECENT` and `RUNNING` steps.
        largest: the largest running share (K,) of each class so far.
        recent_top: the share (K,) of each class among the predicted classes of `RECENT` steps.
        spread: the largest share () that all classes but the most frequent one had in it so far.
    """

    def __init__(
        self,
        classes: list[str],
        source_shares: Sequence[float] | None = None,
        absent: Sequence[str] = (),
        tell: Callable[[str], None] = print,
    ):
        super().__init__()
        self.classes, self.tell = classes, tell
        self.alarms, self.current, self.judged = [], [], []
        self.evaluated = [0.0] * len(classes)
        present = [float(name not in absent) for name in classes]
        shares = [
            here * share for here, share in zip(present, source_shares or present, strict=True)
        ]
        shares = [share / max(sum(shares), 1e-9) for share in shares]
        self.bounds = shares if source_shares else present  # of the expected share of each class
        self.others = [1 - share for share in shares]  # expected share of all classes but this one
        uniform = torch.full((len(classes),), 1 / len(classes))
        self.recent = RunningMean(uniform, 1 - 1 / RECENT)
        self.running = RunningMean(uniform, 1 - 1 / RUNNING)
        self.recent_top = RunningMean(uniform, 1 - 1 / RECENT)
        self.register_buffer("largest", torch.zeros(len(classes)))
        self.register_buffer("spread", torch.zeros(()))

    def get_extra_state(self) -> dict:
        names = ("alarms", "current", "judged", "evaluated")
        return {name: list(getattr(self, name)) for name in names}

    def set_extra_state(self, state: dict) -> None:
        for name, value in state.items():
            setattr(self, name, list(value))

    @torch.no_grad()
    def add(self, logits: torch.Tensor) -> None:
        """Add the predictions on one batch of target images: logits (N, K, ...)."""
        mean = class_mean(logits.float().log_softmax(1).exp())
        top = logits.argmax(1)
        top_shares = mean_over_ranks(occurrences(top, len(self.classes)) / top.numel())
        share = min(top.numel() * count() / WHOLE, 1.0)
        self.recent.update(mean, share)
        self.running.update(mean, share)
        self.recent_top.update(top_shares, share)
        filled = self.running.updates >= RECENT  # earlier, it is the mean of a few batches only
        torch.maximum(self.largest, self.running.value * filled, out=self.largest)
        spread = (1 - self.recent_top.value.max()) * filled
        torch.maximum(self.spread, spread, out=self.spread)

    def report(self, step: int) -> dict[str, float]:
        """Compare the recent predictions with earlier ones, and raise an alarm for what is new.

        Waits once for the device.

        Returns:
            `vanished`, the number of classes that have, and `drift`, the total variation between
            recent and running mean prediction; nothing before the first `add`.
        """
        rows = [self.running.value, self.recent.value, self.largest, self.recent_top.value]
        spread, updates = self.spread.expand(1), self.recent.updates.expand(1)
        *numbers, spread, updates = torch.cat([*rows, spread, updates]).tolist()
        if updates == 0:
            return {}
        count = len(self.classes)
        running, recent, largest, top = (numbers[i : i + count] for i in range(0, 4 * count, count))
        reasons = self._vanished(recent, largest)
        vanished = len(reasons)
        reasons |= self._one_class(top, spread)
        drift = sum(abs(a - b) for a, b in zip(recent, running, strict=True)) / 2
        if drift > DRIFT:
            reasons["drift"] = (
                f"the mean target prediction has moved from its running mean by {drift:.2f}"
            )
        for name, reason in reasons.items():
            if name not in self.current:
                self.alarm(step, reason)
        self.current = list(reasons)
        return {"vanished": vanished, "drift": drift}

    def judge(self, step: int, counts: dict[str, int]) -> dict:
        """Judge an evaluation, and raise an alarm if it is collapsed in a new way.

        Unlike vanished classes, "one class" needs no earlier evaluation to compare with. A class of
        which fewer than `FEWEST` predictions are expected is not judged.

        Args:
            step: the current step.
            counts: how many images (pixels) of the target are predicted as each class.

        Returns:
            `vanished_classes`, the names of those that have; and `collapsed`, None or the reason:
            one class holds nearly all predictions, or the expected share of the vanished classes is
            `COLLAPSED` or more in sum.
        """
        total = max(sum(counts.values()), 1)
        shares = [counts[name] / total for name in self.classes]
        self.evaluated = [max(pair) for pair in zip(self.evaluated, shares, strict=True)]
        missing = self._vanished(shares, self.evaluated, FEWEST / total)
        reasons = missing if self._expected(missing) >= COLLAPSED else {}
        reasons = self._one_class(shares, 1.0, FEWEST / total) or reasons
        reason = "; ".join(reasons.values()) or None
        if set(reasons) - set(self.judged):
            self.alarm(step, f"evaluation: {reason}")
        self.judged = list(reasons)
        return {"vanished_classes": list(missing), "collapsed": reason}

    def _expected(self, names: Sequence[str]) -> float:
        """The expected share of these classes in an evaluation."""
        rows = zip(self.classes, self.evaluated, self.bounds, strict=True)
        return sum(min(before, bound) for name, before, bound in rows if name in names)

    def _vanished(self, now: list[float], before: list[float], least: float = 0.0) -> dict:
        """The reason for each class that has vanished, by its name.

        Args:
            now: the share of each class.
            before: the largest share that each class had.
            least: the least expected share of a class that is judged.
        """
        return {
            name: f"{name} vanished from the target predictions: {100 * share:.2g} %, "
            f"expected {100 * expected:.2g} %"
            for name, share, expected in zip(
                self.classes, now, map(min, before, self.bounds), strict=True
            )
            if share < VANISHED * expected and expected >= least
        }

    def _one_class(self, now: list[float], spread: float, least: float = 0.0) -> dict:
        """{"one class": reason} if one class holds nearly all predictions.

        Args:
            now: the share of each class among the predicted classes.
            spread: the largest share that all classes but the most frequent one had.
            least: the least expected share of all others that is judged.
        """
        most = max(now)
        expected = min(spread, self.others[now.index(most)])
        if 1 - most >= VANISHED * expected or expected < least:
            return {}
        name = self.classes[now.index(most)]
        return {"one class": f"{name} has {100 * most:.4g} % of the target predictions"}

    def alarm(self, step: int, reason: str) -> None:
        """Record an alarm, and print it."""
        self.alarms.append({"step": step, "reason": reason})
        self.tell(f"step {step}  alarm: {reason}")
