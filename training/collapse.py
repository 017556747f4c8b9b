"""Self-training per class: shares of accepted pseudo-labels, and an alarm if classes collapse."""

from collections.abc import Callable

import torch
from torch import nn

from common.averages import RunningMean, class_mean

VANISHED = 0.05  # a class has vanished if its share is below this factor of its expected share
DRIFT = 0.3  # largest total variation between recent and running mean prediction without an alarm
RECENT, RUNNING = 20, 200  # steps over which the two means are taken


class AcceptedShares(nn.Module):
    """Counts of rejected and of accepted pseudo-labels per class, since the last report."""

    def __init__(self, classes: list[str]):
        super().__init__()
        self.classes = classes
        self.register_buffer("counts", torch.zeros(2, len(classes), dtype=torch.int64))

    @torch.no_grad()
    def add(self, labels: torch.Tensor, accepted: torch.Tensor) -> None:
        """Count pseudo-labels int64 (N, ...), of which `accepted` bool (N, ...) are accepted."""
        index = labels.flatten() + len(self.classes) * accepted.flatten()
        # bincount would wait for the device.
        self.counts.view(-1).scatter_add_(0, index, torch.ones_like(index))

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
    """Watches the predictions on the target without using its labels; saved with the run.

    A self-trained model that goes wrong predicts fewer and fewer classes with growing confidence,
    so that no loss shows it.

    Attributes:
        alarms: every {"step", "reason"} that was raised.
        current: what the last report found wrong: names of classes, and "drift".
        recent, running: mean prediction (K,) over the last `RECENT` and `RUNNING` steps.
        largest: the largest running share (K,) of each class so far.
        labeled: counts (K + 1,) of the source labels per class; the last counts ignored labels.
    """

    def __init__(self, classes: list[str]):
        super().__init__()
        self.classes = classes
        self.alarms = []
        self.current = []
        uniform = torch.full((len(classes),), 1 / len(classes))
        self.recent = RunningMean(uniform, 1 - 1 / RECENT)
        self.running = RunningMean(uniform, 1 - 1 / RUNNING)
        self.register_buffer("largest", torch.zeros(len(classes)))
        self.register_buffer("labeled", torch.zeros(len(classes) + 1, dtype=torch.int64))

    def get_extra_state(self) -> dict:
        return {"alarms": list(self.alarms), "current": list(self.current)}

    def set_extra_state(self, state: dict) -> None:
        self.alarms, self.current = list(state["alarms"]), list(state["current"])

    @torch.no_grad()
    def add(self, p: torch.Tensor, y_s: torch.Tensor | None = None) -> None:
        """Add the predictions of one step.

        Args:
            p: (N, K, ...) target probabilities.
            y_s: (N, ...) labels of the source batch, if there is a source.
        """
        mean = class_mean(p)
        self.recent.update(mean)
        self.running.update(mean)
        filled = self.running.updates >= RECENT  # earlier, it is the mean of a few batches only
        torch.maximum(self.largest, self.running.value * filled, out=self.largest)
        if y_s is not None:
            index = y_s.flatten().clamp_max(len(self.classes))
            self.labeled.scatter_add_(0, index, torch.ones_like(index))

    def report(self, step: int, tell: Callable[[str], None]) -> dict[str, float]:
        """Compare the recent predictions with earlier ones, and raise an alarm for what is new.

        The expected share of a class is the largest running share that it ever had, but at most
        its share of the source labels: an untrained network predicts all classes equally often,
        rare ones too. Waits once for the device.

        Args:
            step: the current step.
            tell: called with the text of each new alarm.

        Returns:
            `vanished`, the number of classes whose recent share is below `VANISHED` times the
            expected one, and `drift`, the total variation between recent and running mean
            prediction.
        """
        labeled = self.labeled[:-1].float()
        rows = [self.running.value, self.recent.value, self.largest, labeled / labeled.sum()]
        running, recent, largest, source = torch.stack(rows).tolist()
        # Without a source the shares of its labels are 0 / 0, and nan differs from itself.
        expected = [
            min(before, label_share) if label_share == label_share else before
            for before, label_share in zip(largest, source, strict=True)
        ]
        drift = sum(abs(a - b) for a, b in zip(recent, running, strict=True)) / 2
        reasons = {
            name: f"{name} vanished from the target predictions: {100 * now:.2g} %, "
            f"expected {100 * share:.2g} %"
            for name, now, share in zip(self.classes, recent, expected, strict=True)
            if now < VANISHED * share
        }
        vanished = len(reasons)
        if drift > DRIFT:
            reasons["drift"] = (
                f"the mean target prediction has moved from its running mean by {drift:.2f}"
            )
        for name, reason in reasons.items():
            if name not in self.current:
                self.alarms.append({"step": step, "reason": reason})
                tell(f"step {step}  collapse alarm: {reason}")
        self.current = list(reasons)
        return {"vanished": vanished, "drift": drift}
