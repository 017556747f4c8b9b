"""Label-free criteria of predictions on unlabeled images; higher is better.

Each takes logits (M, K) of M images or pixels. docs/selection.md says when each of them fails.
"""

import math
from collections.abc import Sequence

import torch

from common.metrics import Criteria

CONFIDENT = 5.0  # MaNo: mean cross-entropy to the uniform distribution above which softmax is used
NORM = 4  # MaNo: order of the norm


def probabilities(logits: torch.Tensor) -> torch.Tensor:
    """The softmax in float64."""
    return logits.double().softmax(1)


def entropies(logits: torch.Tensor) -> dict[str, float]:
    """`neg_entropy` and `infomax`, in units of log K, as the evaluations of a run have them."""
    criteria = Criteria(logits.shape[1])
    criteria.add(logits)
    return criteria.values()


def nuclear_norm(logits: torch.Tensor) -> float:
    """The nuclear norm of the matrix of probabilities, over its largest value.

    Cui et al. 2020 (BNM, arXiv:2003.12237) train with it, and Xu et al. 2022 (arXiv:2208.07360)
    rank models by it. It is large if predictions are certain and of many classes.
    """
    p = probabilities(logits)
    count, classes = p.shape
    return float(torch.linalg.matrix_norm(p, "nuc")) / math.sqrt(min(count, classes) * count)


def mano(logits: torch.Tensor) -> float:
    """The norm of order 4 of the normalized logits, in [0, 1] (MaNo, arXiv:2405.18979).

    The logits are normalized by the softmax if the model is confident on average, else by its
    Taylor polynomial of order 2, shifted to a least value of 0.
    """
    x = logits.double()
    if float(-x.log_softmax(1).mean()) > CONFIDENT:
        normalized = x.softmax(1)
    else:
        positive = 1 + x + x.square() / 2
        positive = positive - positive.min(1, keepdim=True).values
        normalized = positive / positive.sum(1, keepdim=True).clamp(min=1e-12)
    return float(normalized.pow(NORM).mean() ** (1 / NORM))


def of_one_run(logits: torch.Tensor) -> dict[str, float]:
    """All criteria that need one run alone, by name."""
    alone = {"nuclear_norm": nuclear_norm(logits), "mano": mano(logits)}
    return {**entropies(logits), **alone}


def agreements(
    runs: Sequence[torch.Tensor], families: Sequence[Sequence[torch.Tensor]]
) -> list[float]:
    """The share of each run's predicted classes that are those of an ensemble.

    With every candidate of a choice as a family it is EnsV (Hu et al. 2024, "Towards Reliable Model
    Selection for Unsupervised Domain Adaptation"). A method with many settings is one family here,
    with one vote, so that the largest grid does not decide.

    Args:
        runs: logits (M, K) on the same M images or pixels.
        families: logits likewise; the ensemble is the mean over families of the mean probability.
            None is empty; without any the agreement is 0.
    """
    if not families:
        return [0.0] * len(runs)
    votes = [sum(map(probabilities, family)) / len(family) for family in families]
    ensemble = (sum(votes) / len(votes)).argmax(1)
    return [float((logits.argmax(1) == ensemble).double().mean()) for logits in runs]
