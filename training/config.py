"""The config of a run, which a script extends by its method's own keys, and the command line."""

import argparse
import difflib
import inspect
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from common import ranks
from common.config import (
    Hints,
    all_keys,
    describe,
    load_config,
    not_negative,
    positive,
    range_rules,
    shorten,
)
from common.errors import UserError, require
from data.config import DataConfig, expand_home
from models.config import ModelConfig
from training.device import get_device
from training.optim import OptimConfig

Select = Literal["source_val", "neg_entropy", "infomax", "last"]  # see docs/selection.md
SELECT = {"classification": "infomax", "segmentation": "neg_entropy"}  # the default, by task


@dataclass(kw_only=True)
class RunConfig:
    out_dir: str | None = None  # the run folder; null: runs/ and the names of the config files
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = not_negative(0)  # weights, order, augmentation and splits follow from it
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps; one that is absent is an error
    amp: Literal["float32", "float16", "bfloat16"] = "float32"  # autocast precision
    deterministic: bool = True  # CUDA: kernels that repeat to the bit; false: the fastest
    compile: bool = False  # compile the network by torch.compile
    accumulate: int = positive(1, most=10_000)  # parts of a batch, one after another: less memory
    steps: int = positive(4000)  # optimizer steps
    eval_every: int = positive(500)  # steps; the last step always evaluates
    save_every: int = positive(500)  # steps; the last step always saves
    log_every: int = positive(50)  # steps between lines of metrics.jsonl
    select: Select | None = None  # the criterion that picks model.pt, or last; null: by task
    weights_format: Literal["pt", "safetensors"] = "pt"  # safetensors: that file beside model.pt
    pictures: Literal["end", "every"] = "end"  # segmentation: at the end, or at every evaluation
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"  # gets all metrics too
    init_from: str | None = None  # a run folder or model.pt to start from
    process_timeout: int = positive(600, most=10**6)  # s that one process waits for another

    method: ClassVar[str | None] = None
    one_process: ClassVar[bool] = False  # whether it cannot be trained by several processes

    def __post_init__(self):
        expand_home(self, "out_dir", "init_from")
        task = self.data.task if self.data else "classification"
        self.select = self.select or SELECT[task]
        require(*range_rules(self), *self.rules())

    def rules(self) -> list[tuple[bool, str]]:
        """Rules (holds, sentence) across keys; a method adds its own."""
        return [
            (
                self.select != "source_val" or not self.data or self.data.source_val > 0,
                "select: source_val needs held-out source images, but data.source_val is 0",
            ),
            (
                re.fullmatch(r"auto|cpu|cuda(:\d{1,4})?|mps", self.device) is not None,
                f"device must be auto, cpu, cuda, cuda:N or mps, not {shorten(self.device)}",
            ),
            *(self.model.rules(self.data.task) if self.model and self.data else ()),
            *(self.part_rules() if self.data else ()),
        ]

    def part_rules(self) -> list[tuple[bool, str]]:
        """Rules (holds, sentence) that a batch has equal parts."""
        return [
            (
                batch is None or batch % self.accumulate == 0,
                f"accumulate: data.{key}={batch} does not have {self.accumulate} equal parts",
            )
            for key, batch in (("batch", self.data.batch), ("target_batch", self.data.target_batch))
        ]

    def trained_criteria(self) -> set[str]:
        """Which of the criteria neg_entropy and infomax the training loss improves directly.

        They do not measure the method independently. A loss that makes target predictions
        confident, as MCC or self-training, improves both; one on features improves neither. Every
        method states them, even if there are none.
        """
        raise UserError(
            f"Config of method {self.method!r} does not state its trained_criteria(): which of "
            "neg_entropy and infomax its loss improves directly; set() if none (docs/selection.md)"
        )


def default_out_dir(files: Sequence[str], method: str) -> str:
    """The run folder of a config that names none: runs/ and the names of its files.

    configs/digits/mnist_usps.yaml configs/digits/dann.yaml -> runs/digits/mnist_usps_dann

    The method is added to the name of a file that stands alone, unless it is a word of it or is the
    source-only training that such a file is for:
    configs/digits/mnist_usps.yaml with train_mcc.py -> runs/digits/mnist_usps_mcc
    """
    first = Path(files[0])
    parts = first.with_suffix("").parts
    below = parts[parts.index("configs") + 1 :] if "configs" in parts else parts[-1:]
    stems = [below[-1], *(Path(file).stem for file in files[1:])]
    if len(files) == 1 and method != "source" and method not in stems[0].split("_"):
        stems.append(method)
    return str(Path("runs", *below[:-1], "_".join(stems)))


