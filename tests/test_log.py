"""The log: means, the lines that a resumed run keeps, and the progress bar."""

import json
import math
import sys

import pytest
import torch

from common.errors import UserError
from training import evaluation
from training.log import Log, evaluation_line, headline


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


NO_RECORDS = {
    "null": b"null",
    "list": b"[1]",
    "empty": b"{}",
    "number": b"5",
    "no number": b'{"step": "x"}',
    "true": b'{"step": true}',
    "latin-1": b'{"step": 1, "loss": "\xfc"}',
    "binary": bytes(range(128, 256)),
    "nested": b"[" * 100_000,
}


@pytest.mark.parametrize("line", NO_RECORDS.values(), ids=NO_RECORDS)
def test_what_is_no_record_is_dropped(tmp_path, line):
    file, first, third = tmp_path / "metrics.jsonl", b'{"step": 1}\n', b'{"step": 3, "loss": 1}\n'
    file.write_bytes(first + line + b"\n" + third)
    Log(file, 8).open(4)
    assert file.read_bytes() == first + third


def test_a_mean_that_is_not_finite_is_named(tmp_path):
    log = Log(tmp_path / "metrics.jsonl", 4)
    log.open(0)
    log.add(loss=torch.tensor(1.0), other=torch.tensor(math.inf))
    with pytest.raises(UserError, match="step 3: other is inf") as error:
        log.write(3)
    assert error.value.code == 3
    assert str(error.value).endswith("; lower optim.lr, or use amp: float32, and start again")
    log.resumable = True
    with pytest.raises(UserError, match=r"go on with --resume --allow-change, or start again"):
        log.write(3)


def test_an_evaluation_that_is_made_again_is_dropped(tmp_path):
    file = tmp_path / "metrics.jsonl"
    text = '{"step": 4, "criteria.infomax": 1}\n{"step": 8, "loss": 1}\n'
    file.write_text(text + '{"step": 8, "target.accuracy": 1.0, "criteria.infomax": 1}\n')
    whole = file.read_text()
    Log(file, 8).open(8)
    assert file.read_text() == whole  # control
    Log(file, 8).open(8, evaluated=False)
    assert file.read_text() == text


def test_a_muted_log_says_and_keeps_nothing(tmp_path, capsys):
    log = Log(tmp_path / "metrics.jsonl", 4)
    log.open(2)
    log.muted = True
    log.add(loss=1.0)
    log.write(3)
    log.print("a warning")
    assert (log.sums, capsys.readouterr().out) == ({}, "")
    assert not log.path.exists()


def test_the_loss_scale_is_written_and_ends_the_run_below_one(tmp_path):
    """With gradients that are never finite every step is skipped, and nothing is learned."""
    log = Log(tmp_path / "metrics.jsonl", 40)
    log.scaler = scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=1.0)
    log.open(0)
    for step in range(1, 5):
        scaler.scale((weight * math.inf).sum()).backward()
        scaler.step(optimizer)
        scaler.update()
        if step < 4:
            log.write(step)
    with pytest.raises(UserError, match=r"amp: float16: .* in 4 steps or more, .* to 0.5") as error:
        log.write(4)
    assert error.value.code == 3
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["scale"] for line in lines] == [4.0, 2.0, 1.0]
    assert weight.item() == 1.0
    log.scaler = torch.amp.GradScaler("cpu", enabled=False)  # of a run in float32
    log.write(4)
    assert "scale" not in json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[-1])


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


LOSSES = {"cls_loss": 0.25, "aux_cls_loss": 1.0, "adv_loss": 0.6931472, "div_loss": 2.0}


@pytest.mark.parametrize(
    ("values", "shown"),
    [
        (
            {**LOSSES, "domain_accuracy": 0.5, "accepted.road": 1.0, "lr": 0.01, "disc_lr": 0.02},
            "cls_loss 0.25  adv_loss 0.6931  lr 0.01",
        ),
        (
            {"adv_loss": 1.0, "disc_loss": 2.0, "target_lr": 1e-5},
            "adv_loss 1  disc_loss 2  target_lr 1e-05",
        ),
        ({"cls_loss": 1.0, "stage": 1, "lr": 0.1}, "cls_loss 1  lr 0.1"),
        ({"mine": 1.0, "other": 2.0, "third": 3.0, "lr": 0.1}, "mine 1  other 2  lr 0.1"),
        ({"cls_loss": 1.0, "adv_loss": None}, "cls_loss 1"),
        ({}, ""),
    ],
)
def test_the_screen_shows_two_losses_and_the_rate(values, shown):
    assert headline(values) == shown


def test_all_other_figures_are_in_the_file(tmp_path, capsys):
    log = Log(tmp_path / "metrics.jsonl", 3)
    log.open(0)
    log.add(**LOSSES, confidence=0.5)
    log.write(3, lr=0.1, **{"accepted.road": None})
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {
        "step": 3,
        **LOSSES,
        "confidence": 0.5,
        "lr": 0.1,
        "accepted.road": None,
    }
    assert "cls_loss 0.25  adv_loss 0.6931  lr 0.1  (" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("target", "source", "select", "line"),
    [
        (84.74, 90.5, "infomax", "step 400  eval  target 84.7  source 90.5  infomax 0.781"),
        (84.74, 90.5, "source_val", "step 400  eval  target 84.7  source 90.5"),
        (None, 90.5, "infomax", "step 400  eval  source 90.5  infomax 0.781"),
        (84.74, None, "last", "step 400  eval  target 84.7"),
    ],
)
def test_a_line_of_an_evaluation_is_short(target, source, select, line):
    metrics = {
        "target": {"accuracy": target, "mean_class_accuracy": target},
        "source_val": {"accuracy": source, "mean_class_accuracy": source},
        "criteria": {"source_val": source, "neg_entropy": -0.4, "infomax": 0.78123},
    }
    assert evaluation_line(400, metrics, select) == line


def test_a_line_of_maps_has_the_mean_iou_alone():
    figures = {"mean_iou": 38.25, "pixel_accuracy": 80.0, "iou": {"road": 90.0}}
    metrics = {"target": figures, "source_val": figures, "criteria": {"neg_entropy": -0.41234}}
    line = evaluation_line(250_000, metrics, "neg_entropy")
    assert line == "step 250000  eval  target 38.2  source 38.2  neg_entropy -0.412"
    assert len(line) <= 80


@pytest.mark.parametrize("terminal", [True, False])
def test_a_long_evaluation_shows_progress_on_a_terminal_only(monkeypatch, capsys, terminal):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: terminal, raising=False)
    batches = [1, 2, 3]
    assert list(evaluation.with_progress(batches)) == batches
    assert capsys.readouterr().err == ""  # a short one shows nothing
    monkeypatch.setattr(evaluation, "BAR_AFTER", 0)
    assert list(evaluation.with_progress(batches)) == batches
    shown = capsys.readouterr().err
    assert ("evaluation" in shown) == terminal
    assert shown == "" or shown.endswith("\r")  # nothing is left of it
