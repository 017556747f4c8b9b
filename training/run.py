"""The run folder: what a run writes, and how it continues after a stop.

config.yaml  metrics.jsonl  status.json  summary.json  model.pt  checkpoints/step_00000080.pt
.lock  held while a run uses the folder
pictures/step_00000080.png  for segmentation
stage1.pt  of fine-tuning
target_labeled.txt, train.txt, val.txt  where images were drawn by the seed
"""

import contextlib
import itertools
import json
import math
import os
import re
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from common import files
from common.config import dump, flatten, load_config
from common.errors import UserError, observe
from common.provenance import code_version
from data import Domains, EvaluationSets, check_files, open_domains
from data.fingerprint import difference
from data.loaders import Loader, WorkerError
from training.changes import check_changes, config_of, config_tree, is_rate
from training.collapse import CollapseMonitor
from training.device import (
    describe_machine,
    get_device,
    seed_everything,
    warn_of_slow_precision,
)
from training.evaluation import choose, compact, evaluate
from training.log import Log, evaluation_line
from training.pictures import save_pictures
from training.state import OWN_STATE, check_state, first_not_finite

KEEP = 2  # checkpoints: the newest, and the one before in case the newest is damaged
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the run saves and leaves
PAIR = 1.0  # seconds within which a second signal counts as the same one, sent to us twice
LOADERS = ("source_val", "target_train", "target_test")  # of an evaluation


class Watched:
    """A loader of a pass that may be left before each batch, and while it waits for one.

    It is left by `leave`, if a signal asks for it.
    """

    def __init__(self, loader: Iterable, leave: Callable[[], None]):
        self.loader, self.leave = loader, leave

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator:
        if isinstance(self.loader, Loader):
            self.loader.on_wait = self.leave
        for batch in self.loader:
            self.leave()
            yield batch


def iou_table(target: dict[str, dict]) -> str:
    """The IoU of each class, one column per figure of the target; `-` for a class without label."""
    classes = list(target["last"]["iou"])
    width = max(map(len, classes))
    lines = [f"{'IoU':{width}}" + "".join(f"{name:>10}" for name in target)]
    for name in classes:
        values = (entry["iou"][name] for entry in target.values())
        cells = ("-" if value is None else f"{value:.1f}" for value in values)
        lines.append(f"{name:{width}}" + "".join(f"{cell:>10}" for cell in cells))
    return "\n".join(lines)


