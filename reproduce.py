"""Run a suite over several seeds, then write a table of mean and spread beside the published numbers.

    python reproduce.py configs/suites/demo.yaml --seeds 0 1 2
    python reproduce.py configs/suites/digits.yaml --seeds 0 1 2 --jobs 2 --out docs/results.md
    python reproduce.py configs/suites/digits.yaml --seeds 0 1 2 --list > commands.txt

Each config runs once a seed, by the plain command that --list prints, in the folder <out_dir>_seed<K>; what it prints
goes to <out_dir>_seed<K>.log. Finished runs are skipped and broken ones resumed: the same command goes on after a stop.

Exit codes: 0 done; 1 a run failed; 2 suite or arguments; 5 disk; 130 / 143 stopped by signal after the runs have saved.
"""

import argparse
import functools
import json
import os
import runpy
import shlex
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from common.checkpoint import write_text
from common.config import all_keys, build, changed_keys, load_config, parse_yaml, require
from common.evaluation import main_metric
from common.runtime import UserError, exit_with

ORACLE = "oracle (chosen on target test labels: no result)"
COLUMNS = ("task", "method", "seeds", "last", "selected", ORACLE, "seconds", "published")


@dataclass
class Entry:
    """One line of the table. Paths are against the working directory."""

    task: str  # first column, such as MNIST -> USPS
    method: str  # second column, such as DANN
    script: str
    config: str
    init_from: str | None = None  # the out_dir of an earlier entry, whose run of the same seed this one starts from
    published: float | None = None  # the figure to compare with, in percent
    reference: str | None = None  # where it was published

    def __post_init__(self):
        require(
            (Path(self.script).is_file(), f"script: there is no file {self.script}"),
            (Path(self.config).is_file(), f"config: there is no file {self.config}"),
            ((self.published is None) == (self.reference is None), "published and reference go together"),
        )
        self.start = None  # the entry of init_from; set by `Suite`
        self.tree = parse_yaml(Path(self.config).read_text(encoding="utf-8"), self.config)
        named = isinstance(self.tree, dict) and isinstance(self.tree.get("out_dir"), str)
        require((named, f"config: {self.config} names no out_dir"))


@dataclass
class Suite:
    """What a file of configs/suites/ holds."""

    title: str
    runs: list  # of `Entry`
    note: str | None = None  # printed below the table

    def __post_init__(self):
        mistakes: list[str] = []
        entries = []
        for i, tree in enumerate(self.runs):
            entries.append(build(Entry, tree, all_keys(Entry, f"runs[{i}]."), mistakes, f"runs[{i}]."))
        require((len(entries) > 0, "runs is empty"), *((False, mistake) for mistake in mistakes))
        folders = [os.path.normpath(entry.tree["out_dir"]) for entry in entries]
        lines = [f"{entry.task} / {entry.method}" for entry in entries]
        for i, entry in enumerate(entries):
            if entry.init_from:
                known = os.path.normpath(entry.init_from) in folders[:i]
                require((known, f"runs[{i}].init_from: {entry.init_from} is the out_dir of no earlier entry"))
                entry.start = entries[folders.index(os.path.normpath(entry.init_from))]
        for name, values in (("out_dir", folders), ("line", lines)):
            require(*((v not in values[:i], f"runs[{i}] has the {name} {v} of another") for i, v in enumerate(values)))
        self.runs = entries


@functools.cache
def script_config(script: str) -> type:
    """The class `Config` of a training script. Raises `UserError` where the script cannot be imported."""
    folder = str(Path(script).resolve().parent)
    sys.path.insert(0, folder)  # as `python script` has it
    try:
        return runpy.run_path(script)["Config"]
    except Exception as error:
        raise UserError(f"{script}: its Config cannot be read ({type(error).__name__}: {error})") from None
    finally:
        sys.path.remove(folder)


