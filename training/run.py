"""The run folder: what a run writes, and how it continues after a stop.

config.yaml  metrics.jsonl  status.json  summary.json  MODEL.md  checkpoints/step_00000080.pt
model.pt  model.yaml  and model.safetensors, if it is asked for
.lock  held while a run uses the folder
predictions.pt  of a sample of the target's training images, by the last and the selected step
pictures/step_00000080.png  for segmentation
stage1.pt  of fine-tuning
tracker_id, tensorboard/, wandb/  of a tracker
target_labeled.txt, train.txt, val.txt  where images were drawn by the seed
"""

import contextlib
import hashlib
import math
import os
import signal
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

import torch

from common import files, ranks
from common.config import dump, flat_values, flatten, load_config
from common.errors import UserError, observe
from common.provenance import code_version
from data import Domains, EvaluationSets, check_files, open_domains, target_size
from data.fingerprint import difference, short_name
from data.loaders import Loader, WorkerError
from data.order import generator
from models.card import card_text
from models.weights import model_file
from training.card import model_card
from training.changes import check_changes, config_of, config_tree, is_rate
from training.collapse import CollapseMonitor
from training.device import (
    describe_machine,
    get_device,
    seed_everything,
    warn_of_slow_precision,
)
from training.evaluation import choose, compact, evaluate
from training.folder import RunFolder
from training.log import Log, evaluation_line
from training.pictures import save_pictures
from training.predictions import PREDICTIONS, predictions_of, share_that_differs
from training.state import OWN_STATE, check_state, first_not_finite, first_that_differs
from training.summary import print_summary, summarize, to_json
from training.tracker import import_tracker, open_tracker

SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)  # the run saves and leaves
PAIR = 1.0  # seconds within which a second signal counts as the same one, sent to us twice
# The keys that may differ between the machines of several processes.
OF_A_MACHINE = ("data.root", "data.cache", "data.cache_gb", "data.storage", "data.workers")
MODEL_FILES = {"pt": ".pt", "safetensors": files.SAFETENSORS}  # endings by weights_format
LOADERS = ("source_val", "target_train", "target_test")  # of an evaluation


def _hash(x: torch.Tensor) -> str:
    """A short text that differs if a value of the tensor does."""
    return hashlib.sha256(x.cpu().numpy().tobytes()).hexdigest()[:16]


class Interrupted(Exception):
    """A signal came while a batch was awaited."""


