"""Images of the target as a network of a run sees them, for images that are in no data set."""

from pathlib import Path
from typing import Protocol

import torch

from data.augment import center
from data.config import DataConfig
from data.decoded import Size, decode
from data.tasks import task_module


class Preparation(Protocol):
    """How files are prepared; see `models.ModelCard`."""

    resize: int | list[int] | None
    size: int | None
    exif: bool


def target_size(config: DataConfig) -> int | Size | None:
    """What the files of the target's test images are resized to, as `ModelCard.resize`."""
    domain = config.target_test or config.target
    return task_module(config).resize_of(domain, config)


def load_image(path: str | Path, how: Preparation) -> torch.Tensor:
    """An image file as in the evaluations of a run.

    Args:
        path: the file.
        how: the card of the run.

    Returns:
        uint8 (3, H, W): of a classifier, the middle square of `size` px of the image at `resize`
        px; of a segmenter, the image at `resize` [height, width], or at its own size.

    Raises:
        UserError: with the path, if the file cannot be read or has more than 8 bits per channel.
    """
    resize = (how.resize, how.resize) if isinstance(how.resize, int) else how.resize
    image = decode(Path(path), resize and tuple(resize), how.exif)
    return image if how.size is None else center(image[None], how.size)[0]
