"""Checkpoints: plain dicts of tensors and numbers, written atomically, a sha256 beside each, loaded safely."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import torch

from common.runtime import UserError


def write_atomically(path: Path, write) -> None:
    """Call `write(file)` on a temporary file beside `path`, flush it to disk, then put it in place of `path`."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        folder = os.open(path.parent, os.O_RDONLY)
        os.fsync(folder)
        os.close(folder)
    except OSError as error:
        raise UserError(
            f"{path}: cannot be written ({error.strerror or error}); free some space or choose another out_dir", 5
        ) from None
    finally:
        if temporary.exists():
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    write_atomically(path, lambda file: file.write(text.encode()))


def _hash_file(path: Path) -> Path:
    return path.with_name(path.name + ".sha256")


def _digest(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(2**20):
            digest.update(block)
    return digest.hexdigest()


def save_tensors(path: Path, state: dict) -> None:
    """Write `state` (tensors, numbers, strings, lists and dicts of them) to `path`, its hash to `path.sha256`."""

    def write(file) -> None:
        torch.save(state, file)
        _hash_file(path).unlink(missing_ok=True)  # never the old hash beside the new file

    write_atomically(path, write)
    write_text(_hash_file(path), f"{_digest(path)}  {path.name}\n")


def load_tensors(path: Path) -> dict:
    """Read what `save_tensors` or a plain torch.save of tensors wrote, on the CPU.

    Raises `UserError` where the file is damaged, holds anything but plain data, or does not match its hash file
    (files from elsewhere need not have one).
    """
    beside = _hash_file(path)
    try:
        if beside.is_file() and beside.read_text().split()[:1] != [_digest(path)]:
            raise UserError(f"{path}: does not match {beside.name}, the file is damaged; use another checkpoint", 4)
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
        raise UserError(f"{path}: is no readable checkpoint of plain tensors ({type(error).__name__})", 4) from None
    if not isinstance(state, dict):
        raise UserError(f"{path}: holds a {type(state).__name__}, not a state dict", 4)
    return state


def save(path: Path, **state) -> None:
    """Save objects with a `state_dict` and plain values under the names given."""
    save_tensors(
        path, {name: value.state_dict() if hasattr(value, "state_dict") else value for name, value in state.items()}
    )


def load(path: Path, **state) -> dict:
    """Load what `save` wrote into the objects given; returns the whole dict, for the plain values.

    Raises `UserError` where a name is missing on either side, or where a state does not fit its object.
    """
    saved = load_tensors(path)
    if different := sorted(saved.keys() ^ state.keys()):
        raise UserError(
            f"{path}: was written by another script or version ({', '.join(different)} on one side only)", 4
        )
    for name, value in state.items():
        if hasattr(value, "load_state_dict"):
            try:
                value.load_state_dict(saved[name])
            except (RuntimeError, ValueError, KeyError) as error:
                raise UserError(f"{path}: its {name} does not fit this run ({str(error).splitlines()[0]})", 4) from None
    return saved


def trained_classes(path: str) -> list[str] | None:
    """The classes of a run, from the summary.json in its folder or beside its model.pt; None where there is none.

    Raises `UserError` where there is no such folder or file, the run is not finished, or the summary is damaged.
    """
    folder = Path(path) if Path(path).is_dir() else Path(path).parent
    file = folder / "summary.json"
    if not Path(path).exists():
        raise UserError(f"init_from or data.classes_from: there is no {path}")
    if folder == Path(path) and (folder / "status.json").is_file() and not file.is_file():
        raise UserError(f"init_from: the run {folder} is not finished; go on with it by --resume, or name its model.pt")
    try:
        classes = dict(json.loads(file.read_text())).get("classes") if file.is_file() else None
        return None if classes is None else list(map(str, classes))
    except (OSError, ValueError, TypeError):
        raise UserError(f"init_from: {file} is damaged; finish the run again, or remove the file") from None
