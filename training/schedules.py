"""Schedules: pure functions of the step, in plain floats, so that there is no state to save."""

import math


def progress(step: int, steps: int, over: int | str = "total") -> float:
    """step / steps, or step / `over` whatever the run's length. `step` counts from 0."""
    return step / (steps if over == "total" else over)


def warm_up(p: float, share: float) -> float:
    """Weight at progress p that rises from 0 to 1 over the first `share` of a run.

    (1 - cos(pi p / share)) / 2, as in AdaMatch (Berthelot et al. 2021, arXiv:2106.04732, section
    3.3, where the share is one half). With a share of 0 the weight is 1.
    """
    return 0.5 * (1 - math.cos(math.pi * min(p / share, 1.0))) if share > 0 else 1.0


def reversal_coefficient(
    schedule: str, p: float, maximum: float = 1.0, gamma: float = 10.0
) -> float:
    """Coefficient lambda of the gradient reversal at progress p.

    Args:
        schedule: dann: maximum * (2 / (1 + exp(-gamma p)) - 1) (Ganin et al. 2016, eq. 14).
            linear: maximum * p. constant: maximum.
        p: the progress.
        maximum: the coefficient at the end of the schedule.
        gamma: steepness of dann.
    """
    shape = {
        "dann": 2 / (1 + math.exp(-gamma * p)) - 1,
        "linear": min(p, 1.0),
        "constant": 1.0,
    }
    return maximum * shape[schedule]
