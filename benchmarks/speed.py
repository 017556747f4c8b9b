"""Cost of a step of a training script, input included, as a ratio to the bare model.

    python benchmarks/speed.py train_dann.py --config configs/benchmarks/dann_resnet18_64.yaml
    python benchmarks/speed.py train_dann.py --config configs/demo/digits.yaml \\
        configs/demo/dann.yaml data.batch=32 --rounds 15 --steps 50

The bare model is the limit: forward, cross-entropy, backward and a foreach SGD step of the same
network (with `--bare torchvision`, of torchvision's network of that name), eager, in the precision
of the script (`amp`), on a tensor in memory: the normalized images that train the network in one
step of the script. On a GPU it has the memory layout of the script,
on a CPU it is contiguous.

The script runs unchanged, in this process and on one thread. After every `--steps` steps of it as
many bare ones follow, and so on; a GPU is waited for in between only. Each round gives one ratio.
The printed line has their median (and range), of wall time and of CPU seconds of this process, and
on a GPU the largest memory of both. A first round warms up and does not count; every image file is
decoded before it. Loader workers (`data.workers`) fill their queues while the bare model has its
turn, and their CPU seconds are not counted: use more steps per round with them.
"""

import argparse
import contextlib
import copy
import importlib.util
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType
from unittest import mock

import torch
import torch.nn.functional as F
import torchvision

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.errors import UserError, exit_with
from data import Domains
from data.image_set import ImageSet, one
from models.network import Network
from training.config import load_run_config
from training.optim import OptimConfig
from training.run import Run

COLUMNS = "run", "images per step", "bare, ms", "script, ms", "ratio", "ratio, CPU seconds"
COLUMNS += ("bare and script, GiB",)
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def clock() -> torch.Tensor:
    """Seconds of wall and of CPU time, float64 (2,)."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return torch.tensor([time.perf_counter(), time.process_time()], dtype=torch.float64)


def peak_memory() -> float:
    """The largest memory of the GPU in GiB since the last call; 0 without one."""
    if not torch.cuda.is_available():
        return 0.0
    peak = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return peak


def kept_memory() -> float:
    """The memory of the GPU that tensors take now, in GiB; 0 without one."""
    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


class Bare:
    """A copy of the script's network, trained on uint8 `images` with made-up labels.

    Args:
        model: the script's network.
        images: uint8 (N, 3, H, W).
        optim: the section `optim`.
        amp: precision.
        network: name of torchvision's network to train in place of the copy.
    """

    def __init__(
        self,
        model: Network,
        images: torch.Tensor,
        optim: OptimConfig,
        amp: str,
        network: str | None = None,
    ):
        layout = model.memory_format if images.is_cuda else torch.contiguous_format
        self.autocast = torch.autocast(images.device.type, getattr(torch, amp), amp != "float32")
        compiled, model.compiled = model.compiled, None  # the copy is not
        self.model = copy.deepcopy(model).to(memory_format=layout)
        model.compiled = compiled
        self.x = ((images - model.mean) / model.std).contiguous(memory_format=layout)
        self.model.normalize = lambda x: x  # scaling and normalization belong to the input
        with torch.no_grad(), self.autocast:
            shape = copy.deepcopy(self.model).eval()(self.x).logits.shape
        labels = torch.arange(len(images) * shape[2:].numel(), device=images.device) % shape[1]
        self.y = labels.view(len(images), *shape[2:])
        if network is not None:
            self.model = torchvision.models.get_model(network, weights=None, num_classes=shape[1])
            self.model.to(images.device, memory_format=layout)
        self.optimizer = torch.optim.SGD(
            self.model.parameters(),
            lr=optim.lr,
            momentum=optim.momentum,
            nesterov=optim.nesterov and optim.momentum > 0,
            weight_decay=optim.weight_decay,
            foreach=True,
        )

    def forward(self) -> torch.Tensor:
        out = self.model(self.x)
        return getattr(out, "logits", out)

    def step(self) -> None:
        with self.autocast:
            loss = F.cross_entropy(self.forward(), self.y)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        self.optimizer.step()


class Finished(BaseException):
    """Leaves the script's `main` after the last round."""


