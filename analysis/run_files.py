"""The files of run folders, read leniently.

A run may be in progress, damaged, or written by an earlier version. Nothing here imports torch,
which takes seconds: a list of runs is there at once.
"""

import json
import math
import os
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from common.config import parse_yaml
from common.errors import UserError

STATES = ("running", "stopped", "failed", "finished")
# Of a run, config.yaml and at least one of these are there.
FILES = {"status.json", "summary.json", "metrics.jsonl"}
WITHOUT_RUNS = {"checkpoints", "pictures"}  # folders in a run folder


def find_runs(top: Path) -> tuple[list[Path], list[str]]:
    """The run folders at and below `top`, and a sentence on each folder that cannot be read.

    Links are followed, but no folder is visited twice. Hidden folders are left out.
    """
    runs, faults, visited = [], [], set()
    waiting, links = [str(top)], []  # links wait longer: a run has its path without a link
    while waiting or links:
        folder = waiting.pop() if waiting else links.pop()
        try:
            place = os.stat(folder)
            if (place.st_dev, place.st_ino) in visited:
                continue
            visited.add((place.st_dev, place.st_ino))
            entries = list(os.scandir(folder))
        except OSError as error:
            faults.append(f"{folder}: cannot be read ({error.strerror})")
            continue
        names = {entry.name for entry in entries}
        is_run = "config.yaml" in names and bool(FILES & names)
        if is_run:
            runs.append(Path(folder))
        for entry in entries:
            if entry.name.startswith(".") or (is_run and entry.name in WITHOUT_RUNS):
                continue
            if entry.is_symlink():
                links += [entry.path] if os.path.isdir(entry.path) else []
            elif entry.is_dir(follow_symlinks=False):
                waiting.append(entry.path)
    return sorted(runs), sorted(faults)


# --- the files of one run


def _read(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"{file}: is gone") from None
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror})") from None


def _read_json(file: Path) -> dict:
    """The mapping in a file. Raises `UserError` if it is gone or damaged."""
    content = _read(file)
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        reason = "it is empty" if not content.strip() else str(error)
        raise UserError(f"{file}: is damaged ({reason})") from None
    if not isinstance(value, dict):
        raise UserError(f"{file}: is damaged (it contains no mapping)")
    return value


def read_config(folder: Path) -> dict:
    """The tree in config.yaml, whatever its keys are. Raises `UserError` if it is damaged."""
    file = folder / "config.yaml"
    try:
        tree = parse_yaml(_read(file).decode(), str(file), fast=True)
    except UnicodeDecodeError:
        raise UserError(f"{file}: is damaged (no utf-8 text)") from None
    if not isinstance(tree, dict):
        raise UserError(f"{file}: is damaged (it contains no mapping)")
    return tree


def read_status(folder: Path) -> dict:
    """status.json. Raises `UserError` if it is gone or damaged."""
    status = _read_json(folder / "status.json")
    if status.get("state") not in STATES:
        raise UserError(f"{folder / 'status.json'}: is damaged (it names no state)")
    return status


def read_summary(folder: Path) -> dict:
    """summary.json; {} without one. Raises `UserError` if it is damaged."""
    file = folder / "summary.json"
    return _read_json(file) if file.exists() else {}


def _records(lines: Iterable[bytes]) -> Iterator[dict]:
    """The lines of metrics.jsonl that are complete; a run that writes may not have ended one."""
    for line in lines:
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            yield record


def read_metrics(folder: Path) -> list[dict]:
    """The records of metrics.jsonl; none without the file."""
    file = folder / "metrics.jsonl"
    return list(_records(_read(file).splitlines())) if file.exists() else []


def _newest(folder: Path) -> tuple[int | None, dict]:
    """The step of the newest record of metrics.jsonl, and the newest record of an evaluation."""
    file, step = folder / "metrics.jsonl", None
    for record in _records(reversed(_read(file).splitlines())) if file.exists() else ():
        step = record["step"] if step is None else step
        if any(name.startswith(("target.", "criteria.")) for name in record):
            return step, record
    return step, {}