def head_command(file: Path) -> list[str] | None:
    """The words of the command in the first line of a yaml file, if that has one.

    Returns:
        Those behind `# python`: the script, then its arguments.
    """
    try:
        first = file.read_text(encoding="utf-8").partition("\n")[0]
        words = shlex.split(first, comments=False)
    except (OSError, ValueError):
        return None
    return words[2:] if words[:2] == ["#", "python"] and len(words) > 2 else None


def command_for(folder: str, files: Sequence[str]) -> str | None:
    """The command that makes the run `folder`, if a config beside `files` tells it.

    That is a config whose first line is a command that trains in this folder, or in one of this
    name without its ending `_seed<K>`.
    """
    wanted = re.fullmatch(r"(.*?)(?:_seed(\d+))?", str(Path(folder)), re.S)
    for file in sorted({path for name in files for path in Path(name).parent.glob("*.yaml")}):
        words = head_command(file)
        if not words or words[1:2] != ["--config"] or not words[0].startswith("train_"):
            continue
        configs = [word for word in words[2:] if "=" not in word]
        method = Path(words[0]).stem.removeprefix("train_")
        if configs and wanted[1] == default_out_dir(configs, method):
            seed = [f"seed={wanted[2]}", f"out_dir={folder}"] if wanted[2] else []
            return shlex.join(["python", *words, *seed])
    return None


def scripts_with(key: str) -> list[str]:
    """The scripts of the project whose method declares this key."""
    found = []
    for script in sorted(Path(__file__).resolve().parents[1].glob("*.py")):
        text = script.read_text(encoding="utf-8", errors="replace")
        config = re.search(r"^class Config\(.*?(?=^[^\s]|\Z)", text, re.M | re.S)
        if config and re.search(rf"^    {re.escape(key)}: (?!ClassVar)", config[0], re.M):
            found.append(script.name)
    return found


def load_run_config(cls, files: str | Sequence[str], overrides: Sequence[str] = ()):
    """`load_config` of a `RunConfig`, with its `out_dir` filled in."""
    files = [files] if isinstance(files, str) else files
    if cls.method is None:
        raise UserError('the Config of this script must name its method: ClassVar[str] = "..."')
    config = load_config(cls, files, overrides, scripts_with)
    config.out_dir = config.out_dir or default_out_dir(files, cls.method)
    return config