@dataclass
class Job:
    """One entry under one seed."""

    entry: Entry
    seed: int

    @property
    def folder(self) -> Path:
        return Path(f"{self.entry.tree['out_dir']}_seed{self.seed}")

    @property
    def start(self) -> "Job | None":
        """The job whose run this one starts from."""
        return Job(self.entry.start, self.seed) if self.entry.start else None

    @property
    def settings(self) -> list[str]:
        """What this job overrides of its config, where it writes aside."""
        return [f"seed={self.seed}", *([f"init_from={self.start.folder}"] if self.start else [])]

    @property
    def log(self) -> Path:
        return self.folder.with_name(self.folder.name + ".log")

    def command(self) -> list[str]:
        settings = [*self.settings, f"out_dir={self.folder}", "--resume"]
        return [sys.executable, self.entry.script, "--config", self.entry.config, *settings]

    def summary(self) -> dict | None:
        """summary.json of a run that is finished, as is the one it starts from, each under its config as it stands now;
        else None."""
        if self.start and not self.start.summary():
            return None
        try:
            state = json.loads((self.folder / "status.json").read_text())["state"]
            summary = json.loads((self.folder / "summary.json").read_text())
            trained = load_config(script_config(self.entry.script), str(self.folder / "config.yaml"))
            wanted = load_config(script_config(self.entry.script), self.entry.config, self.settings)
        except (OSError, ValueError, KeyError, UserError):
            return None
        return summary if state == "finished" and not changed_keys(trained, wanted) else None


