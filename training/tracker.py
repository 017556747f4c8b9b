"""Trackers: the lines of metrics.jsonl and the pictures, sent to TensorBoard, wandb or Trackio too.

Their packages are optional, and are imported for a run that asks for one only.
"""

import importlib
import math
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import numpy as np
from PIL import Image

from common.config import dump_value, flatten
from common.errors import UserError
from common.optional import optional
from common.writing import write_text

PROJECT = "domain-adaptation"  # the name under which wandb and Trackio collect the runs
MODULES = {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "trackio": "trackio"}
FINISH = 60  # s; how long wandb may upload at the end of a run


def import_tracker(name: str) -> ModuleType | None:
    """The module of a tracker; None for `none`.

    Raises:
        UserError: the package is missing, or cannot be imported.
    """
    if name == "none":
        return None
    try:
        package = optional(name)
        # A folder of this name is taken for a package, too, and wandb makes one.
        if getattr(package, "__file__", None) is not None:
            return importlib.import_module(MODULES[name])
    except Exception as error:  # packages that do not fit each other fail in many ways
        raise UserError(
            f"tracker: the package {name} cannot be imported ({_reason(error)}); "
            "repair it, or set tracker: none"
        ) from None
    raise UserError(
        f"tracker: {name} needs the package {name}; pip install {name}, or set tracker: none"
    )


def _reason(error: Exception) -> str:
    """The kind of an error, and the first line of its message."""
    lines = str(error).strip().splitlines()
    return ": ".join([type(error).__name__, *lines[:1]])


def finite_numbers(values: dict) -> dict[str, float]:
    """The finite numbers of a line of metrics.jsonl, without its step.

    Texts, lists, None and truth values are left out. The parts of a name are separated by a slash,
    by which all trackers group their charts: `target.accuracy` becomes `target/accuracy`.
    """
    numbers = {}
    for name, value in flatten(values).items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if name != "step" and is_number and math.isfinite(value):
            numbers[name.replace(".", "/")] = value
    return numbers


class _TensorBoard:
    """Writes to the folder `tensorboard` of the run folder."""

    def __init__(self, tensorboard, folder: Path, step: int, config: dict):
        # Figures of later steps, which a broken run wrote, are no longer shown.
        self.writer = tensorboard.SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1)
        lines = (f"    {key}: {dump_value(value)}" for key, value in config.items())
        self.writer.add_text("config", "\n".join(lines), step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()  # to the file, as metrics.jsonl: a run that is killed loses nothing

    def picture(self, step: int, file: Path) -> None:
        with Image.open(file) as image:
            pixels = np.asarray(image.convert("RGB"))
        self.writer.add_image("pictures", pixels, step, dataformats="HWC")
        self.writer.flush()

    def finish(self) -> None:
        self.writer.close()


class _Wandb:
    """A run of wandb. Its own process sends what is logged, and goes on trying without network."""

    def __init__(self, wandb, folder: Path, step: int, config: dict):
        os.environ.setdefault("WANDB_FINISH_TIMEOUT", str(FINISH))  # wandb itself would wait on
        self.wandb = wandb
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            dir=os.environ.get("WANDB_DIR", str(folder)),
            id=_run_id(folder, step),
            name=_run_name(folder),
            config=config,
            resume="allow" if step > 0 else None,
            allow_val_change=True,  # a run that goes on may have other values
        )
        # wandb's own step only grows. With it, a resumed run would lose the lines of the steps that
        # a broken run had begun.
        self.run.define_metric("step")
        self.run.define_metric("*", step_metric="step")

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log({"step": step, **numbers})

    def picture(self, step: int, file: Path) -> None:
        self.run.log({"step": step, "pictures": self.wandb.Image(str(file))})

    def finish(self) -> None:
        self.run.finish()


class _Trackio:
    """A run of Trackio, which is local, or sent by a thread if TRACKIO_SPACE_ID names a Space."""

    def __init__(self, trackio, folder: Path, step: int, config: dict):
        self.trackio = trackio
        self.run = trackio.init(
            project=os.environ.get("TRACKIO_PROJECT", PROJECT),
            name=f"{_run_name(folder)}-{_run_id(folder, step)}",  # it goes on with runs by name
            config=config,
            resume="allow",
        )

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.run.log(dict(numbers), step=step)

    def picture(self, step: int, file: Path) -> None:
        self.run.log({"pictures": self.trackio.Image(str(file))}, step=step)

    def finish(self) -> None:
        self.trackio.finish()  # not of the run alone, or it would happen again at exit


def _run_name(folder: Path) -> str:
    return folder.resolve().name


def _run_id(folder: Path, step: int) -> str:
    """The name of the tracked run, kept in the run folder; a new one for a run that starts anew."""
    file = folder / "tracker_id"
    if step == 0 or not file.is_file():
        write_text(file, secrets.token_hex(4) + "\n")
    return file.read_text().strip()


SENDERS = {"tensorboard": _TensorBoard, "wandb": _Wandb, "trackio": _Trackio}


class Tracker:
    """Sends what a run records, without ever ending the run.

    If its sender fails, a warning is printed, and nothing more is sent.

    Args:
        name: the tracker, for the warning.
        start: makes the sender; None to send nothing.
        tell: called with the warning.
    """

    def __init__(
        self,
        name: str = "none",
        start: Callable[[], object] | None = None,
        tell: Callable[[str], None] = print,
    ):
        self.name, self.tell, self.sender = name, tell, None
        if start is not None:
            self.sender = self._try(start)

    def _try(self, function: Callable, *arguments):
        try:
            return function(*arguments)
        except Exception as error:  # each package has errors of its own
            self.sender = None
            self.tell(
                f"warning: tracker: {self.name} failed ({_reason(error)}); the run goes on without "
                "it, and metrics.jsonl has all figures"
            )

    def log(self, step: int, values: dict) -> None:
        """Send the finite numbers of a line of metrics.jsonl."""
        if self.sender is not None:
            self._try(self.sender.log, step, finite_numbers(values))

    def picture(self, step: int, file: Path) -> None:
        """Send a png file."""
        if self.sender is not None:
            self._try(self.sender.picture, step, file)

    def finish(self) -> None:
        """End the tracked run, once what was sent has arrived, or did not in time."""
        if self.sender is not None:
            self._try(self.sender.finish)
            self.sender = None


def open_tracker(
    name: str, folder: Path, step: int, config: dict, tell: Callable[[str], None] = print
) -> Tracker:
    """Start a tracked run, or go on with that of the run folder.

    Args:
        name: `none`, `tensorboard`, `wandb` or `trackio`.
        folder: the run folder, which exists.
        step: the number of steps done; 0 starts a new tracked run.
        config: {dotted key: value}.
        tell: called with a warning if the tracker fails, now or later.

    Raises:
        UserError: the package is missing, or cannot be imported.
    """
    module = import_tracker(name)
    if module is None:
        return Tracker()
    return Tracker(name, lambda: SENDERS[name](module, folder, step, config), tell)
