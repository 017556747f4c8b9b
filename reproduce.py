"""Run a suite under several seeds and write a table of the results beside the published figures.

    python reproduce.py configs/suites/demo.yaml --seeds 0 1 2
    python reproduce.py configs/suites/digits.yaml --seeds 0 1 2 --jobs 2 --out docs/results.md
    python reproduce.py configs/suites/digits.yaml --seeds 0 1 2 --list > commands.txt
    python reproduce.py configs/suites/visda.yaml --seeds 0 1 2 --nproc 4

Each entry of the suite runs once per seed, by the plain command that --list prints, in the folder
<out_dir>_seed<K>. What the run prints goes to <out_dir>_seed<K>.log. Finished runs are skipped and
interrupted ones are resumed: after a stop, the same command goes on.

Exit codes: 0 done; 1 a run failed; 2 mistake in the suite or in the arguments; 5 disk;
129, 130 and 143 stopped by a signal, after the runs have saved.
"""

import argparse
import functools
import os
import re
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import (
    Hints,
    all_keys,
    build,
    changed_keys,
    dump_value,
    load_config,
    read_config,
)
from common.errors import UserError, exit_with, require
from common.metrics import main_metric
from common.writing import write_text
from training.config import RunConfig, head_command, load_run_config, scripts_with
from training.folder import finished_summary
from training.free_keys import FREE_AT_RESUME

ORACLE = "oracle (chosen on target test labels: no result)"
COLUMNS = ("task", "method", "seeds", "last", "selected", ORACLE)
LAST_COLUMNS = ("seconds", "published")
UNKNOWN_COMMIT = "an unknown commit"


# --- the suite


@functools.cache
def script_config(script: str) -> type:
    """The class `Config` of a training script.

    Raises:
        UserError: the script cannot be imported, or has no such class.
    """
    folder = str(Path(script).resolve().parent)
    sys.path.insert(0, folder)  # as `python script` has it
    try:
        config = runpy.run_path(script)["Config"]
        if "out_dir" not in getattr(config, "__dataclass_fields__", ()):
            raise TypeError("it is not a RunConfig")
        return config
    except Exception as error:
        raise UserError(
            f"{script}: its Config cannot be read ({type(error).__name__}: {error})"
        ) from None
    finally:
        sys.path.remove(folder)


@dataclass
class Entry:
    """One row of the table. Paths are relative to the working directory."""

    task: str  # first column, such as MNIST -> USPS
    method: str  # second column, such as DANN
    script: str
    config: str | list[str]  # one yaml file, or several of which later ones win
    set: dict = field(default_factory=dict)  # {dotted key: value}, applied after the files
    init_from: str | None = None  # start from the run of this earlier entry's out_dir, same seed
    published: float | None = None  # the figure to compare with, in percent
    reference: str | None = None  # where it was published
    expected: float | None = None  # mean of column `last` when it was recorded; a test reads it
    baselines: list[str] | None = None  # rows of this task to compare with; null: the suite's

    def __post_init__(self):
        self.files = [self.config] if isinstance(self.config, str) else self.config
        missing = [file for file in self.files if not Path(file).is_file()]
        no_keys = [key for key in self.set if not re.fullmatch(r"\w+(\.\w+)*", key)]
        complete = (self.published is None) == (self.reference is None)
        require(
            (Path(self.script).is_file(), f"script: there is no file {self.script}"),
            (len(self.files) > 0, "config: the list of files is empty"),
            *((False, f"config: there is no file {file}") for file in missing),
            *((False, f"set: {key!r} is not a dotted key") for key in no_keys),
            ("seed" not in self.set, "set: the seed comes from --seeds"),
            (complete, "published and reference go together"),
        )
        self.start: Entry | None = None  # the entry of init_from; set by `Suite`
        self.out_dir = self._read_out_dir()
        # The seeds have folders of their own, so out_dir is no override here.
        self.overrides = [text for text in self._settings() if not text.startswith("out_dir=")]

    def _settings(self) -> list[str]:
        return [f"{key}={dump_value(value)}" for key, value in self.set.items()]

    def _read_out_dir(self) -> str:
        """The run folder of `set`, else of the files, else the default one.

        Raises:
            ValueError: the config has mistakes, which are errors now and not after hours.
        """
        start = [f"init_from={dump_value(self.init_from)}"] if self.init_from else []
        try:
            config_class = script_config(self.script)
        except UserError as error:
            raise ValueError(f"script: {error}") from None
        try:
            config = load_run_config(config_class, self.files, [*self._settings(), *start])
        except UserError as error:
            lines = [line.strip() for line in str(error).splitlines()]
            raise ValueError("\n".join(f"config: {line}" for line in lines)) from None
        return os.path.normpath(config.out_dir)


