"""Pictures of predictions: image, prediction and label side by side, in the colours of the classes."""

import torch
from torchvision.datasets import Cityscapes
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid, save_image

from common.checkpoint import write_atomically
from common.evaluation import IGNORE_INDEX

WIDTH = 480  # px, at most, of one picture of a row


def class_colours(classes: list[str]) -> torch.Tensor:
    """uint8 (256, 3): Cityscapes' colours for its class names, PASCAL VOC's for others, black for what is ignored."""
    number = torch.arange(256).view(-1, 1, 1)
    bits = (number >> torch.tensor([3 * i for i in range(8)]).view(8, 1)) >> torch.arange(3) & 1  # (256, 8, 3)
    colours = (bits << torch.arange(7, -1, -1).view(8, 1)).sum(1).roll(-1, 0)  # VOC's first is black
    known = {c.name: c.color for c in Cityscapes.classes}
    for i, name in enumerate(classes):
        colours[i] = torch.tensor(known.get(name, colours[i].tolist()))
    colours[IGNORE_INDEX] = 0
    return colours.to(torch.uint8)


def save_pictures(path, examples: list[tuple], classes: list[str]) -> None:
    """Write a png with a row for each example: uint8 image (3, H, W), prediction (H, W), label (H', W') or None."""
    colours, cells = class_colours(classes), []
    for image, prediction, label in examples:
        height, width = image.shape[1:]
        scale = min(1.0, WIDTH / width)
        size = [max(round(height * scale), 1), max(round(width * scale), 1)]
        maps = [prediction] if label is None else [prediction, label]
        cells.append(F.resize(image, size, antialias=True))
        for numbers in maps:
            coloured = colours[numbers].movedim(-1, 0)
            cells.append(F.resize(coloured, size, interpolation=F.InterpolationMode.NEAREST))
    size = [max(cell.shape[axis] for cell in cells) for axis in (1, 2)]
    cells = [F.center_crop(cell, size) for cell in cells]  # pads the smaller ones
    grid = make_grid(torch.stack(cells), nrow=len(cells) // len(examples), padding=4, pad_value=255)
    write_atomically(path, lambda file: save_image(grid.float() / 255, file, format="png"))