# --- what they say together


def number(value) -> float | None:
    """A finite number; None for anything else."""
    known = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if known and math.isfinite(value) else None


def inner(tree, *keys: str):
    """The value behind nested keys; None if one of them is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def main_metric(names: Collection[str]) -> str:
    """As that of `common.metrics`, which imports torch."""
    return "mean_iou" if "mean_iou" in names else "accuracy"


@dataclass
class RunFacts:
    """What is known of a run. What is not known is None.

    Attributes:
        folder: the run folder.
        config: the tree of config.yaml; {} if that is damaged.
        method: its name.
        metric: the metric that `last` and `selected` are of.
        last, selected: figures on the target in percent. Of a run that is not finished, `last` is
            that of the newest evaluation, and nothing is selected.
        criterion: the one that selects.
        state: one of STATES, or damaged.
        reason: why it failed, or what is damaged.
        collapsed: how the predictions on the target have collapsed.
        step: the last step that is saved; of a running run, the last one in metrics.jsonl.
        steps: how many it shall have.
        seconds: how long it took.
        commit: of the code.
    """

    folder: Path
    config: dict = field(default_factory=dict)
    method: str | None = None
    metric: str | None = None
    last: float | None = None
    selected: float | None = None
    criterion: str | None = None
    state: str = "damaged"
    reason: str | None = None
    collapsed: str | None = None
    step: int | None = None
    steps: int | None = None
    seconds: float | None = None
    commit: str | None = None


def _text(value) -> str | None:
    """A text on one line; None for anything else."""
    return " ".join(value.split()) if isinstance(value, str) else None


def read_run(folder: Path) -> RunFacts:
    """What the files of a run folder say. A file that is damaged is named in `reason`."""
    faults: list[str] = []

    def attempt(read):
        try:
            return read(folder)
        except UserError as error:
            faults.append(str(error).removeprefix(f"{folder}{os.sep}"))
            return None

    config, status = attempt(read_config) or {}, attempt(read_status) or {}
    run = RunFacts(folder, config, state=status.get("state", "damaged"))
    summary = {}
    if run.state in ("finished", "damaged"):
        faults_before = len(faults)
        summary = attempt(read_summary) or {}
        if run.state == "finished" and not summary and len(faults) == faults_before:
            faults.append("summary.json: is gone")
    run.method = _text(status.get("method")) or _text(summary.get("method"))
    run.step, run.steps = number(status.get("step")), number(status.get("steps"))
    run.criterion = _text(inner(summary, "selection", "criterion")) or _text(config.get("select"))
    run.seconds, run.commit = number(summary.get("seconds")), _text(summary.get("commit"))
    if summary:
        _add_figures(run, summary)
    else:
        _add_progress(run, *(attempt(_newest) or (None, {})))
    if faults:
        run.state, run.reason = "damaged", "; ".join(faults)
    elif run.state == "failed":
        run.reason = _text(status.get("reason"))
    return run


def _add_figures(run: RunFacts, summary: dict) -> None:
    """Add what summary.json says about the target."""
    last = inner(summary, "target", "last")
    run.metric = main_metric(last if isinstance(last, dict) else ())
    run.last = number(inner(summary, "target", "last", run.metric))
    run.selected = number(inner(summary, "target", "selected", run.metric))
    collapsed = summary.get("collapsed")
    if isinstance(collapsed, dict) and collapsed:
        run.collapsed = "; ".join(f"{name}: {_text(text)}" for name, text in collapsed.items())


def _add_progress(run: RunFacts, step: int | None, evaluation: dict) -> None:
    """Add what metrics.jsonl says, of a run without summary.json."""
    target = {name: x for name, x in evaluation.items() if name.startswith("target.")}
    run.metric = main_metric([name.removeprefix("target.") for name in target])
    run.last = number(target.get(f"target.{run.metric}"))
    run.collapsed = _text(evaluation.get("collapsed"))
    if run.state == "running" and step is not None:
        run.step = max(step, run.step or 0)
