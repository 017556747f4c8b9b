"""The log: means, the lines that a resumed run keeps, and the progress bar."""

import json
import math
import sys

import pytest
import torch

from common.errors import UserError
from training.log import Log


def test_means_since_the_last_line(tmp_path):
    log = Log(tmp_path / "metrics.jsonl", 4)
    log.open(0)
    for loss, share in ((1.0, 10.0), (3.0, 20.0), (7.0, 0.0)):
        log.add(loss=torch.tensor(loss), share=share)
        if loss != 1.0:
            log.write(int(loss), lr=0.5)
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert lines == [
        {"step": 3, "loss": 2.0, "share": 15.0, "lr": 0.5},
        {"step": 7, "loss": 7.0, "share": 0.0, "lr": 0.5},
    ]


def test_lines_of_later_steps_and_incomplete_lines_are_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 2, "loss": 1}\n{"step": 6, "loss": 2}\n{"step": 1, "lo')
    Log(file, 8).open(4)
    assert file.read_text() == '{"step": 2, "loss": 1}\n'


def test_a_mean_that_is_not_finite_is_named(tmp_path):
    log = Log(tmp_path / "metrics.jsonl", 4)
    log.open(0)
    log.add(loss=torch.tensor(1.0), other=torch.tensor(math.inf))
    with pytest.raises(UserError, match="step 3: other is inf") as error:
        log.write(3)
    assert error.value.code == 3


@pytest.mark.parametrize("terminal", [True, False])
def test_a_progress_bar_on_a_terminal_only(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    log = Log(None, 10)
    log.open(4)
    for _ in range(6):
        log.add(loss=torch.tensor(0.25))
    log.write(10, lr=0.5)
    log.close()
    out, err = capsys.readouterr()
    assert ("10/10" in err and "step/s" in err) == terminal
    assert ("step 10/10  loss 0.25  lr 0.5" in out) != terminal
