"""Features of both domains: two dimensions of them, and how well a classifier tells them apart."""

import copy
from pathlib import Path

import numpy as np
import torch
from torch import nn

from common.counts import occurrences
from common.metrics import labeled_mask
from common.writing import write_atomically
from data import DataConfig, eval_loader, to_views
from data.image_set import ImageSet
from models.backbones import BatchNorm

MOST, FEWEST = 1000, 20  # images per domain; below the latter no distance is computed
RIDGE = 0.1  # weight of the squared coefficients beside the mean squared error


def sample(images: ImageSet) -> ImageSet:
    """At most `MOST` images of a set, evenly spread over it."""
    count = min(len(images), MOST)
    positions = torch.arange(count) * len(images) // max(count, 1)
    return images.subset(positions)


@torch.inference_mode()
def with_own_statistics(model: nn.Module, images: ImageSet, config: DataConfig) -> nn.Module:
    """A copy of a model whose batch norm has the statistics of these images, in eval mode.

    Args:
        model: a network.
        images: the set.
        config: the section `data`.
    """
    model = copy.deepcopy(model)
    device = next(model.parameters()).device
    norms = [module for module in model.modules() if isinstance(module, BatchNorm)]
    for module in norms:
        module.reset_running_stats()
        module.momentum = None  # the mean over all batches
        module.train()
    # In a random order, since sets are sorted by class, and a batch must have all.
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    for batch in eval_loader(images.subset(order), config, device=device):
        model(to_views(batch[0] if isinstance(batch, tuple) else batch, device))
    return model.eval()


@torch.inference_mode()
def compute_features(
    model: nn.Module, images: ImageSet, config: DataConfig
) -> tuple[torch.Tensor, torch.Tensor]:
    """The features that the head reads, averaged over the positions of a map.

    Precision is the caller's autocast.

    Args:
        model: in eval mode.
        images: the set.
        config: the section `data`.

    Returns:
        (features float32 (N, D), labels int64 (N,)): the class of each image, of a mask its most
        frequent one; -1 without a label.
    """
    device = next(model.parameters()).device
    features, labels = [], []
    for batch in eval_loader(images, config, device=device):
        x, y = batch if isinstance(batch, tuple) else (batch, None)
        feature = model(to_views(x, device)).features[model.head_layer].float()
        features.append(feature.flatten(2).mean(2).cpu() if feature.dim() > 2 else feature.cpu())
        labels.append(_label_of_each(y, len(x), model.channels["logits"]))
    return torch.cat(features), torch.cat(labels)


def _label_of_each(labels: torch.Tensor | None, count: int, num_classes: int) -> torch.Tensor:
    """One class per image, int64 (count,); -1 where there is none."""
    if labels is None:
        return torch.full((count,), -1)
    if labels.dim() == 1:
        return labels
    rows = []
    for mask in labels.long():
        counts = occurrences(mask[labeled_mask(mask, num_classes)], num_classes)
        rows.append(int(counts.argmax()) if counts.any() else -1)
    return torch.tensor(rows)


def principal_components(features: torch.Tensor, count: int = 2) -> torch.Tensor:
    """The first principal components of features (N, D), centered: (N, count).

    The sign of each is that with which its largest value is positive.
    """
    centered = features.double() - features.double().mean(0)
    u, s, _ = torch.linalg.svd(centered, full_matrices=False)
    components = torch.zeros(len(features), count, dtype=torch.float64)
    available = min(count, len(s))
    components[:, :available] = u[:, :available] * s[:available]
    largest = components.gather(0, components.abs().argmax(0, keepdim=True))
    return components * torch.where(largest < 0, -1.0, 1.0)


def proxy_a_distance(source: torch.Tensor, target: torch.Tensor) -> float | None:
    """How well a linear classifier tells the features of two domains apart, from 0 to 2.

    2 (1 - 2 error) (Ben-David et al. 2007, "Analysis of representations for domain adaptation"),
    where the error is the mean of the two domains' on every second image, and the classifier is a
    ridge regression of the domain on the standardized features of the others. 0: it cannot.

    Args:
        source, target: features (N, D), (M, D).

    Returns:
        The distance; None if a domain has fewer than `FEWEST` images.
    """
    if min(len(source), len(target)) < FEWEST:
        return None
    train = torch.cat([source[::2], target[::2]]).double()
    count_s, count_t = len(source[::2]), len(target[::2])
    mean, std = train.mean(0), train.std(0)
    std = std.where(std > 0, 1.0)
    x = (train - mean) / std
    domain = torch.tensor([1.0] * count_s + [-1.0] * count_t).double()
    # Both domains weigh the same, however many images they have.
    weight = torch.tensor([0.5 / count_s] * count_s + [0.5 / count_t] * count_t).double()
    center = weight @ x
    x = x - center
    gram = (x * weight[:, None]).T @ x + RIDGE * torch.eye(x.shape[1]).double()
    coefficients = torch.linalg.solve(gram, x.T @ (weight * domain))
    errors = []
    for test, sign in ((source[1::2], 1), (target[1::2], -1)):
        scores = ((test.double() - mean) / std - center) @ coefficients
        errors.append(float((sign * scores <= 0).double().mean()))
    return max(0.0, 2 * (1 - sum(errors)))


def domain_features(
    model: nn.Module, source: ImageSet, target: ImageSet, config: DataConfig, separate: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Features and labels of a sample of both domains; see `compute_features`.

    Args:
        model: in eval mode.
        source, target: the sets.
        config: the section `data`.
        separate: whether each domain is normalized by its own batch-norm statistics, as in training
            with `bn: separate`, where methods compare features that are.

    Returns:
        (source features, their labels, target features, their labels).
    """
    parts: list[torch.Tensor] = []
    for images in map(sample, (source, target)):
        network = with_own_statistics(model, images, config) if separate else model
        parts += compute_features(network, images, config)
    return tuple(parts)


def write_features(features: dict[str, tuple[torch.Tensor, ...]], file: Path) -> None:
    """Write features for numpy: `after_source`, `after_source_labels`, `after_target` and so on.

    Args:
        features: {before, after: of `domain_features`}.
        file: the .npz file.
    """
    names = ("source", "source_labels", "target", "target_labels")
    arrays = {
        f"{title}_{name}": x.numpy()
        for title, parts in features.items()
        for name, x in zip(names, parts, strict=True)
    }
    write_atomically(file, lambda f: np.savez_compressed(f, **arrays))
