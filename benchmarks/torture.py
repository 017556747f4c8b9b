"""Stop training runs at random moments, damage their files, and check that nothing is lost.

    python benchmarks/torture.py
    python benchmarks/torture.py --signals 4 --flips 20 --seed 1

Three parts, each with a table of its outcome; docs/reliability.md keeps the last one:

signals   DANN and self-training, without loader workers and with two, are stopped by SIGKILL and by
          SIGTERM, sent to the whole process group after a random time, and resumed, `--signals`
          times in each of these eight cells. In the end weights, checkpoint and metrics must equal
          those of an uninterrupted run in every number. After a SIGTERM no step may be lost; after
          a SIGKILL at most those since the last checkpoint. No process may be left.
flips     Single bits of a checkpoint and of a model.pt are flipped; every one must be noticed.
hostile   Pickles that would create a file when they are executed are put in place of a checkpoint,
          of the model to start from, of ImageNet weights and of the cache of decoded images, and
          into a yaml file, with torch's own switch for unsafe loading on and off.

On the CPU, with the built-in digits; a few minutes on one core. Exit code 1 if anything is lost.
Every run is `main` of the script in a forked process with a process group of its own.
"""

import argparse
import atexit
import json
import os
import pickle
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_dann  # noqa: E402
import train_pseudo  # noqa: E402
import train_source  # noqa: E402
from common.errors import UserError, exit_with  # noqa: E402
from common.files import load_tensors  # noqa: E402
from data import drawn  # noqa: E402

SCRIPTS = {"dann": train_dann, "pseudo": train_pseudo}
SAVE_EVERY = 15
TINY = [
    *("steps=60", "eval_every=20", f"save_every={SAVE_EVERY}", "log_every=1", "device=cpu"),
    *("data.batch=16", "data.eval_batch=50", "data.select_images=100"),
]
# What may differ between an interrupted and an uninterrupted run: times, and the code's version.
FREE = {"seconds", "commit", "commits", "date", "command", "machine"}


def digits_config(method: str, *overrides: str) -> list[str]:
    files = [str(ROOT / "configs/demo" / name) for name in ("digits.yaml", f"{method}.yaml")]
    return ["--config", *files, *TINY, *overrides]


def fork(main: Callable, argv: list[str], log: Path) -> int:
    """Start `main(argv)` in a process with a group of its own. Returns its pid.

    Its output is appended to `log`.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setsid()
        file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
        os.dup2(file, 1)
        os.dup2(file, 2)
        exit_with(partial(main, argv))
    except SystemExit as end:
        code = end.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()  # ends the loader's workers, as at the end of a real process
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def wait(pid: int, seconds: float = 120.0) -> int | None:
    """The exit code of a process, minus the signal's number if one ended it; None if it hangs."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        time.sleep(0.01)
    os.killpg(pid, signal.SIGKILL)
    os.waitpid(pid, 0)
    return None


