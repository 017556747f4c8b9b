"""Paired comparison of the predictions of two models on the same images."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from analysis.measure import Predictions
from common.errors import UserError
from common.metrics import main_metric

SAMPLES = 2000  # of the bootstrap
LEVEL = 0.95  # of its intervals


@dataclass
class Difference:
    """The difference of a figure, of a second model minus a first one.

    Attributes:
        metric: accuracy or mean_iou.
        first, second: the figures, in percent.
        difference: second - first, in points.
        low, high: the ends of the 95 % interval of the bootstrap.
        units: how many images, or sequences of images, were drawn from.
        images: how many images there are.
        only_first, only_second: how many images only one of the two predicts correctly; None for
            masks.
        p_value: of McNemar's test on them; None for masks.
    """

    metric: str
    first: float
    second: float
    difference: float
    low: float
    high: float
    units: int
    images: int
    only_first: int | None = None
    only_second: int | None = None
    p_value: float | None = None


def mcnemar(only_first: int, only_second: int) -> float:
    """The two-sided p value of McNemar's exact test.

    Under the hypothesis that both models are equally good, each image that only one of them
    predicts correctly is as likely to be the first one's as the second one's.
    """
    n, k = only_first + only_second, min(only_first, only_second)
    if n == 0:
        return 1.0
    # Logarithms, since binomial coefficients of thousands of images are no floats.
    logs = [math.lgamma(n + 1) - math.lgamma(i + 1) - math.lgamma(n - i + 1) for i in range(k + 1)]
    most = max(logs)
    tail = most + math.log(sum(math.exp(x - most) for x in logs)) - n * math.log(2)
    return min(1.0, 2 * math.exp(tail))


def groups_of(names: Sequence[str], pattern: str | None) -> torch.Tensor:
    """The number of each image's group, int64 (N,).

    Args:
        names: of the images.
        pattern: a regular expression; images in whose names it matches the same text are one group,
            as the frames of a video. None: each image is one.

    Raises:
        UserError: it is no regular expression, or it is not found in a name.
    """
    if pattern is None:
        return torch.arange(len(names))
    try:
        expression = re.compile(pattern)
    except re.error as error:
        raise UserError(
            f"--sequences: {pattern} is no regular expression ({error}); "
            "correct it, as '[^/]+(?=_)'"
        ) from None
    matches = [expression.search(name) for name in names]
    if None in matches:
        name = names[matches.index(None)]
        raise UserError(f"--sequences: {pattern} is not found in {name}; correct the pattern")
    texts = [match[0] for match in matches]
    numbers = {text: number for number, text in enumerate(dict.fromkeys(texts))}
    return torch.tensor([numbers[text] for text in texts])


def difference(
    first: Predictions, second: Predictions, groups: torch.Tensor, seed: int = 0
) -> Difference:
    """Compare two models on the same images, by the main figure of the task.

    The interval is that of the percentile bootstrap: images, or whole groups of them, are drawn
    with replacement, for both models the same.

    Args:
        first, second: the predictions.
        groups: the group of each image, int64 (N,); see `groups_of`.
        seed: of the bootstrap.
    """
    metric = main_metric(first.measure(first.confusion()))

    def figure(model: Predictions, weights: torch.Tensor | None = None) -> float:
        return model.measure(model.confusion(weights))[metric]

    generator = torch.Generator().manual_seed(seed)
    count = int(groups.max()) + 1
    values = []
    for _ in range(SAMPLES):
        drawn = torch.randint(count, (count,), generator=generator)
        weights = torch.bincount(drawn, minlength=count).double()[groups]
        pair = figure(first, weights), figure(second, weights)
        if None not in pair:  # none of the drawn images has a label
            values.append(pair[1] - pair[0])
    tails = torch.tensor([(1 - LEVEL) / 2, (1 + LEVEL) / 2], dtype=torch.float64)
    low, high = torch.tensor(values, dtype=torch.float64).quantile(tails).tolist()
    a, b = figure(first), figure(second)
    result = Difference(metric, a, b, b - a, low, high, count, len(groups))
    if not first.maps:
        right_a, right_b = first.shares() == 1, second.shares() == 1
        result.only_first = int((right_a & ~right_b).sum())
        result.only_second = int((right_b & ~right_a).sum())
        result.p_value = mcnemar(result.only_first, result.only_second)
    return result


def comparison_table(rows: Sequence[dict]) -> str:
    """Rows of `Difference`, with the `run`, as text for the screen."""
    first, width = rows[0], max(len(row["run"]) for row in rows)
    drawn = "images" if first["units"] == first["images"] else "sequences"
    lines = [
        f"minus {first['compared_with']}, {first['metric'].replace('_', ' ')} {first['first']:.2f}"
        f" (95 % intervals over {first['units']} {drawn}):"
    ]
    for row in rows:
        test = ""
        if row["p_value"] is not None:
            test = (
                f"   right alone in {row['only_second']} images, wrong alone in "
                f"{row['only_first']}: McNemar p = {row['p_value']:.2g}"
            )
        lines.append(
            f"{row['run']:{width}}  {row['second']:6.2f}  {row['difference']:+6.2f} "
            f"[{row['low']:+.2f}, {row['high']:+.2f}]{test}"
        )
    return "\n".join(lines)
