"""The command torchrun: restarts, two launchers, and the commands that the docs show."""

import json
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.helpers import ROOT, any_config, differing, status, train_on, weights
from tests.test_laws import commands

LAUNCHER = [sys.executable, "-m", "torch.distributed.run"]
# train_dann.py on few images, as in the other tests.
SCRIPT = """
import os, signal, sys
from pathlib import Path

sys.path.insert(0, {root!r})
import train_dann
from common import ranks
from common.errors import exit_with
from data import drawn
from training.log import Log

drawn.COUNT.update(train=200, test=30)
"""
KILLED_ONCE = """
VICTIM = 1
add, seen = Log.add, []

def add_and_die(self, **values):
    add(self, **values)
    seen.append(1)
    if len(seen) == 7 and ranks.number() == VICTIM and not Path("killed").exists():
        Path("killed").write_text("")
        os.kill(os.getpid(), signal.SIGKILL)

Log.add = add_and_die
"""


def script(folder: Path, change: str = "") -> Path:
    file = folder / "script.py"
    file.write_text(SCRIPT.format(root=str(ROOT)) + change + "exit_with(train_dann.main)\n")
    return file


def launch(folder: Path, *words) -> subprocess.Popen:
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        [*LAUNCHER, *map(str, words)],
        cwd=folder,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def end(launcher: subprocess.Popen, seconds: float = 120) -> tuple[int, str]:
    """(exit code, output)."""
    try:
        output, _ = launcher.communicate(timeout=seconds)
    finally:
        if launcher.poll() is None:
            os.killpg(launcher.pid, signal.SIGKILL)
    return launcher.returncode, output


@pytest.fixture
def digits(tmp_path):
    return any_config("train_dann", tmp_path, disc_norm="dropout", save_every=2)


@pytest.mark.slow
def test_a_restart_goes_on_by_itself(tmp_path, digits):
    train_on(2, "train_dann", digits, f"out_dir={tmp_path}/through")
    options = "--standalone", "--nproc-per-node", 2, "--max-restarts", 1
    words = script(tmp_path, KILLED_ONCE), "--config", digits
    code, output = end(launch(tmp_path, *options, *words))
    assert (tmp_path / "killed").exists()
    assert code == 0, output
    assert "resuming after step 6" in output
    assert differing(weights(tmp_path / "through"), weights(tmp_path / "run")) == 0
    lines = [(tmp_path / run / "metrics.jsonl").read_text() for run in ("through", "run")]
    assert lines[0] == lines[1]


def two_machines(folder: Path, *words) -> list[subprocess.Popen]:
    """Two launchers, each with one process, that meet as two machines do."""
    with socket.create_server(("127.0.0.1", 0)) as place:
        port = place.getsockname()[1]
    options = "--nnodes", 2, "--nproc-per-node", 1, "--rdzv-backend", "c10d", "--rdzv-id", "run"
    options += "--rdzv-endpoint", f"127.0.0.1:{port}"
    return [launch(folder, *options, *words) for _ in range(2)]


@pytest.mark.slow
def test_two_machines_train_the_same(tmp_path, digits):
    train_on(2, "train_dann", digits, f"out_dir={tmp_path}/one_machine")
    machines = two_machines(tmp_path, script(tmp_path), "--config", digits)
    for code, output in map(end, machines):
        assert code == 0, output
    assert differing(weights(tmp_path / "one_machine"), weights(tmp_path / "run")) == 0


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_two_machines_restart_together(tmp_path, digits, victim):
    """Each launcher counts its own restarts only."""
    train_on(2, "train_dann", digits, f"out_dir={tmp_path}/one_machine")
    killed = script(tmp_path, KILLED_ONCE.replace("VICTIM = 1", f"VICTIM = {victim}"))
    machines = two_machines(tmp_path, "--max-restarts", 1, killed, "--config", digits)
    for code, output in map(end, machines):
        assert code == 0, output
    assert (tmp_path / "killed").exists()
    assert differing(weights(tmp_path / "one_machine"), weights(tmp_path / "run")) == 0


@pytest.mark.slow
def test_a_signal_to_the_launcher_saves(tmp_path):
    """It is the command of a docstring, with a port of its own and many steps."""
    (shown,) = [command for command in commands(ROOT / "train_source.py") if "torchrun" in command]
    words = shlex.split(shown)[1:]
    overrides = "steps=100000", "log_every=1", "eval_every=100000", f"out_dir={tmp_path}/run"
    launcher = launch(ROOT, "--standalone", *words, *overrides)
    metrics = tmp_path / "run/metrics.jsonl"
    while launcher.poll() is None and not (metrics.exists() and len(metrics.read_bytes()) > 2000):
        time.sleep(0.1)
    launcher.send_signal(signal.SIGTERM)
    code, output = end(launcher)
    stopped = status(tmp_path / "run")
    assert code != 0  # torchrun's own
    assert stopped["state"] == "stopped", output
    file = tmp_path / f"run/checkpoints/step_{stopped['step']:08d}.pt"
    assert torch.load(file, weights_only=True)["step"] == stopped["step"]
    assert json.loads(metrics.read_text().splitlines()[-1])["step"] <= stopped["step"]


def test_a_run_that_the_launcher_stopped_goes_on_exactly(tmp_path, digits):
    keys = "steps=40", "eval_every=40", "save_every=40", "log_every=1"
    train_on(2, "train_dann", digits, *keys, f"out_dir={tmp_path}/through")
    options = "--standalone", "--nproc-per-node", 2, script(tmp_path), "--config", digits
    launcher = launch(tmp_path, *options, *keys)
    metrics = tmp_path / "run/metrics.jsonl"
    while launcher.poll() is None and not (metrics.exists() and metrics.read_bytes()):
        time.sleep(0.02)
    launcher.send_signal(signal.SIGTERM)
    _, output = end(launcher)
    assert status(tmp_path / "run")["state"] == "stopped", output
    train_on(2, "train_dann", digits, *keys, "--resume")
    assert differing(weights(tmp_path / "through"), weights(tmp_path / "run")) == 0
    assert metrics.read_text() == (tmp_path / "through/metrics.jsonl").read_text()
