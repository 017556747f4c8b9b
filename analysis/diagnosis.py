"""What the log and the figures of a run say, in words."""

from collections.abc import Sequence

from common.metrics import main_metric

WON = 95  # domain accuracy, in percent, from which the discriminator tells all features apart
CONFUSED = (45, 60)  # within which it guesses
UNCALIBRATED = 10  # points of the expected calibration error
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


def _source(records: Sequence[dict]) -> list[str]:
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
    return [
        f"source validation has fallen from {best:.1f} at step {step} to {last:.1f}: adaptation "
        "harms what was learned on the source; lower the weight of the method's loss"
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


def _figures(figures: dict, never: Sequence[str]) -> list[str]:
    lines = []
    if never:
        names = ", ".join(never[:8]) + (" ..." if len(never) > 8 else "")
        lines.append(f"never predicted, though they occur ({len(never)} classes): {names}")
    ece = figures.get("ece")
    if ece is not None and ece >= UNCALIBRATED:
        word = "over" if figures["overconfidence"] > 0 else "under"
        lines.append(
            f"calibration is off: the model is {word}confident, with an expected calibration error "
            f"of {ece:.1f} points; do not read its confidence as a probability"
        )
    return lines


def diagnose(
    records: Sequence[dict],
    summary: dict,
    figures: dict,
    never: Sequence[str],
    distances: dict[str, float],
) -> list[str]:
    """One sentence per thing that the log and the figures show; a line if they show nothing.

    Args:
        records: of metrics.jsonl.
        summary: of summary.json; {} if the run is not finished.
        figures: of `Predictions.figures`.
        never: classes with labels that are never predicted.
        distances: the proxy A-distance `before` and `after` adaptation, if computed.
    """
    lines = [
        *_collapse(summary),
        *_discriminator(records),
        *_source(records),
        *_selection(summary),
        *_figures(figures, never),
    ]
    accepted = _late(records, "accepted")
    if accepted is not None and accepted < RARE:
        lines.append(
            f"only {100 * accepted:.0f} % of the pseudo-labels are accepted at the end: few target "
            "images train; lower the threshold (docs/pseudo.md)"
        )
    if "after" in distances:
        before = f"{distances['before']:.2f} before, " if "before" in distances else ""
        lines.append(
            f"A-distance of the two domains' features: {before}{distances['after']:.2f} after "
            "adaptation (0: a linear classifier cannot tell them apart, 2: it always can)"
        )
    return lines or ["nothing unusual"]
