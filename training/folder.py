"""The run folder: its lock, config.yaml, status.json and checkpoints."""

import contextlib
import itertools
import json
import os
import re
import time
from pathlib import Path

from common import files
from common.errors import UserError
from models.card import CARD

KEEP = 2  # checkpoints: the newest, and the one before in case the newest is damaged


def finished_summary(folder: Path) -> dict | None:
    """summary.json of a finished run; None if it or model.pt is gone or damaged."""
    try:
        status = json.loads((folder / "status.json").read_text())
        summary = json.loads((folder / "summary.json").read_text())
        finished = status["state"] == "finished" and bool(summary["target"]["last"])
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return summary if finished and files.is_intact(folder / "model.pt") else None


class RunFolder:
    """The folder of one run. Nothing is written before `take`, `take_new` or `open`.

    Args:
        path: the folder; it need not exist.
        method: the name of the method.
        steps: the number of steps of the run.

    Attributes:
        lock: held while a run uses the folder.
        status: status.json as this run has written it; empty before it has.
        damaged: checkpoints that could not be used.

    Raises:
        UserError: there cannot be such a folder, or (code 5) it cannot be written to.
    """

    def __init__(self, path: Path, method: str, steps: int):
        self.path, self.method, self.steps = path, method, steps
        self.lock: files.Lock | None = None
        self.status: dict = {}
        self.damaged: set[Path] = set()
        place = next(p for p in (path, *path.parents) if os.path.lexists(p))
        if not place.is_dir():
            raise UserError(f"out_dir: {place} is a file; choose another out_dir")
        if not os.access(place, os.W_OK | os.X_OK):
            raise UserError(f"out_dir: {place} cannot be written to; choose another out_dir", 5)

    def is_used(self) -> bool:
        """Whether the folder contains anything but a lock, which a failed start may leave."""
        try:
            return self.path.is_dir() and any(p.name != ".lock" for p in self.path.iterdir())
        except OSError as error:  # such as a name that is too long
            raise UserError(
                f"out_dir: {self.path} cannot be used ({error.strerror}); choose another out_dir"
            ) from None

    def has_config(self) -> bool:
        return (self.path / "config.yaml").is_file()

    def has_status(self) -> bool:
        return (self.path / "status.json").exists()

    def take(self) -> None:
        """Lock the folder of a run. Raises `UserError` if another process uses it."""
        self.lock = files.lock(self.path / ".lock")

    def take_new(self) -> None:
        """Lock a folder that was empty when the run was created, and must be so still."""
        if self.lock is None:
            self.take()
            if self.is_used():
                raise UserError(
                    f"out_dir: another run has begun in {self.path}; choose another out_dir"
                )

    def read_status(self) -> dict:
        """What status.json contains; {} without such a file."""
        file = self.path / "status.json"
        try:
            return dict(json.loads(file.read_text())) if file.is_file() else {}
        except (ValueError, TypeError):
            raise UserError(
                f"{file} is damaged; remove it to go on from the checkpoints with --resume"
            ) from None

    def write_status(self, state: str, step: int) -> None:
        self.status = {"method": self.method, "state": state, "step": step, "steps": self.steps}
        files.write_text(self.path / "status.json", json.dumps(self.status) + "\n")

    def failed(self, code: int, reason: str) -> None:
        """Say in status.json, unless it is another run's, that the process ends by an error."""
        if self.status:
            failure = {**self.status, "state": "failed", "code": code, "reason": reason}
            with contextlib.suppress(UserError):
                files.write_text(self.path / "status.json", json.dumps(failure) + "\n")

    def is_finished(self) -> bool:
        """Whether the run is finished, and has summary.json and an undamaged model.pt."""
        return finished_summary(self.path) is not None

    def has_failed_early(self, status: dict) -> bool:
        """Whether the folder is that of a run which failed before its first checkpoint."""
        failed = status.get("state") == "failed" and status.get("step") == 0
        return failed and not self.checkpoints() and not (self.path / "summary.json").exists()

    def open(self, step: int, command: str, config: str, card: str, lists: dict[str, str]) -> None:
        """Prepare the folder for a run that starts or goes on.

        Args:
            step: the number of steps done.
            command: the command line, for the head of config.yaml.
            config: the text of config.yaml.
            card: the text of model.yaml.
            lists: {file name: text} of the lists of images that were drawn by the seed.

        Raises:
            UserError: a list of the run that goes on is gone, or is another one.
        """
        for temporary in self.path.rglob(".*.tmp"):  # of a run that was killed while writing
            files.remove(temporary)
        for orphan in (self.path / "checkpoints").glob("step_*.pt.sha256"):
            if not orphan.with_suffix("").exists():
                files.remove(orphan)
        for name in lists if step > 0 else ():
            file = self.path / name
            if not file.is_file() or file.read_bytes() != lists[name].encode():
                raise UserError(
                    f"--resume: {file} is gone, or was drawn from other images; restore them"
                )
        self._write_config(step, command, config)
        files.write_text(self.path / CARD, card)
        for name, text in lists.items():
            files.write_text(self.path / name, text)
        self.write_status("running", step)

    def _write_config(self, step: int, command: str, config: str) -> None:
        """Write config.yaml; its head has a line with command and date per start of the run.

        A start that ended before the first checkpoint has no part in a run that begins at step 0.
        """
        file = self.path / "config.yaml"
        text = file.read_text(encoding="utf-8") if step > 0 and file.is_file() else ""
        head = list(itertools.takewhile(lambda line: line.startswith("# "), text.splitlines()))
        date = time.strftime("%Y-%m-%d %H:%M:%S %z")
        files.write_text(file, "\n".join([*head, f"# {command}  # {date}", config]))

    def checkpoints(self) -> list[Path]:
        """The files of all checkpoints, the newest first."""
        files_in_folder = (self.path / "checkpoints").glob("step_*.pt")
        named = (f for f in files_in_folder if re.fullmatch(r"step_\d{8,}\.pt", f.name))
        checkpoints = (f for f in named if f.is_file())
        return sorted(checkpoints, reverse=True)

    def save_checkpoint(self, step: int, **state) -> None:
        """Write the checkpoint of a step, and remove all but the newest `KEEP`."""
        file = self.path / "checkpoints" / f"step_{step:08d}.pt"
        files.save(file, step=step, **state)
        self.damaged.discard(file)
        usable = [file for file in self.checkpoints() if file not in self.damaged]
        for old in (*usable[KEEP:], *self.damaged):
            files.remove(old)
        self.write_status("running", step)

    def read_newest(self, status: dict) -> tuple[Path, dict] | None:
        """The newest checkpoint that is not damaged, and its content; None if there is none yet.

        Args:
            status: what status.json contains.

        Raises:
            UserError: (code 4) none can be read, or all are gone.
        """
        checkpoints = self.checkpoints()
        for file in checkpoints:
            try:
                return file, files.load_tensors(file)
            except UserError as error:
                print(f"warning: {error}")
                self.damaged.add(file)
        # A run writes status.json first, with step 0, and other steps after their checkpoint.
        trained = status.get("step", (self.path / "metrics.jsonl").exists())
        if checkpoints or trained:
            found = f"none of its {len(checkpoints)} checkpoints can be used"
            if not checkpoints:
                found = "its checkpoints are gone"
            raise UserError(
                f"{self.path}: {found}; restore them, or choose another out_dir to start again", 4
            )
        return None
