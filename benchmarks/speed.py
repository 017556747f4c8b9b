"""Step cost of a training script, input included, as a ratio to the bare model.

    python benchmarks/speed.py train_dann.py --config configs/benchmarks/dann_resnet18_64.yaml
    python benchmarks/speed.py train_source.py --config configs/demo/source.yaml data.batch=32 --rounds 15 --steps 50

The bare model is the limit: forward, cross-entropy, backward and a foreach SGD step of the same network, eager,
contiguous, float32, on a tensor in memory: the normalised images that train the network in one step of the script.

The script runs unchanged, in this process and on one thread. Its `Log.add`, called once at the end of every step, hands
over: `--steps` steps of the script, then as many bare ones, and so on. Each round gives one ratio; the line printed has
their median (and range), of wall time and of CPU seconds of this process. A first round warms up and does not count;
every image file is decoded before it. Loader workers (`data.workers`) fill their queues while the bare model has its
turn, and their CPU seconds are not counted: take more steps a round with them.
"""

import argparse
import contextlib
import copy
import importlib.util
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.config import OptimConfig, load_config
from common.log import Log
from common.runtime import UserError, exit_with
from data.image_set import ImageSet
from models.network import Network

HEADER = "| config | images a step | bare, ms | script, ms | ratio | ratio, CPU seconds |\n|---|---|---|---|---|---|"


def clock() -> torch.Tensor:
    """Seconds of wall and of CPU time, float64 (2,)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


class Bare:
    """A copy of the script's network, trained on uint8 `images` with labels that cost what true ones do."""

    def __init__(self, model: Network, images: torch.Tensor, optim: OptimConfig):
        self.model = copy.deepcopy(model).to(memory_format=torch.contiguous_format)
        self.x = ((images - model.mean) / model.std).contiguous()
        self.model.normalise = lambda x: x  # conversion and normalisation of the images are input
        with torch.no_grad():
            shape = copy.deepcopy(self.model).eval()(self.x).logits.shape
        labels = torch.arange(len(images) * shape[2:].numel(), device=images.device) % shape[1]
        self.y = labels.view(len(images), *shape[2:])
        decay = {"momentum": optim.momentum, "nesterov": optim.momentum > 0, "weight_decay": optim.weight_decay}
        self.optimizer = torch.optim.SGD(self.model.parameters(), optim.lr, foreach=True, **decay)

    def forward(self) -> torch.Tensor:
        return self.model(self.x).logits

    def step(self) -> None:
        loss = F.cross_entropy(self.forward(), self.y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


class Finished(BaseException):
    """Leaves the script's `main` after the last round."""


class Turns:
    """A script and its bare model, `steps` steps each in turn, for `rounds` rounds after a warm-up.

    Attributes: model, the script's network; bare, a `Bare`; times, one (2, 2) tensor a round: script and bare, wall and
    CPU seconds a step.
    """

    def __init__(self, script: ModuleType, config, rounds: int, steps: int):
        self.script, self.config, self.rounds, self.steps = script, config, rounds, steps
        self.done, self.images, self.bare, self.times = 0, [], None, []

    def run(self, argv: list[str]) -> None:
        build_model, open_domains, add = self.script.build_model, self.script.open_domains, Log.add

        def build_and_watch(*args) -> Network:
            self.model = build_model(*args)
            self.hook = self.model.register_forward_pre_hook(lambda *call: self._see(*call))  # a teacher copies it
            return self.model

        def open_and_decode(*args):
            domains = open_domains(*args)
            for images in vars(domains).values():
                for part in images.indices.split(256) if isinstance(images, ImageSet) else ():
                    images.images[part]  # decoded here, and kept
            return domains

        def add_and_hand_over(log: Log, **values) -> None:
            add(log, **values)
            self.done += 1
            if self.done % self.steps == 0:
                self._hand_over()
            self.images = []

        hooks = mock.patch.multiple(self.script, build_model=build_and_watch, open_domains=open_and_decode)
        with hooks, mock.patch.object(Log, "add", add_and_hand_over), contextlib.suppress(Finished):
            self.start = clock()
            self.script.main(argv)
            raise UserError("the script ended before the last round")

    def _see(self, model, inputs: tuple[torch.Tensor]) -> None:
        if torch.is_grad_enabled():  # a teacher's or an evaluation's images train nothing
            self.images.append(inputs[0])

    def _hand_over(self) -> None:
        script_seconds = clock() - self.start
        warm_up = self.bare is None
        if warm_up:
            self.hook.remove()
            self.bare = Bare(self.model, torch.cat(self.images), self.config.optim)
        with torch.random.fork_rng():  # the global stream is the script's
            start = clock()
            for _ in range(self.steps):
                self.bare.step()
            bare_seconds = clock() - start
        if not warm_up:
            self.times.append(torch.stack([script_seconds, bare_seconds]) / self.steps)
        if len(self.times) == self.rounds:
            raise Finished
        self.start = clock()


def measure(path: Path, config: str, overrides: list[str], rounds: int, steps: int) -> Turns:
    """Run the script at `path` without its evaluations and checkpoints, in a temporary folder."""
    spec = importlib.util.spec_from_file_location(f"benchmarked_{path.stem}", path)
    script = sys.modules[spec.name] = importlib.util.module_from_spec(spec)  # dataclasses look their module up
    spec.loader.exec_module(script)
    total = (rounds + 1) * steps
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        overrides = [*overrides, f"out_dir={folder}", f"steps={total}", f"eval_every={total}", f"save_every={total}"]
        turns = Turns(script, load_config(script.Config, config, overrides), rounds, steps)
        turns.run(["--config", config, *overrides])
    return turns


def table_line(name: str, turns: Turns) -> str:
    """The outcome as a line under `HEADER`."""
    script, bare = torch.stack(turns.times, 2)  # each (wall or CPU, rounds)
    ms = [f"{1000 * statistics.median(seconds[0].tolist()):.1f}" for seconds in (bare, script)]
    ratios = [f"{statistics.median(r):.3f} ({min(r):.3f}-{max(r):.3f})" for r in (script / bare).tolist()]
    return f"| {' | '.join([name, str(len(turns.bare.x)), *ms, *ratios])} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("script", type=Path, help="train_*.py")
    parser.add_argument("--config", required=True, metavar="FILE", help="yaml file; see configs/benchmarks/")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key of the config")
    parser.add_argument("--rounds", type=int, default=9, help="at least 7")
    parser.add_argument("--steps", type=int, default=20, help="of the script, and of the bare model, a round")
    args = parser.parse_intermixed_args(argv)
    if args.rounds < 7 or args.steps < 1:
        parser.error("--rounds must be at least 7 and --steps positive")
    torch.set_num_threads(1)
    turns = measure(args.script, args.config, args.overrides, args.rounds, args.steps)
    print(HEADER, table_line(Path(args.config).stem, turns), sep="\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
