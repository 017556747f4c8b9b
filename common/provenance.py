"""The commit of the code that runs."""

import subprocess
from pathlib import Path


def code_version() -> str | None:
    """`git describe --always --dirty` of this repository; None outside git or without git.

    A Python file that is in no commit makes it dirty, too, such as the script of a new method.
    """
    folder = Path(__file__).resolve().parents[1]
    if not (folder / ".git").exists():  # a folder above may belong to another repository
        return None
    describe = _git(folder, "describe", "--always", "--dirty", "--abbrev=10")
    if describe and not describe.endswith("-dirty"):
        others = _git(folder, "ls-files", "--others", "--exclude-standard", "--", "*.py")
        return f"{describe}-dirty" if others else describe
    return describe or None


def _git(folder: Path, *arguments: str) -> str:
    """What git prints in the folder; "" if it fails."""
    command = ["git", "-C", str(folder), *arguments]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
