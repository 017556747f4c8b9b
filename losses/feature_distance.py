"""Distance to the features of a fixed network (DAFormer; Hoyer et al. 2022, arXiv:2111.14887)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from common.ranks import count, mean_over_ranks

LEAST_SHARE = 0.75  # of a location's pixels that must belong to one class (the paper's r)


def class_locations(
    labels: torch.Tensor, size: Sequence[int], classes: Sequence[int]
) -> torch.Tensor:
    """The locations of a feature map of which `LEAST_SHARE` shows one of the classes.

    Args:
        labels: (N, H, W); or (N,), for whose images it is all locations or none.
        size: height and width of the map.
        classes: class numbers.

    Returns:
        float32 (N, *size), 1 or 0.
    """
    if labels.dim() == 1:
        labels = labels[:, None, None]
    masks = torch.stack([labels == number for number in classes], 1).float()
    shares = F.adaptive_avg_pool2d(masks, tuple(size))
    return (shares.amax(1) >= LEAST_SHARE).float()


def feature_distance(
    features: torch.Tensor,
    reference: torch.Tensor,
    labels: torch.Tensor,
    classes: Sequence[int],
) -> torch.Tensor:
    """Mean Euclidean distance of the features at the locations of some classes.

    Args:
        features: (N, C, H', W') of source images.
        reference: those of the fixed network, of the same shape.
        labels: (N, H, W) or (N,), see `class_locations`.
        classes: class numbers; no classes: all locations.

    Returns:
        A float32 scalar, not negative; 0, attached to the graph, without any such location.
    """
    distance = (features.float() - reference.detach().float()).norm(dim=1)
    weights = torch.ones_like(distance)
    if classes:
        weights = class_locations(labels, distance.shape[1:], classes)
    total = mean_over_ranks(weights.sum()).clamp_min(1 / count())
    return (distance * weights).sum() / total