class Run:
    """One training run and its folder.

    It seeds the random generators. Nothing is written before `begin`, and nothing at all in a dry
    run. A script calls, in this order, `open_domains`, `begin`, `steps` (with `log`, `monitor`,
    `due` and `evaluate` in the loop) and `finish`. If there is a checkpoint to go on from, the
    config's `model.weights` and `init_from` are null from here on: nothing is read that the
    checkpoint replaces.

    Attributes:
        log: a `Log`, for the losses of a step.
        monitor: a `CollapseMonitor`, for the target logits of a step; it judges each evaluation
            in any case.
        selected: the weights that model.pt holds, or None before the first evaluation.

    Raises:
        UserError: the folder is used and --resume is missing, another process uses it, or the run
            to be resumed was trained under another config, or (code 4) has lost its checkpoints.
    """

    def __init__(self, config, args):
        seed_everything(config.seed)
        warn_of_slow_precision(get_device(config.device), config.amp)
        self.config, self.folder, self.dry_run = config, Path(config.out_dir), args.dry_run
        self.resume, self.read_all, self.command = args.resume, args.all, args.command
        self.history: list[dict] = []
        self.examples: list[tuple] = []
        self.seconds, self.signal, self.saved = 0.0, None, None
        self.signaled = 0.0  # time of the first signal
        self.step = -1  # the step that is being taken
        self.evaluating = False  # whether it is over but for its evaluation
        self.repeat: Path | None = None  # a checkpoint saved then, until that step is evaluated
        self.damaged: set[Path] = set()  # checkpoints that could not be used
        self.status: dict = {}  # status.json of this run; empty before it writes anything
        # Saved too, since an evaluation after the checkpoint may have written another model.pt.
        self.selected: dict | None = None
        self.domains: Domains | None = None
        self.monitor: CollapseMonitor | None = None
        self.commits = [code_version()]  # now: the code may change while the run goes on
        self.machines = [describe_machine(get_device(config.device))]
        self.config_text, self.config_tree = dump(config), config_tree(config)
        self.allow_change = self.resume and args.allow_change
        self.changes: list[dict] = []  # of keys, by --allow-change, since the run began
        self.changed: set[str] = set()  # the keys that have changed now
        self.lock = None
        self.checkpoint: Path | None = None  # to go on from, and what it contains until `begin`
        self.checkpoint_state: dict | None = None
        observe(self)
        self._check_folder()
        self.resume = self.resume and not self.dry_run
        if self.dry_run:
            config.steps = 1
        self.last_step = config.steps
        self.log = Log(None if self.dry_run else self.folder / "metrics.jsonl", config.steps)

    def _check_folder(self) -> None:
        place = next(p for p in (self.folder, *self.folder.parents) if os.path.lexists(p))
        if not place.is_dir():
            raise UserError(f"out_dir: {place} is a file; choose another out_dir")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"out_dir: {place} cannot be written to; choose another out_dir", 5)
        try:
            if not self._is_used():
                return  # `begin` locks it
        except OSError as error:  # such as a name that is too long
            raise UserError(
                f"out_dir: {self.folder} cannot be used ({error.strerror}); choose another out_dir"
            ) from None
        has_config = (self.folder / "config.yaml").is_file()
        begun = self.resume or (self.folder / "status.json").exists()
        if has_config and begun and not self.dry_run:
            self.lock = files.lock(self.folder / ".lock")
        config, status, method = self.config, self._read_status(), type(self.config).method
        other = status.get("method", method)
        if other != method:
            raise UserError(
                f"out_dir: {self.folder} is a run of method {other}, not {method}; "
                "choose another out_dir"
            )
        if self._has_failed_early(status):
            self.resume = True  # as good as an empty folder
        if not self.resume:
            raise UserError(
                f"out_dir: {self.folder} is used; add --resume to go on with it, "
                "or choose another with out_dir=..."
            )
        if not has_config:
            raise UserError(
                f"out_dir: {self.folder} has no config.yaml, so it is not a run folder; "
                "choose another out_dir"
            )
        if self._is_finished(status):
            before = load_config(type(config), str(self.folder / "config.yaml"))
            if not check_changes(before, config, self.allow_change, self.folder):
                print(f"{self.folder}: finished already, nothing to do")
                sys.exit(0)
        self._read_newest(status)

    def _is_used(self) -> bool:
        """Whether the folder contains anything but a lock, which a failed start may leave."""
        return self.folder.is_dir() and any(p.name != ".lock" for p in self.folder.iterdir())

    def _is_finished(self, status: dict) -> bool:
        """Whether the run is finished, and has summary.json and an undamaged model.pt."""
        try:
            dict(json.loads((self.folder / "summary.json").read_text()))
        except (OSError, ValueError, TypeError):
            return False
        return status.get("state") == "finished" and files.is_intact(self.folder / "model.pt")

    def _has_failed_early(self, status: dict) -> bool:
        """Whether the folder is that of a run which failed before its first checkpoint."""
        failed = status.get("state") == "failed" and status.get("step") == 0
        return failed and not self._checkpoints() and not (self.folder / "summary.json").exists()

    def open_domains(self) -> Domains:
        """Open the data of the config and print what the run learns from."""
        trained = self.checkpoint_state and self.checkpoint_state["classes"]
        self.domains = open_domains(self.config.data, self.config.seed, self.dry_run, trained)
        print(self.domains.describe())
        shares = None if self.dry_run else self.domains.source_shares()
        names = self.domains.classes, shares, self.domains.absent_classes
        self.monitor = CollapseMonitor(*names, self.log.print).to(get_device(self.config.device))
        self.log.monitor = self.monitor
        if self.read_all:
            print(f"--all: each of {check_files(self.domains)} files can be used")
        return self.domains

    def begin(self, *, model: torch.nn.Module, **state) -> int:
        """Start or continue the run.

        Args:
            model: the network that is evaluated, selected and saved.
            state: everything else that learns or remembers, by the name it is saved under:
                optimizers, the scaler, discriminators, a teacher, statistics.

        Returns:
            The number of steps done. If the evaluation of the last of them was left by a signal,
            that step is not counted: `steps` repeats it, and `evaluate` restores what it changed.

        Raises:
            UserError: something with a state in the caller is not named (see `check_state`), or
                the data are not those that the run was trained on, or (code 4) the checkpoint
                does not fit.
        """
        named = {"model": model, **state}
        check_state(named, sys._getframe(1).f_locals)
        self.state = {**named, "log": self.log, "collapse": self.monitor}
        self.log.scaler = next((x for x in named.values() if hasattr(x, "get_scale")), None)
        step = 0
        if not self.dry_run:
            self.fingerprints = self.domains.fingerprints()
            self._lock_new_folder()
            if self.checkpoint is not None:
                step = self._go_on()
                self._restore_selected()
            elif self.resume:
                print(f"{self.folder}: no checkpoint yet, starting at step 0")
            self._open_folder(step)
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # as nohup asks
                signal.signal(number, self._on_signal)
        self.log.open(step, evaluated=self.repeat is None)
        self.log.muted = self.repeat is not None
        self.started = time.monotonic()
        if self.repeat is not None:
            self.step = step
            return step - 1
        return step

    def _lock_new_folder(self) -> None:
        """Lock a folder that was empty when the run was created, and must be so still."""
        if self.lock is None:
            self.lock = files.lock(self.folder / ".lock")
            if self._is_used():
                raise UserError(
                    f"out_dir: another run has begun in {self.folder}; choose another out_dir"
                )

    def _open_folder(self, step: int) -> None:
        for temporary in self.folder.rglob(".*.tmp"):  # of a run that was killed while writing
            files.remove(temporary)
        for orphan in (self.folder / "checkpoints").glob("step_*.pt.sha256"):
            if not orphan.with_suffix("").exists():
                files.remove(orphan)
        lists = self.domains.lists
        for name in lists if step > 0 else ():
            file = self.folder / name
            if not file.is_file() or file.read_bytes() != lists[name].encode():
                raise UserError(
                    f"--resume: {file} is gone, or was drawn from other images; restore them"
                )
        self._write_config()
        for name, text in lists.items():
            files.write_text(self.folder / name, text)
        self._write_status("running", step)

    def _write_config(self) -> None:
        """Write config.yaml; its head has a line with command and date per start of the run."""
        file = self.folder / "config.yaml"
        text = file.read_text(encoding="utf-8") if file.is_file() else ""
        head = list(itertools.takewhile(lambda line: line.startswith("# "), text.splitlines()))
        date = time.strftime("%Y-%m-%d %H:%M:%S %z")
        files.write_text(file, "\n".join([*head, f"# {self.command}  # {date}", self.config_text]))

    def _on_signal(self, number, frame) -> None:
        if self.signal is None:
            self.signal, self.signaled = number, time.monotonic()
            name = signal.Signals(number).name
            text = f"\n{name}: saving after this step; send it again to leave at once\n"
            if sys.__stderr__ is not None:
                with contextlib.suppress(OSError):
                    os.write(2, text.encode())  # print must not be entered within a print
        elif time.monotonic() - self.signaled > PAIR:
            signal.signal(number, signal.SIG_DFL)
            signal.raise_signal(number)

    def steps(self, start: int) -> Iterator[int]:
        """Steps start + 1 to the last one.

        After each step the run saves if that is due, and exits if a signal asks it to.

        Raises:
            UserError: something with a state was created after `begin`, and is not saved.
        """
        named = {name: value for name, value in self.state.items() if name not in OWN_STATE}
        check_state(named, sys._getframe(1).f_locals)  # what was created since `begin`, too
        step = start
        while step < self.last_step:
            self._fetch(step)
            step += 1
            self.step = step
            yield step
            self._end_repeat()
            if self.due(step, self.config.save_every):
                self.save(step)
            if self.signal:
                self._leave(step)

    def _fetch(self, step: int) -> None:
        """Wait for the batches of the next step here, where `step` can still be saved."""
        self.domains.on_wait = lambda: self._leave(step) if self.signal else None
        try:
            self.domains.fetch()
        except WorkerError:
            if step > 0 and self.saved != step and self.repeat is None:
                self.save(step)
            raise
        finally:
            self.domains.on_wait = lambda: None

    def watch(self, batches: Iterable, step: int) -> Watched:
        """The batches of a long pass between two steps.

        Before each of them, and while it waits for one, the run exits if a signal asks it to, saved
        as after `step`.
        """

        def leave() -> None:
            if self.signal:
                self._leave(step)

        return Watched(batches, leave)

    def _end_repeat(self) -> None:
        """Put back all that the repeated step has changed, so that its evaluation can be made."""
        if self.repeat is not None:
            self._restore(self.repeat, files.load_tensors(self.repeat))
            self.repeat, self.log.muted = None, False

    def sizes(self) -> str:
        """The keys that decide how much memory a step takes, and their values."""
        data = self.config.data
        values = {"data.batch": data.batch, "data.eval_batch": data.eval_batch}
        if data.target_batch is not None:
            values["data.target_batch"] = data.target_batch
        if data.task == "classification":
            values["data.size"] = data.size
        domains = {"source": next(iter(data.sources), None), "target": data.target}
        values |= {f"data.{name}.crop": x.crop for name, x in domains.items() if x and x.crop}
        return ", ".join(f"{key}={value}" for key, value in values.items())

    def failed(self, code: int, reason: str) -> None:
        """Say in status.json, unless it is another run's, that the process ends by an error."""
        if self.status:
            failure = {**self.status, "state": "failed", "code": code, "reason": reason}
            with contextlib.suppress(UserError):
                files.write_text(self.folder / "status.json", json.dumps(failure) + "\n")

    def end_after(self, step: int) -> None:
        """Let the run end after this step, which has been evaluated, instead of `config.steps`."""
        self.last_step = step
        self._save_pictures(step)

    def due(self, step: int, every: int) -> bool:
        """Whether something that is done every `every` steps is due; it is at the last step."""
        return step % every == 0 or step == self.last_step

    def _seconds(self) -> float:
        """The seconds that the run has taken, before and after it was resumed."""
        return self.seconds + time.monotonic() - self.started

    def _values(self) -> dict:
        """What is saved besides `state`: plain values."""
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
        return {
            "config": self.config_tree,
            "changes": self.changes,
            "classes": self.domains.classes,
            "fingerprints": self.fingerprints,
            "history": compact(self.history, self.config.select),
            "selected": self.selected,
            "seconds": self._seconds(),
            "rng": torch.get_rng_state(),
            "cuda_rng": cuda,
            "commits": self.commits,
            "machines": self.machines,
            "evaluation_due": self.evaluating,
        }

    def save(self, step: int) -> None:
        """Write a checkpoint.

        Raises:
            UserError: (code 3) the run is no longer finite; nothing is written then.
        """
        if self.dry_run:
            return
        self.log.check_finite(step)
        if fault := first_not_finite(self.state):
            raise self.log.not_finite(f"step {step}: {fault} is not finite")
        file = self.folder / "checkpoints" / f"step_{step:08d}.pt"
        files.save(file, step=step, **self.state, **self._values())
        self.saved = step
        self.log.resumable = True
        self.damaged.discard(file)
        usable = [file for file in self._checkpoints() if file not in self.damaged]
        for old in (*usable[KEEP:], *self.damaged):
            files.remove(old)
        self._write_status("running", step)

    def _checkpoints(self) -> list[Path]:
        """The files of all checkpoints, the newest first."""
        files_in_folder = (self.folder / "checkpoints").glob("step_*.pt")
        named = (f for f in files_in_folder if re.fullmatch(r"step_\d{8,}\.pt", f.name))
        checkpoints = (f for f in named if f.is_file())
        return sorted(checkpoints, reverse=True)

    def _read_newest(self, status: dict) -> None:
        """Read the newest checkpoint that is not damaged, if there is one, and check its config.

        Raises:
            UserError: (code 4) none can be read, or all are gone; or the config has changed.
        """
        checkpoints = self._checkpoints()
        for file in checkpoints:
            try:
                saved = files.load_tensors(file)
            except UserError as error:
                print(f"warning: {error}")
                self.damaged.add(file)
                continue
            if OWN_STATE - saved.keys():
                raise UserError(f"{file}: was written by another script or version", 4)
            self._check_checkpoint(file, saved)
            return
        # A run writes status.json first, with step 0, and other steps after their checkpoint.
        trained = status.get("step", (self.folder / "metrics.jsonl").exists())
        if checkpoints or trained:
            found = f"none of its {len(checkpoints)} checkpoints can be used"
            if not checkpoints:
                found = "its checkpoints are gone"
            raise UserError(
                f"{self.folder}: {found}; restore them, or choose another out_dir to start again", 4
            )

    def _check_checkpoint(self, file: Path, saved: dict) -> None:
        """Take over what a checkpoint says about the run, before data and model are there."""
        before = config_of(saved["config"], self.config, file)
        changed = check_changes(before, self.config, self.allow_change, self.folder)
        step, steps = saved["step"], self.config.steps
        if changed and steps <= step:
            raise UserError(
                f"--allow-change: {self.folder} is at step {step} already, and steps is {steps}; "
                f"set steps above {step} to go on"
            )
        self.checkpoint, self.checkpoint_state = file, saved
        self.changed = set(changed)
        new = ({"key": key, "before": pair[0], "now": pair[1]} for key, pair in changed.items())
        self.changes = [*saved["changes"], *({"step": step, **change} for change in new)]
        self.config.model.weights = self.config.init_from = None

    def _go_on(self) -> int:
        """Go on from the checkpoint. Returns its step."""
        file, saved, (machine,) = self.checkpoint, self.checkpoint_state, self.machines
        self.checkpoint_state = None  # its tensors need memory
        if changed := difference(saved["fingerprints"], self.fingerprints):
            raise UserError(
                f"--resume: {self.folder} was trained on other data ({changed}); "
                "restore the data, or choose another out_dir"
            )
        self._restore(file, saved)
        self.history, self.selected = saved["history"], saved["selected"]
        self.seconds = saved["seconds"]
        self.commits = list(dict.fromkeys([*saved["commits"], *self.commits]))
        self.machines = list(dict.fromkeys([*saved["machines"], machine]))
        self.repeat = file if saved["evaluation_due"] else None
        self.log.resumable = True
        print(f"{self.folder}: resuming after step {saved['step']}")
        if len(self.machines) > 1:
            print(
                f"warning: {self.folder} was trained on {'; '.join(saved['machines'])}, and now on "
                f"{machine}: the result may differ from that of an uninterrupted run"
            )
        return saved["step"]

    def _restore(self, file: Path, saved: dict) -> None:
        """Load the content of a checkpoint into what the run saves."""
        state = {**self.state, **dict.fromkeys(OWN_STATE - self.state.keys())}
        if "amp" in self.changed:  # a scaler that was off has nothing saved
            state |= {name: None for name in self.state if saved.get(name) == {}}
        optimizers = [x for x in self.state.values() if isinstance(x, torch.optim.Optimizer)]
        groups = [group for optimizer in optimizers for group in optimizer.param_groups]
        rates = [{k: group[k] for k in ("lr", "lr_scale") if k in group} for group in groups]
        files.restore(file, saved, **state)
        if any(map(is_rate, self.changed)):  # a state has the rates from before
            groups = [group for optimizer in optimizers for group in optimizer.param_groups]
            for group, rate in zip(groups, rates, strict=True):
                group.update(rate)
        torch.set_rng_state(saved["rng"])
        if saved["cuda_rng"] and torch.cuda.is_available():
            torch.cuda.set_rng_state_all(saved["cuda_rng"])

    def _restore_selected(self) -> None:
        """Restore model.pt as of the checkpoint; a later evaluation may have written another."""
        file = self.folder / "model.pt"
        if self.selected is not None:
            files.save_tensors(file, self.selected)
        else:
            files.remove(file)

    def evaluate(self, step: int, model: torch.nn.Module, sets: EvaluationSets) -> dict:
        """Measure the model, record its metrics, and keep its weights if they are selected.

        If a signal asks for it, the run exits before the next batch, saved as after `step`. When it
        is resumed, the evaluation takes place.

        Returns:
            The metrics, as `training.evaluation.evaluate`.
        """
        if step == self.step:
            self._end_repeat()
        loaders = {name: getattr(sets, name) for name in LOADERS}
        watched = {name: self.watch(x, step) for name, x in loaders.items() if x is not None}
        self.evaluating = step == self.step  # and not before the first step
        metrics, self.examples = evaluate(model, replace(sets, **watched))
        self.evaluating = False
        for name, value in metrics["criteria"].items():
            if not math.isfinite(value):
                raise self.log.not_finite(f"step {step}: criteria.{name} is {value}")
        predicted = metrics["predicted"]  # of each class: in metrics.jsonl only
        verdict = self.monitor.judge(step, predicted) if predicted else {"collapsed": None}
        entry = {name: value for name, value in metrics.items() if name != "predicted"}
        self.history.append({"step": step, **entry, "collapsed": verdict["collapsed"]})
        self.log.record({"step": step, **flatten(metrics), **verdict})
        self.log.print(evaluation_line(step, metrics, self.config.select))
        if self.config.pictures == "every" or step == self.last_step:
            self._save_pictures(step)
        if choose(self.history, self.config.select)["selected"]["step"] == step:
            self.selected = {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}
            if not self.dry_run:
                files.save_tensors(self.folder / "model.pt", self.selected)
        return metrics

    def _save_pictures(self, step: int) -> None:
        if self.examples and not self.dry_run:
            file = self.folder / "pictures" / f"step_{step:08d}.png"
            save_pictures(file, self.examples, self.domains.classes)
            self.examples = []

    def keep_selected(self, name: str) -> None:
        """Write the weights selected so far to the file `name` of the run folder.

        A part of the run ends with the last evaluation, and has a selection of its own.
        """
        self.history[-1]["part_ends"] = True
        if not self.dry_run:
            files.save_tensors(self.folder / name, self.selected)

    def _read_status(self) -> dict:
        file = self.folder / "status.json"
        try:
            return dict(json.loads(file.read_text())) if file.is_file() else {}
        except (ValueError, TypeError):
            raise UserError(
                f"{file} is damaged; remove it to go on from the checkpoints with --resume"
            ) from None

    def _write_status(self, state: str, step: int) -> None:
        method = type(self.config).method
        self.status = {"method": method, "state": state, "step": step, "steps": self.config.steps}
        files.write_text(self.folder / "status.json", json.dumps(self.status) + "\n")

    def _leave(self, step: int) -> None:
        """Save and exit, as a signal asked."""
        if self.repeat is not None:
            step = self.step  # it is saved already; what its repetition changes does not count
        elif self.saved != step:
            self.save(step)
        self.log.close()
        if not self.dry_run:
            self._write_status("stopped", step)
        observe(None)
        name = signal.Signals(self.signal).name
        print(f"stopped by {name} after step {step}; --resume goes on from here")
        sys.exit(128 + self.signal)

    def finish(self, domains: Domains, **facts) -> int:
        """Write summary.json, with `facts` of the method, and print the target's figures.

        Returns:
            The exit code, 0.
        """
        self.log.close()
        summary = self._summary(domains, facts)
        if self.dry_run:
            print("dry run: one step of training and of evaluation passed, nothing was written")
            return 0
        target = summary["target"]
        files.write_text(self.folder / "summary.json", json.dumps(summary, indent=2) + "\n")
        self._write_status("finished", summary["steps"])
        observe(None)
        for name, reason in summary["collapsed"].items():
            print(f"warning: {name}: the predictions on the target have collapsed: {reason}")
        if target["oracle"]["step"] is None:
            step, criterion = target["selected"]["step"], summary["selection"]["criterion"]
            print(f"no target labels to measure with; model.pt: step {step}, by {criterion}")
            print(self.folder / "summary.json")
            return 0
        for name, entry in target.items():
            values = ((k, v) for k, v in entry.items() if k != "step" and isinstance(v, float))
            figures = "  ".join(f"{k} {v:.2f}" for k, v in values)
            print(f"target {name:8} step {entry['step']}  {figures}")
        if "iou" in target["last"]:
            print(iou_table(target))
        print(f"{self.folder / 'summary.json'} (target: {domains.target_test_note})")
        return 0

    def _summary(self, domains: Domains, facts: dict) -> dict:
        config, device = self.config, get_device(self.config.device)
        target = choose(self.history, config.select)
        step = target["selected"]["step"]
        selected = next(e for e in self.history if e["step"] == step)
        labeled, commit = domains.target_labeled, self.commits[0]
        if len(self.commits) > 1:  # resumed by other code
            commit = ", ".join(map(str, self.commits))
        return {
            "method": type(config).method,
            "seed": config.seed,
            "steps": self.history[-1]["step"],
            "device": device.type,
            "machine": "; ".join(self.machines),
            "commit": commit,
            "seconds": round(self._seconds(), 1),
            "target": target,
            **({"changed": self.changes} if self.changes else {}),
            **({"target_labeled": len(labeled)} if labeled else {}),
            "target_test": domains.target_test_note,
            "classes": domains.classes,
            **({"absent_classes": absent} if (absent := domains.absent_classes) else {}),
            "collapse_alarms": self.monitor.alarms,
            "collapsed": {
                name: entry["collapsed"]
                for name, entry in (("last", self.history[-1]), ("selected", selected))
                if entry["collapsed"]
            },
            **facts,
            "source_val": self.history[-1]["source_val"],
            "selection": {
                "criterion": config.select,
                "value": selected["criteria"].get(config.select),  # none: the last step
                "part_of_training_loss": config.select in config.trained_criteria(),
            },
        }
