"""The conformance kit can fail: it finds what is wrong with copies of train_mcc.py."""

import dataclasses
import subprocess
import sys

import pytest

from common.errors import UserError
from tests import test_method as kit
from tests.helpers import ROOT, stop_after

CONFIG = str(ROOT / "configs/demo/digits.yaml")
LOSS = '                losses["mcc_loss"] = mcc_loss(out_t.logits, config.temperature)\n'
BEGIN = "    start = run.begin("


@pytest.fixture
def broken(tmp_path):
    """`broken((old, new), ...)`: a `Method` of a copy of train_mcc.py with these replacements."""

    def copy(*changes: tuple[str, str]) -> kit.Method:
        text = (ROOT / "train_mcc.py").read_text()
        for old, new in [('"mcc"', '"mine"'), *changes]:
            assert old in text
            text = text.replace(old, new)
        script = tmp_path / "scripts/train_mine.py"
        script.parent.mkdir()
        script.write_text(text)
        return kit.Method(script, (CONFIG,), ())

    return copy


def first_run(method: kit.Method, tmp_path):
    assert method.run(tmp_path / "first/run") == 0
    return tmp_path / "first/run"


def test_the_unbroken_copy_passes(broken, tmp_path, monkeypatch):
    method = broken()
    whole = first_run(method, tmp_path)
    kit.test_the_script_is_one_of_the_family(method)
    kit.test_target_labels_do_not_train_or_select(method, whole, tmp_path / "labels", monkeypatch)
    kit.test_the_loss_of_the_method_moves_the_weights(method, whole, tmp_path / "loss")


def test_a_state_outside_the_checkpoint_is_found(broken, tmp_path, monkeypatch):
    """A running temperature in a plain tensor: --resume starts it anew."""
    method = broken(
        (BEGIN, "    sharpness = torch.ones(())\n" + BEGIN),
        (
            LOSS,
            "                sharpness += 0.5\n" + LOSS.replace("config.temperature", "sharpness"),
        ),
    )
    whole = first_run(method, tmp_path)
    with pytest.raises(AssertionError, match=r"differs? after a resume"):
        kit.test_resume_is_exact(method, whole, tmp_path, monkeypatch, stop_after, 4, workers=0)


def test_gradients_that_are_not_averaged_are_found(broken, tmp_path):
    line = "        average_gradients(optimizer, model)\n"
    with pytest.raises(AssertionError, match="differs between the processes"):
        kit.test_two_processes_train_one_model(broken((line, "")), tmp_path)


def test_a_loss_of_the_rows_of_one_process_is_found(broken, tmp_path):
    alone = '                losses["mcc_loss"] = 10 * out_t.logits.mean(0).square().sum()\n'
    with pytest.raises(AssertionError, match="computed from the rows of one process"):
        kit.test_two_processes_train_what_one_trains(broken((LOSS, alone)), tmp_path)


def test_two_classes_give_no_false_alarm(broken, tmp_path, pictures, monkeypatch):
    """Two balanced classes and a target_test: shifted twice, labels would be what they were."""
    for name in ("photo", "sketch", "test"):
        pictures(name, {"cat": 8, "dog": 8})
    sections = ("source", "photo"), ("target", "sketch"), ("target_test", "test")
    lines = [f"  {role}: {{name: folder, path: {name}}}" for role, name in sections]
    config = tmp_path / "two.yaml"
    config.write_text("\n".join(["data:", f"  root: {tmp_path}/images", "  size: 16", *lines]))
    method = dataclasses.replace(broken(), files=(str(config),))
    whole = first_run(method, tmp_path)
    kit.test_target_labels_do_not_train_or_select(method, whole, tmp_path, monkeypatch)


def test_a_forgotten_module_is_refused(broken, tmp_path):
    forgotten = "    projector = torch.nn.Linear(2, 2)\n"
    with pytest.raises(UserError, match=r"projector .* would be lost on --resume"):
        broken((BEGIN, forgotten + BEGIN)).run(tmp_path / "run")


def test_read_target_labels_are_found(broken, tmp_path, monkeypatch):
    leak = (
        "                test = domains.target_test\n"
        "                out = model(test.images[:8].to(device))\n"
        "                y = test.labels[:8].to(device)\n"
        "                loss = loss + supervised_loss(out, y, config.model)[0]\n"
    )
    method = broken((LOSS, LOSS + leak))
    whole = first_run(method, tmp_path)
    with pytest.raises(AssertionError, match="has read labels of the target"):
        kit.test_target_labels_do_not_train_or_select(method, whole, tmp_path, monkeypatch)


def test_a_loss_without_gradient_is_found(broken, tmp_path, monkeypatch):
    method = broken(("mcc_loss(out_t.logits,", "mcc_loss(out_t.logits.detach(),"))
    whole = first_run(method, tmp_path)
    with pytest.raises(AssertionError, match="another weight of the loss trains the same"):
        kit.test_the_loss_of_the_method_moves_the_weights(method, whole, tmp_path)
    with pytest.raises(AssertionError, match="no loss depends on the target's images"):
        kit.test_target_images_move_the_weights(method, tmp_path / "images", monkeypatch)


def test_criteria_that_are_not_stated_are_found(broken, tmp_path):
    stated = (ROOT / "train_mcc.py").read_text()
    start = stated.index("    def trained_criteria(self):")
    end = stated.index("def main(")
    method = broken((stated[start:end], "\n"))
    with pytest.raises(AssertionError, match="must state trained_criteria"):
        kit.test_the_script_is_one_of_the_family(method)
    with pytest.raises(UserError, match="does not state its trained_criteria"):
        method.run(tmp_path / "run")


def test_the_name_of_another_method_is_found(broken):
    with pytest.raises(AssertionError, match="the name of another script"):
        kit.test_the_script_is_one_of_the_family(broken(('"mine"', '"dann"')))


def test_a_script_without_a_config_fails_alone():
    """It has no words, so that its own tests say what is missing, and others run."""
    method = kit.method_of(ROOT / "train_new.py", kit.demo_command(ROOT / "train_new.py")[3:], ROOT)
    assert method.files == ()
    assert kit.demo_command(ROOT / "train_mcc.py")[-1] == "configs/demo/mcc.yaml"  # control


def test_the_command_of_the_readme(broken, tmp_path):
    """The kit on one script outside the repository, from another folder."""
    method = broken()
    command = [sys.executable, "-m", "pytest", ROOT / "tests/test_method.py", "-q", "-n", "0"]
    command += ["-k", "family or dry_run"]
    command += ["--script", method.script, "--config", CONFIG, "mcc_weight=2"]
    done = subprocess.run(
        [*map(str, command)], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr
    assert "2 passed" in done.stdout
