"""Where a run of two stages stands."""

import math
from collections.abc import Callable

from common.evaluation import choose


class Stages:
    """Stage 1 until its validation loss is flat or for `head_steps`, then stage 2 until its own is flat.

    Flat: `patience` evaluations in a row without a loss more than `min_delta` below the best that counted in the stage.

    Attributes: number, 1 or 2; switch, the step stage 2 began after, or None; over, whether the run ended before its
    last step; jump, by how much the validation loss was above the one at the switch until it first came below, at most,
    or None.
    """

    def __init__(self, head_steps: int, patience: int, min_delta: float, max_jump: float):
        self.head_steps, self.patience, self.min_delta, self.max_jump = head_steps, patience, min_delta, max_jump
        self.switch = None if head_steps > 0 else 0
        self.over, self.recovered, self.jump, self.began_with = False, False, None, None
        self.best, self.lowest, self.waited = math.inf, math.inf, 0

    @property
    def number(self) -> int:
        return 1 if self.switch is None else 2

    def state_dict(self) -> dict:
        names = ("switch", "over", "recovered", "jump", "began_with", "best", "lowest", "waited")
        return {name: getattr(self, name) for name in names}

    def load_state_dict(self, state: dict) -> None:
        self.__dict__.update(state)

    def due(self, step: int) -> bool:
        """Whether this step is the last that stage 1 may take."""
        return self.number == 1 and step == self.head_steps

    def end(self, step: int, loss: float, tell: Callable[[str], None]) -> bool:
        """Take the validation loss after `step`; whether the stage ends here. A jump beyond `max_jump` is told once."""
        self.lowest = min(self.lowest, loss)
        if self.began_with is not None and not self.recovered:
            self._watch(step, loss, tell)
        if loss < self.best - self.min_delta:
            self.best, self.waited = loss, 0
        else:
            self.waited += 1
        return self.waited >= self.patience or self.due(step)

    def _watch(self, step: int, loss: float, tell: Callable[[str], None]) -> None:
        before, now = self.jump or 0.0, max(loss - self.began_with, 0.0)
        self.jump, self.recovered = max(before, now), loss < self.began_with
        if before <= self.max_jump < now:
            tell(
                f"warning: step {step}: after unfreezing the validation loss rose from {self.began_with:.3f} to "
                f"{loss:.3f}, by more than max_jump; lower finetune_lr or unfreeze less. The weights of before are in "
                "stage1.pt"
            )

    def begin_second(self, step: int) -> None:
        """Stage 2 begins after `step`, with the weights of the lowest validation loss."""
        self.switch, self.began_with, self.best, self.waited = step, self.lowest, math.inf, 0

    def entries(self, history: list[dict], select: str) -> dict:
        """{"stage1", "stage2"}: its steps and its best evaluation by `select`; None for a stage that was left out."""
        last = history[-1]["step"]
        switch = last if self.switch is None else self.switch
        first, second = ([e for e in history if (e["step"] > switch) == later] for later in (False, True))
        return {
            "stage1": {"steps": switch, **choose(first, select)["selected"]} if first else None,
            "stage2": {"steps": last - switch, "jump": self.jump, **choose(second, select)["selected"]}
            if second
            else None,
        }
