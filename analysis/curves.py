"""Curves of metrics.jsonl: of several runs in one picture, and of one run alone.

They need matplotlib, which is optional. Nothing here imports torch.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from analysis.figures import (
    BLACK,
    BLUE,
    GRAY,
    GREEN,
    ORANGE,
    PINK,
    RED,
    SKY,
    new_figure,
    plain_label,
    save_figure,
)
from analysis.run_files import inner, main_metric, number
from common.errors import UserError

COLORS = (BLUE, RED, GREEN, PINK, ORANGE, SKY, BLACK)  # without yellow, too pale for a line
LINES = ("-", "--", "-.", ":")
TOTAL = {"color": COLORS[-1], "linestyle": "-", "linewidth": 2.5, "zorder": 3}  # beside its parts
MOST = 2 * len(COLORS) * len(LINES)  # curves that can be told apart
FEW = 25  # points of a curve up to which each is marked
WIDTH, HEIGHT = 8.0, 2.4  # inches, of a panel
LETTER, ROW, HANDLE = 0.063, 0.17, 0.55  # inches, of a legend: a letter, a row, a line and its gaps

Series = tuple[list[int], list[float]]  # steps and values; nan where a record has null


def series_of(records: Sequence[dict]) -> dict[str, Series]:
    """The curve of each metric that has a number in at least one record."""
    curves: dict[str, Series] = {}
    for record in records:
        for name, value in record.items():
            if value is not None and number(value) is None:
                continue  # a text or a list
            steps, values = curves.setdefault(name, ([], []))
            steps.append(record["step"])
            values.append(math.nan if value is None else float(value))
    return {
        name: (steps, values)
        for name, (steps, values) in curves.items()
        if name != "step" and not all(map(math.isnan, values))
    }


def _style(index: int) -> dict:
    """Color and line of a curve; neighbors differ in both, the first `MOST` in one at least."""
    style = {"color": COLORS[index % len(COLORS)], "linestyle": LINES[index % len(LINES)]}
    marked = index // (len(COLORS) * len(LINES)) % 2 == 1
    return {**style, "marker": "s", "markersize": 5, "markevery": 0.1} if marked else style


def _plot(axes, curve: Series, **style):
    """Draw a curve. A few points are marked, since one between two gaps makes no line."""
    if len(curve[0]) <= FEW:
        style = {"marker": ".", "markersize": 4, **style}
    return axes.plot(*curve, **{"linewidth": 1.3, **style})[0]


def _dress(axes, title: str) -> None:
    axes.set_title(title, fontsize=9, loc="left")
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3, linewidth=0.5)
    axes.xaxis.get_major_locator().set_params(integer=True)


def compare_curves(runs: Sequence[tuple[str, dict]], names: Sequence[str], file: Path) -> None:
    """Write a picture with one panel per metric, in which each run has a curve.

    Args:
        runs: (name in the legend, `series_of` its records) of each run, at most `MOST`.
        names: of the metrics.
        file: a png.
    """
    labels = [plain_label(name, int(WIDTH / LETTER) - 10) for name, _ in runs]
    longest = max(len(line) for label in labels for line in label.splitlines())
    columns = min(max(int(WIDTH / (LETTER * longest + HANDLE)), 1), len(labels))
    lines = sum(label.count("\n") + 1 for label in labels)
    height = HEIGHT if len(runs) <= len(COLORS) else 1.5 * HEIGHT
    figure = new_figure(WIDTH, height * len(names) + ROW * (math.ceil(lines / columns) + 1) + 0.5)
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    handles = {}
    for axes, name in zip(panels, names, strict=True):
        for index, (_, series) in enumerate(runs):
            if name in series:
                handles[index] = _plot(axes, series[name], **_style(index))
        _dress(axes, name)
    panels[-1].set_xlabel("step", fontsize=8)
    order = sorted(handles)
    figure.legend(
        [handles[index] for index in order],
        [labels[index] for index in order],
        loc="outside lower center",
        ncols=columns,
        fontsize=8,
        handlelength=3.5,
    )
    save_figure(figure, file)


# --- one run


@dataclass
class _Panel:
    """Curves in one pair of axes.

    Attributes:
        title: what they show.
        curves: by the name in the legend.
        total: the name of a curve that all others are parts of.
        many: further curves, of one name in the legend.
        level: (value, name) of a horizontal line.
        marks: (step, value, marker, size, name) of single points.
    """

    title: str
    curves: dict[str, Series]
    total: str | None = None
    many: list[Series] = field(default_factory=list)
    level: tuple[float, str] | None = None
    marks: list[tuple] = field(default_factory=list)


def _accepted(series: dict[str, Series]) -> _Panel:
    """The accepted share of the pseudo-labels; more classes than styles are not told apart."""
    classes = {
        x.removeprefix("accepted."): y for x, y in series.items() if x.startswith("accepted.")
    }
    curves = {x: y for x, y in series.items() if x == "accepted"}
    few = len(classes) < len(COLORS) * len(LINES)
    if few:
        curves |= {f"class {name}": curve for name, curve in classes.items()}
    many = [] if few else list(classes.values())
    return _Panel("accepted share of the pseudo-labels", curves, "accepted", many)


def _choice(series: dict[str, Series], summary: dict) -> _Panel | None:
    """The target's main metric with the chosen steps; without labels, the criterion with its."""
    targets = [name for name in series if name.startswith("target.")]
    metric = main_metric([name.removeprefix("target.") for name in targets])
    if f"target.{metric}" in series:
        points = [
            (inner(summary, "target", name, "step"), inner(summary, "target", name, metric), name)
            for name in ("last", "selected", "oracle")
        ]
        panel, digits = _Panel(f"target.{metric}, percent", {}), 1
        panel.curves[f"target.{metric}"] = series[f"target.{metric}"]
    else:
        criterion = inner(summary, "selection", "criterion")
        if f"criteria.{criterion}" not in series:
            return None
        value = inner(summary, "selection", "value")
        points = [(inner(summary, "target", "selected", "step"), value, "selected")]
        panel, digits = _Panel(f"criteria.{criterion}", {}), 3
        panel.curves[f"criteria.{criterion}"] = series[f"criteria.{criterion}"]
    markers = {"last": ("s", 13), "selected": ("o", 9), "oracle": ("*", 7)}
    panel.marks = [
        (step, value, *markers[name], f"{name}: {value:.{digits}f} at step {step}")
        for step, value, name in points
        if number(step) is not None and number(value) is not None
    ]
    return panel


