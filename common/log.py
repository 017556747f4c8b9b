"""Running means of a run's metrics, written once every `log_every` steps with one host sync."""

import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common.checkpoint import write_text
from common.runtime import UserError


class Log:
    """Means since the last line go to metrics.jsonl and to the screen.

    On a terminal a progress bar; elsewhere a line now and then with the time left.

    Args:
        path: metrics.jsonl, or None to write no file (dry run).
        steps: the run's length.
    """

    def __init__(self, path: Path | None, steps: int):
        self.path, self.steps = path, steps
        self.sums, self.counts = {}, {}
        self.bar, self.printed, self.start = None, -math.inf, 0

    def state_dict(self) -> dict:
        return {"sums": dict(self.sums), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])

    def open(self, step: int) -> None:
        """Begin after `step` steps; lines of later steps, left by a broken run, are dropped."""
        if self.path is not None and self.path.exists():
            lines = []
            for line in self.path.read_text().splitlines(keepends=True):
                try:
                    keep = json.loads(line)["step"] <= step and line.endswith("\n")
                except ValueError:
                    keep = False  # the line a kill cut short
                lines += [line] if keep else []
            write_text(self.path, "".join(lines))
        self.start, self.started = step, time.monotonic()
        if sys.stderr.isatty():
            self.bar = tqdm(total=self.steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05)

    def add(self, **values: torch.Tensor | float) -> None:
        """Add one step's values under their names; tensors stay on the device."""
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else value
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        if self.bar is not None:
            self.bar.update()

    def write(self, step: int, **values: float | None) -> None:
        """Write the means since the last call, and `values` as they are; `name.class` goes to the file alone."""
        means = self.check_finite(step)
        self.sums, self.counts = {}, {}
        self.record({"step": step, **means, **values})
        shown = "  ".join(f"{name} {value:.4g}" for name, value in {**means, **values}.items() if "." not in name)
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
        elif time.monotonic() - self.printed > 20 or step == self.steps:
            self.printed = time.monotonic()
            left = (self.printed - self.started) / max(step - self.start, 1) * (self.steps - step)
            print(f"step {step}/{self.steps}  {shown}  ({int(left) // 60}:{int(left) % 60:02d} left)", flush=True)

    def check_finite(self, step: int) -> dict[str, float]:
        """The means since the last line. Raises `UserError` (code 3) naming the first that is not finite."""
        if not self.sums:
            return {}
        tensors = {name: total for name, total in self.sums.items() if isinstance(total, torch.Tensor)}
        totals = dict(self.sums)
        if tensors:  # the one host sync
            totals.update(zip(tensors, torch.stack([t.double() for t in tensors.values()]).tolist(), strict=True))
        means = {name: total / self.counts[name] for name, total in totals.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                remedy = "lower optim.lr, or use amp: float32, and --resume from the last checkpoint"
                raise UserError(f"step {step}: {name} is {mean}; {remedy}", 3)
        return means

    def record(self, line: dict) -> None:
        """Append one line to metrics.jsonl."""
        if self.path is not None:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error.strerror}); free some space", 5) from None

    def print(self, text: str) -> None:
        (self.bar.write if self.bar is not None else lambda line: print(line, flush=True))(text)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
