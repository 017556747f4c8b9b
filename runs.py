"""A table of all runs below a folder: how they differ, their figures, and how far they are.

    python runs.py
    python runs.py runs/demo --sort selected
    python runs.py runs/demo --sort optim.lr --csv table.csv
    python runs.py runs/demo --plot curves.png
    python runs.py runs/demo --plot curves.png --metric cls_loss criteria.infomax

The column `config` has the keys of which two of the runs have different values, except those that
do not change what is learned, such as out_dir. A key that a run lacks, because its method or its
version has none of this name, is no difference. docs/run.md explains the columns.

Exit codes: 0 done; 2 mistake in the arguments, no run there, no matplotlib for --plot; 5 disk.
"""

import argparse
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.curves import MOST, Series, compare_curves, series_of
from analysis.figures import check_available
from analysis.run_files import RunFacts, find_runs, read_metrics, read_run
from analysis.run_table import Table, printable
from common.config import Hints, cut
from common.errors import UserError, exit_with
from common.writing import write_text


def read_words(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments by their names."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    folder_help = "where the runs are, at any depth; default: runs"
    parser.add_argument("folder", nargs="?", type=Path, default=Path("runs"), help=folder_help)
    sort_help = "a column, or a key of the config: figures from the largest, texts from A"
    parser.add_argument("--sort", metavar="COLUMN", default="run", help=sort_help)
    csv_help = "write the table with all keys of the configs"
    parser.add_argument("--csv", type=Path, metavar="FILE", help=csv_help)
    plot_help = "draw curves of the runs; needs matplotlib"
    parser.add_argument("--plot", type=Path, metavar="FILE.png", help=plot_help)
    metric_help = (
        "with --plot: names in metrics.jsonl, one panel each; "
        "default: the target's main metric, or without labels the criterion that selects"
    )
    parser.add_argument("--metric", nargs="+", metavar="NAME", help=metric_help)
    return parser.parse_args(argv)


def parse_args(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments. Raises `UserError` for what cannot be done."""
    args = read_words(argv)
    if args.metric and not args.plot:
        raise UserError("--metric goes with --plot")
    if args.plot and args.plot.suffix != ".png":
        raise UserError(f"--plot: {args.plot} must end with .png")
    for name, file in (("--csv", args.csv), ("--plot", args.plot)):
        if file and file.is_dir():
            raise UserError(f"{name}: {file} is a folder; name a file")
    if not args.folder.is_dir():
        raise UserError(f"{args.folder}: there is no such folder; name one that contains runs")
    return args


def default_metric(run: RunFacts, series: dict[str, Series]) -> str:
    """The main metric of the target, or without its labels the criterion that selects."""
    metric = f"target.{run.metric}"
    return metric if metric in series else f"criteria.{run.criterion}"


def plot(table: Table, names: list[str] | None, file: Path) -> None:
    """Write the curves of the metrics `names`, and print for how many runs.

    Raises:
        UserError: no run has such a metric, or too many have.
    """
    curves = [(run, series_of(read_metrics(run.folder))) for run in table.runs]
    known = sorted({name for _, series in curves for name in series})
    wanted = names or [default_metric(run, series) for run, series in curves]
    wanted = [name for name in dict.fromkeys(wanted) if names or name in known]
    for name in wanted:
        if name not in known:
            near = Hints(known).near(name) if known else None
            hint = f"did you mean {near}?" if near else f"there are: {cut(', '.join(known), 300)}"
            raise UserError(f"--metric: no run has {name}; {hint}")
    if not wanted:
        raise UserError("--plot: no run has been evaluated yet; name another --metric")
    drawn = [(run, series) for run, series in curves if any(name in series for name in wanted)]
    if len(drawn) > MOST:
        raise UserError(
            f"--plot: {len(drawn)} curves cannot be told apart, {MOST} can; "
            "name a folder with fewer runs"
        )
    names_of = {run.folder: table.names[run.folder] for run, _ in drawn}
    names_of |= {f: f.resolve().name for f, name in names_of.items() if name == "."}
    pairs = [(printable(names_of[run.folder]), series) for run, series in drawn]
    compare_curves(pairs, wanted, file)
    print(f"{file}: {', '.join(wanted)} of {len(drawn)} of {len(curves)} runs")


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(argv)
    if args.plot:
        check_available()
    folders, faults = find_runs(args.folder)
    for fault in faults:
        print(f"warning: {fault}")
    if not folders:
        raise UserError(
            f"{args.folder}: contains no run, which is a folder with config.yaml and status.json; "
            "name another folder"
        )
    table = Table(args.folder, [read_run(folder) for folder in folders])
    table.sort(args.sort)
    print(table.text(shutil.get_terminal_size().columns if sys.stdout.isatty() else None))
    print(table.note())
    if args.csv:
        write_text(args.csv, table.csv())
        print(args.csv)
    if args.plot:
        plot(table, args.metric, args.plot)
    return 0


if __name__ == "__main__":
    exit_with(main)
