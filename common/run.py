"""The run folder: what a run leaves behind, and how it goes on after a stop.

config.yaml  metrics.jsonl  status.json  summary.json  model.pt  checkpoints/step_00000080.pt
pictures/step_00000080.png  for segmentation
stage1.pt  of fine-tuning
target_labeled.txt, train.txt, val.txt  where images were drawn by the seed
"""

import json
import math
import re
import signal
import sys
import time
from pathlib import Path

import torch

from common import checkpoint
from common.config import changed_keys, dump, flatten, load_config
from common.evaluation import choose
from common.log import Log
from common.pictures import save_pictures
from common.runtime import UserError, describe_machine, get_device

KEEP = 2  # checkpoints: the newest, and the one before should the newest be damaged


def iou_table(target: dict[str, dict]) -> str:
    """The IoU of each class, a column for each of the target's figures; `-` for a class without a label."""
    classes = list(target["last"]["iou"])
    width = max(map(len, classes))
    lines = [f"{'IoU':{width}}" + "".join(f"{name:>10}" for name in target)]
    for name in classes:
        values = (entry["iou"][name] for entry in target.values())
        lines.append(f"{name:{width}}" + "".join(f"{'-' if v is None else f'{v:.1f}':>10}" for v in values))
    return "\n".join(lines)