class _Parser(argparse.ArgumentParser):
    """Its help ends with the keys of the config class `cls`."""

    def __init__(self, cls, description: str):
        super().__init__(
            description=description, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        self.cls = cls

    def format_help(self) -> str:
        self.epilog = "keys of the config, the method's own first:\n" + describe(self.cls)
        return super().format_help()

    def error(self, message: str):
        raise UserError(f"{message}; --help lists options and keys")


def _check_words(
    words: list[str], unknown: list[str], options: Sequence[str], cls, files: list[str] | None
) -> None:
    """Raise `UserError` for an option that does not exist, and where no config file is named."""
    if "=" in words:
        raise UserError("write key=value without spaces around the equals sign")
    if unknown:
        option = unknown[0].partition("=")[0]
        hint = "--help lists all"
        if near := difflib.get_close_matches(option, options, 1, 0.75):
            hint = f"did you mean {near[0]}?"
        elif near := Hints(all_keys(cls)).near(option.strip("-").replace("-", "_")):
            hint = f"keys are set without dashes: {near}=VALUE"
        raise UserError(f"{shorten(option)}: there is no such option; {hint}")
    if not files:
        files = [word for word in words if word.endswith((".yaml", ".yml"))]
        if files:
            raise UserError(f"--config is missing; write --config {' '.join(map(shorten, files))}")
        raise UserError(
            "--config is missing; name yaml files, as --config configs/demo/digits.yaml "
            "(--help lists all options and keys)"
        )


def _check_start(config, files: Sequence[str]) -> None:
    """Raise `UserError` if the run to start from does not exist, with the command that makes it."""
    if config.init_from is None or Path(config.init_from).exists():
        return
    command = command_for(config.init_from, files)
    hint = f"make it by: {command}" if command else "train it first, or name another run"
    raise UserError(f"init_from: there is no {config.init_from}; {hint}")


def _check_processes(config) -> None:
    """Raise `UserError` if several processes cannot train by this config."""
    if config.one_process and ranks.count() > 1:
        raise UserError(
            f"torchrun: method {config.method} takes one batch after another, each with the model "
            "that the one before has left, in one process; start it by python"
        )
    if config.model.bn_sync and get_device(config.device).type != "cuda":
        raise UserError(
            "model.bn_sync: torch has synchronized batch norm on CUDA devices only; leave it out"
        )
    for key in ("batch", "target_batch"):
        batch, shares = getattr(config.data, key), ranks.count() * config.accumulate
        if batch is not None and batch % shares > 0:
            parts = f" in {config.accumulate} parts" * (config.accumulate > 1)
            raise UserError(
                f"data.{key}: {batch} images cannot be shared out evenly among {ranks.count()} "
                f"processes{parts}; use a multiple of {shares}, or another number of processes"
            )


def _warn(config) -> None:
    """Print warnings of what is allowed but seldom meant."""
    model = config.model
    untrained = model.weights is None and config.init_from is None
    if untrained and model.batch_norm and model.bn == "frozen":
        print(
            "warning: model.bn: frozen keeps the statistics of untrained weights, with which a "
            "deep network hardly learns; name model.weights or init_from, or set model.bn=concat"
        )
    if config.steps is not None and config.optim.warmup >= config.steps:
        print(
            f"warning: optim.warmup: the rate rises for {config.optim.warmup} steps, and the run "
            f"has {config.steps}, so it never reaches optim.lr"
        )
    if config.select in config.trained_criteria():
        print(
            f"warning: select: {config.select} is part of the training loss and does not measure "
            "it independently; read the figure of the last step, or set select: last "
            "(docs/selection.md)"
        )


def parse_args(cls, description: str, argv: Sequence[str] | None = None):
    """The command line of a training script.

    `--config FILE [FILE ...] [key=value ...] [--resume [--allow-change]] [--dry-run [--all]]
    [--debug]`

    Returns:
        (config, arguments): an instance of `cls`, and the flags; `command` is the command itself.
    """
    ranks.start()
    parser = _Parser(cls, description)
    files_help = "yaml files, of which later ones win; see configs/"
    parser.add_argument("--config", nargs="+", action="extend", metavar="FILE", help=files_help)
    override_help = "override a key of the config"
    parser.add_argument("overrides", nargs="*", metavar="key=value", help=override_help)
    resume_help = "go on from the newest checkpoint in out_dir"
    parser.add_argument("--resume", action="store_true", help=resume_help)
    allow_help = "with --resume: accept other learning rates, steps, eval_every and amp"
    parser.add_argument("--allow-change", action="store_true", help=allow_help)
    dry_run_help = "take one step of training and of evaluation, write nothing"
    parser.add_argument("--dry-run", action="store_true", help=dry_run_help)
    all_help = "with --dry-run: read every file of the data, and name all that cannot be used"
    parser.add_argument("--all", action="store_true", help=all_help)
    debug_help = "show the traceback of an error"
    parser.add_argument("--debug", action="store_true", help=debug_help)
    # argparse gives all words that follow --config to it, so the overrides go first.
    words = sys.argv[1:] if argv is None else argv
    overrides = [word for word in words if re.match(r"\w[\w.-]*=", word)]
    others = [word for word in words if word not in overrides]
    args, unknown = parser.parse_known_intermixed_args([*overrides, *others])
    _check_words(words, unknown, re.findall(r"--[\w-]+", parser.format_usage()), cls, args.config)
    if args.allow_change and not args.resume:
        raise UserError("--allow-change goes with --resume")
    if args.all and not args.dry_run:
        raise UserError("--all goes with --dry-run")
    config = load_run_config(cls, args.config, args.overrides)
    _check_processes(config)
    args.resume |= ranks.restarts() > 0  # torchrun --max-restarts
    script = Path(inspect.getfile(cls)).name
    args.command = "".join(
        c if c.isprintable() else " " for c in shlex.join(["python", script, *words])
    )
    if not (args.resume and Path(config.out_dir, "checkpoints").is_dir()):
        _check_start(config, args.config)
    _warn(config)
    return config, args
