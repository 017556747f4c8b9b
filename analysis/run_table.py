"""A table of runs: for the screen, and as csv."""

import collections
import csv
import io
import re
import sys
from collections.abc import Sequence
from pathlib import Path

from analysis.run_configs import (
    differing_keys,
    flat_config,
    short_names,
    split_sections,
    value_text,
)
from analysis.run_files import RunFacts, number
from common.config import Hints, cut
from common.errors import UserError
from training.free_keys import FREE_AT_RESUME

COLUMNS = (
    "run",
    "method",
    "config",
    "last",
    "selected",
    "criterion",
    "state",
    "step",
    "seconds",
    "commit",
)
FIGURES = ("last", "selected", "step", "seconds")  # flush right; sorted from the largest
# The columns of the csv between the run and the keys of its config.
FACTS = (
    "method",
    "metric",
    "last",
    "selected",
    "criterion",
    "state",
    "reason",
    "collapsed",
    "step",
    "seconds",
    "commit",
)
SHOWN = ("steps", "select")  # keys that have a column of their own
STATE = 48  # letters of a state on a terminal, at most
LEAST = {"state": 24, "config": 10}  # letters to which a narrow terminal cuts these, in this order


def printable(text: str) -> str:
    """A text that neither breaks a line nor moves the cursor."""
    return "".join(letter if letter.isprintable() else "?" for letter in text)


def natural(text: str) -> list:
    """To sort by: numbers within texts by size, so that seed10 follows seed9."""
    return [int(x) if i % 2 else x for i, x in enumerate(re.split(r"(\d{1,18})", text))]


class Table:
    """Runs side by side, in the order of their names.

    Args:
        top: the folder that the names of the runs begin below.
        runs: the runs.

    Attributes:
        names: the name of each run, by its folder.
        keys: all keys of the configs, except those that do not change what is learned.
        short: a short name of each key.
        differing: the keys of which two runs have different values, except steps and select, which
            have columns of their own.
    """

    def __init__(self, top: Path, runs: Sequence[RunFacts]):
        self.names = {run.folder: str(run.folder.relative_to(top)) for run in runs}
        self.runs = sorted(runs, key=lambda run: natural(self.names[run.folder]))
        sections = split_sections(runs)
        self.configs = {run.folder: flat_config(run.config, sections) for run in self.runs}
        for flat in self.configs.values():
            for key in FREE_AT_RESUME:
                flat.pop(key, None)
        self.keys = list(dict.fromkeys(key for flat in self.configs.values() for key in flat))
        differing = differing_keys(self.configs.values())
        self.differing = [key for key in differing if key not in SHOWN]
        self.short = short_names(self.keys)
        self.of_method = collections.defaultdict(set)  # the keys that any of its runs has
        for run in self.runs:
            self.of_method[run.method] |= self.configs[run.folder].keys()

    def config(self, run: RunFacts) -> str:
        """The differing keys of a run; `-` for one that other runs of its method have."""
        flat, parts = self.configs[run.folder], []
        for key in self.differing:
            if key in self.of_method[run.method]:
                value = value_text(flat[key]) if key in flat else "-"
                parts.append(f"{self.short[key]}={value}")
        return " ".join(parts) or "-"

    def value(self, run: RunFacts, column: str):
        """What a run is sorted by; None if it is not known."""
        if column == "run":
            return self.names[run.folder]
        if column == "config":
            return self.config(run)
        if column in COLUMNS:
            return getattr(run, column)
        return self.configs[run.folder].get(column)

    def sort(self, column: str) -> None:
        """Sort by a column or a key: figures from the largest, texts from A, unknown ones last.

        Raises:
            UserError: there is no such column or key.
        """
        if column not in COLUMNS:
            keys = {name: key for key, name in self.short.items()}
            column = keys.get(column, column)
        if column not in (*COLUMNS, *self.keys):
            near = Hints([*COLUMNS, *self.keys]).near(column)
            hint = f"did you mean {near}?" if near else f"columns are {', '.join(COLUMNS)}"
            raise UserError(f"--sort: there is no column and no key {column}; {hint}")
        values = {run.folder: self.value(run, column) for run in self.runs}
        known = [run for run in self.runs if values[run.folder] is not None]
        if all(number(values[run.folder]) is not None for run in known):
            known.sort(key=lambda run: -values[run.folder])
        else:
            known.sort(key=lambda run: natural(value_text(values[run.folder])))
        self.runs = known + [run for run in self.runs if values[run.folder] is None]

    def cells(self, run: RunFacts, short: bool) -> dict[str, str]:
        """The text in each column; `short` cuts a long state."""
        marked = run.state + " (collapsed)" * (run.collapsed is not None)
        state = f"{marked}: {run.reason}" if run.reason else marked
        done = ("-" if count is None else f"{count:.0f}" for count in (run.step, run.steps))
        texts = {name: getattr(run, name, None) for name in ("method", "criterion", "commit")}
        return {
            **{name: text or "-" for name, text in texts.items()},
            "run": self.names[run.folder],
            "config": self.config(run),
            "last": "-" if run.last is None else f"{run.last:.1f}",
            "selected": "-" if run.selected is None else f"{run.selected:.1f}",
            "state": cut(state, STATE) if short else state,
            "step": "/".join(done),
            "seconds": "-" if run.seconds is None else f"{run.seconds:.0f}",
        }

    def text(self, width: int | None = None) -> str:
        """The table in lines.

        Args:
            width: letters of a line. As far as necessary, states with a reason and then configs
                are cut; lines are longer if that does not suffice. None cuts nothing.
        """
        columns = [name for name in COLUMNS if name != "config" or self.differing]
        rows = [{name: name for name in COLUMNS}]
        rows += [self.cells(run, short=width is not None) for run in self.runs]
        rows = [{name: printable(row[name]) for name in columns} for row in rows]
        widths = {name: max(len(row[name]) for row in rows) for name in columns}
        for name in [name for name in LEAST if name in columns]:
            surplus = sum(widths.values()) + 2 * (len(columns) - 1) - (width or sys.maxsize)
            widths[name] -= min(max(surplus, 0), max(widths[name] - LEAST[name], 0))
        lines = []
        for row in rows:
            sides = {name: ">" if name in FIGURES else "<" for name in columns}
            texts = {name: cut(text, widths[name]) for name, text in row.items()}
            cells = [f"{texts[name]:{sides[name]}{widths[name]}}" for name in columns]
            lines.append("  ".join(cells).rstrip())
        return "\n".join(lines)

    def note(self) -> str:
        """How many runs there are in each state, and what their figures are."""
        states = collections.Counter(run.state for run in self.runs)
        counts = ", ".join(f"{count} {state}" for state, count in sorted(states.items()))
        metrics = sorted({run.metric for run in self.runs if run.last is not None})
        figures = f"; last, selected: target {' or '.join(metrics)} in percent" if metrics else ""
        return f"{len(self.runs)} run{'s' * (len(self.runs) > 1)} ({counts}){figures}"

    def csv(self) -> str:
        """All facts and keys, each in a column, nothing cut or rounded; empty if not known."""
        buffer = io.StringIO()
        writer = csv.writer(buffer, lineterminator="\n")
        taken = ("run", *FACTS)
        writer.writerow([*taken, *(f"config.{k}" if k in taken else k for k in self.keys)])
        for run in self.runs:
            flat = self.configs[run.folder]
            texts = [value_text(flat[key]) if key in flat else "" for key in self.keys]
            writer.writerow([self.names[run.folder], *(getattr(run, x) for x in FACTS), *texts])
        return buffer.getvalue()
