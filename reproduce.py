"""Run a suite under several seeds and write a table of the results beside the published figures.

    python reproduce.py configs/suites/demo.yaml --seeds 0 1 2
    python reproduce.py configs/suites/digits.yaml --seeds 0 1 2 --jobs 2 --out docs/results.md
    python reproduce.py configs/suites/digits.yaml --seeds 0 1 2 --list > commands.txt
    python reproduce.py configs/suites/visda.yaml --seeds 0 1 2 --nproc 4
    python reproduce.py configs/suites/digits.yaml --seeds 0 1 2 --choose

Each entry of the suite runs once per seed, by the plain command that --list prints, in the folder
<out_dir>_seed<K>. What the run prints goes to <out_dir>_seed<K>.log. Finished runs are skipped and
interrupted ones are resumed: after a stop, the same command goes on.

Exit codes: 0 done; 1 a run failed; 2 mistake in the suite or in the arguments; 5 disk;
129, 130 and 143 stopped by a signal, after the runs have saved.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from analysis.candidates import candidates_of, check_can_choose, choice_report, unfinished
from analysis.choice import to_csv
from analysis.suite_table import commits, place, report
from analysis.suites import Entry, Suite, check_is_suite, script_config
from common.config import changed_keys, dump_value, load_config
from common.errors import UserError, exit_with
from common.files import recorded_sha256
from common.writing import write_text
from training.folder import finished_summary
from training.free_keys import FREE_AT_RESUME

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
        """summary.json of a run that counts as finished, see `result`."""
        return self.result()[0]

    def result(self) -> tuple[dict | None, str]:
        """summary.json of a finished run and "", or None and why the run does not count.

        It does not if its config has changed since or while it was trained (--allow-change), if it
        has lost its model.pt, or if the run that it starts from does not count, or has been trained
        again since.
        """
        if self.start and not self.start.summary():
            return None, f"{self.start.folder}, which it starts from, is not finished"
        summary = finished_summary(self.folder)
        if summary is None:
            return None, self._state()
        again = "remove its folder to train it again"
        try:
            config_class = script_config(self.entry.script)
            trained = load_config(config_class, str(self.folder / "config.yaml"))
            wanted = load_config(config_class, self.entry.files, self.overrides)
        except UserError as error:
            return None, str(error)
        if changed_keys(trained, wanted, FREE_AT_RESUME) or summary.get("changed"):
            return None, f"it was trained by another config; {again}"
        if self.start:
            model = recorded_sha256(self.start.folder / "model.pt")
            if summary.get("start_sha256") != model:
                return None, f"{self.start.folder} has been trained again since; {again}"
        return summary, ""

    def _state(self) -> str:
        """What status.json says of a run that is not finished."""
        try:
            status = json.loads((self.folder / "status.json").read_text())
            if status["state"] == "finished":
                return "summary.json or model.pt is gone or damaged"
            return status.get("reason", status["state"])
        except (OSError, ValueError, KeyError, TypeError):
            return "not started"


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
        reason = last_line if code else job.result()[1]
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
    choose_help = "choose among the runs of each task without target labels (docs/selection.md)"
    parser.add_argument("--choose", action="store_true", help=choose_help)
    csv_help = "with --choose: write the candidates and their scores into this file"
    parser.add_argument("--csv", type=Path, metavar="FILE", help=csv_help)
    args = parser.parse_args(argv)
    for name, number in (("--jobs", args.jobs), ("--nproc", args.nproc)):
        if number < 1:
            raise UserError(f"{name} must be positive, not {number}")
    if min(args.seeds) < 0 or len(set(args.seeds)) < len(args.seeds):
        raise UserError("--seeds must be distinct and not negative")
    if args.csv and not args.choose:
        raise UserError("--csv goes with --choose")
    return args


def choice(suite: Suite, results: list[dict[int, dict]], args: argparse.Namespace) -> str:
    """The report of --choose; it writes --csv, too.

    Raises:
        UserError: see `candidates_of`.
    """
    entries = {(entry.task, entry.method): entry for entry in suite.runs}

    def folder_of(entry: Entry, seed: int) -> Path:
        return Job(entry, seed).folder

    lines = unfinished(suite, results, args.seeds, lambda entry, seed: Job(entry, seed).result()[1])
    candidates = candidates_of(suite, results, folder_of)
    if args.csv:
        write_text(args.csv, to_csv(candidates))
    chosen = choice_report(suite, candidates, lambda *row, seed: folder_of(entries[row], seed))
    return "\n\n".join([*lines, chosen])


def main(argv: list[str] | None = None) -> int:
    argv = sys.argv[1:] if argv is None else argv
    args = parse_args(argv)
    check_is_suite(args.suite)
    suite, name = load_config(Suite, args.suite), Path(args.suite).stem
    if args.choose:
        check_can_choose(suite)
    if args.out:
        place(args.out, name, "")  # a file that cannot take the table is an error before any run

    # Seed by seed: after each seed there is a whole table.
    jobs = [Job(entry, seed, args.nproc) for seed in args.seeds for entry in suite.runs]
    if args.list:
        print("\n".join(shlex.join(job.command()) for job in jobs))
        return 0
    finished = [job.folder for job in jobs if job.summary()]
    for folder in finished:
        print(f"{folder}: finished already")
    failed, stopped = run_all([job for job in jobs if job.folder not in finished], args.jobs)
    if stopped:
        number = signal.Signals(stopped).name
        print(f"stopped by {number}, no table written; the same command goes on from here")
        return 128 + stopped

    results = [
        {seed: summary for seed in args.seeds if (summary := Job(entry, seed).summary())}
        for entry in suite.runs
    ]
    block = report(suite, results, args.seeds, argv)
    summaries = [summary for of_entry in results for summary in of_entry.values()]
    print(f"\n{block}")
    if args.out:  # before the choice, which may fail
        write_text(args.out, place(args.out, name, block))
    if args.choose:
        chosen = choice(suite, results, args)
        print(f"\n{chosen}")
        if args.out:
            write_text(args.out, place(args.out, name, f"{block}\n\n{chosen}"))
    names = commits(summaries)
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
