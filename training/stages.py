"""The two stages of fine-tuning, and when each of them ends."""

import math
from collections.abc import Callable

from training.evaluation import choose


class Stages:
    """The progress of a run of two stages; its state is saved with the run.

    Stage 1 lasts until its validation loss is flat, or for `head_steps`; stage 2 lasts until its
    validation loss is flat, or to the end of the run. A loss is flat after `patience` evaluations
    without improvement.

    Args:
        head_steps: steps of stage 1 at most; 0 starts with stage 2.
        patience: evaluations in a row without improvement that end a stage.
        min_delta: how far, in nats, a loss must be below the best of the stage to be an
            improvement.
        max_jump: a rise of the loss in stage 2, in nats, beyond which a warning is printed.

    Attributes:
        number: the current stage, 1 or 2.
        switch: the step after which stage 2 began; None in stage 1.
        over: whether the run ends before its last step.
        jump: the largest rise of the validation loss over that of the switch, until the loss first
            falls below it; None before stage 2 is evaluated.
        recovered: whether the loss of stage 2 has fallen below that of the switch.
        began_with: the validation loss at the switch, which is the lowest of stage 1.
        best: the lowest loss of the stage that was an improvement.
        lowest: the lowest loss of the run.
        waited: evaluations since the last improvement.
    """

    def __init__(self, head_steps: int, patience: int, min_delta: float, max_jump: float):
        self.head_steps = head_steps
        self.patience = patience
        self.min_delta = min_delta
        self.max_jump = max_jump
        self.switch = None if head_steps > 0 else 0
        self.over = False
        self.recovered = False
        self.jump = None
        self.began_with = None
        self.best = math.inf
        self.lowest = math.inf
        self.waited = 0

    @property
    def number(self) -> int:
        return 1 if self.switch is None else 2

    def state_dict(self) -> dict:
        names = ("switch", "over", "recovered", "jump", "began_with", "best", "lowest", "waited")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)

    def due(self, step: int) -> bool:
        """Whether `step` is the last step that stage 1 may take."""
        return self.number == 1 and step == self.head_steps

    def end(self, step: int, loss: float, tell: Callable[[str], None]) -> bool:
        """Record the validation loss of an evaluation.

        Args:
            step: the step of the evaluation.
            loss: the validation loss, in nats.
            tell: called with a warning, once, if the loss of stage 2 rises by more than `max_jump`.

        Returns:
            Whether the stage ends after this step.
        """
        self.lowest = min(self.lowest, loss)
        if self.began_with is not None and not self.recovered:
            self._watch(step, loss, tell)
        if loss < self.best - self.min_delta:
            self.best = loss
            self.waited = 0
        else:
            self.waited += 1
        return self.waited >= self.patience or self.due(step)

    def _watch(self, step: int, loss: float, tell: Callable[[str], None]) -> None:
        """Record the rise of the loss in stage 2."""
        before = self.jump or 0.0
        now = max(loss - self.began_with, 0.0)
        self.jump = max(before, now)
        self.recovered = loss < self.began_with
        if before <= self.max_jump < now:
            tell(
                f"warning: step {step}: after unfreezing the validation loss rose from "
                f"{self.began_with:.3f} to {loss:.3f}, by more than max_jump; "
                "lower finetune_lr or unfreeze less. The weights from before are in stage1.pt"
            )

    def begin_second(self, step: int) -> None:
        """Begin stage 2 after `step`, with the weights of the lowest validation loss."""
        self.switch = step
        self.began_with = self.lowest
        self.best = math.inf
        self.waited = 0

    def entries(self, history: list[dict], select: str) -> dict:
        """The entries of summary.json.

        Args:
            history: the evaluations of the run.
            select: the criterion that selects an evaluation.

        Returns:
            `stage1` and `stage2`: the steps of the stage and its selected evaluation; None for a
            stage that did not take place.
        """
        last = history[-1]["step"]
        switch = last if self.switch is None else self.switch
        first = [entry for entry in history if entry["step"] <= switch]
        second = [entry for entry in history if entry["step"] > switch]
        stage1 = stage2 = None
        if first:
            stage1 = {"steps": switch, **choose(first, select)["selected"]}
        if second:
            selected = choose(second, select)["selected"]
            stage2 = {"steps": last - switch, "jump": self.jump, **selected}
        return {"stage1": stage1, "stage2": stage2}
