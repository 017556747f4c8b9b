"""What the log and the figures of a run say, in words."""

from collections.abc import Sequence

from common.metrics import main_metric

WON = 95  # domain accuracy, in percent, from which the discriminator tells all features apart
CONFUSED = (45, 60)  # within which it guesses
UNCALIBRATED, CHANCE = 10, 2  # percent of calibration error; times what chance would give
TOO_OFTEN, FEW = 1.5, 0.03  # predictions per label; their excess as a share of all labels
FALLEN = 5  # points that the source validation may lose, and selection below the best step
RARE = 0.1  # share of accepted pseudo-labels below which few images train


def _late(records: Sequence[dict], name: str) -> float | None:
    """The mean of a metric over the last fifth of the lines that have it; None without any."""
    values = [record[name] for record in records if record.get(name) is not None]
    late = values[-max(len(values) // 5, 1) :]
    return sum(late) / len(late) if late else None


def _discriminator(records: Sequence[dict]) -> list[str]:
    accuracy = _late(records, "domain_accuracy")
    if accuracy is None:
        return []
    if accuracy >= WON:
        return [
            f"the discriminator has won: it tells {accuracy:.0f} % of the features apart at the "
            "end, so the features are not aligned; make the adversarial part stronger, or the "
            "discriminator weaker (docs/dann.md, docs/adda.md)"
        ]
    if CONFUSED[0] <= accuracy <= CONFUSED[1]:
        return [f"the domains are confused: the discriminator is right in {accuracy:.0f} %"]
    if accuracy < CONFUSED[0]:
        return [
            f"the features run away from the discriminator: it is right in {accuracy:.0f} %, less "
            "often than by guessing; lower the weight of the adversarial part"
        ]
    return [f"the discriminator is right in {accuracy:.0f} % at the end: partly aligned"]


def _collapse(summary: dict) -> list[str]:
    lines = []
    alarms = summary.get("collapse_alarms") or []
    if alarms:
        first = alarms[0]
        lines.append(
            f"{len(alarms)} collapse alarms, the first at step {first['step']}: {first['reason']}"
        )
    for name, reason in (summary.get("collapsed") or {}).items():
        lines.append(f"the {name} evaluation is collapsed and not to be used: {reason}")
    return lines


def _source(records: Sequence[dict], selection: dict) -> list[str]:
    values = [
        (record["step"], record["criteria.source_val"])
        for record in records
        if record.get("criteria.source_val") is not None
    ]
    if not values:
        return []
    step, best = max(values, key=lambda pair: pair[1])
    last = values[-1][1]
    if best - last < FALLEN:
        return []
    fallen = f"source validation has fallen from {best:.1f} at step {step} to {last:.1f}"
    if not selection.get("source_vetoes", True):
        return [f"{fallen}, with batch norm that trains: its statistics fit the target now"]
    return [
        f"{fallen}: adaptation harms what was learned on the source; lower the weight of the "
        "method's loss"
    ]


def _selection(summary: dict) -> list[str]:
    target = summary.get("target") or {}
    if (target.get("oracle") or {}).get("step") is None:
        return []
    figure = main_metric(target["last"])
    values = {name: entry[figure] for name, entry in target.items()}
    lines = []
    for name in ("selected", "last"):
        if values["oracle"] - values[name] >= FALLEN:
            lines.append(
                f"the {name} step has {values[name]:.1f}, but step {target['oracle']['step']} had "
                f"{values['oracle']:.1f}: training is unstable, or the criterion is misled "
                "(docs/selection.md)"
            )
    return lines


def _calibration(figures: dict) -> list[str]:
    ece, over = figures.get("ece"), figures.get("overconfidence")
    if ece is None or ece < UNCALIBRATED or ece < CHANCE * figures["ece_by_chance"]:
        return []
    word = "overconfident" if over > 0 else "underconfident"
    tendency = f"is {word}" if abs(over) > ece / 2 else "is both over- and underconfident"
    return [
        f"calibration is off: the model {tendency}, with an expected calibration error of "
        f"{ece:.1f} %; do not read its confidence as a probability (reliability.png)"
    ]


def _classes(rows: Sequence[dict]) -> list[str]:
    """What the rows of `per_class` show."""
    total = max(sum(row["labels"] for row in rows), 1)
    never = [row["class"] for row in rows if row["labels"] and not row["predictions"]]
    lines = []
    if never:
        names = ", ".join(never[:8]) + (" ..." if len(never) > 8 else "")
        lines.append(f"never predicted, though they occur ({len(never)} classes): {names}")
    for row in rows:
        labels, predictions = row["labels"], row["predictions"]
        if predictions > TOO_OFTEN * labels and predictions - labels > FEW * total:
            lines.append(
                f"{row['class']} is predicted too often: {predictions} times for {labels} labels, "
                f"of which {row['precision']:.0f} % are right"
            )
    return lines


def _adaptation(figures: dict, before: dict | None) -> list[str]:
    """Whether the model is better than the one from before adaptation."""
    if before is None:
        return []
    figure = main_metric(figures)
    name = figure.replace("_", " ")
    first, second = before[figure], figures[figure]
    if first is None or second is None:
        return []
    if second < first:
        return [
            f"adaptation has made the model worse: {name} {first:.1f} before, {second:.1f} after; "
            "--compare tells whether by chance"
        ]
    return [f"{name} {first:.1f} before adaptation, {second:.1f} after"]


def _accepted(records: Sequence[dict]) -> list[str]:
    """What the accepted pseudo-labels show."""
    accepted = _late(records, "accepted")
    if accepted is None:
        return []
    if accepted < RARE:
        return [
            f"only {100 * accepted:.0f} % of the pseudo-labels are accepted at the end: few target "
            "images train; lower the threshold (docs/pseudo.md)"
        ]
    names = {name for record in records for name in record if name.startswith("accepted.")}
    none = [name.partition(".")[2] for name in sorted(names) if not _late(records, name)]
    if not none:
        return []
    shown = ", ".join(none[:8]) + (" ..." if len(none) > 8 else "")
    return [f"no pseudo-label of these classes is accepted at the end: {shown} (docs/pseudo.md)"]


def diagnose(
    records: Sequence[dict],
    summary: dict,
    figures: dict,
    rows: Sequence[dict],
    distances: dict[str, float],
    before: dict | None = None,
) -> list[str]:
    """One sentence per thing that the log and the figures show; a line if they show nothing.

    Args:
        records: of metrics.jsonl.
        summary: of summary.json; {} if the run is not finished.
        figures: of `Predictions.figures`.
        rows: of `per_class`.
        distances: the proxy A-distance `before` and `after` adaptation, if computed.
        before: the figures of the model from before adaptation, or None.
    """
    lines = [
        *_adaptation(figures, before),
        *_collapse(summary),
        *_discriminator(records),
        *_source(records, summary.get("selection") or {}),
        *_selection(summary),
        *_classes(rows),
        *_calibration(figures),
        *_accepted(records),
    ]
    if "after" in distances:
        values = f"{distances['after']:.2f}"
        if "before" in distances:
            values = f"{distances['before']:.2f} before adaptation, {values} after"
        lines.append(
            f"A-distance of the features of source and target: {values} (0: a linear classifier "
            "cannot tell them apart, 2: it always can; docs/use.md)"
        )
    return lines or ["nothing unusual"]
