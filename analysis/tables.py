"""Tables of the predictions of a model: json, csv, and text for the screen."""

import csv
import io
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.measure import Predictions
from common.writing import write_text

SHOWN = 30  # classes up to which the screen shows a row per class


PICTURES = ("best", "confusion", "curves", "features", "overlays", "reliability", "worst")
TABLES = ("comparison.csv", "confusion.csv", "features.npz", "figures.json", "images.csv")
FILES = [*(f"{name}.png" for name in PICTURES), *TABLES, "per_class.csv"]  # of an evaluation


def remove_files(folder: Path) -> None:
    """Remove what an earlier evaluation has written to a folder; other files stay."""
    for name in FILES:
        (folder / name).unlink(missing_ok=True)


def write_csv(file: Path, head: Sequence[str], rows: Iterable[Sequence]) -> None:
    """Write a table; None and nan are empty cells."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(head)
    for row in rows:
        missing = (x is None or (isinstance(x, float) and math.isnan(x)) for x in row)
        writer.writerow(["" if gone else x for x, gone in zip(row, missing, strict=True)])
    write_text(file, buffer.getvalue())


def per_class(predictions: Predictions) -> list[dict]:
    """A row per class: how many labels and predictions it has, and its shares in percent.

    `recall`, the share of its labels that are predicted as it (the accuracy of the class);
    `precision`, the share of its predictions that are right; `iou`, its intersection over union.
    Each is None if there is nothing to divide by, and the IoU without a label.
    """
    confusion = predictions.confusion()
    columns = confusion.diag().tolist(), confusion.sum(1).tolist(), confusion.sum(0).tolist()

    def percent(part: int, total: int) -> float | None:
        return 100 * part / total if total else None

    return [
        {
            "class": name,
            "labels": labels,
            "predictions": predicted,
            "recall": percent(hits, labels),
            "precision": percent(hits, predicted),
            "iou": percent(hits, labels + predicted - hits) if labels else None,
        }
        for name, hits, labels, predicted in zip(predictions.classes, *columns, strict=True)
    ]


def class_table(rows: list[dict]) -> str:
    """The rows of `per_class` as text, the worst class first; of many classes the worst ones."""
    figure = "recall"

    def place(row: dict) -> float:
        return math.inf if row[figure] is None else row[figure]

    width = max(len(str(row["class"])) for row in rows)
    lines = [f"{'class':{width}}   labels  predicted  recall  precision    IoU"]
    for row in sorted(rows, key=place)[:SHOWN]:
        cells = ["-" if row[name] is None else f"{row[name]:.1f}" for name in list(row)[3:]]
        recall, precision, iou = cells
        lines.append(
            f"{row['class']:{width}} {row['labels']:8} {row['predictions']:10} {recall:>7} "
            f"{precision:>10} {iou:>6}"
        )
    if len(rows) > SHOWN:
        lines.append(f"and {len(rows) - SHOWN} classes with a higher recall, see per_class.csv")
    return "\n".join(lines)


def write_tables(predictions: Predictions, folder: Path) -> None:
    """per_class.csv, confusion.csv and images.csv of a model's predictions."""
    rows = per_class(predictions)
    write_csv(folder / "per_class.csv", list(rows[0]), [list(row.values()) for row in rows])
    classes = predictions.classes
    matrix = zip(classes, predictions.confusion().tolist(), strict=True)
    write_csv(
        folder / "confusion.csv", ["label", *classes], [[name, *counts] for name, counts in matrix]
    )
    names, doubts = predictions.images, (predictions.confidence, predictions.entropy)
    confidence, entropy = (x.tolist() for x in doubts)
    if predictions.maps:
        head = ["image", "pixel_accuracy", "mean_iou", "confidence", "entropy"]
        shares = (100 * predictions.shares()).tolist()
        columns = names, shares, predictions.image_ious().tolist(), confidence, entropy
        write_csv(folder / "images.csv", head, zip(*columns, strict=True))
        return
    head = ["image", "label", "prediction", "confidence", "entropy"]
    of_image = {int(row[0]): row for row in predictions.rows}
    pairs = [(of_image[i][1], of_image[i][2]) for i in range(len(names))]
    labels, predicted = ([classes[int(pair[i])] for pair in pairs] for i in (0, 1))
    write_csv(
        folder / "images.csv", head, zip(names, labels, predicted, confidence, entropy, strict=True)
    )


def figures_text(figures: dict) -> str:
    """The figures of a set as lines for the screen."""
    percent = ("accuracy", "mean_class_accuracy", "mean_iou", "pixel_accuracy", "ece", "confidence")
    lines = [
        f"{name.replace('_', ' '):22}{figures[name]:6.2f} %"
        for name in percent
        if figures.get(name) is not None
    ]
    if figures["loss"] is not None:
        lines.append(f"{'loss':22}{figures['loss']:6.3f} nats per label")
    return "\n".join(lines)


def against_summary(figures: dict, summary: dict) -> str | None:
    """Whether the figures are those that summary.json has for the selected step; None without."""
    before = (summary.get("target") or {}).get("selected")
    names = [name for name, x in (before or {}).items() if name in figures and x is not None]
    if not names:
        return None
    different = [name for name in names if before[name] != figures[name]]
    if not different:
        return f"exactly the figures of summary.json, selected step {before['step']}"
    name = different[0]
    if isinstance(before[name], dict):
        return f"note: summary.json has other figures of {name.replace('_', ' ')}"
    return (
        f"note: summary.json has {name.replace('_', ' ')} {before[name]:.4f}, here it is "
        f"{figures[name]:.4f}: another machine, precision, or version of the code"
    )
