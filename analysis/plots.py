"""Pictures of the figures of a run. They need matplotlib, which is optional."""

from collections.abc import Sequence
from pathlib import Path

import torch

from analysis.curves import learning_curves
from analysis.features import principal_components
from analysis.figures import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PALE,
    PINK,
    RED,
    SKY,
    WINE,
    YELLOW,
    new_figure,
    plain_label,
    save_figure,
)
from analysis.measure import BINS, Predictions
from analysis.run_files import read_metrics, read_summary
from common.errors import UserError

COLORS = (BLUE, ORANGE, GREEN, PINK, SKY, RED, YELLOW, BLACK, GRAY, WINE)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
NUMBERED = 20  # classes up to which a confusion matrix shows its numbers
NAMED, LARGEST = 150, 30  # classes up to which it shows their names; inches of its side
TOLD_APART = len(COLORS)  # classes up to which features are drawn in the style of their class


def shorten(name: str, length: int = 24) -> str:
    """A class name for an axis: cut in the middle, which is shown, if it is very long."""
    if len(name) > length:
        half = (length - 1) // 2
        name = f"{name[:half]}\u2026{name[-half:]}"
    return plain_label(name, length)


def plot_confusion(confusion: torch.Tensor, classes: Sequence[str], file: Path) -> None:
    """The confusion matrix (K, K), as shares of each row; numbers are percent."""
    k = len(classes)
    counts = confusion.double()
    shares = (counts / counts.sum(1, keepdim=True)).nan_to_num()
    cell = 0.45 if k <= NUMBERED else 0.2
    side = min(max(cell * k, 2.5), LARGEST)
    longest = 0.085 * max(len(shorten(name)) for name in classes) if k <= NAMED else 0.0
    figure = new_figure(side + longest + 1.6, side + longest + 0.9)
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    size = 9 if k <= NUMBERED else 6
    names = [shorten(name) for name in classes]
    if k <= NAMED:
        axes.set_xticks(range(k), names, rotation=90, fontsize=size)
        axes.set_yticks(range(k), names, fontsize=size)
    number = "" if k <= NAMED else ", by its number in confusion.csv"
    axes.set_xlabel(f"predicted class{number}")
    axes.set_ylabel(f"label{number}")
    axes.set_title("Share of each label's predictions", fontsize=10)
    if k <= NUMBERED:
        for i, row in enumerate((100 * shares).round().int().tolist()):
            for j, value in enumerate(row):
                color = "white" if value > 55 else "black"
                if value:
                    axes.text(j, i, value, ha="center", va="center", fontsize=8, color=color)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    save_figure(figure, file)


def plot_reliability(bins: torch.Tensor, ece: float, file: Path) -> None:
    """Accuracy by confidence beside the diagonal, and how many predictions each bin has.

    Args:
        bins: (3, `BINS`) of `Predictions`.
        ece: the expected calibration error, in percent.
        file: the picture.
    """
    count, correct, _ = bins
    figure = new_figure(5, 5.4)
    upper, lower = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    centers = ((torch.arange(BINS) + 0.5) / BINS).numpy()
    used = (count > 0).numpy()
    width = 0.9 / BINS
    heights = (correct / count).numpy()[used]
    upper.bar(centers[used], heights, width, color=BLUE, label="accuracy")
    upper.plot([0, 1], [0, 1], color=GRAY, linestyle="--", label="calibrated")
    upper.set_ylabel("accuracy")
    upper.set_ylim(0, 1)
    figure.legend(loc="outside lower center", ncols=2)
    upper.set_title(f"Expected calibration error {ece:.1f} %", fontsize=10)
    lower.bar(centers, (count / count.sum()).numpy(), width, color=GRAY)
    lower.set_ylabel("share")
    lower.set_xlabel("confidence")
    lower.set_xlim(0, 1)
    save_figure(figure, file)


def scatter_domains(axes, source: torch.Tensor, target: torch.Tensor) -> None:
    """Points of both domains, in their colors."""
    # In turns, so that neither domain hides the other.
    points = torch.cat([source, target])
    colors = [BLUE] * len(source) + [ORANGE] * len(target)
    order = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))
    axes.scatter(
        *points[order].T.numpy(), s=8, c=[colors[i] for i in order], alpha=0.7, linewidths=0
    )
    for name, color in (("source", BLUE), ("target", ORANGE)):
        axes.scatter([], [], s=30, c=color, label=name)


def scatter_classes(
    axes, points: torch.Tensor, labels: torch.Tensor, classes: Sequence[str]
) -> None:
    """Points of both domains, in the color and with the marker of their class."""
    for number, name in enumerate(classes):
        chosen = points[labels == number]
        style = {"c": COLORS[number], "marker": MARKERS[number]}
        axes.scatter(*chosen.T.numpy(), s=10, alpha=0.7, linewidths=0, **style)
        axes.scatter([], [], s=30, label=shorten(name), **style)


def plot_features(
    columns: dict[str, tuple[torch.Tensor, ...]], classes: Sequence[str], file: Path
) -> None:
    """Two principal components of the features of both domains, one column per model.

    A lower row shows the classes of the target's images, above the source in gray, if there are
    labels of several classes, and few enough to tell them apart.

    Args:
        columns: {title: (source features (N, D), their labels (N,), target features (M, D), their
            labels (M,))}; a label is -1 where there is none.
        classes: the class names.
        file: the picture.
    """
    labels = torch.cat([part[3] for part in columns.values()])
    several = len(labels[labels >= 0].unique()) > 1
    rows = 2 if several and len(classes) <= TOLD_APART else 1
    figure = new_figure(4.6 * len(columns) + 1.4, 3.9 * rows + 0.4)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for j, (title, (source, _, target, target_labels)) in enumerate(columns.items()):
        points = principal_components(torch.cat([source, target]))
        scatter_domains(grid[0][j], points[: len(source)], points[len(source) :])
        grid[0][j].set_title(title, fontsize=10)
        if rows == 2:
            gray = points[: len(source)].T.numpy()
            grid[1][j].scatter(*gray, s=8, c=PALE, linewidths=0, label="source")
            scatter_classes(grid[1][j], points[len(source) :], target_labels, classes)
            grid[1][j].set_title("classes of the target", fontsize=10)
    for row in grid:
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    save_figure(figure, file)


def draw_all(
    run: Path,
    predictions: Predictions,
    features: dict[str, tuple[torch.Tensor, ...]],
    method: str,
    folder: Path,
) -> None:
    """Write the pictures of an evaluation.

    Args:
        run: the run folder, for its log.
        predictions: of its model.
        features: {before, after: of `domain_features`}; {} without a source.
        method: the name of the method.
        folder: where to write.
    """
    confusion, ece = predictions.confusion(), predictions.calibration()["ece"]
    plot_confusion(confusion, predictions.classes, folder / "confusion.png")
    if ece is not None:
        plot_reliability(predictions.bins, ece, folder / "reliability.png")
    if features:
        alone = len(features) == 1
        titles = {"before": "before adaptation", "after": method if alone else f"after ({method})"}
        columns = {titles[name]: value for name, value in features.items()}
        plot_features(columns, predictions.classes, folder / "features.png")
    try:
        learning_curves(read_metrics(run), read_summary(run), folder / "curves.png")
    except UserError as error:  # the log has no number yet
        print(f"no curves.png: {error}")
