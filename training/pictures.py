"""Pictures of predictions: image, prediction and label side by side, and what each color means."""

import torch
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from common.drawing import class_colors, with_legend
from common.metrics import IGNORE_INDEX
from common.writing import write_atomically

WIDTH = 480  # px; largest width of one picture of a row


def save_pictures(path, examples: list[tuple], classes: list[str]) -> None:
    """Write a png with one row per example, and below it a legend of the classes that occur.

    Args:
        path: the file.
        examples: (image uint8 (3, H, W), prediction (H, W), label (H', W') or None).
        classes: the class names.
    """
    colors = class_colors(classes)
    cells, shown = [], set()
    for image, prediction, label in examples:
        height, width = image.shape[1:]
        scale = min(1.0, WIDTH / width)
        size = [max(round(height * scale), 1), max(round(width * scale), 1)]
        cells.append(F.resize(image, size, antialias=True))
        for numbers in [prediction] if label is None else [prediction, label]:
            shown |= set(numbers.unique().tolist())
            colored = colors[numbers].movedim(-1, 0)
            cells.append(F.resize(colored, size, interpolation=F.InterpolationMode.NEAREST))
    size = [max(cell.shape[axis] for cell in cells) for axis in (1, 2)]
    cells = [F.center_crop(cell, size) for cell in cells]  # pads the smaller ones
    grid = make_grid(torch.stack(cells), nrow=len(cells) // len(examples), padding=4, pad_value=255)
    entries = [(name, tuple(colors[i].tolist())) for i, name in enumerate(classes) if i in shown]
    if IGNORE_INDEX in shown:
        entries.append(("ignored", (0, 0, 0)))
    image = with_legend(F.to_pil_image(grid), entries)
    write_atomically(path, lambda file: image.save(file, format="png"))