class Turns:
    """A script and its bare model, `steps` steps each in turn, for `rounds` rounds after a warm-up.

    Attributes:
        model: the script's network.
        bare: a `Bare`.
        times: one (2, 2) tensor per round: script and bare, wall and CPU seconds per step.
        memory: (bare, script): the largest memory of a GPU in GiB.
    """

    def __init__(self, script: ModuleType, config, rounds: int, steps: int, network: str | None):
        self.script, self.config, self.rounds, self.steps = script, config, rounds, steps
        self.network = network
        self.done, self.images, self.bare, self.times = 0, [], None, []
        self.memory, self.kept, self.bare_kept = (0.0, 0.0), 0.0, 0.0

    def run(self, argv: list[str]) -> None:
        build_model, open_domains, due = self.script.build_model, Run.open_domains, Run.due

        def build_and_watch(*args, **kwargs) -> Network:
            self.model = build_model(*args, **kwargs)
            # A lambda, for a teacher copies it: a bound method would bring these turns along.
            self.hook = self.model.register_forward_pre_hook(lambda *call: self._see(*call))
            return self.model

        def open_and_decode(run: Run) -> Domains:
            domains = open_domains(run)
            for images in vars(domains).values():
                for i in images.indices.tolist() if isinstance(images, ImageSet) else ():
                    one(images.images, i)  # decoded here, and kept
                    if images.crop is not None and images.labels is not None:
                        one(images.labels, i)
            return domains

        def due_or_hand_over(run: Run, step: int, every: int) -> bool:
            if step > self.done:  # a script asks first whether the log is due, after its update
                self.done = step
                if self.done % self.steps == 0:
                    self._hand_over()
                self.images = []
            return due(run, step, every)

        with contextlib.suppress(Finished), contextlib.ExitStack() as patches:
            patches.enter_context(mock.patch.object(self.script, "build_model", build_and_watch))
            patches.enter_context(mock.patch.object(Run, "open_domains", open_and_decode))
            patches.enter_context(mock.patch.object(Run, "due", due_or_hand_over))
            self.start = clock()
            self.script.main(argv)
            raise UserError("the script ended before the last round")

    def _see(self, model, inputs: tuple[torch.Tensor]) -> None:
        if torch.is_grad_enabled():  # a teacher's or an evaluation's images train nothing
            self.images.append(inputs[0])

    def _hand_over(self) -> None:
        script_seconds = clock() - self.start
        script_memory = peak_memory()
        warm_up = self.bare is None
        if warm_up:
            self.kept = kept_memory()  # by the script
            self.hook.remove()
            optim, amp = self.config.optim, self.config.amp
            self.bare = Bare(self.model, torch.cat(self.images), optim, amp, self.network)
        with torch.random.fork_rng():  # the global stream is the script's
            start = clock()
            for _ in range(self.steps):
                self.bare.step()
            bare_seconds = clock() - start
        # What the other one keeps does not count.
        self.memory = peak_memory() - self.kept, script_memory - self.bare_kept
        if warm_up:
            self.bare_kept = kept_memory() - self.kept
        if not warm_up:
            self.times.append(torch.stack([script_seconds, bare_seconds]) / self.steps)
        if len(self.times) == self.rounds:
            raise Finished
        self.start = clock()


def measure(
    path: Path,
    files: list[str],
    overrides: list[str],
    rounds: int,
    steps: int,
    torchvisions: bool = False,
) -> Turns:
    """Run a script without its evaluations and checkpoints, in a temporary folder.

    Args:
        path: the script.
        files: its yaml files.
        overrides: `key=value` words.
        rounds: rounds that count, after one of warm-up.
        steps: steps per round.
        torchvisions: whether the bare model is torchvision's network, and not a copy.

    Raises:
        UserError: the script ends before the last round.
    """
    spec = importlib.util.spec_from_file_location(f"benchmarked_{path.stem}", path)
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # dataclasses look their module up
    spec.loader.exec_module(script)
    total = (rounds + 1) * steps
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        lengths = [f"{key}={total}" for key in ("steps", "eval_every", "save_every")]
        overrides = [*overrides, f"out_dir={folder}", *lengths]
        config = load_run_config(script.Config, files, overrides)
        network = config.model.backbone if torchvisions else None
        turns = Turns(script, config, rounds, steps, network)
        turns.run(["--config", *files, *overrides])
    return turns


def run_name(script: Path, files: list[str], overrides: list[str]) -> str:
    """The first column: script, config files and overrides, as in the README."""
    name = f"{script.stem}, {' '.join(Path(file).stem for file in files)}"
    return f"{name}, `{' '.join(overrides)}`" if overrides else name


def table_line(name: str, turns: Turns) -> str:
    """The outcome as a line under `HEADER`."""
    script, bare = torch.stack(turns.times, 2)  # each (wall or CPU, rounds)
    ms = [f"{1000 * statistics.median(seconds[0].tolist()):.1f}" for seconds in (bare, script)]
    ratios = [
        f"{statistics.median(r):.3f} ({min(r):.3f}-{max(r):.3f})" for r in (script / bare).tolist()
    ]
    memory = [f"{turns.memory[0]:.2f}, {turns.memory[1]:.2f}" if any(turns.memory) else "-"]
    return f"| {' | '.join([name, str(len(turns.bare.x)), *ms, *ratios, *memory])} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("script", type=Path, help="train_*.py")
    files_help = "yaml files, of which later ones win; see configs/benchmarks/"
    parser.add_argument("--config", required=True, nargs="+", metavar="FILE", help=files_help)
    override_help = "override a key of the config"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=override_help)
    parser.add_argument("--rounds", type=int, default=9, help="at least 7")
    steps_help = "of the script, and of the bare model, per round"
    parser.add_argument("--steps", type=int, default=20, help=steps_help)
    bare_help = "what is compared: a copy of the network, or torchvision's network of its name"
    parser.add_argument("--bare", choices=["copy", "torchvision"], default="copy", help=bare_help)
    args = parser.parse_intermixed_args(argv)
    words = [*args.config, *args.overrides]  # argparse gives all that follows --config to it
    files = [word for word in args.config if not re.match(r"[\w.]+=", word)]
    overrides = [word for word in words if word not in files]
    if not files:
        parser.error("--config needs a yaml file")
    if args.rounds < 7 or args.steps < 1:
        parser.error("--rounds must be at least 7 and --steps positive")
    torch.set_num_threads(1)
    torchvisions = args.bare == "torchvision"
    turns = measure(args.script, files, overrides, args.rounds, args.steps, torchvisions)
    print(HEADER, table_line(run_name(args.script, files, overrides), turns), sep="\n")
    return 0


if __name__ == "__main__":
    exit_with(main)
