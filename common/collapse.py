"""What self-training does to the classes: how much of each is accepted, and an alarm where it collapses."""

from collections.abc import Callable

import torch
from torch import nn

from common.averages import RunningMean, class_mean

VANISHED = 0.05  # of the share that a class is expected to have: below it the class has vanished
DRIFT = 0.3  # total variation between recent and running mean prediction: beyond it they are far apart
RECENT, RUNNING = 20, 200  # steps that the two means look back


class AcceptedShares(nn.Module):
    """Counts of predicted and accepted pseudo-labels since the last report, in all and of each class."""

    def __init__(self, classes: list[str]):
        super().__init__()
        self.classes = classes
        self.register_buffer("counts", torch.zeros(2, len(classes), dtype=torch.int64))

    @torch.no_grad()
    def add(self, labels: torch.Tensor, accepted: torch.Tensor) -> None:
        """labels: int64 (N, ...); accepted: bool (N, ...)."""
        index = labels.flatten() + len(self.classes) * accepted.flatten()
        self.counts.view(-1).scatter_add_(0, index, torch.ones_like(index))  # bincount would wait for the device

    def report(self) -> dict[str, float | None]:
        """`accepted`, the accepted share, and `accepted.<class>`, that of a predicted class, None where there is none.

        One host sync; the counts start anew.
        """
        refused, accepted = self.counts.tolist()
        self.counts.zero_()
        shares = {
            f"accepted.{name}": yes / (no + yes) if no + yes else None
            for name, no, yes in zip(self.classes, refused, accepted, strict=True)
        }
        return {"accepted": sum(accepted) / max(sum(refused + accepted), 1), **shares}


class CollapseMonitor(nn.Module):
    """Watches the predictions on the target, without a label of it; its state is saved with the run.

    A self-trained model that goes wrong predicts ever fewer classes, and ever more surely, so that no loss tells.
    `alarms` keeps every {"step", "reason"} that was raised.
    """

    def __init__(self, classes: list[str]):
        super().__init__()
        self.classes, self.alarms, self.current = classes, [], []
        uniform = torch.full((len(classes),), 1 / len(classes))
        self.recent, self.running = (RunningMean(uniform, 1 - 1 / steps) for steps in (RECENT, RUNNING))
        self.register_buffer("largest", torch.zeros(len(classes)))
        self.register_buffer("labelled", torch.zeros(len(classes) + 1, dtype=torch.int64))  # the last is ignored

    def get_extra_state(self) -> dict:
        return {"alarms": list(self.alarms), "current": list(self.current)}

    def set_extra_state(self, state: dict) -> None:
        self.alarms, self.current = list(state["alarms"]), list(state["current"])

    @torch.no_grad()
    def add(self, p: torch.Tensor, y_s: torch.Tensor | None = None) -> None:
        """One step's target probabilities (N, K, ...), and labels (N, ...) of the source batch where there is one."""
        mean = class_mean(p)
        self.recent.update(mean)
        self.running.update(mean)
        filled = self.running.updates >= RECENT  # before, it is the mean of a few batches
        torch.maximum(self.largest, self.running.value * filled, out=self.largest)
        if y_s is not None:
            index = y_s.flatten().clamp_max(len(self.classes))
            self.labelled.scatter_add_(0, index, torch.ones_like(index))

    def report(self, step: int, tell: Callable[[str], None]) -> dict[str, float]:
        """`vanished`, how many classes have a recent share below VANISHED times what is to be expected; `drift`, the
        total variation between recent and running mean prediction. One host sync. What is newly wrong becomes an
        alarm, and is told.

        Expected is the largest running share that the class ever had, but no more than its share of the source's
        labels: an untrained network predicts all classes alike, rare ones too.
        """
        labelled = self.labelled[:-1].float()
        rows = [self.running.value, self.recent.value, self.largest, labelled / labelled.sum()]
        running, recent, largest, source = torch.stack(rows).tolist()
        expected = [min(a, b) if b == b else a for a, b in zip(largest, source, strict=True)]  # nan: no source
        drift = sum(abs(a - b) for a, b in zip(recent, running, strict=True)) / 2
        reasons = {
            name: f"{name} vanished from the target predictions: {100 * now:.2g} %, expected {100 * share:.2g} %"
            for name, now, share in zip(self.classes, recent, expected, strict=True)
            if now < VANISHED * share
        }
        vanished = len(reasons)
        if drift > DRIFT:
            reasons["drift"] = f"the mean target prediction has moved from its running mean by {drift:.2f}"
        for name, reason in reasons.items():
            if name not in self.current:
                self.alarms.append({"step": step, "reason": reason})
                tell(f"step {step}  collapse alarm: {reason}")
        self.current = list(reasons)
        return {"vanished": vanished, "drift": drift}
