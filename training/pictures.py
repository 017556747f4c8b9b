"""Pictures of predictions: image, prediction and label side by side, in one color per class."""

import torch
from torchvision.datasets import Cityscapes
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid, save_image

from common.files import write_atomically
from common.metrics import IGNORE_INDEX

WIDTH = 480  # px; largest width of one picture of a row


def class_colours(classes: list[str]) -> torch.Tensor:
    """The color of each class number, uint8 (256, 3).

    Cityscapes' colors for its class names, PASCAL VOC's for others, black for ignored pixels.
    """
    # PASCAL VOC: the bits of a class number, three at a time, set red, green and blue from the
    # highest bit down.
    number = torch.arange(256).view(-1, 1, 1)
    shifts = torch.tensor([3 * i for i in range(8)]).view(8, 1)
    bits = (number >> shifts) >> torch.arange(3) & 1  # (256, 8, 3)
    colors = (bits << torch.arange(7, -1, -1).view(8, 1)).sum(1)
    colors = colors.roll(-1, 0)  # the first is black, the background of PASCAL VOC
    known = {c.name: c.color for c in Cityscapes.classes}
    for i, name in enumerate(classes):
        colors[i] = torch.tensor(known.get(name, colors[i].tolist()))
    colors[IGNORE_INDEX] = 0
    return colors.to(torch.uint8)


def save_pictures(path, examples: list[tuple], classes: list[str]) -> None:
    """Write a png with one row per example.

    Args:
        path: the file.
        examples: (image uint8 (3, H, W), prediction (H, W), label (H', W') or None).
        classes: the class names.
    """
    colors = class_colours(classes)
    cells = []
    for image, prediction, label in examples:
        height, width = image.shape[1:]
        scale = min(1.0, WIDTH / width)
        size = [max(round(height * scale), 1), max(round(width * scale), 1)]
        cells.append(F.resize(image, size, antialias=True))
        for numbers in [prediction] if label is None else [prediction, label]:
            colored = colors[numbers].movedim(-1, 0)
            cells.append(F.resize(colored, size, interpolation=F.InterpolationMode.NEAREST))
    size = [max(cell.shape[axis] for cell in cells) for axis in (1, 2)]
    cells = [F.center_crop(cell, size) for cell in cells]  # pads the smaller ones
    grid = make_grid(torch.stack(cells), nrow=len(cells) // len(examples), padding=4, pad_value=255)
    write_atomically(path, lambda file: save_image(grid.float() / 255, file, format="png"))
