"""The config of a run, which a script extends by its method's own keys, and the command line."""

import argparse
import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

from common.config import describe, load_config, not_negative, positive, range_rules
from common.errors import UserError, require
from data.config import DataConfig, expand_home
from models.config import ModelConfig
from training.optim import OptimConfig

Select = Literal["source_val", "neg_entropy", "infomax", "last"]  # see docs/selection.md
SELECT = {"classification": "infomax", "segmentation": "neg_entropy"}  # the default, by task

# Keys that may differ between a run and its continuation: they do not change what is learned.
FREE_AT_RESUME = (
    "out_dir",
    "save_every",
    "data.root",
    "data.workers",
    "data.worker_timeout",
    "data.cache",
    "data.cache_gb",
)


@dataclass(kw_only=True)
class RunConfig:
    out_dir: str | None = None  # the run folder; null: runs/ and the names of the config files
    data: DataConfig
    model: ModelConfig = field(default_factory=ModelConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    seed: int = not_negative(0)  # weights, order, augmentation and splits follow from it
    device: Literal["auto", "cpu", "cuda"] = "auto"  # cuda asked for and absent is an error
    amp: Literal["float32", "float16", "bfloat16"] = "float32"  # autocast precision
    steps: int = positive(4000)  # optimizer steps
    eval_every: int = positive(500)  # steps; the last step always evaluates
    save_every: int = positive(500)  # steps; the last step always saves
    log_every: int = positive(50)  # steps between lines of metrics.jsonl
    select: Select | None = None  # the criterion that picks model.pt, or last; null: by task
    pictures: Literal["end", "every"] = "end"  # segmentation: at the end, or at every evaluation
    init_from: str | None = None  # a run folder or model.pt to start from

    method: ClassVar[str | None] = None

    def __post_init__(self):
        expand_home(self, "out_dir", "init_from")
        task = self.data.task if self.data else "classification"
        self.select = self.select or SELECT[task]
        require(*range_rules(self), *self.rules())

    def rules(self) -> list[tuple[bool, str]]:
        """Rules (holds, sentence) across keys; a method adds its own."""
        return [
            (self.seed < 2**63, "seed must be below 2**63"),
            (
                self.select != "source_val" or not self.data or self.data.source_val > 0,
                "select: source_val needs held-out source images, but data.source_val is 0",
            ),
            *(self.model.rules(self.data.task) if self.model and self.data else ()),
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


def load_run_config(cls, files: str | Sequence[str], overrides: Sequence[str] = ()):
    """`load_config` of a `RunConfig`, with its `out_dir` filled in."""
    files = [files] if isinstance(files, str) else files
    if cls.method is None:
        raise UserError('the Config of this script must name its method: ClassVar[str] = "..."')
    config = load_config(cls, files, overrides)
    config.out_dir = config.out_dir or default_out_dir(files, cls.method)
    return config


def parse_args(cls, description: str, argv: Sequence[str] | None = None):
    """The command line of a training script.

    `--config FILE [FILE ...] [key=value ...] [--resume [--allow-change]] [--dry-run [--all]]
    [--debug]`

    Returns:
        (config, arguments): an instance of `cls`, and the flags.
    """
    parser = argparse.ArgumentParser(
        description=description,
        epilog="keys of the config, the method's own first:\n" + describe(cls),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files_help = "yaml files, of which later ones win; see configs/"
    parser.add_argument(
        "--config", required=True, nargs="+", action="extend", metavar="FILE", help=files_help
    )
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
    args = parser.parse_intermixed_args([*overrides, *others])
    if args.allow_change and not args.resume:
        raise UserError("--allow-change goes with --resume")
    if args.all and not args.dry_run:
        raise UserError("--all goes with --dry-run")
    config = load_run_config(cls, args.config, args.overrides)
    if config.select in config.trained_criteria():
        print(
            f"warning: select: {config.select} is part of the training loss and does not measure "
            "it independently; read the figure of the last step, or set select: last "
            "(docs/selection.md)"
        )
    return config, args
