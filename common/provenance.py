"""The commit of the code that runs."""

import subprocess
from pathlib import Path


def code_version() -> str | None:
    """`git describe --always --dirty` of this repository; None outside git or without git."""
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():  # a folder above may belong to another repository
        return None
    command = ["git", "-C", str(folder), "describe", "--always", "--dirty", "--abbrev=10"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
