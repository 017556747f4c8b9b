"""Files that hold either the old content or all of the new. Unlike `files`, it imports no torch."""

import os
from pathlib import Path

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
