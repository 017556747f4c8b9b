"""MODEL.md of a run folder: what the model is and how well it does, for whoever gets the folder."""

import inspect
import itertools
import textwrap
from pathlib import Path

from data import Domains, LabeledDataConfig

ALARMS = 10  # collapse alarms that are shown
LICENSE = (
    "License: to be filled in by whoever shares this model; that of the training images and of "
    "the pretrained weights applies"
)
TASKS = {
    "classification": "assigns an image to one of its classes",
    "segmentation": "assigns each pixel of an image to one of its classes",
}


def _block(text: str) -> str:
    """A text that markdown shows as it is."""
    return f"```text\n{text}\n```"


def _table(rows: list[list[str]]) -> str:
    """A table whose first row is the head."""
    rows = [rows[0], ["---"] * len(rows[0]), *rows[1:]]
    return "\n".join(f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in rows)


def _figure(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _numbers(metrics: dict) -> list[str]:
    """The names of the metrics that are one number, such as the accuracy."""
    return [k for k, v in metrics.items() if k != "step" and isinstance(v, float | None)]


def _domains(domains: Domains) -> tuple[str | None, str]:
    """The names of the source, None without one, and of the target."""
    target = domains.target or domains.target_labeled
    return domains.source and domains.source.name, target.name


def objective(docstring: str) -> tuple[str, str]:
    """The first paragraph of a script's docstring, and the indented lines that follow it.

    Returns:
        (what the script is, its objective); the objective is "" if none follows.
    """
    first, *others = inspect.cleandoc(docstring).split("\n\n")
    indented = itertools.takewhile(lambda part: part.startswith("    "), others)
    parts = [part for part in indented if not part.startswith(("    python ", "    torchrun "))]
    return " ".join(first.split()), textwrap.dedent("\n\n".join(parts))


def _model(run, domains: Domains) -> str:
    config = run.config
    names = ", ".join(f"`{name}`" for name in domains.classes)
    absent = ""
    if domains.absent_classes:
        absent = f"\n\nThe target is known to lack {', '.join(domains.absent_classes)}."
    return (
        f"The model {TASKS[config.data.task]}. It is a {config.model.backbone}; `model.yaml` says "
        "how it is built and how images are prepared.\n\n"
        f"{len(domains.classes)} classes, in the order of its outputs: {names}{absent}"
    )


def _labels(run, domains: Domains) -> str:
    """Which labels the run was trained with."""
    if isinstance(run.config.data, LabeledDataConfig):
        return (
            f"Trained with the labels of {len(domains.target_labeled)} target images. Those of the "
            f"{len(domains.target_test)} validation images (target_test) decided when to stop and "
            "which weights to keep."
        )
    if domains.source is not None and run.config.data.target_is_source():
        return f"The source is the target itself: {len(domains.source)} of its labels trained."
    text = "No source image was seen"
    if domains.source is not None:
        text = f"Trained with the labels of the {len(domains.source)} source images"
    if domains.target_labeled:
        return f"{text}, and with those of {len(domains.target_labeled)} target images."
    return f"{text}, and no label of the target."


def _start(run) -> str:
    """What the weights were before the run."""
    start, weights = run.config_values["init_from"], run.config_values["model.weights"]
    if start is not None:
        return f"The run started from `{start}`."
    if weights is not None:
        return f"The backbone started from the pretrained weights `{weights}`."
    return "The weights were random at the start."


def _data(run, domains: Domains) -> str:
    return f"{_block(domains.describe(storage=False))}\n\n{_labels(run, domains)} {_start(run)}"


def _method(run) -> str:
    script = Path(inspect.getfile(type(run.config))).name
    title, formula = objective(inspect.getmodule(type(run.config)).__doc__ or "")
    parts = [f"`{script}`: {title}" if title else f"`{script}`"]
    return "\n\n".join(parts + ([_block(formula)] if formula else []))


def _figures(run, domains: Domains, summary: dict) -> str:
    target, source = summary["target"], summary["source_val"] or {}
    names = _numbers(target["last"])
    step = target["selected"]["step"]
    parts = []
    if target["oracle"]["step"] is None:
        parts.append(
            "The target has no labels to measure with: how well the model does on it is not known. "
            f"`model.pt` is step {step}."
        )
    else:
        rows = [["figure", "step", *names]]
        for name, entry in target.items():
            shown = "selected (`model.pt`)" if name == "selected" else name
            rows.append([shown, str(entry["step"]), *(_figure(entry[k]) for k in names)])
        parts += [_table(rows), _note(run, domains, summary)]
    if (source_names := _numbers(source)) and source[source_names[0]] is not None:
        shown = ", ".join(f"{name} {_figure(source[name])}" for name in source_names)
        parts.append(f"On held-out source images, at the last step: {shown}.")
    return "\n\n".join([*parts, _selection(summary), *_collapse(summary)])


def _note(run, domains: Domains, summary: dict) -> str:
    """What the table of figures was measured on."""
    text = (
        f"In percent, on {len(domains.target_test)} images of the target "
        f"({summary['target_test']}). The oracle is chosen with their labels: it is a bound, not a "
        "result."
    )
    if isinstance(run.config.data, LabeledDataConfig):
        text += " The selected step is chosen with them, too, so none of this is a test figure."
    return text


def _selection(summary: dict) -> str:
    selection = summary["selection"]
    if selection["criterion"] == "last":
        return "The last step was taken; nothing was selected."
    trained = "which is part of the training loss and does not measure it independently"
    if not selection["part_of_training_loss"]:
        trained = "which is no part of the training loss"
    return (
        f"Selected by the criterion {selection['criterion']} ({selection['value']:.4g}), {trained}."
    )


def _collapse(summary: dict) -> list[str]:
    """What went wrong, if anything did."""
    sentences = [
        f"**The predictions of the {name} step have collapsed: {reason}.**"
        for name, reason in summary["collapsed"].items()
    ]
    if alarms := summary["collapse_alarms"]:
        lines = [f"- step {alarm['step']}: {alarm['reason']}" for alarm in alarms[:ALARMS]]
        if len(alarms) > ALARMS:
            lines.append(f"- and {len(alarms) - ALARMS} more, in `summary.json`")
        sentences.append("Collapse alarms of the training:\n\n" + "\n".join(lines))
    return sentences


def _training(run, summary: dict) -> str:
    commit = summary["commit"] or "unknown: it was not in a git repository"
    if "-dirty" in commit:
        commit += " (with changes that are in no commit, so nobody else has this code)"
    rows = [
        ["seed", str(summary["seed"])],
        ["steps", str(summary["steps"])],
        ["seconds", str(summary["seconds"])],
        ["machine", summary["machine"]],
        ["commit of the code", commit],
    ]
    for change in summary.get("changed", []):
        text = f"{change['before']} before step {change['step']}, then {change['now']}"
        rows.append([f"changed: {change['key']}", text])
    config = (run.folder / "config.yaml").read_text(encoding="utf-8").splitlines()
    head = itertools.takewhile(lambda line: line.startswith("# "), config)
    commands = "\n".join(line.removeprefix("# ") for line in head)
    return f"{_table([['', ''], *rows])}\n\nStarted by:\n\n{_block(commands)}"


def _use(run) -> str:
    return (
        "With the code of the commit above, where `RUN` is this folder and `FOLDER` has images:\n\n"
        + _block("python evaluate.py RUN\npython predict.py RUN FOLDER")
        + "\n\nThe first needs the images of the run, or others that `data.target_test` names."
    )


def _limits(domains: Domains) -> str:
    _, target = _domains(domains)
    measured = "and was measured on no target image"
    if domains.target_test is not None:
        measured = "and was measured on the images named above only"
    return (
        f"The model was made for the target, {target}, {measured}. Other images, another camera "
        "or another place are another domain: measure before you rely on it. It knows no other "
        "classes, and gives one of its own to everything."
    )


def model_card(run, domains: Domains, summary: dict) -> str:
    """The text of MODEL.md.

    Args:
        run: a `Run` whose last evaluation is over.
        domains: its data.
        summary: as `training.summary.summarize` returns it.
    """
    source, target = _domains(domains)
    title = f"# {summary['method']}: " + (f"{source} -> {target}" if source else target)
    sections = {
        "Model": _model(run, domains),
        "Data": _data(run, domains),
        "Method": _method(run),
        "Figures": _figures(run, domains, summary),
        "Training": _training(run, summary),
        "Use": _use(run),
        "Limits": _limits(domains),
    }
    parts = [title, *(f"## {name}\n\n{text}" for name, text in sections.items()), LICENSE]
    return "\n\n".join(parts) + "\n"
