"""Empty figures of matplotlib, which is optional, and their names and colors."""

import textwrap
from pathlib import Path

from common.errors import UserError
from common.optional import optional
from common.writing import write_atomically

HINT = "pictures need matplotlib; install it by: pip install matplotlib"
# Of Okabe and Ito, and of Tol, which people with any color vision tell apart.
BLUE, ORANGE, GREEN, PINK, SKY = "#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9"
RED, YELLOW, BLACK, GRAY, WINE = "#D55E00", "#F0E442", "#000000", "#777777", "#882255"
PALE = "#BBBBBB"


def available() -> bool:
    """Whether pictures can be made."""
    return optional("matplotlib.figure") is not None


def check_available() -> None:
    """Raise `UserError` if no picture can be made."""
    if not available():
        raise UserError(HINT)


def new_figure(width: float, height: float):
    """An empty figure of this size in inches, without matplotlib's global state.

    Raises:
        UserError: matplotlib is not installed.
    """
    check_available()
    figure = optional("matplotlib.figure").Figure
    return figure(figsize=(width, height), dpi=120, layout="constrained")


def save_figure(figure, file: Path) -> None:
    """Write a figure as png; it is enlarged to what lies outside."""
    write_atomically(file, lambda f: figure.savefig(f, format="png", bbox_inches="tight"))


def plain_label(name: str, width: int) -> str:
    """A name in lines of `width` letters, without a meaning to matplotlib."""
    lines = textwrap.wrap(name, width, break_on_hyphens=False) or ["-"]
    text = "\n".join(lines).replace("$", r"\$")
    return f" {text}" if text.startswith("_") else text  # a label that begins so is left out