@dataclass
class Suite:
    """The content of a file in configs/suites/."""

    title: str
    runs: list  # of `Entry`
    note: str | None = None  # printed below the table
    # What the figures are of; null: the mean IoU of a segmentation, the accuracy of others.
    metric: Literal["accuracy", "mean_class_accuracy", "mean_iou"] | None = None
    # Methods whose rows the other rows of their task are compared with, seed by seed.
    baselines: list[str] = field(default_factory=list)

    def __post_init__(self):
        mistakes: list[str] = []
        entries = [
            build(Entry, tree, Hints(all_keys(Entry, f"runs[{i}].")), mistakes, f"runs[{i}].")
            for i, tree in enumerate(self.runs)
        ]
        require((len(entries) > 0, "runs is empty"), *((False, mistake) for mistake in mistakes))
        rules = []
        for i, entry in enumerate(entries):
            earlier = {other.out_dir: other for other in entries[:i]}
            if entry.init_from:
                entry.start = earlier.get(os.path.normpath(entry.init_from))
                rule = f"runs[{i}].init_from: {entry.init_from} is the out_dir of no earlier entry"
                rules.append((entry.start is not None, rule))
            new_folder = entry.out_dir not in earlier
            rules.append((new_folder, f"runs[{i}] has the out_dir {entry.out_dir} of another"))
            name = (entry.task, entry.method)
            new_row = name not in [(other.task, other.method) for other in entries[:i]]
            rules.append((new_row, f"runs[{i}] has the row {' / '.join(name)} of another"))
        methods = {entry.method for entry in entries}
        for name in self.baselines:
            rules.append((name in methods, f"baselines: {name} is the method of no entry"))
        for i, entry in enumerate(entries):
            if entry.baselines is None:
                entry.baselines = self.baselines
            foreign = set(entry.baselines) - set(self.baselines)
            rule = f"runs[{i}].baselines: {distinct(foreign)} is not among the suite's baselines"
            rules.append((not foreign, rule))
        require(*rules)
        self.runs = entries


def check_is_suite(file: str) -> None:
    """Raise `UserError` for the config of a run, with the command that trains with it."""
    tree = read_config(file)
    known = tree.keys() & set(all_keys(RunConfig)) or any(map(scripts_with, tree))
    if {"title", "runs"} & tree.keys() or not known:
        return
    command = shlex.join(["python", *(head_command(Path(file)) or ["SCRIPT", "--config", file])])
    raise UserError(
        f"{file}: is the config of a run, not a suite (see configs/suites/); run it by: {command}"
    )


# --- the runs


@dataclass
class Job:
    """One entry under one seed, in `processes` processes."""

    entry: Entry
    seed: int
    processes: int = 1

    @property
    def folder(self) -> Path:
        return Path(f"{self.entry.out_dir}_seed{self.seed}")

    @property
    def start(self) -> "Job | None":
        """The job whose run this one starts from."""
        return Job(self.entry.start, self.seed, self.processes) if self.entry.start else None

    @property
    def overrides(self) -> list[str]:
        """What this job sets beside its config files, except the folder."""
        start = [f"init_from={dump_value(str(self.start.folder))}"] if self.start else []
        return [*self.entry.overrides, f"seed={self.seed}", *start]

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    def command(self) -> list[str]:
        options = [*self.overrides, f"out_dir={dump_value(str(self.folder))}", "--resume"]
        command = [sys.executable]
        if self.processes > 1:  # torchrun
            command += ["-m", "torch.distributed.run", "--standalone"]
            command += [f"--nproc-per-node={self.processes}"]
        return [*command, self.entry.script, "--config", *self.entry.files, *options]

    def summary(self) -> dict | None:
        """summary.json of a finished run.

        Returns None if the run is not finished or has lost its model.pt, if its config has changed
        since or while it was trained (--allow-change), or if any of these holds for the run that it
        starts from.
        """
        if self.start and not self.start.summary():
            return None
        summary = finished_summary(self.folder)
        if summary is None:
            return None
        try:
            config_class = script_config(self.entry.script)
            trained = load_config(config_class, str(self.folder / "config.yaml"))
            wanted = load_config(config_class, self.entry.files, self.overrides)
        except UserError:
            return None
        same = not changed_keys(trained, wanted, FREE_AT_RESUME) and not summary.get("changed")
        return summary if same else None


