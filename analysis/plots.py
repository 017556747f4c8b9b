"""Pictures of the figures of a run. They need matplotlib, which is optional."""

from collections.abc import Sequence
from pathlib import Path

import torch

from analysis.curves import HINT, learning_curves
from analysis.features import principal_components
from analysis.measure import BINS, Predictions
from analysis.run_files import read_metrics, read_summary
from common.optional import optional
from common.writing import write_atomically

# Of Okabe and Ito, and of Tol, which people with any color vision tell apart.
BLUE, ORANGE, GREEN, GRAY, WINE = "#0072B2", "#E69F00", "#009E73", "#888888", "#882255"
COLORS = (BLUE, ORANGE, GREEN, "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000", GRAY, WINE)
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*", "<", ">")
NUMBERED = 20  # classes up to which a confusion matrix shows its numbers
TOLD_APART = len(COLORS)  # classes up to which features are drawn in the style of their class


def available() -> bool:
    """Whether pictures can be made."""
    return optional("matplotlib.figure") is not None


def new_figure(width: float, height: float):
    """An empty figure of this size in inches, without matplotlib's global state."""
    figure_module = optional("matplotlib.figure")
    if figure_module is None:
        raise RuntimeError(HINT)
    return figure_module.Figure(figsize=(width, height), dpi=120, layout="constrained")


def save(figure, file: Path) -> None:
    """Write a figure as png."""
    write_atomically(file, lambda f: figure.savefig(f, format="png"))


def shorten(name: str, length: int = 24) -> str:
    """A class name for an axis: cut in the middle, which is shown, if it is very long."""
    if len(name) <= length:
        return name
    half = (length - 1) // 2
    return f"{name[:half]}\u2026{name[-half:]}"


def plot_confusion(confusion: torch.Tensor, classes: Sequence[str], file: Path) -> None:
    """The confusion matrix (K, K), as shares of each row; numbers are percent."""
    k = len(classes)
    counts = confusion.double()
    shares = (counts / counts.sum(1, keepdim=True)).nan_to_num()
    cell = 0.45 if k <= NUMBERED else 0.2
    side = max(cell * k, 2.5)
    longest = 0.085 * max(len(shorten(name)) for name in classes)
    figure = new_figure(side + longest + 1.6, side + longest + 0.9)
    axes = figure.add_subplot()
    image = axes.imshow(shares.numpy(), cmap="Blues", vmin=0, vmax=1)
    size = 9 if k <= NUMBERED else 6
    names = [shorten(name) for name in classes]
    axes.set_xticks(range(k), names, rotation=90, fontsize=size)
    axes.set_yticks(range(k), names, fontsize=size)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("label")
    axes.set_title("Share of each label's predictions", fontsize=10)
    if k <= NUMBERED:
        for i, row in enumerate((100 * shares).round().int().tolist()):
            for j, value in enumerate(row):
                color = "white" if value > 55 else "black"
                if value:
                    axes.text(j, i, value, ha="center", va="center", fontsize=8, color=color)
    bar = figure.colorbar(image, ax=axes, fraction=0.04, pad=0.02)
    bar.set_ticks([0, 0.5, 1], labels=["0 %", "50 %", "100 %"])
    save(figure, file)


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
    upper.legend(loc="lower right")
    upper.set_title(f"Expected calibration error {ece:.1f} %", fontsize=10)
    lower.bar(centers, (count / count.sum()).numpy(), width, color=GRAY)
    lower.set_ylabel("share")
    lower.set_xlabel("confidence")
    lower.set_xlim(0, 1)
    save(figure, file)


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

    The lower row has the classes of all images that have a label, if there are few classes.

    Args:
        columns: {title: (source features (N, D), their labels (N,), target features (M, D), their
            labels (M,))}; a label is -1 where there is none.
        classes: the class names.
        file: the picture.
    """
    labeled = any((part[3] >= 0).any() for part in columns.values())
    rows = 2 if labeled and len(classes) <= TOLD_APART else 1
    figure = new_figure(4.6 * len(columns) + 1.4, 3.9 * rows + 0.4)
    grid = figure.subplots(rows, len(columns), squeeze=False)
    for j, (title, (source, source_labels, target, target_labels)) in enumerate(columns.items()):
        points = principal_components(torch.cat([source, target]))
        scatter_domains(grid[0][j], points[: len(source)], points[len(source) :])
        grid[0][j].set_title(title, fontsize=10)
        if rows == 2:
            scatter_classes(grid[1][j], points, torch.cat([source_labels, target_labels]), classes)
    for row in grid:
        for axes in row:
            axes.set_xticks([])
            axes.set_yticks([])
        row[-1].legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=9)
    save(figure, file)


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
        titles = {"before": "before adaptation", "after": f"after: {method}"}
        columns = {titles[name]: value for name, value in features.items()}
        plot_features(columns, predictions.classes, folder / "features.png")
    if records := read_metrics(run):
        learning_curves(records, read_summary(run), folder / "curves.png")
