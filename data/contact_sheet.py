"""A contact sheet: random images of several sets in one picture, with their classes or masks."""

from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from common.drawing import class_colors, drawable, with_legend, wrapped
from common.errors import UserError
from common.metrics import IGNORE_INDEX
from data.decoded import image_header, mask_numbers, read_rgb
from data.id_maps import UNKNOWN
from data.image_set import one
from data.listing import Listing
from data.order import generator

CELL, COLUMNS = (104, 104), 12  # px, (height, width) that an image with a class may have; in a row
PIXEL_CELL, PIXEL_COLUMNS = (180, 240), 6  # the same of images with masks, or without both
LEAST, MOST = 24, 96  # images of a set with classes, unless it has fewer; most classes shown
PAIRS = 6  # images with masks that are shown of a set
GAP = 8  # px
TITLE, CAPTION = 16, 12  # px; sizes of the letters
MIX = 0.6  # share of a class's color in an overlay

WHITE, BLACK = (255, 255, 255), (0, 0, 0)


class Shown(NamedTuple):
    """A set on the sheet.

    Attributes:
        title: what is written above it.
        role: its place in the config; it seeds the choice of images.
        listing: its images and labels.
        usable: which of them can be read, bool (N,).
    """

    title: str
    role: str
    listing: Listing
    usable: np.ndarray


class Cell(NamedTuple):
    """An image of the sheet, and the lines below it."""

    image: Image.Image
    lines: list[str]


def contact_sheet(sets: list[Shown], seed: int) -> Image.Image:
    """The sets one below the other, the images of a class at the same place in each if possible.

    Args:
        sets: those to show. Images with masks are followed by an overlay in the colors of their
            classes, which a legend names.
        seed: of the choice of images.
    """
    classes = list(dict.fromkeys(n for shown in sets for n in shown.listing.classes or ()))
    by_pixel = any(shown.listing.by_pixel for shown in sets)
    (_, side), columns = (PIXEL_CELL, PIXEL_COLUMNS) if by_pixel else (CELL, COLUMNS)
    width = columns * (side + GAP) + GAP
    strips: list[Image.Image] = []
    if by_pixel:
        colors, occurring = _Colors(classes), set()
        for shown in sets:
            cells = _pixel_cells(shown, seed, colors, occurring)
            strips += [_title(shown.title, len(cells), width), *_rows(cells, width)]
        return with_legend(_stack(strips, width), colors.legend(occurring))
    chosen = _choose_classes(classes, seed)
    for shown in sets:
        cells, title = _class_cells(shown, chosen, seed), shown.title
        if shown.listing.labels is not None and len(chosen) < len(classes):
            title += f": {len(chosen)} of {len(classes)} classes"
        strips += [_title(title, len(cells), width), *_rows(cells, width)]
    return _stack(strips, width)


def _choose_classes(classes: list[str], seed: int) -> list[str]:
    """At most MOST classes, drawn by the seed, in their order."""
    order = torch.randperm(len(classes), generator=generator(seed, "contact sheet"))
    return [classes[i] for i in sorted(order[:MOST].tolist())]


def _draw(candidates: np.ndarray, count: int, *purpose) -> list[int]:
    """At most `count` of the candidates, drawn by the purpose, in their order."""
    order = torch.randperm(len(candidates), generator=generator("contact sheet", *purpose))
    return sorted(candidates[order[:count].numpy()].tolist())