def group_is_gone(pid: int, seconds: float = 10.0) -> bool:
    """Whether no process of the group is left, within a time."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            os.killpg(pid, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.05)
    os.killpg(pid, signal.SIGKILL)
    return False


def steps_logged(folder: Path) -> int:
    """The last step in metrics.jsonl; a line that was cut off does not count."""
    try:
        lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
        return max((json.loads(x)["step"] for x in lines if x.endswith("\n")), default=0)
    except FileNotFoundError:
        return 0


def steps_saved(folder: Path) -> int:
    """The step of the newest checkpoint; 0 without one.

    It may still be without its hash: a checkpoint gets its name when it is complete.
    """
    files = (folder / "checkpoints").glob("step_*.pt")
    return max((int(file.stem[5:]) for file in files), default=0)


def result(folder: Path) -> dict:
    """All that a finished run leaves behind, except what may differ."""
    newest = max((folder / "checkpoints").glob("step_*.pt"))
    return {
        "model": load_tensors(folder / "model.pt"),
        "checkpoint": load_tensors(newest),
        "metrics": [json.loads(x) for x in (folder / "metrics.jsonl").read_text().splitlines()],
        "summary": json.loads((folder / "summary.json").read_text()),
    }


def differing(a, b) -> int:
    """How many numbers and texts of two results differ; 10**9 for another structure."""
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) and a.shape == b.shape:
        return int((a != b).sum())
    if isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
        return sum(differing(a[key], b[key]) for key in a if key not in FREE)
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        return sum(map(differing, a, b))
    return int(a != b) if type(a) is type(b) and not isinstance(a, (dict, list)) else 10**9


class Cell:
    """One script with a number of workers, stopped again and again by one signal.

    Args:
        method: key of SCRIPTS.
        workers: loader workers per domain.
        number: the signal.
        folder: an empty folder.
    """

    def __init__(self, method: str, workers: int, number: signal.Signals, folder: Path):
        self.name = f"{method}, {workers} workers, {number.name}"
        self.main, self.number = SCRIPTS[method].main, number
        self.folder, self.log = folder, folder / "log.txt"
        folder.mkdir()
        self.argv = digits_config(method, f"data.workers={workers}", f"data.cache={folder}/cache")
        self.sent = self.finished = self.most_lost = self.saves_lost = self.left = self.wrong = 0
        self.slowest = 0.0
        self.problems: list[str] = []

    def start(self, run: Path) -> int:
        return fork(self.main, [*self.argv, f"out_dir={run}", "--resume"], self.log)

    def reference(self) -> None:
        """Train without interruption."""
        begin = time.monotonic()
        code = wait(self.start(self.folder / "reference"))
        if code != 0:
            raise UserError(f"{self.name}: the uninterrupted run failed; see {self.log}")
        self.duration = time.monotonic() - begin
        self.expected = result(self.folder / "reference")

    def check(self, run: Path) -> None:
        """Compare a finished run with the uninterrupted one, and remove it."""
        count = differing(self.expected, result(run))
        self.finished += 1
        self.wrong += count
        if count:
            self.problems.append(f"{run.name}: {count} numbers differ")
        shutil.rmtree(run)

    def interrupt(self, run: Path, delay: float) -> None:
        """Start or resume a run and send it the signal after `delay` seconds."""
        before = steps_saved(run)
        pid = self.start(run)
        time.sleep(delay)
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:  # it ended before the signal
            code = os.waitstatus_to_exitcode(status)
            if code:
                self.problems.append(f"ended by itself with exit code {code}")
            else:
                self.check(run)
            return
        begin = time.monotonic()
        os.killpg(pid, self.number)
        self.sent += 1
        code = wait(pid)
        self.slowest = max(self.slowest, time.monotonic() - begin)
        self.left += not group_is_gone(pid)
        if code == 0:  # the signal came while it ended
            self.check(run)
            return
        lost = max(steps_logged(run), before) - steps_saved(run)
        self.most_lost = max(self.most_lost, lost)
        if self.number == signal.SIGKILL:
            bad = lost > SAVE_EVERY or code != -self.number
        else:
            # Before the run has begun there is nothing to save, and the signal ends it at once.
            bad = lost > 0 or code not in (128 + self.number, -self.number)
        if bad:
            self.saves_lost += 1
            self.problems.append(f"exit code {code}, {lost} steps lost")

    def run(self, signals: int, chance: random.Random) -> None:
        """Send `signals` signals; then let the last run finish."""
        self.reference()
        run = self.folder / "run"
        while self.sent < signals:
            self.interrupt(run, chance.uniform(0.05, self.duration))
        if run.exists():
            code = wait(self.start(run))
            if code == 0:
                self.check(run)
            else:
                self.problems.append(f"the last resume ended with exit code {code}")

    def row(self) -> str:
        cells = self.sent, self.finished, self.wrong, self.most_lost, self.saves_lost, self.left
        return f"| {self.name} | {' | '.join(map(str, cells))} | {self.slowest:.1f} |"


def signals_part(count: int, chance: random.Random, folder: Path) -> bool:
    """The part `signals`. Returns whether all is well."""
    names = "run, signal", "sent", "runs finished", "numbers that differ", "most steps lost"
    columns = *names, "beyond what may be lost", "processes left", "slowest end, s"
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    problems = []
    for number in (signal.SIGKILL, signal.SIGTERM):
        for method in SCRIPTS:
            for workers in (0, 2):
                cell = Cell(method, workers, number, folder / f"{method}_{workers}_{number.name}")
                cell.run(count, chance)
                print(cell.row(), flush=True)
                problems += [f"{cell.name}: {problem}" for problem in cell.problems]
                problems += [f"{cell.name}: processes left"] * (cell.left > 0)
    print("\n".join(problems))
    return not problems


def flips_part(count: int, chance: random.Random, folder: Path) -> bool:
    """The part `flips`. Returns whether every flip was noticed."""
    run, log = folder / "flips", folder / "flips.txt"
    argv = [*digits_config("dann"), f"out_dir={run}", f"data.cache={folder}/cache"]
    if wait(fork(train_dann.main, argv, log)) != 0:
        raise UserError(f"the run to damage failed; see {log}")
    good = True
    for file in (max((run / "checkpoints").glob("step_*.pt")), run / "model.pt"):
        content = bytearray(file.read_bytes())
        noticed = 0
        for _ in range(count):
            place, bit = chance.randrange(len(content)), 1 << chance.randrange(8)
            content[place] ^= bit
            file.write_bytes(content)
            content[place] ^= bit
            try:
                load_tensors(file)
            except UserError:
                noticed += 1
        file.write_bytes(content)
        load_tensors(file)  # control: the file itself is good
        print(f"{file.name}: {noticed} of {count} flipped bits noticed", flush=True)
        good &= noticed == count
    return good


class Hostile:
    """An object whose pickle creates a file when it is loaded."""

    def __init__(self, proof: Path):
        self.proof = proof

    def __reduce__(self):
        return os.mkdir, (str(self.proof),)


def hostile_files(folder: Path, proof: Path) -> dict[str, tuple]:
    """{what is hostile: (main, argv)} of runs that read a file which creates `proof`."""
    plain, legacy, zipped = (folder / name for name in ("plain.pt", "legacy.pt", "zip.pt"))
    plain.write_bytes(pickle.dumps(Hostile(proof)))
    torch.save({"model": Hostile(proof)}, zipped)
    torch.save({"model": Hostile(proof)}, legacy, _use_new_zipfile_serialization=False)
    tag = folder / "tag.yaml"
    tag.write_text(f"steps: !!python/object/apply:os.mkdir ['{proof}']\n")
    source = ["--config", str(ROOT / "configs/demo/digits.yaml"), *TINY]
    runs = {"yaml": (train_source.main, [*source[:2], str(tag), *TINY, f"out_dir={folder}/tag"])}
    for file in (plain, legacy, zipped):
        run = folder / f"run_{file.stem}"
        options = [*source, f"out_dir={run}", f"data.cache={folder}/cache"]
        if wait(fork(train_source.main, options, folder / "log.txt")) != 0:
            raise UserError(f"the run to attack failed; see {folder / 'log.txt'}")
        for checkpoint in (run / "checkpoints").glob("step_*.pt"):
            shutil.copy(file, checkpoint)
            Path(f"{checkpoint}.sha256").unlink()
        status = json.loads((run / "status.json").read_text())
        (run / "status.json").write_text(json.dumps({**status, "state": "stopped"}))
        (run / "summary.json").unlink()
        runs[f"checkpoint, {file.stem}"] = train_source.main, [*options, "--resume"]
        other = [*source, f"out_dir={folder}/other", f"data.cache={folder}/cache"]
        runs[f"init_from, {file.stem}"] = train_source.main, [*other, f"init_from={file}"]
        weights = ["model.backbone=resnet18", f"model.weights={file}", "model.bn=concat"]
        runs[f"model.weights, {file.stem}"] = train_source.main, [*other, *weights]
    runs["cache"] = train_source.main, hostile_cache(folder, proof)
    return runs


def hostile_cache(folder: Path, proof: Path) -> list[str]:
    """The command of a run on image files, whose cache holds pickled objects."""
    for label in ("a", "b"):
        (folder / "images" / label).mkdir(parents=True)
        for i in range(8):
            pixels = np.full((32, 32, 3), 20 * i, np.uint8)
            Image.fromarray(pixels).save(folder / "images" / label / f"{i}.png")
    domain = f"{{name: folder, path: {folder}/images}}"
    argv = ["--config", str(ROOT / "configs/demo/digits.yaml"), *TINY, "data.workers=1"]
    argv += [f"data.source={domain}", f"data.target={domain}", f"data.root={folder}/images"]
    argv = [x.replace(f"{folder}/images}}", ".}") for x in argv]
    argv += [f"data.cache={folder}/image_cache", f"out_dir={folder}/from_cache"]
    if wait(fork(train_source.main, argv, folder / "log.txt")) != 0:
        raise UserError(f"the run to attack failed; see {folder / 'log.txt'}")
    stored = list((folder / "image_cache").iterdir())
    if not stored:
        raise UserError(f"the run to attack has no cache; see {folder / 'log.txt'}")
    for file in stored:
        file.write_bytes(pickle.dumps(Hostile(proof)).ljust(file.stat().st_size, b"\0"))
    return [*argv[:-1], f"out_dir={folder}/from_hostile_cache"]


def hostile_part(folder: Path) -> bool:
    """The part `hostile`. Returns whether no hostile file was executed."""
    attempts = executed = strange = 0
    for unsafe in (False, True):
        place = folder / f"hostile_{unsafe}"
        place.mkdir()
        proof = place / "executed"
        pickle.loads(pickle.dumps(Hostile(proof)))  # control: the pickle does what it says
        proof.rmdir()
        runs = hostile_files(place, proof)
        os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"] = str(int(unsafe))
        for name, (main, argv) in runs.items():
            code = wait(fork(main, argv, place / "log.txt"))
            attempts += 1
            if proof.exists():
                executed += 1
                proof.rmdir()
                print(f"{name}, unsafe loading {unsafe}: executed")
            elif code not in ((0,) if name == "cache" else (2, 4)):  # a cache is made again
                strange += 1
                print(f"{name}, unsafe loading {unsafe}: exit code {code}")
    del os.environ["TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD"]
    print(f"{executed} of {attempts} hostile files executed, {strange} unexpected exit codes")
    return executed == strange == 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--signals", type=int, default=25, help="per cell, of eight; default: 25")
    parser.add_argument("--flips", type=int, default=200, help="per file, of two; default: 200")
    parser.add_argument("--seed", type=int, default=0, help="of all random moments and places")
    args = parser.parse_args()
    torch.set_num_threads(1)  # also: a process with threads cannot be forked safely
    drawn.COUNT = {"train": 400, "test": 100}
    drawn.draw = cache(drawn.draw)
    for split in drawn.COUNT:
        for shifted in (False, True):
            drawn.draw(split, shifted)
    chance = random.Random(args.seed)
    folder = Path(tempfile.mkdtemp(prefix="torture_"))
    begin = time.monotonic()
    good = signals_part(args.signals, chance, folder)
    good &= flips_part(args.flips, chance, folder)
    good &= hostile_part(folder)
    print(f"{time.monotonic() - begin:.0f} s; {'nothing was lost' if good else 'FAILED'}")
    if good:
        shutil.rmtree(folder)
    else:
        print(f"the runs are in {folder}")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