class Run:
    """Checks the run folder of a config; nothing is written before `begin`, and nothing at all in a dry run.

    Attributes: log, a `Log`; stopping, the signal that asks the run to save and leave, or None.

    Raises `UserError` for a used folder without --resume, and for a resume under a config that trains differently.
    """

    def __init__(self, config, args):
        self.config, self.folder, self.dry_run = config, Path(config.out_dir), args.dry_run
        self.resume = args.resume and not args.dry_run
        self.history, self.seconds, self.stopping, self.saved = [], 0.0, None, None
        self.lists, self.labels = {}, {}
        self.selected = None  # what model.pt holds; kept, since a resumed run must find it as it was at the checkpoint
        if self.dry_run:
            config.steps = 1
            self.log = Log(None, 1)
            return
        self.log = Log(self.folder / "metrics.jsonl", config.steps)
        if file := next((p for p in (self.folder, *self.folder.parents) if p.is_file()), None):
            raise UserError(f"out_dir: {file} is a file; choose another out_dir")
        used = self.folder.is_dir() and any(self.folder.iterdir())
        if used and not self.resume:
            raise UserError(
                f"out_dir: {self.folder} is used; add --resume to go on with it, or choose another with out_dir=..."
            )
        if used:
            status, method = self._read_status(), type(config).method
            other = status.get("method", method)
            if other != method:
                raise UserError(
                    f"--resume: {self.folder} is a run of method {other}, not {method}; choose another out_dir"
                )
            self._check_config()
            if status.get("state") == "finished":
                print(f"{self.folder}: finished already, nothing to do")
                sys.exit(0)

    def _check_config(self) -> None:
        file = self.folder / "config.yaml"
        if not file.is_file():
            raise UserError(f"out_dir: {self.folder} has no config.yaml, it is no run folder; choose another out_dir")
        changed = changed_keys(load_config(type(self.config), str(file)), self.config)
        if changed and self._checkpoints():  # before the first one nothing is trained yet
            shown = ", ".join(f"{key} {before!r} -> {now!r}" for key, (before, now) in changed.items())
            remedy = "undo the change or choose another out_dir"
            raise UserError(f"--resume: {self.folder} was trained under another config ({shown}); {remedy}")

    def show(self, domains) -> None:
        """Print what the run learns from; `begin` writes the lists of what was drawn, `finish` how much is labelled."""
        print(domains.describe())
        self.lists = domains.lists
        self.labels = {"target_labeled": len(domains.target_labeled)} if domains.target_labeled else {}

    def begin(self, **state) -> int:
        """Start or continue the run; returns the number of steps done. `state`: what `save` writes, by name."""
        self.state = {**state, "log": self.log}
        step = 0
        if self.resume:
            step = self._load_newest()
            self._restore_selected()
        if not self.dry_run:
            for left in self.folder.rglob(".*.tmp"):  # by a run that was killed while writing
                left.unlink()
            for name in self.lists if step > 0 else ():
                file = self.folder / name
                if not file.is_file() or file.read_text(encoding="utf-8") != self.lists[name]:
                    raise UserError(f"--resume: {file} is gone, or was drawn from other images; restore them")
            checkpoint.write_text(self.folder / "config.yaml", dump(self.config))
            for name, text in self.lists.items():
                checkpoint.write_text(self.folder / name, text)
            self._write_status("running", step)
            for number in (signal.SIGTERM, signal.SIGINT):
                signal.signal(number, self._on_signal)
        self.log.open(step)
        self.started = time.monotonic()
        return step

    def _on_signal(self, number, frame) -> None:
        self.stopping = number
        signal.signal(number, signal.SIG_DFL)  # a second one leaves at once

    def due(self, step: int, every: int) -> bool:
        """Whether something done every so many steps is due; the last step always is."""
        return step % every == 0 or step == self.config.steps

    def _values(self) -> dict:
        """What is saved besides `state`: plain values."""
        seconds = self.seconds + time.monotonic() - self.started
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        values = {"history": self.history, "selected": self.selected, "seconds": seconds}
        return {**values, "rng": torch.get_rng_state(), "cuda_rng": cuda}

    def save(self, step: int) -> None:
        """Write a checkpoint. Raises `UserError` (code 3) rather than save a run that is no longer finite."""
        if self.dry_run:
            return
        self.log.check_finite(step)
        for name, value in self.state["model"].state_dict().items():
            if not value.isfinite().all():
                raise UserError(
                    f"step {step}: the model's {name} is not finite; lower optim.lr, or use amp: float32", 3
                )
        folder = self.folder / "checkpoints"
        checkpoint.save(folder / f"step_{step:08d}.pt", step=step, **self.state, **self._values())
        self.saved = step
        for old in self._checkpoints()[KEEP:]:
            old.unlink()
            old.with_name(old.name + ".sha256").unlink(missing_ok=True)
        self._write_status("running", step)

    def _checkpoints(self) -> list[Path]:
        """Newest first."""
        files = (self.folder / "checkpoints").glob("step_*.pt")
        return sorted((f for f in files if re.fullmatch(r"step_\d{8,}\.pt", f.name)), reverse=True)

    def _load_newest(self) -> int:
        files = self._checkpoints()
        if not files:
            print(f"{self.folder}: no checkpoint yet, starting at step 0")
            return 0
        for file in files:
            try:
                values = dict.fromkeys(("step", "history", "selected", "seconds", "rng", "cuda_rng"))
                saved = checkpoint.load(file, **self.state, **values)
            except UserError as error:
                print(f"warning: {error}")
                continue
            self.history, self.seconds, self.selected = saved["history"], saved["seconds"], saved["selected"]
            torch.set_rng_state(saved["rng"])
            if saved["cuda_rng"] and torch.cuda.is_available():
                torch.cuda.set_rng_state_all(saved["cuda_rng"])
            print(f"{self.folder}: resuming after step {saved['step']}")
            return saved["step"]
        raise UserError(
            f"{self.folder}: none of its {len(files)} checkpoints can be used; remove the folder to start again", 4
        )

    def _restore_selected(self) -> None:
        """model.pt as it was at the checkpoint: an evaluation after it may have written another."""
        file = self.folder / "model.pt"
        if self.selected is not None:
            checkpoint.save_tensors(file, self.selected)
        else:
            for left in (file, file.with_name(file.name + ".sha256")):
                left.unlink(missing_ok=True)

    def evaluated(self, step: int, metrics: dict, model: torch.nn.Module, last: bool = False) -> None:
        """Record an evaluation; keep the weights if they are the best so far by `select`. `last`: of a run that ends
        before `steps`."""
        examples = metrics.pop("examples")
        for name, value in metrics["criteria"].items():
            if not math.isfinite(value):
                raise UserError(f"step {step}: criteria.{name} is {value}; lower optim.lr, or use amp: float32", 3)
        self.history.append({"step": step, **metrics})
        flat = flatten(metrics)
        self.log.record({"step": step, **flat})
        shown = {k: v for k, v in flat.items() if v is not None and ".iou." not in k}
        self.log.print(f"step {step}  " + "  ".join(f"{name} {value:.4g}" for name, value in shown.items()))
        last = last or step == self.config.steps
        if examples and not self.dry_run and (self.config.pictures == "every" or last):
            save_pictures(
                self.folder / "pictures" / f"step_{step:08d}.png", examples, list(metrics["source_val"]["iou"])
            )
        if choose(self.history, self.config.select)["selected"]["step"] == step:
            self.selected = {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}
            self.keep_selected("model.pt")

    def keep_selected(self, name: str) -> None:
        """Write the weights selected so far to the file `name` of the run folder."""
        if not self.dry_run:
            checkpoint.save_tensors(self.folder / name, self.selected)

    def _read_status(self) -> dict:
        file = self.folder / "status.json"
        try:
            return dict(json.loads(file.read_text())) if file.is_file() else {}
        except (ValueError, TypeError):
            raise UserError(f"--resume: {file} is damaged; remove it to go on from the checkpoints") from None

    def _write_status(self, state: str, step: int) -> None:
        status = {"method": type(self.config).method, "state": state, "step": step, "steps": self.config.steps}
        checkpoint.write_text(self.folder / "status.json", json.dumps(status) + "\n")

    def stopped(self, step: int) -> int:
        """Save and leave, as a signal asked; returns the exit code."""
        if self.saved != step:
            self.save(step)
        self.log.close()
        if not self.dry_run:
            self._write_status("stopped", step)
        print(f"stopped by {signal.Signals(self.stopping).name} after step {step}; --resume goes on from here")
        return 128 + self.stopping

    def finish(self, **facts) -> None:
        """Write summary.json, with `facts` about the data; `target_test` says what the target is measured on."""
        self.log.close()
        config, target, steps = self.config, choose(self.history, self.config.select), self.history[-1]["step"]
        value = next(e["criteria"][config.select] for e in self.history if e["step"] == target["selected"]["step"])
        part = config.select in config.trained_criteria()
        summary = {
            "method": type(config).method,
            "seed": config.seed,
            "steps": steps,
            "device": get_device(config.device).type,
            "machine": describe_machine(get_device(config.device)),
            "seconds": round(self._values()["seconds"], 1),
            "target": target,
            **self.labels,
            **facts,
            "source_val": self.history[-1]["source_val"],
            "selection": {"criterion": config.select, "value": value, "part_of_training_loss": part},
        }
        if self.dry_run:
            print("dry run: one step of training and of evaluation passed, nothing was written")
            return
        checkpoint.write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        self._write_status("finished", steps)
        for name, entry in target.items():
            figures = "  ".join(f"{k} {v:.2f}" for k, v in entry.items() if k != "step" and isinstance(v, float))
            print(f"target {name:8} step {entry['step']}  {figures or 'no target labels'}")
        if target["oracle"]["step"] is not None and "iou" in target["last"]:
            print(iou_table(target))
        print(f"{self.folder / 'summary.json'} (target: {facts['target_test']})")