def _class_cells(shown: Shown, classes: list[str], seed: int) -> list[Cell]:
    """As many images of each class, with its name; or of a set without labels, with their names."""
    listing, font = shown.listing, ImageFont.load_default(CAPTION)
    each = max(LEAST // max(len(classes), 1), 1)
    cells = []
    if listing.class_numbers is None:
        count = max(each * len(classes), LEAST)
        for i in _draw(shown.usable.nonzero()[0], count, seed, shown.role):
            cells.append(_cell(_picture(listing, i, CELL), _name(listing, i), font))
        return cells
    numbers = listing.class_numbers.numpy()
    for name in classes:
        if name in listing.classes:
            of_class = shown.usable & (numbers == listing.classes.index(name))
            for i in _draw(of_class.nonzero()[0], each, seed, shown.role, name):
                cells.append(_cell(_picture(listing, i, CELL), name, font))
    return cells


def _pixel_cells(shown: Shown, seed: int, colors: "_Colors", occurring: set[int]) -> list[Cell]:
    """Images, each beside itself under the colors of its mask if there are masks.

    Args:
        shown: the set.
        seed: of the choice of images.
        colors: of the classes.
        occurring: the numbers of the classes on the sheet, to which those of this set are added.
    """
    listing, font, cells = shown.listing, ImageFont.load_default(CAPTION), []
    for i in _draw(shown.usable.nonzero()[0], PAIRS, seed, shown.role):
        image = _picture(listing, i, PIXEL_CELL)
        if listing.masks is not None:
            numbers = _classes_of_mask(listing, i, image.size)
            numbers = colors.renumbered(numbers, listing.classes)
            occurring |= set(np.unique(numbers).tolist())
            gray = image.convert("L").convert("RGB")  # so that the colors are those of the legend
            overlay = Image.blend(gray, Image.fromarray(colors.table[numbers]), MIX)
            pair = Image.new("RGB", (2 * image.width + GAP, image.height), WHITE)
            pair.paste(image, (0, 0))
            pair.paste(overlay, (image.width + GAP, 0))
            image = pair
        cells.append(_cell(image, _name(listing, i), font))
    return cells


class _Colors:
    """The colors of classes by their numbers in `classes`, uint8 (256, 3)."""

    def __init__(self, classes: list[str]):
        self.classes = classes[:UNKNOWN]  # two sets of quite different classes may have more
        self.table = class_colors(self.classes).numpy()
        self.table[UNKNOWN] = WHITE

    def renumbered(self, numbers: np.ndarray, classes: list[str]) -> np.ndarray:
        """The numbers of a mask in the order of all classes of the sheet."""
        number_of = {name: number for number, name in enumerate(self.classes)}
        table = np.arange(256, dtype=np.uint8)
        table[: len(classes)] = [number_of.get(name, UNKNOWN) for name in classes]
        return table[numbers]

    def legend(self, occurring: set[int]) -> list[tuple[str, tuple]]:
        font = ImageFont.load_default(CAPTION)
        names = [(i, drawable(name, font)) for i, name in enumerate(self.classes)]
        names += [(IGNORE_INDEX, "ignored"), (UNKNOWN, "not defined by ids")]
        return [(name, tuple(self.table[i].tolist())) for i, name in names if i in occurring]


def _classes_of_mask(listing: Listing, i: int, size: tuple[int, int]) -> np.ndarray:
    """The class numbers of a mask, uint8, resized to (width, height) by nearest neighbor."""
    if isinstance(listing.masks, torch.Tensor):
        classes = listing.masks[i].numpy()
    else:
        classes = listing.decode_mask.look_up(mask_numbers(listing.masks[i]))
    return np.asarray(Image.fromarray(classes).resize(size, Image.Resampling.NEAREST))


def _picture(listing: Listing, i: int, box: tuple[int, int]) -> Image.Image:
    """An image of a set in RGB, as large as fits into (height, width)."""
    if isinstance(listing.images, torch.Tensor):
        image = one(listing.images, i).expand(3, -1, -1).permute(1, 2, 0).numpy()
        height, width = image.shape[:2]
        size = _fitting(height, width, box)
        return Image.fromarray(image.copy()).resize(size[::-1], Image.Resampling.NEAREST)
    path, exif = listing.images[i], listing.decode.exif
    try:
        height, width = image_header(path, exif).size
        size = _fitting(height, width, box)
        if height < size[0]:  # enlarged, with its pixels to be seen
            return read_rgb(path, None, exif).resize(size[::-1], Image.Resampling.NEAREST)
        return read_rgb(path, size, exif)
    except UserError:  # it was readable a moment ago
        return Image.new("RGB", box[::-1], WHITE)


def _fitting(height: int, width: int, box: tuple[int, int]) -> tuple[int, int]:
    scale = min(box[0] / height, box[1] / width)
    return max(round(height * scale), 1), max(round(width * scale), 1)


def _name(listing: Listing, i: int) -> str:
    return listing.images[i].name if listing.files else f"image {i}"


def _cell(image: Image.Image, text: str, font: ImageFont.FreeTypeFont) -> Cell:
    width = max(image.width, CELL[1])
    return Cell(image, wrapped(drawable(text, font), width, font))


def _rows(cells: list[Cell], width: int) -> list[Image.Image]:
    """The cells in rows of at most `width` px, those of a row in columns of equal width."""
    if not cells:
        return []
    column = max(max(cell.image.width, CELL[1]) for cell in cells) + GAP
    count = max((width - GAP) // column, 1)
    return [_row(cells[i : i + count], column, width) for i in range(0, len(cells), count)]


def _row(cells: list[Cell], column: int, width: int) -> Image.Image:
    font = ImageFont.load_default(CAPTION)
    line, height = CAPTION + 3, max(cell.image.height for cell in cells)
    lines = max(len(cell.lines) for cell in cells)
    row = Image.new("RGB", (width, height + line * lines + 2 * GAP), WHITE)
    draw = ImageDraw.Draw(row)
    for k, cell in enumerate(cells):
        left = GAP + k * column
        row.paste(cell.image, (left, height - cell.image.height))
        for i, text in enumerate(cell.lines):
            draw.text((left, height + 2 + i * line), text, BLACK, font)
    return row


def _title(text: str, count: int, width: int) -> Image.Image:
    font = ImageFont.load_default(TITLE)
    text = text if count else f"{text}: no image of it can be shown"
    lines = wrapped(drawable(text, font), width - 2 * GAP, font)
    strip = Image.new("RGB", (width, len(lines) * (TITLE + 4) + 3 * GAP), WHITE)
    draw = ImageDraw.Draw(strip)
    draw.line((0, 0, width, 0), BLACK, 2)
    for i, line in enumerate(lines):
        draw.text((GAP, GAP + i * (TITLE + 4)), line, BLACK, font)
    return strip


def _stack(strips: list[Image.Image], width: int) -> Image.Image:
    sheet = Image.new("RGB", (width, sum(strip.height for strip in strips)), WHITE)
    y = 0
    for strip in strips:
        sheet.paste(strip, (0, y))
        y += strip.height
    return sheet
