"""Errors that a user can correct, and how a script ends with one."""

import sys
import traceback


class UserError(Exception):
    """A mistake that the user can correct: one line that says what, where and what to do.

    Exit codes: 2 config or data, 3 not finite, 4 no usable checkpoint, 5 disk.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def require(*rules: tuple[bool, str]) -> None:
    """Raise `ValueError` with the sentence of every rule (holds, sentence) that does not hold."""
    broken = [sentence for holds, sentence in rules if not holds]
    if broken:
        raise ValueError("\n".join(broken))


def last_line(error: BaseException) -> str:
    """The message of an error, without the traceback that a loader worker wraps around it."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].split("UserError: ", 1)[-1]
    return text


def exit_with(main) -> None:
    """Run a script's `main` and exit with its code.

    A `UserError` becomes one line on stderr and its exit code; `--debug` shows the traceback too.
    """
    try:
        code = main()
    except UserError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"error: {last_line(error)}", file=sys.stderr)
        # The traceback's frames hold main's loaders, whose workers would otherwise stay alive.
        traceback.clear_frames(error.__traceback__)
        code = error.code
    sys.exit(code)
