"""A suite: the runs behind a table, as a yaml file in configs/suites/ names them."""

import dataclasses
import functools
import itertools
import os
import re
import runpy
import shlex
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from common.config import (
    Hints,
    all_keys,
    build,
    dump_value,
    hint_of,
    not_negative,
    range_rules,
    read_config,
)
from common.errors import UserError, require
from data import LabeledDataConfig
from data.order import generator
from training.config import RunConfig, head_command, load_run_config, scripts_with
from training.evaluation import SOURCE_MARGIN

LONGEST_NAME = 150  # letters that a cell adds to the name of its folder


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
    grid: dict = field(default_factory=dict)  # {dotted key: values}: a run per combination
    draws: int | None = None  # so many runs, with keys drawn from `ranges`
    ranges: dict = field(default_factory=dict)  # {dotted key: [low, high] or [low, high, log]}
    draws_seed: int = 0  # of the draws

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
            *self._rules_of_cells(),
        )
        self.start: Entry | None = None  # the entry of init_from; set by `Suite`
        self.family = self.method  # of a cell of a grid: the method without its keys
        self.out_dir = self._read_out_dir()
        # The seeds have folders of their own, so out_dir is no override here.
        self.overrides = [text for text in self._settings() if not text.startswith("out_dir=")]

    def _rules_of_cells(self) -> list[tuple[bool, str]]:
        lists = [key for key, x in self.grid.items() if not (isinstance(x, list) and x)]
        ranges = [key for key, x in self.ranges.items() if not _is_range(x)]
        recorded = self.expected is not None or self.published is not None
        return [
            *((False, f"grid: {key} needs a list of values") for key in lists),
            *(
                (False, f"ranges: {key} needs [low, high], or [low, high, log] with low above 0")
                for key in ranges
            ),
            ("out_dir" not in self.grid, "grid: each cell has an out_dir of its own; leave it out"),
            (not (self.grid and self.draws), "grid and draws exclude each other"),
            (self.draws is None or self.draws > 0, "draws must be positive"),
            ((self.draws is not None) == bool(self.ranges), "draws and ranges go together"),
            (
                not (recorded and (self.grid or self.draws)),
                "expected and published are figures of one run, not of a grid or of draws",
            ),
        ]

    def cells(self) -> list["Entry"]:
        """An entry per combination of the grid, or per draw; without these, itself.

        Raises:
            ValueError: a cell's config has mistakes.
        """
        if self.grid:
            combinations = itertools.product(*self.grid.values())
            cells = [dict(zip(self.grid, values, strict=True)) for values in combinations]
            names = [_folder_name(cell) for cell in cells]
        elif self.draws:
            cells = [self._draw(number) for number in range(self.draws)]
            names = [f"draw{self.draws_seed}_{number:02d}" for number in range(self.draws)]
        else:
            return [self]
        made = []
        for cell, name in zip(cells, names, strict=True):
            values = ", ".join(f"{key}={dump_value(value)}" for key, value in cell.items())
            entry = dataclasses.replace(
                self,
                method=f"{self.method}, {values}",
                set={**self.set, **cell, "out_dir": f"{self.out_dir}_{name}"},
                grid={},
                draws=None,
                ranges={},
            )
            entry.family = self.method
            made.append(entry)
        return made

    def _draw(self, number: int) -> dict:
        """The keys of a draw.

        Values are whole numbers if both bounds are and the key takes no fractions; others are
        rounded to four significant digits.
        """
        cell = {}
        for key, (low, high, *log) in self.ranges.items():
            random = generator(self.draws_seed, "draws", number, key)
            share = float(torch.rand((), generator=random, dtype=torch.float64))
            value = low * (high / low) ** share if log else low + (high - low) * share
            hint = hint_of(type(self.run_config), key)
            fractions = float in (hint, *get_args(hint))
            whole = isinstance(low, int) and isinstance(high, int) and not fractions
            cell[key] = round(value) if whole else float(f"{value:.4g}")
        return cell

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
        self.run_config = config
        return os.path.normpath(config.out_dir)

    def sees_target_labels(self) -> bool:
        """Whether target labels train or select, so that the runs are no candidates of a choice."""
        data = self.run_config.data
        return bool(
            isinstance(data, LabeledDataConfig)
            or data.target_labeled is not None
            or data.target_is_source()
            or data.is_source(data.target_test)
            or getattr(data, "order", None) == "sorted"  # of a stream, by label
            or (self.start is not None and self.start.sees_target_labels())
        )


