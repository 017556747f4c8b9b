"""Errors that a user can correct, and how a script ends with one."""

import errno
import os
import sys
import traceback
from typing import Protocol

DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO}


class UserError(Exception):
    """A mistake that the user can correct: one line that says what, where and what to do.

    Exit codes: 2 config or data, 3 not finite, 4 no usable checkpoint, 5 disk.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


class Observer(Protocol):
    """What `exit_with` knows of the run in this process."""

    def sizes(self) -> str:
        """The keys that decide how much memory a step takes, and their values."""

    def failed(self, code: int, reason: str) -> str | None:
        """The process ends by an error. Returns what to print; None: another process prints it."""

    def explain(self, error: Exception) -> UserError | None:
        """An error that another process has caused."""


_observer: Observer | None = None


def observe(run: Observer | None) -> None:
    """Let `exit_with` ask and tell `run` where this process fails; None: no longer."""
    global _observer
    _observer = run


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


def _is_memory_error(error: Exception) -> bool:
    """Whether memory of the GPU or of the machine ran out, in this process or in a worker."""
    if isinstance(error, MemoryError):
        return True
    signs = ("out of memory", "DefaultCPUAllocator", "ALLOC_FAILED", "MemoryError")
    return isinstance(error, RuntimeError) and any(sign in str(error) for sign in signs)


def _as_user_error(error: Exception) -> UserError | None:
    """An error of the system as one sentence; None for a mistake of the code."""
    if isinstance(error, UserError):
        return error
    if _observer is not None and (caused := _observer.explain(error)):
        return caused
    reason = (last_line(error) or type(error).__name__).splitlines()[0].rstrip(".")
    if _is_memory_error(error):
        reason = ". ".join(reason.split(". ")[:2])  # the rest is advice on torch's own settings
        sizes = f" with {sizes}" if _observer and (sizes := _observer.sizes()) else ""
        return UserError(
            f"out of memory{sizes} ({reason}); lower data.batch or data.eval_batch, "
            "or use smaller images or crops"
        )
    if isinstance(error, OSError):
        path = f"{error.filename}: " if error.filename is not None else ""
        remedy = "check the path and its permissions"
        if error.errno in DISK:
            remedy = "free some space, or choose another folder"
        code = 5 if error.errno in DISK else 2
        return UserError(f"{path}{error.strerror or reason}; {remedy}", code)
    if isinstance(error, UnicodeError):
        where = ascii(getattr(error, "object", ""))[:120]
        return UserError(
            f"{where}: a text or a file name is not UTF-8 ({reason}); rename or convert it"
        )
    return None


class _Output:
    """A stream whose loss does not end the run: after a first OSError it writes to nowhere.

    A pipe may be closed, and the disk under a log may be full.
    """

    def __init__(self, stream):
        self.stream = stream

    def __getattr__(self, name):
        return getattr(self.stream, name)

    def _try(self, function, *arguments):
        try:
            return function(*arguments)
        except OSError:
            # Python flushes the stream once more at its end, which must not fail either.
            os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())

    def write(self, text: str):
        return self._try(self.stream.write, text)

    def flush(self):
        return self._try(self.stream.flush)


def _guard_output() -> None:
    """Let neither a lost terminal or log, nor a name that it cannot show, end the run."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is not None and not isinstance(stream, _Output):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
            setattr(sys, name, _Output(stream))


def _silence_interrupt(kind, error, trace, show=sys.excepthook) -> None:
    """`sys.excepthook`: Ctrl-C during the imports of a script needs no traceback."""
    if not issubclass(kind, KeyboardInterrupt):
        show(kind, error, trace)


sys.excepthook = _silence_interrupt


def _fail(code: int, reason: str) -> str | None:
    """Tell the run that it fails. Returns the reason, or None if another process prints it."""
    return reason if _observer is None else _observer.failed(code, reason)


def exit_with(main) -> None:
    """Run a script's `main` and exit with its code.

    A `UserError`, an error of the system and too little memory become one line on stderr and an
    exit code; `--debug` shows the traceback too. Any other exception keeps its traceback. The run
    of this process is told of each (`observe`).
    """
    _guard_output()
    try:
        code = main()
    except KeyboardInterrupt:  # the run handles the signal itself once it has begun
        print("stopped by SIGINT", file=sys.stderr)
        code = 130
    except Exception as error:
        known = _as_user_error(error)
        if known is None:
            _fail(1, f"{type(error).__name__}: {last_line(error)}")
            raise
        if "--debug" in sys.argv:
            traceback.print_exc()
        code = known.code
        if reason := _fail(code, last_line(known)):
            print(f"error: {reason}", file=sys.stderr)
        # The traceback's frames hold main's loaders, whose workers would otherwise stay alive.
        traceback.clear_frames(error.__traceback__)
    sys.exit(code)
