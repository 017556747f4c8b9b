"""What rules for a choice among runs without target labels are worth, from a file of candidates.

    python benchmarks/selection.py docs/selection.csv
    python benchmarks/selection.py docs/selection.csv --without "PACS, art painting -> photo"

The file is written by `python reproduce.py SUITE --choose --csv FILE`. For each task each seed
chooses once, and the choice is measured on the other seeds. The tables of docs/selection.md are
those that this prints.
"""

import argparse
import math
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.choice import (
    RULES,
    Candidate,
    Worth,
    from_csv,
    markdown,
    rank_correlation,
    worth,
    worth_table,
)
from common.errors import UserError, exit_with


def by_task(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """The candidates of each task."""
    tasks: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        tasks.setdefault(candidate.task, []).append(candidate)
    return tasks


def correlations(candidates: Sequence[Candidate], rule: str, veto: bool) -> list[float]:
    """The rank correlation of a score with the figure on the target, per task and seed."""
    name = "agreement_all" if rule == "agreement" and not veto else rule
    values = []
    for of_task in by_task(candidates).values():
        for seed in dict.fromkeys(candidate.seed for candidate in of_task):
            runs = [x for x in of_task if x.seed == seed and not (veto and x.veto)]
            runs = [x for x in runs if getattr(x, name) is not None]
            scores = [getattr(x, name) for x in runs]
            values.append(rank_correlation(scores, [x.selected for x in runs]))
    return [x for x in values if not math.isnan(x)]


def choices(candidates: Sequence[Candidate], rule: str, veto: bool) -> list[Worth]:
    """What each choice is worth, per task and choosing seed."""
    return [
        worth(of_task, rule, veto, seed)
        for of_task in by_task(candidates).values()
        for seed in dict.fromkeys(candidate.seed for candidate in of_task)
    ]


def rules_table(candidates: Sequence[Candidate]) -> str:
    """One row per rule, with and without vetoes, and two that choose nothing."""
    head = ("rule", "vetoes", "mean regret", "worst regret", "mean gain", "worst gain")
    head = (*head, "below no adaptation", "rank correlation")
    rows = []
    for rule in RULES:
        for veto in (True, False):
            worths = choices(candidates, rule, veto)
            ranks = [] if rule == "default" else correlations(candidates, rule, veto)
            correlation = f"{statistics.fmean(ranks):.2f}" if ranks else "-"
            gains = [statistics.fmean(x.gains) for x in worths]
            regrets = [x.regret for x in worths]
            rows.append((rule, "yes" if veto else "no", *_figures(regrets, gains), correlation))
    rows.append(("no adaptation", "-", *_blindly(candidates, reference=True), "-"))
    rows.append(("any adapted run, last step", "-", *_blindly(candidates, reference=False), "-"))
    return markdown(head, rows)


def _figures(regrets: Sequence[float], gains: Sequence[float]) -> tuple[str, ...]:
    below = sum(gain < 0 for gain in gains)
    return (
        f"{statistics.fmean(regrets):.1f}",
        f"{max(regrets):.1f}",
        f"{statistics.fmean(gains):+.1f}",
        f"{min(gains):+.1f}",
        f"{below} of {len(gains)}",
    )


def _blindly(candidates: Sequence[Candidate], reference: bool) -> tuple[str, ...]:
    """The figures of taking the run without adaptation, or any other one, by chance."""
    regrets, gains = [], []
    for of_task in by_task(candidates).values():
        for seed in dict.fromkeys(candidate.seed for candidate in of_task):
            runs = [x for x in of_task if x.seed == seed]
            best = max(x.selected for x in runs)
            (plain,) = [x.selected for x in runs if x.reference]
            figures = [
                x.selected if reference else x.last for x in runs if x.reference == reference
            ]
            regrets += [best - figure for figure in figures]
            gains += [figure - plain for figure in figures]
    return _figures(regrets, gains)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="csv file of reproduce.py --csv")
    without_help = "leave these tasks out"
    parser.add_argument("--without", nargs="+", default=[], metavar="TASK", help=without_help)
    args = parser.parse_args(argv)
    candidates = from_csv(args.file)
    tasks = by_task(candidates)
    if unknown := [task for task in args.without if task not in tasks]:
        raise UserError(f"--without: no task {unknown[0]!r}; there are {', '.join(tasks)}")
    remaining = [x for x in candidates if x.task not in args.without]
    if any(x.selected is None for x in remaining):
        raise UserError(f"{args.file}: a run has no figure on the target, so nothing is measured")
    families = {x.method.partition(",")[0] for x in remaining}
    print(
        f"{len(remaining)} runs of {len(families)} methods on {len(by_task(remaining))} tasks, "
        f"{sum(x.hours for x in remaining):.1f} hours\n"
    )
    print(rules_table(remaining), "\n")
    print(worth_table([worth(of_task) for of_task in by_task(remaining).values()]))
    return 0


if __name__ == "__main__":
    exit_with(main)
