"""What rules for a choice among runs without target labels are worth, from a file of candidates.

    python benchmarks/selection.py runs.csv
    python benchmarks/selection.py runs.csv --without "PACS, art painting -> photo"
    python benchmarks/selection.py runs.csv --out results.md

The file is written by `python reproduce.py SUITE --choose --csv FILE`. For each task a run of each
seed is chosen, and measured by the figures of the other seeds, or by its own if there is no other.
"""

import argparse
import math
import shlex
import statistics
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from analysis.choice import (
    COMPOSED,
    RULES,
    Candidate,
    Worth,
    choose,
    default_of,
    from_csv,
    rank_correlation,
    worth,
    worth_summary,
    worth_table,
)
from analysis.suite_table import markdown, place
from common.errors import UserError, exit_with
from common.files import write_text


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
        for of_seed in seeds_of(of_task):
            runs = [x for x in of_seed if not (veto and x.veto)]
            runs = [x for x in runs if getattr(x, name) is not None]
            scores = [getattr(x, name) for x in runs]
            values.append(rank_correlation(scores, [x.selected for x in runs]))
    return [x for x in values if not math.isnan(x)]


def seeds_of(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """The candidates of one task, per seed."""
    seeds = dict.fromkeys(candidate.seed for candidate in candidates)
    return [[x for x in candidates if x.seed == seed] for seed in seeds]


def one_method(candidates: Sequence[Candidate]) -> dict[str, list[Candidate]]:
    """{method: its runs} of the methods that all tasks have; of a grid, the first setting."""
    tasks = []
    for of_task in by_task(candidates).values():
        first = {x.family: x.method for x in reversed(of_task) if not x.reference}
        tasks.append({name: [x for x in of_task if x.method == first[name]] for name in first})
    common = [name for name in tasks[0] if all(name in methods for methods in tasks)]
    return {name: [x for methods in tasks for x in methods[name]] for name in common}


def rules_table(candidates: Sequence[Candidate]) -> str:
    """One row per rule, with and without vetoes, and rows that choose nothing."""
    head = ("rule", "vetoes", "mean regret", "worst regret", "mean gain", "worst gain")
    head = (*head, "below no adaptation", "rank correlation")
    tasks, rows = by_task(candidates).values(), []
    rules = [rule for rule in RULES if rule != "between_seeds" or default_of(candidates) == rule]
    for rule in rules:
        for veto in (True, False):
            worths = [
                worth(of_task, choose(of_seed, rule, veto))
                for of_task in tasks
                for of_seed in seeds_of(of_task)
            ]
            ranks = [] if rule in COMPOSED else correlations(candidates, rule, veto)
            correlation = f"{statistics.fmean(ranks):.2f}" if ranks else "-"
            rows.append((rule, "yes" if veto else "no", *_figures(worths), correlation))
    plain = [worth(of_task, x) for of_task in tasks for x in of_task if x.reference]
    rows.append(("no adaptation", "-", *_figures(plain), "-"))
    fixed = {f"always {name}": runs for name, runs in one_method(candidates).items()}
    fixed["any adapted run"] = [x for x in candidates if not x.reference]
    for name, runs in fixed.items():
        worths = [worth(by_task(candidates)[x.task], x) for x in runs]
        last = [replace(x, selected=x.last, gains=[x.last - x.reference]) for x in worths]
        rows.append((f"{name}, last step", "-", *_figures(last), "-"))
    return markdown(head, rows)


def _figures(worths: Sequence[Worth]) -> tuple[str, ...]:
    regrets, gains = zip(*((x.regret, statistics.fmean(x.gains)) for x in worths), strict=True)
    below = sum(gain < 0 for gain in gains)
    return (
        f"{statistics.fmean(regrets):.1f}",
        f"{max(regrets):.1f}",
        f"{statistics.fmean(gains):+.1f}",
        f"{min(gains):+.1f}",
        f"{below} of {len(gains)}",
    )


def check_complete(candidates: Sequence[Candidate], file: Path) -> None:
    """Raise `UserError` unless each method of a task has a figure on each of its seeds."""
    if not candidates:
        raise UserError(f"{file}: there is no run to measure")
    for task, of_task in by_task(candidates).items():
        seeds = {x.seed for x in of_task}
        for method in dict.fromkeys(x.method for x in of_task):
            known = {x.seed for x in of_task if x.method == method and x.selected is not None}
            if missing := sorted(seeds - known):
                raise UserError(
                    f"{file}: {task}, {method} has no figure on the target with seed {missing[0]}"
                )


def tables(candidates: Sequence[Candidate]) -> str:
    """The number of runs, what each rule is worth, and what the default rule chooses."""
    families = {x.family for x in candidates}
    count = (
        f"{len(candidates)} runs of {len(families)} methods on {len(by_task(candidates))} tasks, "
        f"{sum(x.hours for x in candidates):.1f} hours."
    )
    chosen = [
        worth(of_task, choose(of_seed))
        for of_task in by_task(candidates).values()
        for of_seed in seeds_of(of_task)
    ]
    parts = [count, rules_table(candidates), worth_table(chosen), worth_summary(chosen)]
    return "\n\n".join(parts)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, metavar="FILE", help="csv file of reproduce.py --csv")
    without_help = "leave these tasks out"
    parser.add_argument("--without", nargs="+", default=[], metavar="TASK", help=without_help)
    out_help = "write the tables into this file, between its markers"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out_help)
    args = parser.parse_args(argv)
    candidates = from_csv(args.file)
    tasks = by_task(candidates)
    if unknown := [task for task in args.without if task not in tasks]:
        raise UserError(f"--without: no task {unknown[0]!r}; there are {', '.join(tasks)}")
    remaining = [x for x in candidates if x.task not in args.without]
    check_complete(remaining, args.file)
    without = f" --without {shlex.join(args.without)}" if args.without else ""
    command = f"`python benchmarks/selection.py {args.file}{without}`:"
    text = f"{command} {tables(remaining)}"
    if args.out:
        write_text(args.out, place(args.out, "selection", text))
    print(text)
    return 0


if __name__ == "__main__":
    exit_with(main)
