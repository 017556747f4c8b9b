"""The runs of a suite as candidates of a choice without target labels, and the report of it."""

import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from analysis.choice import (
    Candidate,
    candidates_table,
    choose,
    default_of,
    score,
    set_vetoes,
    worth,
    worth_summary,
    worth_table,
)
from analysis.suites import Entry, Suite
from common.errors import UserError
from common.files import load_tensors
from common.metrics import main_metric
from training.predictions import PREDICTIONS, agreement_of, is_of_same_images, is_of_same_set

RULE_NAMES = {
    "between_seeds": "agreement between seeds",
    "one seed": "infomax and agreement with the ensemble",
}


def _alarm(summary: dict) -> str | None:
    """Why the selected step is collapsed, or the first collapse alarm of a run."""
    if reason := summary["collapsed"].get("selected"):
        return reason
    alarms = summary["collapse_alarms"]
    return f"step {alarms[0]['step']}: {alarms[0]['reason']}" if alarms else None


def _candidate(entry: Entry, seed: int, summary: dict, suite: Suite) -> Candidate:
    target, selection = summary["target"], summary["selection"]
    if "parameters" not in summary:
        raise UserError(
            f"--choose: {entry.task}, {entry.method}, seed {seed} is a run of an earlier version; "
            "remove its folder to train it again"
        )
    metric = suite.metric or main_metric(target["last"])
    return Candidate(
        task=entry.task,
        method=entry.method,
        family=entry.family,
        seed=seed,
        reference=entry.method == suite.baselines[0],
        judged="infomax" not in entry.run_config.trained_criteria(),
        source_val=selection["source_val"],
        source_count=selection["source_count"],
        source_vetoes=selection["source_vetoes"],
        alarm=_alarm(summary),
        last=target["last"].get(metric),
        selected=target["selected"].get(metric),
        hours=summary["seconds"] / 3600,
        parameters=summary["parameters"],
    )


