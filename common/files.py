"""Safe files: written atomically; checkpoints have a sha256 file and are loaded as plain data."""

import hashlib
import json
import os
import pickle
from pathlib import Path

import torch

from common.errors import UserError


def write_atomically(path: Path, write) -> None:
    """Write a file so that `path` holds either the old content or all of the new content.

    Args:
        path: the file; its folder is created if necessary.
        write: called with a temporary binary file beside `path`, which is flushed to disk and then
            replaces `path`.

    Raises:
        UserError: (code 5) the file cannot be written.
    """
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
            f"{path}: cannot be written ({error.strerror or error}); "
            "free some space or choose another out_dir",
            5,
        ) from None
    finally:
        if temporary.exists():
            temporary.unlink()


def write_text(path: Path, text: str) -> None:
    """`write_atomically` of a text, in UTF-8."""
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
    """Write `state` to `path`, and its hash to the file `path`.sha256.

    `state` consists of tensors, numbers and strings, and of lists and dicts of these.
    """

    def write(file) -> None:
        torch.save(state, file)
        # The old hash must never lie beside the new file.
        _hash_file(path).unlink(missing_ok=True)

    write_atomically(path, write)
    write_text(_hash_file(path), f"{_digest(path)}  {path.name}\n")


def load_tensors(path: Path) -> dict:
    """Read, on the CPU, a file of `save_tensors` or of a plain torch.save of tensors.

    Raises:
        UserError: (code 4) the file is damaged, contains anything but plain data, or does not match
            its hash file. Files from other sources need not have a hash file.
    """
    hash_file = _hash_file(path)
    try:
        if hash_file.is_file() and hash_file.read_text().split()[:1] != [_digest(path)]:
            raise UserError(
                f"{path}: does not match {hash_file.name}, the file is damaged; "
                "use another checkpoint",
                4,
            )
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


def load(path: Path, **state) -> dict:
    """Load a file of `save` into the given objects.

    Args:
        path: the file.
        state: the names that were saved; a value with `load_state_dict` takes its saved state.

    Returns:
        All that was saved, by name, for the plain values.

    Raises:
        UserError: (code 4) the names differ from those in the file, or a state does not fit its
            object.
    """
    saved = load_tensors(path)
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
    return saved


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