def run_all(jobs: list[Job], at_once: int) -> tuple[int, int | None]:
    """Run the jobs, `at_once` at a time. Returns how many failed, and the signal that stopped them or None.

    After a first signal no job is started and the running ones save and leave; a second one makes them leave at once.
    """
    threads = max(1, (os.cpu_count() or 1) // at_once)
    environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PYTHONUNBUFFERED": "1"}
    waiting, running, failed, signals, forwarded = list(jobs), {}, 0, [], 0
    handlers = {n: signal.signal(n, lambda n, frame: signals.append(n)) for n in (signal.SIGINT, signal.SIGTERM)}
    try:
        while running or (waiting and not signals):
            while len(running) < at_once and not signals:
                open_folders = {j.folder for j in waiting} | {j.folder for j, _ in running.values()}
                job = next((j for j in waiting if not j.start or j.start.folder not in open_folders), None)
                if job is None:
                    break
                waiting.remove(job)
                if job.start and not job.start.summary():
                    failed += 1
                    print(f"{job.folder}: failed: {job.start.folder}, which it starts from, is not finished")
                    continue
                print(f"{job.folder}: started ({len(jobs) - len(waiting)} of {len(jobs)})", flush=True)
                job.log.parent.mkdir(parents=True, exist_ok=True)
                with open(job.log, "a") as log:
                    print("$", shlex.join(job.command()), file=log, flush=True)
                    # a session of its own: Ctrl-C at the terminal reaches it through us only, hence once
                    streams = {"stdin": subprocess.DEVNULL, "stdout": log, "stderr": subprocess.STDOUT}
                    process = subprocess.Popen(job.command(), env=environment, start_new_session=True, **streams)
                running[process] = job, time.monotonic()
            for number in signals[forwarded:]:
                forwarded += 1
                for process in running:
                    process.send_signal(number)
            for process, (job, start) in list(running.items()):
                code = process.poll()
                if code is None:
                    continue
                del running[process]
                end = "finished" if code == 0 and job.summary() else "stopped" if signals else "failed"
                print(f"{job.folder}: {end} after {time.monotonic() - start:.0f} s", end="")
                if end == "failed":
                    failed += 1
                    last_line = job.log.read_text(errors="replace").strip().splitlines()[-1]
                    said = last_line if code else "no summary.json of this config"
                    print(f" with exit code {code}: {said} (log: {job.log})", end="")
                print(flush=True)
            time.sleep(0.1)
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for process in running:  # only after an error of our own
            process.terminate()
    return failed, signals[0] if signals else None


def figure(values: list[float | None]) -> str:
    """`mean +- sample standard deviation`; one value alone stands as it is, and none, or an unknown one, is `-`."""
    if not values or None in values:
        return "-"
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def metric(summary: dict) -> str:
    return main_metric(summary["target"]["last"])


def selection(found: list[tuple[str, dict]]) -> str:
    """What picked the selected steps of (method, summary) pairs, and for which methods it is no judge: sentences."""
    names = {summary["selection"]["criterion"] for _, summary in found}
    part = [method for method, summary in found if summary["selection"]["part_of_training_loss"]]
    sentences = []
    if names != {"val_loss"}:
        no_judge = f", which for {distinct(part)} is part of the training loss and no judge" if part else ""
        sentences.append(f"Selected without target labels by {distinct(names - {'val_loss'})}{no_judge}.")
    if "val_loss" in names:
        sentences.append("Selected by val_loss, on the labels of the very images the figures are of: no test figures.")
    return " ".join(sentences)


def distinct(values: Iterable) -> str:
    return ", ".join(str(value) for value in sorted(set(values))) or "-"


def table(suite: Suite, seeds: list[int], argv: list[str]) -> str:
    """The suite's results as markdown, and what it takes to get them again."""
    lines, pairs = [COLUMNS, ("---",) * len(COLUMNS)], []
    for entry in suite.runs:
        found = [summary for seed in seeds if (summary := Job(entry, seed).summary())]
        pairs += [(entry.method, summary) for summary in found]
        count = str(len(found)) if len(found) == len(seeds) else f"{len(found)} of {len(seeds)}"
        figures = [figure([s["target"][name][metric(s)] for s in found]) for name in ("last", "selected", "oracle")]
        seconds = f"{statistics.fmean(s['seconds'] for s in found):.0f}" if found else "-"
        published = "-" if entry.published is None else f"{entry.published} ({entry.reference})"
        lines.append((entry.task, entry.method, count, *figures, seconds, published))

    everything = [summary for _, summary in pairs]
    machines = distinct(s.get("machine", "an unknown machine") for s in everything)
    parts = [
        f"**{suite.title}**",
        "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines),
        f"Target {distinct(map(metric, everything))} in percent on {distinct(s['target_test'] for s in everything)}: "
        "mean +- sample standard deviation over the seeds. "
        f"{selection(pairs)} Seconds are a run's mean.",
        *([suite.note.strip()] if suite.note else []),
        f"Written by `{shlex.join(['python', 'reproduce.py', *argv])}`: seeds {' '.join(map(str, seeds))}; "
        f"steps {distinct(s['steps'] for s in everything)}; on {machines}.",
    ]
    return "\n\n".join(parts)


def place(path: Path, name: str, block: str) -> str:
    """The text of `path` with `block` between the markers of `name`; appended, markers and all, where it has none."""
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
        raise UserError(f"--out: {path} must hold {begin} and {end} once each, in this order")
    return text[: text.index(begin)] + marked + text[text.index(end) + len(end) :]


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("suite", metavar="SUITE", help="yaml file; see configs/suites/")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="K", help="default: 0 1 2")
    parser.add_argument("--jobs", type=int, default=1, metavar="N", help="runs at once, sharing the cores; default: 1")
    parser.add_argument("--out", type=Path, metavar="FILE", help="put the table here, between the suite's markers")
    parser.add_argument("--list", action="store_true", help="print the commands and run nothing")
    args = parser.parse_args(argv)
    if args.jobs < 1:
        raise UserError(f"--jobs must be positive, not {args.jobs}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds must be distinct and not negative")
    suite, name = load_config(Suite, args.suite), Path(args.suite).stem
    if args.out:
        place(args.out, name, "")  # a file that cannot take the table is an error now, not after hours

    jobs = [Job(entry, seed) for seed in args.seeds for entry in suite.runs]  # seed by seed: each leaves a whole table
    if args.list:
        print("\n".join(shlex.join(job.command()) for job in jobs))
        return 0
    for job in jobs:
        script_config(job.entry.script)  # a script that cannot be imported is an error now, not after hours
    finished = [job for job in jobs if job.summary()]
    for job in finished:
        print(f"{job.folder}: finished already")
    failed, stopped = run_all([job for job in jobs if job not in finished], args.jobs)
    if stopped:
        print(f"stopped by {signal.Signals(stopped).name}, no table written; the same command goes on from here")
        return 128 + stopped

    block = table(suite, args.seeds, argv)
    print(f"\n{block}")
    if args.out:
        write_text(args.out, place(args.out, name, block))
    return 1 if failed else 0


if __name__ == "__main__":
    exit_with(main)
