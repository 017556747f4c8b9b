"""The runs of a suite as candidates of a choice without target labels, and the report of it."""

from collections.abc import Callable
from pathlib import Path

from analysis.choice import (
    Candidate,
    candidates_table,
    choose,
    score,
    worth,
    worth_table,
)
from analysis.suites import Entry, Suite
from common.errors import UserError
from common.files import load_tensors
from common.metrics import main_metric
from training.predictions import PREDICTIONS


def _alarm(summary: dict) -> str | None:
    """The first collapse alarm of a run."""
    if reason := summary["collapsed"].get("selected"):
        return reason
    alarms = summary["collapse_alarms"]
    return f"step {alarms[0]['step']}: {alarms[0]['reason']}" if alarms else None


def _candidate(entry: Entry, seed: int, summary: dict, suite: Suite) -> Candidate:
    target = summary["target"]
    metric = suite.metric or main_metric(target["last"])
    return Candidate(
        task=entry.task,
        method=entry.method,
        seed=seed,
        reference=entry.method == suite.baselines[0],
        judged="infomax" not in entry.run_config.trained_criteria(),
        source_val=summary["selection"]["source_val"],
        alarm=_alarm(summary),
        last=target["last"].get(metric),
        selected=target["selected"].get(metric),
        hours=summary["seconds"] / 3600,
    )


def candidates_of(
    suite: Suite, results: list[dict[int, dict]], folder_of: Callable[[Entry, int], Path]
) -> list[Candidate]:
    """The finished runs of a suite that see no target label, with their scores and vetoes.

    Args:
        suite: its first baseline is the method without adaptation.
        results: {seed: summary} of the finished runs, one dict per entry.
        folder_of: the run folder of an entry and a seed.

    Returns:
        In the order of tasks, seeds and entries. A task and seed without the run without adaptation
        is left out.

    Raises:
        UserError: the suite names no baseline, or predictions are missing or of other images.
    """
    if not suite.baselines:
        raise UserError(
            "--choose: name the method without adaptation first in the suite's baselines"
        )
    groups: dict[tuple[str, int], list[tuple[Entry, dict]]] = {}
    for entry, summaries in zip(suite.runs, results, strict=True):
        for seed, summary in summaries.items():
            if not entry.sees_target_labels():
                groups.setdefault((entry.task, seed), []).append((entry, summary))
    scored = []
    for (_, seed), runs in sorted(groups.items(), key=lambda item: item[0]):
        candidates = [_candidate(entry, seed, summary, suite) for entry, summary in runs]
        if sum(candidate.reference for candidate in candidates) != 1:
            continue
        saved = _read([folder_of(entry, seed) for entry, _ in runs])
        logits = [predictions["selected"] for predictions in saved]
        score(candidates, logits, saved[0]["classes"], suite.margin)
        scored += candidates
    return scored


def _read(folders: list[Path]) -> list[dict]:
    """The predictions of runs on the same images.

    Raises:
        UserError: a run has none, or those of other images.
    """
    saved = []
    for folder in folders:
        file = folder / PREDICTIONS
        if not file.is_file():
            raise UserError(
                f"--choose: {file} is missing, so {folder} is a run of an earlier version; "
                "remove that folder to train it again"
            )
        saved.append(load_tensors(file))
        for name in ("images", "classes"):
            if saved[-1][name] != saved[0][name]:
                raise UserError(
                    f"--choose: {folders[0]} and {folder} have other target images or classes; "
                    "the entries of one task must have the same target"
                )
    return saved


def choice_report(
    suite: Suite, candidates: list[Candidate], folder_of: Callable[[str, str, int], Path]
) -> str:
    """What is chosen for each task on its first seed, and what that is worth on the other seeds.

    Args:
        suite: whose margin is named.
        candidates: as `candidates_of` returns them.
        folder_of: the run folder of a task, a method and a seed.
    """
    parts, worths = [], []
    for task in dict.fromkeys(candidate.task for candidate in candidates):
        of_task = [candidate for candidate in candidates if candidate.task == task]
        first = [candidate for candidate in of_task if candidate.seed == of_task[0].seed]
        chosen = choose(first)
        folder = folder_of(task, chosen.method, chosen.seed)
        parts += [
            f"**{task}: chosen without target labels, seed {chosen.seed}**",
            candidates_table(first, chosen),
            f"Chosen: {chosen.method}, {100 * chosen.changed:.1f} % of whose predictions differ "
            f"from those of {_reference(first)}. The model is {folder}/model.pt; predictions by "
            f"`python predict.py {folder} IMAGES`.",
        ]
        worths.append(worth(of_task))
    labeled = [x for x in worths if x.selected is not None]
    note = (
        "Scores are of the selected step on unlabeled target images. Vetoes: source validation "
        f"more than {suite.margin:g} points below that of the run without adaptation, or a "
        "collapse alarm. The rule: the best by infomax of the runs whose loss does not contain it, "
        "beside all others; of these, the one that agrees most with the mean prediction of all "
        "runs that are not vetoed (docs/selection.md)."
    )
    if labeled:
        seeds = ", ".join(map(str, labeled[0].seeds))
        same = labeled[0].seeds == [candidates[0].seed]
        where = "the same seed" if same else f"seeds {seeds}, which the choice has not seen"
        parts += [
            "**What the choice is worth**",
            worth_table(labeled),
            f"Chosen on seed {candidates[0].seed}; figures are means over {where}, by target test "
            "labels. Regret is what the best method, known by these labels, has more.",
        ]
    return "\n\n".join([*parts, note])


def _reference(candidates: list[Candidate]) -> str:
    return next(candidate.method for candidate in candidates if candidate.reference)