def check_can_choose(suite: Suite) -> None:
    """Raise `UserError` if a suite lacks what a choice among its runs needs.

    That is the method without adaptation, first in the suite's baselines, in each task; and of each
    run all that it has learned from.
    """
    if not suite.baselines:
        raise UserError(
            "--choose: name the method without adaptation first in the suite's baselines"
        )
    candidates = [entry for entry in suite.runs if not entry.sees_target_labels()]
    for entry in candidates:
        if entry.run_config.init_from and entry.start is None:
            raise UserError(
                f"--choose: {entry.task}, {entry.method}: starts from "
                f"{entry.run_config.init_from}, which may have seen target labels; "
                "let the entry name a run of the suite by the key init_from"
            )
    name = suite.baselines[0]
    for task in dict.fromkeys(entry.task for entry in candidates):
        if name not in [entry.method for entry in candidates if entry.task == task]:
            raise UserError(
                f"--choose: {task}: has no run of {name} that sees no target label; "
                "the suite's first baseline is what the other runs are compared with"
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
        In the order of tasks, seeds and entries. A task and seed whose run without adaptation is
        not finished has none.

    Raises:
        UserError: predictions are missing or of other images, or a run is of an earlier version.
    """
    groups: dict[tuple[str, int], list[tuple[Entry, Candidate]]] = {}
    for entry, summaries in zip(suite.runs, results, strict=True):
        for seed, summary in summaries.items():
            if not entry.sees_target_labels():
                candidate = _candidate(entry, seed, summary, suite)
                groups.setdefault((entry.task, seed), []).append((entry, candidate))
    groups = {
        key: runs
        for key, runs in sorted(groups.items(), key=lambda item: item[0])
        if any(candidate.reference for _, candidate in runs)
    }
    for task in dict.fromkeys(task for task, _ in groups):
        of_task = [x for key, runs in groups.items() if key[0] == task for _, x in runs]
        set_vetoes(of_task, suite.margin)
    scored: list[tuple[Candidate, dict]] = []
    for (_, seed), runs in groups.items():
        candidates = [candidate for _, candidate in runs]
        saved = _read([folder_of(entry, seed) for entry, _ in runs])
        score(candidates, [x["selected"] for x in saved], saved[0]["classes"])
        scored += zip(candidates, saved, strict=True)
    _compare_seeds(scored)
    return [candidate for candidate, _ in scored]


def _compare_seeds(scored: list[tuple[Candidate, dict]]) -> None:
    """Fill in `between_seeds` of candidates with their predictions.

    Raises:
        UserError: the seeds of a task have other target sets or classes.
    """
    runs_of: dict[tuple[str, str], list[tuple[Candidate, dict]]] = {}
    for candidate, predictions in scored:
        runs_of.setdefault((candidate.task, candidate.method), []).append((candidate, predictions))
    for (task, method), runs in runs_of.items():
        for candidate, predictions in runs:
            others = [(other.seed, x) for other, x in runs if other is not candidate]
            for seed, x in others:
                if not is_of_same_set(x, predictions):
                    raise UserError(
                        f"--choose: {task}, {method}: seeds {candidate.seed} and {seed} have other "
                        "target images or classes; remove the folders of one seed to train it again"
                    )
            shares = [agreement_of(predictions, x) for _, x in others]
            if known := [share for share in shares if share is not None]:
                candidate.between_seeds = statistics.fmean(known)


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
        saved.append({k: v for k, v in load_tensors(file).items() if k != "last"})
        if not is_of_same_images(saved[-1], saved[0]):
            raise UserError(
                f"--choose: {folders[0]} and {folder} have other target images or classes; "
                "the entries of one task must have the same target"
            )
    return saved


def unfinished(
    suite: Suite,
    results: list[dict[int, dict]],
    seeds: Sequence[int],
    reason_of: Callable[[Entry, int], str],
) -> list[str]:
    """A line per run that is no candidate because it does not count as finished.

    Args:
        suite, results: see `candidates_of`.
        seeds: all that were asked for.
        reason_of: why the run of an entry and a seed does not count.
    """
    lines = []
    for entry, summaries in zip(suite.runs, results, strict=True):
        for seed in seeds:
            if seed in summaries or entry.sees_target_labels():
                continue
            reason = reason_of(entry, seed)
            line = f"{entry.task}, {entry.method}, seed {seed}: not finished ({reason})"
            if entry.method == suite.baselines[0]:
                line += "; without it there is no choice on this seed"
            lines.append(line)
    return lines


def choice_report(suite: Suite, candidates: list[Candidate], folder_of: Callable[..., Path]) -> str:
    """What is chosen for each task, a run of its first seed, and what that is worth on the others.

    Args:
        suite: whose margin is named.
        candidates: as `candidates_of` returns them.
        folder_of: the run folder of a task and a method, and of `seed`.
    """
    if not candidates:
        return "There is nothing to choose from: no run without adaptation has finished."
    parts, worths = [], []
    for task in dict.fromkeys(candidate.task for candidate in candidates):
        of_task = [candidate for candidate in candidates if candidate.task == task]
        first = [candidate for candidate in of_task if candidate.seed == of_task[0].seed]
        chosen = choose(first)
        rule = RULE_NAMES[default_of([candidate for candidate in first if not candidate.veto])]
        folder = folder_of(task, chosen.method, seed=chosen.seed)
        changed = (
            ""
            if chosen.reference
            else f", which changes {100 * chosen.changed:.1f} % of the predictions"
        )
        parts += [
            f"**{task}: chosen without target labels, seed {chosen.seed}**",
            candidates_table(first, chosen),
            f"Chosen by {rule}: {chosen.method}{changed}. The model is {folder}/model.pt; "
            f"predictions by `python predict.py {folder} IMAGES`.",
        ]
        worths.append(worth(of_task, chosen))
    if any(x.selected is not None for x in worths):
        parts += [
            "**What the choice is worth**",
            worth_table(worths),
            worth_summary(worths),
            "Figures are by target test labels, which the choice has not seen, and means over the "
            "named seeds: all but that of the chosen run, if there are others. Regret is what the "
            "best method, known by these labels, has more. Gain is over the run without adaptation "
            "of the same seed; intervals are of 95 % by Student's t, where there is more than one "
            "value.",
        ]
    parts.append(
        "Scores are of the selected step on unlabeled target images. Shares of the predictions in "
        "percent: agreement, with the ensemble of the methods that are not vetoed; between seeds, "
        "with the same method on another seed; changed, which differ from those of "
        f"{suite.baselines[0]}. Vetoes: a method is out on all seeds if, on one of them, its run "
        "has not finished, has raised an alarm, or has a source validation that is more than "
        f"{suite.margin:g} points (in classification also more than two images) below that of "
        f"{suite.baselines[0]}, unless batch norm trains in either run. The "
        "rule: the method whose predictions agree most between seeds, if that is known of all; "
        "else the best by infomax of the runs whose loss does not contain it, beside all others, "
        "and of these the one that agrees most with the ensemble (docs/selection.md)."
    )
    return "\n\n".join(parts)