class Watched:
    """A loader of a pass that a signal may end before each batch, and while it waits for one.

    Of several processes all leave it together, so the caller takes every batch.

    Args:
        loader: the loader.
        stopping: whether a signal asks this process to end.
        leave: leaves the run.
        save: called if the loader's workers fail, before the error goes on.
    """

    def __init__(
        self,
        loader: Iterable,
        stopping: Callable[[], bool],
        leave: Callable[[], None],
        save: Callable[[], None],
    ):
        self.loader, self.stopping, self.leave, self.save = loader, stopping, leave, save

    def __len__(self) -> int:
        return len(self.loader)

    def __getattr__(self, name: str):
        return getattr(self.loader, name)

    def __iter__(self) -> Iterator:
        if isinstance(self.loader, Loader):
            self.loader.on_wait = self._check
        batches = iter(self.loader)
        agreement, stopped = ranks.Agreement(), False
        # Of several processes one may have a batch less; all take as many turns, and leave in one.
        for _ in range(int(ranks.most(torch.tensor(len(self.loader))))):
            batch = None
            if not stopped:
                try:
                    batch = next(batches, None)
                    self._check()
                except Interrupted:
                    batch, stopped = None, True
                except WorkerError:
                    self.save()
                    raise
            if agreement.reached(stopped):
                break
            if batch is not None:
                yield batch
        agreement.end()
        if ranks.agree(stopped):
            self.leave()

    def _check(self) -> None:
        if self.stopping():
            raise Interrupted


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
        ranks.join(config.process_timeout)
        shared = {key: x for key, x in flat_values(config).items() if key not in OF_A_MACHINE}
        ranks.check_same(shared, "start all of them by the same command")
        seed_everything(config.seed, config.deterministic)
        warn_of_slow_precision(get_device(config.device), config.amp)
        self.config, self.folder, self.dry_run = config, Path(config.out_dir), args.dry_run
        self.writes = ranks.is_first() and not args.dry_run
        self.resume = ranks.agree(args.resume)  # torchrun may restart one machine only
        self.read_all, self.command = args.all, args.command
        self.history: list[dict] = []
        self.examples: list[tuple] = []
        self.seconds, self.signal, self.saved = 0.0, None, None
        self.signaled = 0.0  # time of the first signal
        self.agreement = ranks.Agreement()  # of all processes to stop
        self.step = -1  # the step that is being taken
        self.evaluating = False  # whether it is over but for its evaluation
        self.repeat: Path | None = None  # a checkpoint saved then, until that step is evaluated
        # Saved too, since an evaluation after the checkpoint may have written another model.pt.
        self.selected: dict | None = None
        # Logits float16 (M, K) of the last and the selected step, see `Sample`, and of the run that
        # this one starts from, which may be gone when this one is resumed.
        self.predictions: dict[str, torch.Tensor] = {}
        self.start_sha256: str | None = None  # of the model of that run
        self.domains: Domains | None = None
        self.monitor: CollapseMonitor | None = None
        self.commits = [code_version()]  # now: the code may change while the run goes on
        self.machines = [describe_machine(get_device(config.device))]
        self.config_text, self.config_tree = dump(config), config_tree(config)
        self.config_values = flat_values(config)
        self.model_section = replace(config.model)
        self.allow_change = self.resume and args.allow_change
        self.changes: list[dict] = []  # of keys, by --allow-change, since the run began
        self.changed: set[str] = set()  # the keys that have changed now
        self.checkpoint: Path | None = None  # to go on from, and what it contains until `begin`
        self.checkpoint_state: dict | None = None
        self.run_folder = RunFolder(self.folder, type(config).method, config.steps)
        observe(self)
        self._check_folder()
        if ranks.is_first():
            import_tracker(config.tracker)  # a package that is missing is told at once
        self.resume = self.resume and not self.dry_run
        if self.dry_run:
            config.steps = 1
        self.last_step = config.steps
        file = self.folder / "metrics.jsonl" if self.writes else None
        self.log = Log(file, config.steps, config.accumulate)

    def _check_folder(self) -> None:
        folder = self.run_folder
        if not folder.is_used():
            return  # `begin` locks it
        begun = self.resume or folder.has_status()
        if folder.has_config() and begun and self.writes:
            folder.take()
        config, status, method = self.config, folder.read_status(), folder.method
        other = status.get("method", method)
        if other != method:
            raise UserError(
                f"out_dir: {self.folder} is a run of method {other}, not {method}; "
                "choose another out_dir"
            )
        if folder.has_failed_early(status):
            self.resume = True  # as good as an empty folder
        if not folder.has_config():
            raise UserError(
                f"out_dir: {self.folder} is used, and has no config.yaml, so it is not a run "
                "folder; choose another out_dir"
            )
        if not self.resume:
            raise UserError(
                f"out_dir: {self.folder} is used; add --resume to go on with it, "
                "or choose another with out_dir=..."
            )
        if folder.is_finished():
            before = load_config(type(config), str(self.folder / "config.yaml"))
            if not check_changes(before, config, self.allow_change, self.folder):
                print(f"{self.folder}: finished already, nothing to do")
                ranks.leave()
                sys.exit(0)
        if newest := folder.read_newest(status):
            self._check_checkpoint(*newest)

    def open_domains(self) -> Domains:
        """Open the data of the config and print what the run learns from."""
        trained = self.checkpoint_state and self.checkpoint_state["classes"]
        self.domains = ranks.first_on_machine(  # it may have to make files that the others read
            lambda: open_domains(self.config.data, self.config.seed, self.dry_run, trained)
        )
        self.domains.device = get_device(self.config.device)
        self.domains.parts = self.config.accumulate
        print(self.domains.describe())
        shares = None if self.dry_run else self.domains.source_shares()
        names = self.domains.classes, shares, self.domains.absent_classes
        self.monitor = CollapseMonitor(*names, self.log.print).to(get_device(self.config.device))
        self.log.monitor = self.monitor
        self._set_steps()
        if self.read_all:
            print(f"--all: each of {check_files(self.domains)} files can be used")
        return self.domains

    def _set_steps(self) -> None:
        """Let a run over a stream have a step per batch of it, or the fewer ones of its `steps`."""
        if self.domains.stream is None:
            return
        batches, steps = self.domains.stream_length(), self.config.steps
        if steps is not None and steps > batches:
            raise UserError(
                f"steps: {steps}, but the stream has {batches} batches of "
                f"{self.config.data.batch}; set steps: null for all of them"
            )
        steps = batches if steps is None else steps
        self.config.steps = self.last_step = self.log.steps = self.run_folder.steps = steps

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
            self.predictions = self._predictions_of_start()
            if self.config.init_from:
                self.start_sha256 = files.sha256(model_file(self.config.init_from))
            if self.writes:
                self.run_folder.take_new()
            if self.checkpoint is not None:
                step = self._go_on()
                if self.writes:
                    self._restore_selected()
            elif self.resume:
                print(f"{self.folder}: no checkpoint yet, starting at step 0")
            self._check_same(step)
            if self.writes:
                lists, config = self.domains.lists, self.config
                resize = target_size(config.data)
                card = card_text(config, self.model_section, self.domains.classes, resize)
                self.run_folder.open(step, self.command, self.config_text, card, lists)
            for number in SIGNALS:
                if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                    continue  # as nohup asks
                signal.signal(number, self._on_signal)
        if self.writes:
            what = self.config.tracker, self.folder, step, self.config_values
            self.log.tracker = open_tracker(*what, self.log.print)
        self.log.open(step, evaluated=self.repeat is None)
        self.log.muted = self.repeat is not None
        self.started = time.monotonic()
        if self.repeat is not None:
            self.step = step
            return step - 1
        return step

    def _check_same(self, step: int) -> None:
        """Raise `UserError` if the processes have other images, or are not at the same step."""
        images = {f"data.{role}": _hash(x) for role, x in self.fingerprints.items()}
        ranks.check_same(images, "all machines must have the same images and lists")
        folder = {f"out_dir: the step in {self.folder}": step}
        ranks.check_same(folder, "use a folder that all machines share")

    def _on_signal(self, number, frame) -> None:
        if self.signal is None:
            self.signal, self.signaled = number, time.monotonic()
            name = signal.Signals(number).name
            text = f"\n{name}: saving after this step; send it again to leave at once\n"
            if sys.__stderr__ is not None and ranks.is_first():
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
            # For dropout and noise: a checkpoint needs no state of a generator.
            noise = generator(self.config.seed, "step", step, ranks.number())
            torch.manual_seed(noise.initial_seed())
            yield step
            self._end_repeat()
            if self.due(step, self.config.save_every):
                self.save(step)
            if self.agreement.reached(self.signal is not None):
                self._leave(step)

    def _fetch(self, step: int) -> None:
        """Wait for the batches of the next step here, where `step` can still be saved."""
        if ranks.count() == 1:  # several processes leave together, after the step
            self.domains.on_wait = lambda: self._leave(step) if self.signal else None
        try:
            self.domains.fetch()
        except WorkerError:
            self._save_once(step)
            raise
        finally:
            self.domains.on_wait = lambda: None

    def watch(self, batches: Iterable, step: int) -> Watched:
        """The batches of a long pass between two steps.

        Before each of them, and while it waits for one, the run exits if a signal asks it to, saved
        as after `step`. It is saved so, too, if the workers fail.
        """

        return Watched(
            batches,
            stopping=lambda: self.signal is not None,
            leave=lambda: self._leave(step),
            save=lambda: self._save_once(step),
        )

    def _save_once(self, step: int) -> None:
        """Write the checkpoint of `step`, unless it is there already or there is nothing to save.

        During a repeated step it is there, and what the repetition changes does not count. One of
        several processes cannot save alone.
        """
        if step > 0 and self.saved != step and self.repeat is None and ranks.count() == 1:
            self.save(step)

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

    def failed(self, code: int, reason: str) -> str | None:
        """Say in status.json, and to the other processes, that this process ends by an error.

        Returns:
            What to print; None if another process does.
        """
        if self.writes:
            self.run_folder.failed(code, reason)
        return ranks.announce(code, reason)

    def explain(self, error: Exception) -> UserError | None:
        """An error that another process has caused."""
        return ranks.lost(error)

    def end_after(self, step: int) -> None:
        """Let the run end after this step, which has been evaluated, instead of `config.steps`."""
        self.last_step = step
        self._save_pictures(step)

    def due(self, step: int, every: int) -> bool:
        """Whether something that is done every `every` steps is due; it is at the last step."""
        return step % every == 0 or step == self.last_step

    def total_seconds(self) -> float:
        """The seconds that the run has taken, before and after it was resumed."""
        return self.seconds + time.monotonic() - self.started

    def _values(self) -> dict:
        """What is saved besides `state`: plain values."""
        return {
            "config": self.config_tree,
            "changes": self.changes,
            "classes": self.domains.classes,
            "fingerprints": self.fingerprints,
            "history": self.history,
            "selected": self.selected,
            "sampled_predictions": self.predictions,
            "start_sha256": self.start_sha256,
            "seconds": self.total_seconds(),
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
        log_state = self.log.state_dict()  # of all processes
        others = {name: value for name, value in self.state.items() if name != "log"}
        if fault := first_not_finite(others):
            raise self.log.not_finite(f"step {step}: {fault} is not finite")
        if self.writes:
            self.run_folder.save_checkpoint(step, **others, log=log_state, **self._values())
        self.saved = step
        self.log.resumable = True

    def _check_checkpoint(self, file: Path, saved: dict) -> None:
        """Take over what a checkpoint says about the run, before data and model are there."""
        if OWN_STATE - saved.keys():
            raise UserError(f"{file}: was written by another script or version", 4)
        before = config_of(saved["config"], self.config, file)
        changed = check_changes(before, self.config, self.allow_change, self.folder)
        step, steps = saved["step"], self.config.steps
        if changed and steps is not None and steps <= step:
            raise UserError(
                f"--allow-change: {self.folder} is at step {step} already, and steps is {steps}; "
                f"set steps above {step} to go on"
            )
        self.checkpoint, self.checkpoint_state = file, saved
        self.changed = set(changed)
        new = ({"key": key, "before": pair[0], "now": pair[1]} for key, pair in changed.items())
        self.changes = [*saved["changes"], *({"step": step, **change} for change in new)]
        start = self.config.init_from and files.recorded_sha256(model_file(self.config.init_from))
        if start and start != saved["start_sha256"]:
            raise UserError(
                f"init_from: {self.config.init_from} has been trained again since {self.folder} "
                "began; remove that folder, or choose another out_dir"
            )
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
        self.predictions = saved["sampled_predictions"]
        self.start_sha256 = saved["start_sha256"]
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

    def _restore_selected(self) -> None:
        """Restore model.pt as of the checkpoint; a later evaluation may have written another."""
        if self.selected is not None:
            self._write_selected()
            return
        for ending in MODEL_FILES.values():
            files.remove(self.folder / f"model{ending}")

    def _write_selected(self) -> None:
        """Write the selected weights, in one format or in both."""
        for name, ending in MODEL_FILES.items():
            file = self.folder / f"model{ending}"
            if name in ("pt", self.config.weights_format):
                files.save_tensors(file, self.selected)
            else:
                files.remove(file)  # of the run before it was resumed: other weights by now

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
        self._check_processes(step)
        self.evaluating = step == self.step  # and not before the first step
        metrics, self.examples, sample = evaluate(model, replace(sets, **watched))
        self.evaluating = False
        for name, value in metrics["criteria"].items():
            if not math.isfinite(value):
                raise self.log.not_finite(f"step {step}: criteria.{name} is {value}")
        predicted = metrics["predicted"]  # of each class: in metrics.jsonl only
        verdict = self.monitor.judge(step, predicted) if predicted else {"collapsed": None}
        entry = {name: value for name, value in metrics.items() if name != "predicted"}
        entry = {"step": step, **entry, "collapsed": verdict["collapsed"]}
        # With statistics of the target, source validation falls, and the more, the better they fit.
        entry["source_vetoes"] = not model.learns_statistics
        self.history = compact([*self.history, entry], self.config.select)
        others = ("confusion", "source_count")
        record = {name: value for name, value in metrics.items() if name not in others}
        self.log.record({"step": step, **flatten(record), **verdict})
        self.log.print(evaluation_line(step, metrics, self.config.select))
        if self.config.pictures == "every" or step == self.last_step:
            self._save_pictures(step)
        chosen = choose(self.history, self.config.select)
        if sample is not None:
            names = [name for name in ("last", "selected") if chosen[name]["step"] == step]
            self.predictions |= dict.fromkeys(names, sample)
        if chosen["selected"]["step"] == step:
            self.selected = {k: v.to("cpu", copy=True) for k, v in model.state_dict().items()}
            if self.writes:
                self._write_selected()
        return metrics

    def _check_processes(self, step: int) -> None:
        """Raise `UserError` if the processes no longer train the same thing."""
        state = {name: value for name, value in self.state.items() if name != "log"}
        if different := first_that_differs(state):
            raise UserError(
                f"step {step}: {different} differs between the processes; call average_gradients "
                "before each step of an optimizer, with every module whose batch norm trains, and "
                "compute what is not a mean over images from the rows of all processes "
                "(common/ranks.py)",
                1,
            )

    def _save_pictures(self, step: int) -> None:
        if self.examples and self.writes:
            file = self.folder / "pictures" / f"step_{step:08d}.png"
            save_pictures(file, self.examples, self.domains.classes)
            self.log.tracker.picture(step, file)
            self.examples = []

    def keep_selected(self, name: str) -> None:
        """Write the weights selected so far to the file `name` of the run folder.

        A part of the run ends with the last evaluation, and has a selection of its own.
        """
        self.history[-1]["part_ends"] = True
        if self.writes:
            files.save_tensors(self.folder / name, self.selected)

    def _leave(self, step: int) -> None:
        """Save and exit, as a signal asked."""
        if self.repeat is not None:
            step = self.step  # it is saved already; what its repetition changes does not count
        elif self.saved != step:
            self.save(step)
        self.log.close()
        if self.writes:
            self.run_folder.write_status("stopped", step)
        observe(None)
        number = max(ranks.gather_objects(int(self.signal or 0)))  # of those that got one
        name = signal.Signals(number).name
        print(f"stopped by {name} after step {step}; --resume goes on from here")
        self.agreement.end()
        ranks.leave()
        self.log.tracker.finish()
        sys.exit(128 + number)

    def _sample(self) -> dict | None:
        """What names the images of `predictions`, and the classes; None without such images."""
        if self.domains.criteria is None:
            return None
        return {
            "set": short_name(self.fingerprints["target"]),
            "numbers": self.domains.criteria.indices.int(),
            "classes": self.domains.classes,
        }

    def _predictions_of_start(self) -> dict[str, torch.Tensor]:
        """The predictions of the run that `init_from` names, if they are of the same images."""
        sample = self._sample()
        logits = predictions_of(self.config.init_from, sample) if sample else None
        return {} if logits is None else {"start": logits}

    def _write_predictions(self) -> dict:
        """Write predictions.pt. Returns an entry of summary.json: how many differ from the start's.

        It is empty if this run starts from none, or from one that has not predicted these images.
        """
        start = self.predictions.get("start")
        saved = {name: self.predictions[name] for name in ("last", "selected")}
        files.save_tensors(self.folder / PREDICTIONS, {**self._sample(), **saved})
        if start is None:
            return {}
        share = share_that_differs(start, saved["selected"])
        run = self.config_values["init_from"]  # that of the config is null after a resume
        return {"changed_from_start": {"run": run, "share": share}}

    def finish(self, domains: Domains, **facts) -> int:
        """Write summary.json, with `facts` of the method, and print the target's figures.

        Returns:
            The exit code, 0.
        """
        self.log.close()
        if self.writes and "last" in self.predictions:
            facts = {**facts, **self._write_predictions()}
        if self.start_sha256:
            facts = {**facts, "start_sha256": self.start_sha256}
        summary = summarize(self, domains, facts)
        if self.dry_run:
            print("dry run: one step of training and of evaluation passed, nothing was written")
        if self.writes:
            files.write_text(self.folder / "summary.json", to_json(summary))
            files.write_text(self.folder / "MODEL.md", model_card(self, domains, summary))
            self.run_folder.write_status("finished", summary["steps"])
            print_summary(summary, self.folder / "summary.json")
        observe(None)
        self.agreement.end()
        ranks.leave()
        self.log.tracker.finish()
        return 0
