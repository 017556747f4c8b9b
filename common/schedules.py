"""Schedules: pure functions of the step, in plain floats, so that there is no state to save."""

import math

from common.config import OptimConfig


def progress(step: int, steps: int, over: int | str = "total") -> float:
    """step / steps, or step / `over` whatever the run's length. `step` counts from 0."""
    return step / (steps if over == "total" else over)


def learning_rate(config: OptimConfig, step: int, steps: int) -> float:
    """Rate of the new layers at `step` (from 0), with p the progress.

    inverse_decay: lr / (1 + 10 p)^0.75 (Ganin et al. 2016, section 5.2.2); with schedule_progress 10000 it is the
    lr * (1 + 0.001 step)^-0.75 of common libraries. poly: lr (1 - p)^0.9. cosine: lr (1 + cos(pi p)) / 2.
    """
    p = progress(step, steps, config.schedule_progress)
    capped = min(p, 1.0)
    scale = {
        "constant": 1.0,
        "inverse_decay": (1 + 10 * p) ** -0.75,
        "poly": (1 - capped) ** 0.9,
        "cosine": 0.5 * (1 + math.cos(math.pi * capped)),
    }
    return config.lr * scale[config.schedule]


def warm_up(p: float, share: float) -> float:
    """Weight at progress p that rises from 0 to 1 over the first `share` of a run: (1 - cos(pi p / share)) / 2
    (Berthelot et al. 2021, arXiv:2106.04732, section 3.3, where it is half). With a share of 0 it is 1."""
    return 0.5 * (1 - math.cos(math.pi * min(p / share, 1.0))) if share > 0 else 1.0


def reversal_coefficient(schedule: str, p: float, maximum: float = 1.0, gamma: float = 10.0) -> float:
    """lambda at progress p. dann: maximum * (2 / (1 + exp(-gamma p)) - 1) (Ganin et al. 2016, eq. 14)."""
    shape = {"dann": 2 / (1 + math.exp(-gamma * p)) - 1, "linear": min(p, 1.0), "constant": 1.0}
    return maximum * shape[schedule]
