"""Pictures of single images of a labeled set: the most wrong and the best predictions."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import nn
from torchvision.transforms.v2 import functional as F

from analysis.measure import Predictions
from common.drawing import class_colors, drawable, save_png, with_legend, wrapped
from common.metrics import IGNORE_INDEX
from data import DataConfig, eval_loader
from data.image_set import ImageSet, one
from training.evaluation import predict_labeled

COUNT, COLUMNS, SIDE = 24, 6, 150  # images of a sheet, in a row, and px of each
ROWS, WIDTH = 4, 360  # masks: images of the worst and of the best, and px of each
GAP, LINE = 6, 15  # px between cells, and of a line of text
OVERLAY = 0.6  # weight of the colors of the classes over the image


def sheet(cells: Sequence[tuple[Image.Image, str]], columns: int) -> Image.Image:
    """Images in rows, each above its caption; a row is as high as its highest cell."""
    font = ImageFont.load_default(LINE - 4)
    width = max(image.width for image, _ in cells)
    rows = []
    for first in range(0, len(cells), columns):
        row = [
            (image, [x for part in text.split("\n") for x in wrapped(part, width, font)])
            for image, text in cells[first : first + columns]
        ]
        height = max(image.height + LINE * len(lines) for image, lines in row) + 2 * GAP
        rows.append((row, height))
    total = GAP + sum(height for _, height in rows)
    result = Image.new("RGB", (columns * (width + GAP) + GAP, total), "white")
    draw, y = ImageDraw.Draw(result), GAP
    for row, height in rows:
        for j, (image, lines) in enumerate(row):
            x = GAP + j * (width + GAP)
            result.paste(image, (x, y))
            for i, line in enumerate(lines):
                draw.text((x, y + image.height + 2 + LINE * i), drawable(line, font), "black", font)
        y += height
    return result


def _thumbnail(image: torch.Tensor, width: int, most: int | None = None) -> Image.Image:
    """An image uint8 (C, H, W) of `width` px, and at most `most` px high."""
    channels, height, old = image.shape
    scale = width / old if most is None else min(width / old, most / height)
    size = [max(round(height * scale), 1), max(round(old * scale), 1)]
    mode = F.InterpolationMode.NEAREST if scale > 2 else F.InterpolationMode.BILINEAR
    resized = F.resize(image, size, interpolation=mode, antialias=scale < 1)
    return F.to_pil_image(resized.expand(3, -1, -1) if channels == 1 else resized)


def write_examples(
    model: nn.Module, images: ImageSet, predictions: Predictions, config: DataConfig, folder: Path
) -> None:
    """Write the sheets of a set: worst.png and best.png, or of masks overlays.png.

    Precision is the caller's autocast.

    Args:
        model: in eval mode.
        images: the set.
        predictions: those of the model on it.
        config: the section `data`.
        folder: where to write.
    """
    if predictions.maps:
        _write_overlays(model, images, predictions, config, folder / "overlays.png")
    else:
        _write_sheets(images, predictions, folder)


def _write_sheets(images: ImageSet, predictions: Predictions, folder: Path) -> None:
    """worst.png: wrong predictions, the most confident first; best.png: right ones, likewise."""
    right, labels, predicted = predictions.shares() == 1, {}, {}
    for image, label, prediction, _ in predictions.rows.tolist():
        labels[image], predicted[image] = label, prediction
    order = predictions.confidence.argsort(descending=True, stable=True).tolist()
    for name, wanted in (("worst", False), ("best", True)):
        chosen = [i for i in order if bool(right[i]) == wanted][:COUNT]
        cells = []
        for i in chosen:
            picture = _thumbnail(one(images.images, int(images.indices[i])), SIDE, SIDE)
            names = [predictions.classes[x[i]] for x in (labels, predicted)]
            text = names[1] if wanted else f"{names[0]}, predicted {names[1]}"
            share = int(1000 * float(predictions.confidence[i])) / 10
            cells.append((picture, f"{text} ({share:.1f} %)"))
        file = folder / f"{name}.png"
        if cells:
            save_png(sheet(cells, min(COLUMNS, len(cells))), file)


def _colored(image: Image.Image, mask: torch.Tensor, colors: torch.Tensor) -> Image.Image:
    """An image with the classes of a mask (H, W) in color over it."""
    picture = F.to_pil_image(colors[mask].movedim(-1, 0))
    return Image.blend(image, picture.resize(image.size, Image.Resampling.NEAREST), OVERLAY)


def _write_overlays(
    model: nn.Module, images: ImageSet, predictions: Predictions, config: DataConfig, file: Path
) -> None:
    """The images with the lowest and with the highest mean IoU, with prediction and label."""
    values = predictions.image_ious()
    known = (~values.isnan()).nonzero()[:, 0]
    order = known[values[known].argsort(stable=True)]
    if len(order) > 2 * ROWS:
        order = torch.cat([order[:ROWS], order[-ROWS:]])
    colors, cells, shown = class_colors(predictions.classes), [], set()
    device = next(model.parameters()).device
    for i in order.tolist():
        # One by one, since a loader puts images of one size together.
        loader = eval_loader(images.subset(torch.tensor([i])), config, device=device)
        with torch.inference_mode():
            x, logits, label = next(iter(predict_labeled(model, loader, device)))
        mask, label = logits[0].argmax(0).cpu(), label[0].cpu()
        shown |= set(mask.unique().tolist()) | set(label.unique().tolist())
        image = _thumbnail(x[0], WIDTH)
        cells += [
            (image, predictions.images[i]),
            (_colored(image, mask, colors), f"prediction, mean IoU {float(values[i]):.1f}"),
            (_colored(image, label, colors), "label"),
        ]
    if not cells:
        return
    names = enumerate(predictions.classes)
    entries = [(name, tuple(colors[i].tolist())) for i, name in names if i in shown]
    if IGNORE_INDEX in shown:
        entries.append(("ignored", (0, 0, 0)))
    save_png(with_legend(sheet(cells, 3), entries), file)
