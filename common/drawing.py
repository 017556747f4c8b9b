"""What pictures are made of: colors of classes, a legend that names them, and lines of text."""

import functools
import re
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torchvision.datasets import Cityscapes

from common.metrics import IGNORE_INDEX
from common.writing import write_atomically

MARK, GAP = 14, 8  # px; a color and the height of a name in the legend; between entries
LEVELS = 10  # per channel; the colors to choose from


def lab(colors: torch.Tensor) -> torch.Tensor:
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
    places = lab(candidates)
    # from black and from white
    distance = torch.minimum(*((places - places[i]).norm(dim=1) for i in (0, -1)))
    chosen = []
    for _ in range(count):
        chosen.append(int(distance.argmax()))
        distance = torch.minimum(distance, (places - places[chosen[-1]]).norm(dim=1))
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


def with_legend(picture: Image.Image, entries: list[tuple[str, tuple]]) -> Image.Image:
    """The picture above a legend of (name, color) entries, in lines of its width.

    The image is wider than the picture if a name is.
    """
    font = ImageFont.load_default(MARK - 2)
    lengths = [round(MARK + font.getlength(name)) + 2 * GAP for name, _ in entries]
    width = max(picture.width, GAP + max(lengths, default=0))
    places, x, y = [], GAP, picture.height
    for length in lengths:
        if x + length > width:
            x, y = GAP, y + MARK + GAP
        places.append((x, y))
        x += length
    image = Image.new("RGB", (width, y + MARK + GAP), "white")
    image.paste(picture, (0, 0))
    draw = ImageDraw.Draw(image)
    for (x, y), (name, color) in zip(places, entries, strict=True):
        draw.rectangle((x, y, x + MARK - 1, y + MARK - 1), color, "black")
        draw.text((x + MARK + GAP // 2, y), name, "black", font)
    return image


@functools.cache
def _has_glyph(font: ImageFont.FreeTypeFont, character: str) -> bool:
    """Whether the font can show a character; for others it has one and the same box."""
    box = bytes(font.getmask("\U0010fffd"))
    return character.isprintable() and bytes(font.getmask(character)) != box


def drawable(text: str, font: ImageFont.FreeTypeFont) -> str:
    r"""The text with an escape such as `\u732b` in place of characters that the font lacks."""
    return "".join(
        c if _has_glyph(font, c) else c.encode("unicode_escape", "surrogatepass").decode()
        for c in text
    )


def wrapped(text: str, width: int, font: ImageFont.FreeTypeFont) -> list[str]:
    """The lines of a text that are at most `width` px long; broken within a word if need be."""
    lines = [""]
    for word in re.findall(r"[^ _/.-]*[ _/.-]|[^ _/.-]+", text):
        if font.getlength((lines[-1] + word).rstrip()) <= width:
            lines[-1] += word
            continue
        if lines[-1]:
            lines.append("")
        for character in word:
            if lines[-1] and font.getlength((lines[-1] + character).rstrip()) > width:
                lines.append("")
            lines[-1] += character
    return [line.rstrip() for line in lines]


def save_png(image: Image.Image, file: Path) -> None:
    """Write an image as png."""
    write_atomically(file, lambda f: image.save(f, format="png"))
