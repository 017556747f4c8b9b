"""Safe files: locks; checkpoints have a sha256 file and are loaded as plain data."""

import fcntl
import hashlib
import json
import os
import pickle
import socket
import warnings
from pathlib import Path

import torch

from common import safetensors
from common.errors import UserError
from common.writing import write_atomically, write_text

SAFETENSORS = ".safetensors"  # the ending of files in that format


class Lock:
    """An open, locked file, which this object closes at its end.

    A plain file object would warn of that.

    Args:
        number: the file descriptor.
    """

    def __init__(self, number: int):
        self.number = number

    def __del__(self):
        os.close(self.number)


def lock(path: Path) -> Lock:
    """Lock the file `path` until this process ends, or until the returned object is gone.

    The file names the process that holds the lock. `fcntl.lockf` is not inherited by the workers of
    a loader, as `flock` is, so the lock is free at once when a run is killed.

    Raises:
        UserError: another process holds the lock, or (code 5) the file cannot be written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = Lock(os.open(path, os.O_RDWR | os.O_CREAT, 0o666))
        try:
            fcntl.lockf(file.number, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):
            owner = os.read(file.number, 1000).decode(errors="replace").strip()
            raise UserError(
                f"out_dir: {path.parent} is in use by another run ({owner}); "
                "wait for it to end, or choose another out_dir"
            ) from None
        except OSError as error:
            print(
                f"warning: {path.parent}: its file system has no locks ({error.strerror}); "
                "make sure that no other run uses the folder"
            )
        os.ftruncate(file.number, 0)
        os.write(file.number, f"process {os.getpid()} on {socket.gethostname()}\n".encode())
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); "
            "free some space or choose another out_dir",
            5,
        ) from None
    return file


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def sha256(path: Path) -> str:
    """The hash of a file's content, as hexadecimal digits."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def recorded_sha256(path: Path) -> str | None:
    """What the hash file of a file of `save_tensors` says; None if there is none to read."""
    try:
        return next(iter(_hash_file(path).read_text().split()), None)
    except (OSError, UnicodeDecodeError):
        return None


def is_intact(path: Path) -> bool:
    """Whether a file of `save_tensors` is there and matches its hash."""
    try:
        return recorded_sha256(path) == sha256(path)
    except OSError:
        return False


def remove(path: Path) -> None:
    """Remove a file of `save_tensors` and its hash, which never stays behind alone.

    What is no file stays.
    """
    for file in (_hash_file(path), path):
        if file.is_file():
            file.unlink()


def save_tensors(path: Path, state: dict) -> None:
    """Write `state` to `path`, and its hash to the file `path`.sha256.

    `state` consists of tensors, numbers and strings, and of lists and dicts of these. If the name
    of the file ends with .safetensors, it is a dict of tensors, and the file has that format.
    """
    digest = hashlib.sha256()

    def write(file) -> None:
        hashed = _HashedFile(file, digest)
        if path.suffix == SAFETENSORS:
            hashed.write(safetensors.to_bytes(state))
        else:
            _save(state, hashed)
        file.flush()
        os.fsync(file.fileno())  # a full disk is known now, while the old file has its hash
        # The old hash must never lie beside the new file.
        _hash_file(path).unlink(missing_ok=True)

    write_atomically(path, write)
    write_text(_hash_file(path), f"{digest.hexdigest()}  {path.name}\n")


class _HashedFile:
    """A binary file, of which everything that is written enters a hash.

    Attributes:
        error: that of a write, such as to a full disk.
    """

    def __init__(self, file, digest):
        self.file, self.digest, self.error = file, digest, None

    def write(self, content) -> int:
        try:
            count = self.file.write(content)
        except OSError as error:
            self.error = error
            raise
        self.digest.update(content)
        return count

    def flush(self) -> None:
        self.file.flush()


def _save(state: dict, file: _HashedFile) -> None:
    """`torch.save`, whose zip writer raises a RuntimeError where the file could not be written."""
    try:
        torch.save(state, file)
    except RuntimeError:
        if file.error is None:
            raise
        raise file.error from None


def load_tensors(path: Path) -> dict:
    """Read, on the CPU, a file of `save_tensors`, of a plain torch.save of tensors, or safetensors.

    Raises:
        UserError: (code 4) the file is damaged, contains anything but plain data, or does not match
            its hash file. Files from other sources need not have a hash file.
    """
    hash_file = _hash_file(path)
    try:
        if hash_file.is_file() and hash_file.read_text().split()[:1] != [sha256(path)]:
            raise UserError(
                f"{path}: does not match {hash_file.name}, the file is damaged; "
                "use another checkpoint",
                4,
            )
        if path.suffix == SAFETENSORS:
            return safetensors.read(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a damaged file's pickle protocol
            state = torch.load(path, map_location="cpu", weights_only=True)
    except (
        OSError,
        EOFError,
        RuntimeError,
        ValueError,
        LookupError,
        TypeError,
        AttributeError,
        pickle.UnpicklingError,
        AssertionError,
    ) as error:
        raise UserError(
            f"{path}: is not a readable checkpoint of plain tensors ({type(error).__name__})", 4
        ) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: contains a {type(state).__name__}, not a state dict", 4)
    return state


def save(path: Path, **state) -> None:
    """Save objects with a `state_dict`, and plain values, under the given names."""
    save_tensors(
        path,
        {
            name: value.state_dict() if hasattr(value, "state_dict") else value
            for name, value in state.items()
        },
    )


def restore(path: Path, saved: dict, **state) -> None:
    """Load what a file of `save` contains into the given objects.

    Args:
        path: the file, for messages.
        saved: its content, by `load_tensors`.
        state: the names that were saved; a value with `load_state_dict` takes its saved state.

    Raises:
        UserError: (code 4) the names differ from those in the file, or a state does not fit its
            object.
    """
    if different := sorted(saved.keys() ^ state.keys()):
        raise UserError(
            f"{path}: was written by another script or version "
            f"({', '.join(different)} in the file only or in this run only)",
            4,
        )
    for name, value in state.items():
        if hasattr(value, "load_state_dict"):
            try:
                value.load_state_dict(saved[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise UserError(
                    f"{path}: its {name} does not fit this run ({str(error).splitlines()[0]})", 4
                ) from None


def trained_classes(path: str) -> list[str] | None:
    """The class names of a run; None without a summary.json, or if that names no classes.

    Args:
        path: the run folder, or its model.pt, beside which summary.json lies.

    Raises:
        UserError: there is no such folder or file, the run is not finished, or summary.json is
            damaged.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / "summary.json"
    if not Path(path).exists():
        raise UserError(f"init_from or data.classes_from: there is no {path}")
    if folder == Path(path) and (folder / "status.json").is_file() and not file.is_file():
        raise UserError(
            f"init_from: the run {folder} is not finished; "
            "continue it with --resume, or name its model.pt"
        )
    try:
        classes = dict(json.loads(file.read_text())).get("classes") if file.is_file() else None
        return None if classes is None else list(map(str, classes))
    except (OSError, ValueError, TypeError):
        raise UserError(
            f"init_from: {file} is damaged; finish the run again, or remove the file"
        ) from None
