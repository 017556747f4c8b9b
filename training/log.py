"""Means of a run's metrics, written every `log_every` steps. A line waits once for the device."""

import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from common import ranks
from common.errors import UserError
from common.metrics import main_metric
from common.writing import write_atomically
from training.tracker import Tracker


def _is_kept(line: bytes, step: int, evaluated: bool) -> bool:
    """Whether a line of metrics.jsonl is complete, and stays when a run goes on (`Log.open`)."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError):  # such as a line that a killed run did not end
        return False
    written = record.get("step") if isinstance(record, dict) else None
    if type(written) is not int or not line.endswith(b"\n"):
        return False
    is_evaluation = any(key.startswith("criteria.") for key in record)
    return written < step or (written == step and (evaluated or not is_evaluation))


def headline(values: dict[str, float | None]) -> str:
    """The figures of a step that the screen shows: the first two losses, and the learning rate.

    A script adds its losses in the order of its objective, cls_loss first. Those of an auxiliary
    head, and all other figures, are in metrics.jsonl.
    """
    names = [name for name in values if "." not in name and not name.startswith("aux_")]
    losses = [name for name in names if name.endswith("loss")] or names
    rates = [name for name in names if name == "lr" or name.endswith("_lr")]
    shown = dict.fromkeys([*losses[:2], *rates[:1]])
    return "  ".join(f"{name} {values[name]:.4g}" for name in shown if values[name] is not None)


def evaluation_line(step: int, metrics: dict, select: str) -> str:
    """The figures of an evaluation that the screen shows: target, source, and what selects.

    Args:
        step: the step after which it was made.
        metrics: of `training.evaluation.evaluate`.
        select: the criterion that selects; source_val is the source's figure already.
    """
    parts = [f"step {step}", "eval"]
    for name, figures in (("target", metrics["target"]), ("source", metrics["source_val"])):
        value = figures[main_metric(figures)]
        parts += [f"{name} {value:.1f}"] if value is not None else []
    criterion = metrics["criteria"].get(select)
    if select != "source_val" and criterion is not None:
        parts.append(f"{select} {criterion:.3g}")
    return "  ".join(parts)


class Log:
    """Writes the means of all values since the last line to metrics.jsonl and to the screen.

    A terminal shows a progress bar; other outputs get a line every 20 seconds at most, with the
    remaining time.

    Args:
        path: metrics.jsonl, or None to write no file (dry run).
        steps: steps of the run.
        parts: calls of `add` per step.

    Attributes:
        muted: whether nothing is added, written and printed, because a step is only repeated.
        resumable: whether there is a checkpoint to go on from, for messages.
        monitor: the `CollapseMonitor` of a run; its report is written with each line.
        scaler: the loss scaler of a run in float16; its `scale` is written with each line.
        tracker: gets each line too.
    """

    def __init__(self, path: Path | None, steps: int, parts: int = 1):
        self.path, self.steps, self.parts = path, steps, parts
        self.sums, self.counts = {}, {}
        self.bar, self.added = None, 0
        self.printed = -math.inf  # time of the last line on the screen
        self.start = 0
        self.muted = self.resumable = False
        self.monitor = self.scaler = None
        self.tracker = Tracker()
        self.largest_scale = 0.0

    def _tensors(self) -> dict[str, torch.Tensor]:
        return {name: x for name, x in self.sums.items() if isinstance(x, torch.Tensor)}

    def state_dict(self) -> dict:
        """The sums, of tensors those of each process (count,)."""
        tensors = self._tensors()
        sums = dict(self.sums)
        if tensors:
            rows = ranks.gather(torch.stack(list(tensors.values()))[None])
            sums |= dict(zip(tensors, rows.unbind(1), strict=True))
        return {"sums": sums, "counts": dict(self.counts)}

    def load_state_dict(self, state: dict) -> None:
        """Take over the sums of this process, or of another number of processes their mean."""
        self.sums, self.counts = dict(state["sums"]), dict(state["counts"])
        for name, sums in self._tensors().items():
            same = len(sums) == ranks.count()
            self.sums[name] = sums[ranks.number()] if same else sums.mean()

    def open(self, step: int, evaluated: bool = True) -> None:
        """Begin after `step` steps.

        Lines of later steps, which a broken run wrote, are removed, and the evaluation of `step`
        itself if it is not over yet (`evaluated` is False). So is what is no record.
        """
        if self.path is not None and self.path.exists():
            lines = self.path.read_bytes().splitlines(keepends=True)
            kept = b"".join(line for line in lines if _is_kept(line, step, evaluated))
            write_atomically(self.path, lambda file: file.write(kept))
        self.start, self.started = step, time.monotonic()
        if self.scaler is not None and self.scaler.is_enabled():
            self.largest_scale = self.scaler.get_scale()
        if sys.stderr.isatty() and ranks.is_first():
            self.bar = tqdm(
                total=self.steps, initial=step, unit="step", dynamic_ncols=True, smoothing=0.05
            )

    def add(self, **values: torch.Tensor | float) -> None:
        """Add the values of one step, or part of it, by name. Tensors stay on the device."""
        if self.muted:
            return
        for name, value in values.items():
            value = value.detach().float() if isinstance(value, torch.Tensor) else value
            self.sums[name] = self.sums[name] + value if name in self.sums else value
            self.counts[name] = self.counts.get(name, 0) + 1
        if self.bar is not None:
            self.added += 1
            self.bar.update(self.added % self.parts == 0)

    def write(self, step: int, **values: float | None) -> None:
        """Write the means since the last call, and `values` unchanged.

        All of them go to the file, those of `headline` to the screen.
        """
        if self.muted:
            return
        means = self.check_finite(step)
        self.sums, self.counts = {}, {}
        if self.monitor is not None:
            values |= self.monitor.report(step)
        self.record({"step": step, **means, **values, **self.check_scale(step)})
        shown = headline({**means, **values})
        if self.bar is not None:
            self.bar.set_postfix_str(shown, refresh=False)
        elif time.monotonic() - self.printed > 20 or step == self.steps:
            self.printed = time.monotonic()
            seconds_per_step = (self.printed - self.started) / max(step - self.start, 1)
            minutes, seconds = divmod(int(seconds_per_step * (self.steps - step)), 60)
            print(f"step {step}/{self.steps}  {shown}  ({minutes}:{seconds:02d} left)", flush=True)

    def flush(self, step: int, **values: float | None) -> None:
        """Call `write` if anything was added since the last line."""
        if self.sums:
            self.write(step, **values)

    def check_finite(self, step: int) -> dict[str, float]:
        """The means since the last line.

        Raises:
            UserError: (code 3) a mean is not finite; the message names the first one.
        """
        if not self.sums:
            return {}
        tensors, totals = self._tensors(), dict(self.sums)
        if tensors:
            sums = ranks.mean_over_ranks(torch.stack(list(tensors.values())))
            # The only synchronization with the device.
            numbers = sums.tolist()
            totals.update(zip(tensors, numbers, strict=True))
        means = {name: total / self.counts[name] for name, total in totals.items()}
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise self.not_finite(f"step {step}: {name} is {mean}")
        return means

    def check_scale(self, step: int) -> dict[str, float]:
        """The loss scale by name; nothing without a scaler.

        Raises:
            UserError: (code 3) the scale is below 1. Each step whose gradients are not finite is
                skipped and halves it.
        """
        if self.scaler is None or not self.scaler.is_enabled():
            return {}
        scale = self.scaler.get_scale()
        self.largest_scale = max(self.largest_scale, scale)
        if scale < 1:
            skipped = round(math.log2(self.largest_scale / scale))
            raise self.not_finite(
                f"step {step}: amp: float16: gradients were not finite in {skipped} steps or more, "
                f"which were skipped, and the loss scale fell to {scale:.3g}"
            )
        return {"scale": scale}

    def not_finite(self, fault: str) -> UserError:
        """The error (code 3) for numbers that are no longer finite."""
        way_on = "start again"
        if self.resumable:
            way_on = "go on with --resume --allow-change, or start again in another out_dir"
        return UserError(f"{fault}; lower optim.lr, or use amp: float32, and {way_on}", 3)

    def record(self, line: dict) -> None:
        """Append one line to metrics.jsonl, and send it to the tracker."""
        if self.path is not None:
            try:
                with open(self.path, "a") as file:
                    file.write(json.dumps(line) + "\n")
            except OSError as error:
                raise UserError(
                    f"{self.path}: cannot be written ({error.strerror}); free some space", 5
                ) from None
        self.tracker.log(line["step"], line)

    def print(self, text: str) -> None:
        """Print a line, above the progress bar if there is one."""
        if self.muted:
            return
        if self.bar is not None:
            self.bar.write(text)
        else:
            print(text, flush=True)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
