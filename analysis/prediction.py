"""Predictions on images: test-time augmentation, sliding windows, doubt."""

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import nn

from common.resize import resized_strips

STRIP = 512  # rows of a map that are enlarged at once
TOP = 3  # classes of an image that a table names


class MapPrediction(NamedTuple):
    """The prediction of every pixel of an image.

    Attributes:
        classes: int64 (H, W), on the CPU.
        confidence, entropy: means over the pixels; entropy in nats.
        probabilities: float16 (K, H, W), on the CPU; None if they are not asked for.
    """

    classes: torch.Tensor
    confidence: float
    entropy: float
    probabilities: torch.Tensor | None


def _starts(length: int, window: int, stride: int) -> list[int]:
    """Where windows begin that cover a length; the last one ends with it."""
    last = max(length - window, 0)
    return [*range(0, last, stride), last]


def _windows(
    forward: Callable, images: torch.Tensor, window: Sequence[int], stride: Sequence[int]
) -> torch.Tensor:
    """The mean probabilities (N, K, H, W) over overlapping windows."""
    height, width = images.shape[2:]
    total, count = None, images.new_zeros(height, width, dtype=torch.float32)
    for y in _starts(height, window[0], stride[0]):
        for x in _starts(width, window[1], stride[1]):
            rows, columns = slice(y, y + window[0]), slice(x, x + window[1])
            p = forward(images[:, :, rows, columns]).float().softmax(1)
            if total is None:
                total = p.new_zeros(*p.shape[:2], height, width)
            total[:, :, rows, columns] += p
            count[rows, columns] += 1
    return total / count


def predict_logits(
    network: nn.Module,
    images: torch.Tensor,
    flip: bool = False,
    window: Sequence[int] | None = None,
    stride: Sequence[int] | None = None,
) -> torch.Tensor:
    """Logits of images; with test-time augmentation the logarithms of mean probabilities.

    Args:
        network: in eval mode.
        images: uint8 (N, 3, H, W), on its device.
        flip: average with the predictions on the mirrored images.
        window: (height, width) of the windows of a segmenter that slide over larger images.
        stride: (rows, columns) from a window to the next; None: half a window.

    Returns:
        float32 (N, K), or (N, K, H, W).
    """

    def forward(x: torch.Tensor) -> torch.Tensor:
        return network(x).logits

    slides = window is not None and any(
        side > part for side, part in zip(images.shape[2:], window, strict=True)
    )
    stride = stride or (window and [max(side // 2, 1) for side in window])

    def probabilities(x: torch.Tensor) -> torch.Tensor:
        return _windows(forward, x, window, stride) if slides else forward(x).float().softmax(1)

    if not flip and not slides:
        return forward(images).float()
    p = probabilities(images)
    if flip:
        mirrored = probabilities(images.flip(3))
        p = (p + (mirrored.flip(3) if mirrored.dim() > 2 else mirrored)) / 2
    return p.clamp_min(torch.finfo(torch.float32).tiny).log()


def doubt(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Probabilities, and their entropy in nats, of logits whose class axis is 1."""
    log_p = logits.log_softmax(1)
    p = log_p.exp()
    return p, -(p * log_p).sum(1)


def predict_map(logits: torch.Tensor, size: Sequence[int], soft: bool) -> MapPrediction:
    """The prediction of an image's pixels at its own size.

    Args:
        logits: (K, H, W).
        size: (height, width) of the image.
        soft: whether the probabilities are returned.
    """
    parts, probabilities = [], []
    confidence, entropy = 0.0, 0.0
    for _, strip in resized_strips(logits[None], size, STRIP):
        p, h = doubt(strip)
        parts.append(strip.argmax(1)[0].cpu())
        confidence += float(p.amax(1).double().sum())
        entropy += float(h.double().sum())
        if soft:
            probabilities.append(p[0].half().cpu())
    pixels = size[0] * size[1]
    return MapPrediction(
        classes=torch.cat(parts),
        confidence=confidence / pixels,
        entropy=entropy / pixels,
        probabilities=torch.cat(probabilities, 1) if soft else None,
    )


def top_classes(
    logits: torch.Tensor, classes: Sequence[str]
) -> Iterator[tuple[float, list[tuple[str, float]]]]:
    """(entropy, (class, probability) of the `TOP` likeliest classes) of each image.

    Args:
        logits: (N, K).
        classes: the class names.
    """
    p, entropy = doubt(logits)
    best = logits.topk(min(TOP, len(classes))).indices
    rows = zip(entropy.tolist(), p.gather(1, best).tolist(), best.tolist(), strict=True)
    for h, values, numbers in rows:
        yield h, [(classes[i], value) for i, value in zip(numbers, values, strict=True)]