def _is_range(value) -> bool:
    """Whether a value is [low, high] or [low, high, "log"]."""
    if not isinstance(value, list) or len(value) not in (2, 3) or value[2:] not in ([], ["log"]):
        return False
    numbers = all(isinstance(x, (int, float)) and not isinstance(x, bool) for x in value[:2])
    return numbers and value[0] < value[1] and (len(value) == 2 or value[0] > 0)


def _folder_name(cell: dict) -> str:
    """The end of the name of a cell's folder, such as `reversal_max=0.3_optim.lr=0.01`."""
    text = "_".join(f"{key}={dump_value(value)}" for key, value in cell.items())
    name = re.sub(r"[^\w.=+-]+", "-", text)
    if len(name) > LONGEST_NAME:
        raise ValueError(f"grid: the folder of a cell would be {name[:60]}..., which is too long")
    return name


@dataclass
class Suite:
    """The content of a file in configs/suites/."""

    title: str
    runs: list  # of `Entry`
    tuned: str | None = None  # on what the settings were chosen; printed below the table
    note: str | None = None  # likewise
    # What the figures are of; null: the mean IoU of a segmentation, the accuracy of others.
    metric: Literal["accuracy", "mean_class_accuracy", "mean_iou"] | None = None
    # Methods whose rows the other rows of their task are compared with, seed by seed.
    baselines: list[str] = field(default_factory=list)
    # Points of source validation that a run may lose against the first baseline (--choose), where
    # batch norm does not train.
    margin: float = not_negative(SOURCE_MARGIN)

    def __post_init__(self):
        mistakes: list[str] = []
        entries = [
            build(Entry, tree, Hints(all_keys(Entry, f"runs[{i}].")), mistakes, f"runs[{i}].")
            for i, tree in enumerate(self.runs)
        ]
        require((len(entries) > 0, "runs is empty"), *((False, mistake) for mistake in mistakes))
        numbered = []
        for i, entry in enumerate(entries):
            try:
                numbered += [(f"runs[{i}]", cell) for cell in entry.cells()]
            except ValueError as error:
                mistakes += [f"runs[{i}].{line}" for line in str(error).splitlines()]
        require(*((False, mistake) for mistake in mistakes))
        cells = [cell for _, cell in numbered]
        rules = []
        for i, (name, entry) in enumerate(numbered):
            earlier = {other.out_dir: other for other in cells[:i]}
            if entry.init_from:
                entry.start = earlier.get(os.path.normpath(entry.init_from))
                rule = f"{name}.init_from: {entry.init_from} is the out_dir of no earlier entry"
                rules.append((entry.start is not None, rule))
            new_folder = entry.out_dir not in earlier
            rules.append((new_folder, f"{name} has the out_dir {entry.out_dir} of another"))
            row = (entry.task, entry.method)
            new_row = row not in [(other.task, other.method) for other in cells[:i]]
            rules.append((new_row, f"{name} has the row {' / '.join(row)} of another"))
        methods = {entry.method for entry in cells}
        for name in self.baselines:
            rules.append((name in methods, f"baselines: {name} is the method of no entry"))
        for name, entry in numbered:
            if entry.baselines is None:
                entry.baselines = self.baselines
            foreign = ", ".join(sorted(set(entry.baselines) - set(self.baselines)))
            rule = f"{name}.baselines: {foreign} is not among the suite's baselines"
            rules.append((not foreign, rule))
        require(*rules, *range_rules(self))
        self.runs = cells


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
