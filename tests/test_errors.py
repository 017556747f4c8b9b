"""How a script ends with an error: one line and a code, or a traceback for an error of the code."""

import errno
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from common import errors
from common.errors import UserError, exit_with, observe
from tests.helpers import ROOT


class Observer:
    """A run that remembers how it failed."""

    def __init__(self):
        self.failures = []
        observe(self)

    def sizes(self) -> str:
        return "data.batch=8, data.size=28"

    def failed(self, code: int, reason: str) -> str:
        self.failures.append((code, reason))
        return reason

    def explain(self, error: Exception) -> None:
        return None


@pytest.fixture
def end(capsys):
    """`end(function)` -> (exit code, lines of stderr, what the run was told)."""

    def call(function) -> tuple[int, list[str], list[tuple[int, str]]]:
        run = Observer()
        with pytest.raises(SystemExit) as stop:
            exit_with(function)
        return stop.value.code, capsys.readouterr().err.splitlines(), run.failures

    return call


def raising(error: BaseException):
    def main():
        raise error

    return main


class Hungry(Dataset):
    """A data set whose worker runs out of memory."""

    def __init__(self, request):
        self.request = request

    def __len__(self) -> int:
        return 1

    def __getitem__(self, index: int):
        return self.request()


def too_much() -> torch.Tensor:
    return torch.empty(2**50)


def no_memory():
    raise MemoryError


def in_worker(request):
    return lambda: list(DataLoader(Hungry(request), num_workers=1))


CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79 GiB."
MEMORY = {
    "cpu": too_much,
    "python": no_memory,
    "cuda": raising(torch.OutOfMemoryError(CUDA)),
    "cuda error": raising(RuntimeError("CUDA error: out of memory")),
    "cpu in a worker": in_worker(too_much),
    "python in a worker": in_worker(no_memory),
}


@pytest.mark.parametrize("request_memory", MEMORY.values(), ids=MEMORY)
def test_out_of_memory_is_one_line_with_sizes_and_remedies(end, request_memory):
    code, lines, failures = end(request_memory)
    assert (code, len(lines)) == (2, 1), lines
    assert lines[0].startswith("error: out of memory with data.batch=8, data.size=28 (")
    assert lines[0].endswith(
        "; lower data.batch or data.eval_batch, or use smaller images or crops"
    )
    assert "GPU 0" not in lines[0]
    assert failures == [(2, lines[0].removeprefix("error: "))]


def test_another_runtime_error_is_no_lack_of_memory(end):
    with pytest.raises(RuntimeError, match="shape"):
        end(raising(RuntimeError("shape mismatch")))


@pytest.mark.parametrize(
    ("error", "code", "text"),
    [
        (PermissionError(errno.EACCES, "Permission denied", "a/b"), 2, "a/b: Permission denied; "),
        (OSError(errno.ENAMETOOLONG, "File name too long", "x"), 2, "x: File name too long; check"),
        (OSError(errno.ENOSPC, "No space left on device", "x"), 5, "x: No space left on device; f"),
        (OSError("no words"), 2, "no words; check the path"),
        (UnicodeDecodeError("utf-8", b"caf\xe9", 3, 4, "bad"), 2, r"b'caf\xe9': a text or a file"),
        (UnicodeEncodeError("utf-8", "a\udce9", 1, 2, "bad"), 2, r"'a\udce9': a text or a file "),
        (UserError("no; do", 4), 4, "no; do"),
    ],
)
def test_an_error_of_the_system_is_one_line(end, monkeypatch, error, code, text):
    found, lines, failures = end(raising(error))
    assert (found, len(lines)) == (code, 1), lines
    assert lines[0].startswith(f"error: {text}")
    assert [failure[0] for failure in failures] == [code]
    monkeypatch.setattr(sys, "argv", ["train.py", "--debug"])
    found, lines, _ = end(raising(error))
    assert found == code
    assert lines[0].startswith("Traceback")
    assert lines[-1].startswith(f"error: {text}")


def test_a_mistake_of_the_code_keeps_its_traceback(capsys):
    run = Observer()
    with pytest.raises(ZeroDivisionError):
        exit_with(lambda: 1 // 0)
    assert len(run.failures) == 1
    code, reason = run.failures[0]
    assert code == 1
    assert reason.startswith("ZeroDivisionError: ")


def test_a_code_is_passed_on(end):
    assert end(lambda: 0) == (0, [], [])
    assert end(lambda: 3) == (3, [], [])


def test_ctrl_c_is_130_in_one_line(end):
    signal.signal(signal.SIGINT, signal.default_int_handler)
    assert end(lambda: signal.raise_signal(signal.SIGINT)) == (130, ["stopped by SIGINT"], [])


@pytest.mark.parametrize("error", ["KeyboardInterrupt", "ValueError"])
def test_ctrl_c_during_the_imports_shows_no_traceback(error):
    """A shell reports a program that SIGINT ended as 130. Other errors stay visible."""
    command = [sys.executable, "-c", f"import common.errors; raise {error}"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if error == "KeyboardInterrupt":
        assert (done.returncode, done.stderr) == (-signal.SIGINT, "")
    else:
        assert done.returncode == 1
        assert done.stderr.startswith("Traceback")


LOST = """
import sys
from common.errors import exit_with
def main():
    for number in range(20000):
        print("a line that fills the buffer", flush=number % 2 == 0)
        print("another", file=sys.stderr)
    open(sys.argv[1], "w").write("done")
    return 7
exit_with(main)
"""


@pytest.mark.parametrize("lost", ["pipe", "full disk"])
def test_a_lost_output_ends_no_run(tmp_path, lost):
    """`| head -1`, and a log on a full disk; neither does it change the exit code."""
    if lost == "pipe":
        read, write = os.pipe()
        os.close(read)
    else:
        write = os.open("/dev/full", os.O_WRONLY)
    command = [sys.executable, "-c", LOST, str(tmp_path / "result")]
    done = subprocess.run(command, cwd=ROOT, stdout=write, stderr=write)
    os.close(write)
    assert done.returncode == 7
    assert Path(tmp_path / "result").read_text() == "done"


def test_a_name_that_the_terminal_cannot_show_is_escaped(tmp_path):
    code = "from common.errors import exit_with; exit_with(lambda: print('caf\\xe9 \\udce9'))"
    environment = {**os.environ, "PYTHONIOENCODING": "ascii:strict"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, env=environment)
    assert (done.returncode, done.stderr) == (0, b"")
    assert done.stdout == b"caf\\xe9 \\udce9\n"


def test_only_the_last_run_is_told():
    first, second = Observer(), Observer()
    with pytest.raises(SystemExit):
        exit_with(raising(UserError("no", 3)))
    assert (first.failures, second.failures) == ([], [(3, "no")])
    observe(None)
    with pytest.raises(SystemExit):
        exit_with(raising(UserError("no")))
    assert errors._observer is None
    assert len(second.failures) == 1