def _panels(series: dict[str, Series], summary: dict) -> list[_Panel]:
    """The panels for which the log has something."""
    losses = {name: curve for name, curve in series.items() if name.endswith("loss")}
    losses = {name: curve for name, curve in losses.items() if "." not in name}
    reversal = {x: series[x] for x in ("reversal_coeff", "reversal_applied") if x in series}
    panels = [_Panel("losses", losses)]
    if "domain_accuracy" in series:
        curves = {"domain_accuracy": series["domain_accuracy"]}
        panels.append(_Panel("domain_accuracy, percent", curves, level=(50, "50: confused")))
    if reversal:
        panels.append(_Panel("reversal_coeff (lambda)", reversal))
    panels += [_accepted(series), _choice(series, summary)]
    return [panel for panel in panels if panel and (panel.curves or panel.many)]


def _draw(axes, panel: _Panel) -> None:
    for index, curve in enumerate(panel.many):
        label = "one class each" if index == 0 else None
        _plot(axes, curve, color=GRAY, alpha=0.4, label=label)
    for index, (name, curve) in enumerate(panel.curves.items()):
        style = TOTAL if name == panel.total else _style(index)
        _plot(axes, curve, label=plain_label(name, 32), **style)
    if panel.level:
        axes.axhline(panel.level[0], color=GRAY, linestyle=":", label=panel.level[1])
    for index, (step, value, marker, size, name) in enumerate(panel.marks, 1):
        style = {"linestyle": "", "markerfacecolor": "none", "markeredgewidth": 1.6}
        style |= {"color": COLORS[index], "marker": marker, "markersize": size}
        axes.plot([step], [value], label=name, **style)
    _dress(axes, panel.title)
    columns = 1 if len(panel.curves) <= 14 else 2
    outside = {"loc": "upper left", "bbox_to_anchor": (1.01, 1), "borderaxespad": 0}
    axes.legend(**outside, ncols=columns, fontsize=8, handlelength=3.5, markerscale=0.7)


def learning_curves(records: Sequence[dict], summary: dict, file: Path) -> None:
    """Write a picture of one run, with a panel for each of these that its log has.

    Losses, the accuracy of the discriminator, the coefficient of the gradient reversal, the
    accepted shares of the pseudo-labels, and the target's main metric with the steps last, selected
    and oracle; without target labels, the criterion with the selected step.

    Args:
        records: of metrics.jsonl.
        summary: of summary.json; {} if the run is not finished.
        file: a png.

    Raises:
        UserError: there is no matplotlib, or nothing to draw.
    """
    panels = _panels(series_of(records), summary)
    if not panels:
        raise UserError(f"{file}: metrics.jsonl has no curve to draw; train longer than log_every")
    figure = new_figure(WIDTH, HEIGHT * len(panels) + 0.4)
    grid = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for axes, panel in zip(grid, panels, strict=True):
        _draw(axes, panel)
    grid[-1].set_xlabel("step", fontsize=8)
    save_figure(figure, file)
