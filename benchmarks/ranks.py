"""Time of a step of several processes, and its share in communication.

    python benchmarks/ranks.py                       # 1 and 2 processes
    python benchmarks/ranks.py --processes 1 2 4 8 --config configs/benchmarks/dann_resnet18_64.yaml

Two tables. The first is of train_dann.py as it is, on one thread per process (CPU) or one GPU each:
milliseconds per step, steps per second relative to one process, and the share of the time that
process 0 spends in the functions of common/ranks.py, which includes waiting for the others. Several
processes share the batch of the config. `apart` is the same for as many single processes that train
at the same time on their share of the batch and know nothing of each other: what cores and memory
allow without any communication. The second compares `average_gradients` with torch's
DistributedDataParallel on a plain step of the same network: forward, cross-entropy, backward, SGD,
in turns of `--steps` steps; the median of `--rounds` rounds.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import train_dann  # noqa: E402
from common import ranks  # noqa: E402
from models import build_model  # noqa: E402
from training.config import load_run_config  # noqa: E402
from training.device import get_device  # noqa: E402
from training.log import Log  # noqa: E402

SHARED = ("total", "most", "gather", "gather_objects", "average_gradients")
WARM_UP = 5  # steps


def clock() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def time_script(files: list[str], steps: int, batch: int | None, run: Path) -> dict[str, float]:
    """Milliseconds per step of train_dann.py in this process, and those in communication.

    `batch` is in place of the config's, if not None; `run` is the folder of the run.
    """
    spent, marks = [0.0], []

    def timed(function):
        def call(*arguments):
            begin = clock()
            try:
                return function(*arguments)
            finally:
                spent[0] += clock() - begin

        return call

    add = Log.add

    def add_and_mark(self, **values):
        add(self, **values)
        marks.append((clock(), spent[0]))

    for name in SHARED:
        setattr(ranks, name, timed(getattr(ranks, name)))
    train_dann.average_gradients = ranks.average_gradients
    Log.add = add_and_mark
    total = WARM_UP + steps
    lengths = [f"{key}={total}" for key in ("steps", "eval_every", "save_every", "log_every")]
    overrides = [] if batch is None else [f"data.batch={batch}"]
    train_dann.main(["--config", *files, *lengths, *overrides, f"out_dir={run}"])
    (begin, spent_before), (end, spent_after) = marks[WARM_UP - 1], marks[-1]
    step = 1000 * (end - begin) / steps
    return {"step": step, "communication": 1000 * (spent_after - spent_before) / steps}


def time_plain(files: list[str], steps: int, rounds: int) -> dict[str, float]:
    """Milliseconds per plain step by `average_gradients` and by DistributedDataParallel."""
    config = load_run_config(train_dann.Config, files)
    device = get_device(config.device)
    ranks.join(600)
    torch.manual_seed(0)
    plain = build_model(config, [str(k) for k in range(10)]).to(device).train()
    shape = (config.data.batch // ranks.count(), 3, config.data.size, config.data.size)
    x = torch.randint(256, shape, dtype=torch.uint8, device=device)
    y = torch.randint(10, shape[:1], device=device)
    wrapped = DistributedDataParallel(plain) if ranks.count() > 1 else plain
    optimizer = torch.optim.SGD(plain.parameters(), 1e-3, momentum=0.9)

    def step(model, by_hand: bool) -> None:
        loss = F.cross_entropy(model(x).logits, y)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if by_hand:
            ranks.average_gradients(optimizer, plain)
        optimizer.step()

    times: dict[str, list[float]] = {"by_hand": [], "wrapper": []}
    for _ in range(rounds + 1):
        for name, model in (("by_hand", plain), ("wrapper", wrapped)):
            begin = clock()
            for _ in range(steps):
                step(model, name == "by_hand")
            times[name].append(1000 * (clock() - begin) / steps)
    ranks.leave()
    return {name: statistics.median(values[1:]) for name, values in times.items()}


def start(
    launcher: list, what: str, file: str, args: argparse.Namespace, *more
) -> subprocess.Popen:
    """Start workers that write the figures of process 0 to `file`."""
    options = ["--worker", what, file, "--steps", args.steps, "--rounds", args.rounds]
    words = [*launcher, __file__, *options, *more, "--config", *args.config]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([sys.executable, *map(str, words)], env=environment)


def end(worker: subprocess.Popen) -> None:
    if worker.wait() != 0:
        sys.exit("a measurement failed, as printed above")


def measure(processes: int, what: str, args: argparse.Namespace) -> dict[str, float]:
    """The figures of process 0 of `processes` that train together."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "figures.json")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", processes]
        end(start(launcher, what, str(file), args))
        return json.loads(file.read_text())


def measure_apart(processes: int, args: argparse.Namespace) -> float:
    """Milliseconds per step of as many single processes, each on its share of the batch."""
    batch = load_run_config(train_dann.Config, args.config).data.batch // processes
    with tempfile.TemporaryDirectory() as folder:
        files = [Path(folder, f"{number}.json") for number in range(processes)]
        workers = [start([], "script", str(file), args, "--batch", batch) for file in files]
        for worker in workers:
            end(worker)
        return statistics.mean(json.loads(file.read_text())["step"] for file in files)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = [str(ROOT / "configs/benchmarks/dann_resnet18_64.yaml")]
    parser.add_argument("--config", nargs="+", default=default, metavar="FILE")
    parser.add_argument("--processes", nargs="+", type=int, default=[1, 2], metavar="N")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--worker", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--batch", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        what, file = args.worker
        if what == "script":
            figures = time_script(args.config, args.steps, args.batch, Path(file).with_suffix(""))
        else:
            figures = time_plain(args.config, args.steps, args.rounds)
        if ranks.is_first():
            Path(file).write_text(json.dumps(figures))
        return
    scripts = {n: measure(n, "script", args) for n in args.processes}
    apart = {n: measure_apart(n, args) for n in args.processes}
    plain = {n: measure(n, "plain", args) for n in args.processes if n > 1}
    first = next(iter(scripts.values()))["step"]
    columns = "ms per step", "steps per second, relative", "communication, %", "apart, relative"
    print(f"\n| processes | {' | '.join(columns)} |\n|---|---|---|---|---|")
    for n, measured in scripts.items():
        step, share = measured["step"], measured["communication"]
        figures = f"{step:.1f} | {first / step:.2f} | {100 * share / step:.1f}"
        print(f"| {n} | {figures} | {first / apart[n]:.2f} |")
    print("\n| processes | average_gradients, ms | DistributedDataParallel, ms | ratio |")
    print("|---|---|---|---|")
    for n, figures in plain.items():
        ours, other = figures["by_hand"], figures["wrapper"]
        print(f"| {n} | {ours:.1f} | {other:.1f} | {ours / other:.3f} |")


if __name__ == "__main__":
    main()
