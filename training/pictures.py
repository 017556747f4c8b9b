"""Pictures of predictions: image, prediction and label side by side, and what each color means."""

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets import Cityscapes
from torchvision.transforms.v2 import functional as F
from torchvision.utils import make_grid

from common.metrics import IGNORE_INDEX
from common.writing import write_atomically

WIDTH = 480  # px; largest width of one picture of a row
MARK, GAP = 14, 8  # px; a color and the height of a name in the legend; between entries
LEVELS = 10  # per channel; the colors to choose from


def _lab(colors: torch.Tensor) -> torch.Tensor:
    """CIELAB of sRGB colors (N, 3) in [0, 255]: equal distances look about equally different."""
    c = colors.double() / 255
    linear = torch.where(c > 0.04045, ((c + 0.055) / 1.055) ** 2.4, c / 12.92)
    to_xyz = torch.tensor(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]],
        dtype=torch.float64,
    )
    xyz = linear @ to_xyz.T / to_xyz.sum(1)  # relative to white
    f = torch.where(xyz > 0.008856, xyz ** (1 / 3), 7.787 * xyz + 16 / 116)
    x, y, z = f.unbind(1)
    return torch.stack([116 * y - 16, 500 * (x - y), 200 * (y - z)], 1)


def _palette(count: int) -> torch.Tensor:
    """uint8 (count, 3): each color as far as can be from those before it, black and white."""
    level = torch.linspace(0, 255, LEVELS).round()
    candidates = torch.cartesian_prod(level, level, level)
    lab = _lab(candidates)
    distance = torch.minimum(*((lab - lab[i]).norm(dim=1) for i in (0, -1)))  # black, white
    chosen = []
    for _ in range(count):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (lab - lab[chosen[-1]]).norm(dim=1))
    return candidates[chosen].to(torch.uint8)


def class_colors(classes: list[str]) -> torch.Tensor:
    """The color of each class number, uint8 (256, 3).

    Those of Cityscapes if it has all of the classes, else colors that differ clearly from one
    another; black for ignored pixels.
    """
    colors = torch.zeros(256, 3, dtype=torch.uint8)
    known = {c.name: c.color for c in Cityscapes.classes}
    if all(name in known for name in classes):
        colors[: len(classes)] = torch.tensor([known[name] for name in classes])
    else:
        colors[: len(classes)] = _palette(len(classes))
    colors[IGNORE_INDEX] = 0
    return colors


def _with_legend(picture: torch.Tensor, entries: list[tuple[str, tuple]]) -> Image.Image:
    """The picture uint8 (3, H, W) above a legend of (name, color) entries, in lines of its width.

    The image is wider than the picture if a name is.
    """
    font = ImageFont.load_default(MARK - 2)
    lengths = [round(MARK + font.getlength(name)) + 2 * GAP for name, _ in entries]
    width = max(picture.shape[2], GAP + max(lengths, default=0))
    places, x, y = [], GAP, picture.shape[1]
    for length in lengths:
        if x + length > width:
            x, y = GAP, y + MARK + GAP
        places.append((x, y))
        x += length
    image = Image.new("RGB", (width, y + MARK + GAP), "white")
    image.paste(F.to_pil_image(picture), (0, 0))
    draw = ImageDraw.Draw(image)
    for (x, y), (name, color) in zip(places, entries, strict=True):
        draw.rectangle((x, y, x + MARK - 1, y + MARK - 1), color, "black")
        draw.text((x + MARK + GAP // 2, y), name, "black", font)
    return image


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
    image = _with_legend(grid, entries)
    write_atomically(path, lambda file: image.save(file, format="png"))