def start_process(job: Job, at_once: int) -> subprocess.Popen:
    """Start the command of a job, which appends its output to the job's log."""
    threads = max(1, (os.cpu_count() or 1) // (at_once * job.processes))
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    job.log.parent.mkdir(parents=True, exist_ok=True)
    with open(job.log, "a") as log:
        print("$", shlex.join(job.command()), file=log, flush=True)
        return subprocess.Popen(
            job.command(),
            env=environment,
            # A session of its own: Ctrl-C at the terminal reaches the run through us only, once.
            start_new_session=True,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )


def report_end(job: Job, code: int, seconds: float, stopping: bool) -> bool:
    """Print how a run ended. Returns whether it failed."""
    finished = code == 0 and job.summary() is not None
    end = "finished" if finished else "stopped" if stopping else "failed"
    line = f"{job.folder}: {end} after {seconds:.0f} s"
    if end == "failed":
        log = job.log.read_text(errors="replace")
        lines = log[log.rfind("\n$ ") + 1 :].strip().splitlines()  # of the last start
        errors = [line for line in lines if line.startswith("error: ")]  # before torchrun's report
        last_line = errors[-1] if job.processes > 1 and errors else lines[-1]
        reason = last_line if code else "no summary.json of this config without a change"
        line += f" with exit code {code}: {reason} (log: {job.log})"
    print(line, flush=True)
    return end == "failed"


def next_job(waiting: list[Job], running: Iterable[Job]) -> Job | None:
    """The first waiting job that does not start from a run still to come."""
    unfinished = {job.folder for job in (*waiting, *running)}
    ready = (job for job in waiting if not job.start or job.start.folder not in unfinished)
    return next(ready, None)


def run_all(jobs: list[Job], at_once: int) -> tuple[int, int | None]:
    """Run the jobs, `at_once` at a time.

    After a first signal no job is started, and the running ones save and leave. A second signal
    makes them leave at once.

    Returns:
        How many jobs failed, and the signal that stopped them or None.
    """
    waiting, running, failed = list(jobs), {}, 0
    signals: list[int] = []
    forwarded = 0
    handlers = {
        number: signal.signal(number, lambda received, frame: signals.append(received))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
        if number != signal.SIGHUP or signal.getsignal(number) != signal.SIG_IGN  # as nohup asks
    }
    try:
        while running or (waiting and not signals):
            while len(running) < at_once and not signals:
                job = next_job(waiting, [job for job, _ in running.values()])
                if job is None:
                    break
                waiting.remove(job)
                if job.start and not job.start.summary():
                    failed += 1
                    start = job.start.folder
                    print(f"{job.folder}: failed: {start}, which it starts from, is not finished")
                    continue
                count = f"{len(jobs) - len(waiting)} of {len(jobs)}"
                print(f"{job.folder}: started ({count})", flush=True)
                running[start_process(job, at_once)] = job, time.monotonic()
            for number in signals[forwarded:]:
                forwarded += 1
                for process in running:
                    process.send_signal(number)
            for process, (job, begin) in list(running.items()):
                code = process.poll()
                if code is not None:
                    del running[process]
                    failed += report_end(job, code, time.monotonic() - begin, bool(signals))
            time.sleep(0.1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for process in running:  # only after an error of our own
            process.terminate()
    return failed, signals[0] if signals else None


# --- the table


def figure(values: list[float | None]) -> str:
    """`mean +- sample standard deviation`; one value alone has no deviation.

    `-` if there is no value, or an unknown one among them.
    """
    if not values or None in values:
        return "-"
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def distinct(values: Iterable) -> str:
    return ", ".join(str(value) for value in sorted(set(values))) or "-"


def selection(pairs: list[tuple[str, dict]]) -> str:
    """Sentences on what picked the selected steps, and which methods it cannot judge.

    Args:
        pairs: (method, summary) of each run.
    """
    names = {summary["selection"]["criterion"] for _, summary in pairs}
    part = [method for method, summary in pairs if summary["selection"]["part_of_training_loss"]]
    sentences = []
    if criteria := names - {"neg_val_loss", "last"}:
        no_judge = f", which for {distinct(part)} is part of the training loss and no judge"
        by = f"by {distinct(criteria)}{no_judge if part else ''}"
        sentences.append(f"Selected without target labels {by}.")
    if "last" in names:
        last = [method for method, summary in pairs if summary["selection"]["criterion"] == "last"]
        sentences.append(f"The last step is selected for {distinct(last)}.")
    if lost := [method for method, summary in pairs if "last" in summary.get("collapsed", ())]:
        runs = f"{len(lost)} of {len(pairs)} runs"
        sentences.append(f"At the last step the predictions of {runs} collapsed: {distinct(lost)}.")
    if "neg_val_loss" in names:
        sentences.append(
            "Selected by neg_val_loss, on the labels of the very images that the figures are "
            "computed on: no test figures."
        )
    return " ".join(sentences)


def commits(summaries: list[dict]) -> list[str]:
    """The commits that the runs were trained by."""
    return sorted({summary.get("commit") or UNKNOWN_COMMIT for summary in summaries})


def commit_note(names: list[str]) -> str:
    """`commit abc1234`, `an unknown commit`, or `commits abc1234, def5678 (mixed)`."""
    if len(names) > 1:
        return f"commits {', '.join(names)} (mixed)"
    return UNKNOWN_COMMIT if names == [UNKNOWN_COMMIT] else f"commit {distinct(names)}"


class Table:
    """The finished runs of a suite, as the rows of a markdown table.

    Args:
        suite: whose entries are the rows.
        results: {seed: summary} of the finished runs, one dict per entry.
        seeds: all that were asked for.
    """

    def __init__(self, suite: Suite, results: list[dict[int, dict]], seeds: list[int]):
        self.suite, self.seeds = suite, seeds
        self.results = results
        self.by_name = {
            (entry.task, entry.method): summaries
            for entry, summaries in zip(suite.runs, results, strict=True)
        }

    def metric(self, summary: dict) -> str:
        """The name of the metric that the figures are of."""
        return self.suite.metric or main_metric(summary["target"]["last"])

    def value(self, summary: dict, name: str) -> float | None:
        """The figure of an evaluation: `last`, `selected` or `oracle`."""
        return summary["target"][name].get(self.metric(summary))

    def difference(self, entry: Entry, summaries: dict[int, dict], baseline: str) -> str:
        """Mean and deviation of `last` minus that of the baseline's run of the same seed.

        `-` for the baseline itself, for an entry that is not compared with it, and where a seed has
        no run of both.
        """
        others = self.by_name.get((entry.task, baseline), {})
        if baseline not in entry.baselines or entry.method == baseline or not others:
            return "-"
        if summaries.keys() != others.keys():
            return "-"
        pairs = [
            (self.value(summary, "last"), self.value(others[seed], "last"))
            for seed, summary in summaries.items()
        ]
        if any(None in pair for pair in pairs):
            return "-"
        text = figure([value - other for value, other in pairs])
        return text if text.startswith(("-", "0.0")) else f"+{text}"

    def row(self, entry: Entry, summaries: dict[int, dict]) -> tuple[str, ...]:
        """The cells of an entry, in the order of `columns`."""
        complete = len(summaries) == len(self.seeds)
        count = str(len(self.seeds)) if complete else f"{len(summaries)} of {len(self.seeds)}"
        figures = [
            figure([self.value(summary, name) for summary in summaries.values()])
            for name in ("last", "selected", "oracle")
        ]
        differences = [self.difference(entry, summaries, name) for name in self.suite.baselines]
        seconds = [summary["seconds"] for summary in summaries.values()]
        mean_seconds = f"{statistics.fmean(seconds):.0f}" if seconds else "-"
        published = "-" if entry.published is None else f"{entry.published} ({entry.reference})"
        cells = entry.task, entry.method, count, *figures, *differences
        return (*cells, mean_seconds, published)

    def caption(self, summaries: list[dict]) -> str:
        """What the figures are, and on which images they are measured."""
        labeled = [summary for summary in summaries if self.value(summary, "last") is not None]
        if summaries and not labeled:
            return "The target has no labels, so there are no figures."
        tests = distinct(summary["target_test"] for summary in labeled)
        unlabeled = " `-`: the target has no labels." if len(labeled) < len(summaries) else ""
        return (
            f"Target {distinct(map(self.metric, summaries))} in percent on {tests}: "
            f"mean +- sample standard deviation over the seeds.{unlabeled}"
        )

    def columns(self) -> tuple[str, ...]:
        differences = [f"minus {name}" for name in self.suite.baselines]
        return (*COLUMNS, *differences, *LAST_COLUMNS)

    def markdown(self) -> str:
        """The header and one line per entry."""
        rows = [self.row(*pair) for pair in zip(self.suite.runs, self.results, strict=True)]
        lines = [self.columns(), ("---",) * len(self.columns()), *rows]
        cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
        return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def report(suite: Suite, results: list[dict[int, dict]], seeds: list[int], argv: list[str]) -> str:
    """The results as a markdown table, with what it takes to get them again.

    Args:
        suite, results, seeds: see `Table`.
        argv: the command line, for the last paragraph.
    """
    table = Table(suite, results, seeds)
    pairs = [
        (entry.method, summary)
        for entry, summaries in zip(suite.runs, results, strict=True)
        for summary in summaries.values()
    ]
    summaries = [summary for _, summary in pairs]
    machines = distinct(summary.get("machine", "an unknown machine") for summary in summaries)
    paired = (
        "The columns `minus` compare the last step with that of the named row, seed by seed. "
        if suite.baselines
        else ""
    )
    parts = [
        f"**{suite.title}**",
        table.markdown(),
        f"{table.caption(summaries)} {paired}{selection(pairs)} Seconds are the mean over the runs."
        if summaries
        else "No run has finished.",
        *([suite.note.strip()] if suite.note else []),
        f"Written by `{shlex.join(['python', 'reproduce.py', *argv])}`: "
        f"seeds {' '.join(map(str, seeds))}; "
        f"steps {distinct(summary['steps'] for summary in summaries)}; "
        f"{commit_note(commits(summaries))}; on {machines}.",
    ]
    return "\n\n".join(parts)


def place(path: Path, name: str, block: str) -> str:
    """The text of `path` with `block` between the markers of `name`.

    If the file has no such markers, they are appended with the block.

    Raises:
        UserError: the file cannot be read, or its markers are not one pair.
    """
    try:
        text = path.read_bytes().decode() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not utf-8 text"
        raise UserError(f"--out: {path} cannot be read ({reason})") from None
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    marked = f"{begin}\n{block}\n{end}"
    if begin not in text and end not in text:
        return f"{text}\n{marked}\n" if text else f"{marked}\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"--out: {path} must contain {begin} and {end} once each, in this order")
    return text[: text.index(begin)] + marked + text[text.index(end) + len(end) :]


# --- the command line


def parse_args(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("suite", metavar="SUITE", help="yaml file; see configs/suites/")
    seeds_help = "default: 0 1 2"
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="K", help=seeds_help
    )
    jobs_help = "number of runs at once, which share the cores; default: 1"
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help=jobs_help)
    nproc_help = "processes per run, by torchrun; on GPUs with --jobs 1 only; default: 1"
    parser.add_argument("--nproc", type=int, default=1, metavar="N", help=nproc_help)
    out_help = "write the table into this file, between the suite's markers"
    parser.add_argument("--out", type=Path, metavar="FILE", help=out_help)
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(argv)
    for name, number in (("--jobs", args.jobs), ("--nproc", args.nproc)):
        if number < 1:
            raise UserError(f"{name} must be positive, not {number}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds must be distinct and not negative")
    return args


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    check_is_suite(args.suite)
    suite, name = load_config(Suite, args.suite), Path(args.suite).stem
    if args.out:
        place(args.out, name, "")  # a file that cannot take the table is an error before any run

    # Seed by seed: after each seed there is a whole table.
    jobs = [Job(entry, seed, args.nproc) for seed in args.seeds for entry in suite.runs]
    if args.list:
        print("\n".join(shlex.join(job.command()) for job in jobs))
        return 0
    finished = [job for job in jobs if job.summary()]
    for job in finished:
        print(f"{job.folder}: finished already")
    failed, stopped = run_all([job for job in jobs if job not in finished], args.jobs)
    if stopped:
        number = signal.Signals(stopped).name
        print(f"stopped by {number}, no table written; the same command goes on from here")
        return 128 + stopped

    results = [
        {seed: summary for seed in args.seeds if (summary := Job(entry, seed).summary())}
        for entry in suite.runs
    ]
    block = report(suite, results, args.seeds, argv)
    print(f"\n{block}")
    if args.out:
        write_text(args.out, place(args.out, name, block))
    names = commits([summary for summaries in results for summary in summaries.values()])
    if len(names) > 1:
        print(
            f"warning: the table mixes runs of commits {', '.join(names)}; "
            "to compare like with like, remove the folders of the older runs and run this again"
        )
    elif names and "-dirty" in names[0]:
        print(f"warning: commit {names[0]}: the code had changes that are not committed")
    return 1 if failed else 0


if __name__ == "__main__":
    exit_with(main)
