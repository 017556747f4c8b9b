"""benchmarks/fuzz_config.py: its configs load unchanged, and a few mutations of them end well."""

import pytest
import yaml

from benchmarks import fuzz_config
from common.errors import UserError
from tests.helpers import ROOT, TRAINING, load_script
from training.config import load_run_config


def test_the_configs_load_without_a_mistake(tmp_path):
    """Else all mutations of one would be refused for the same reason."""
    bases = fuzz_config.base_configs(tmp_path)
    assert {script for script, _ in bases} == {script.name for script in TRAINING}
    file = tmp_path / "config.yaml"
    for script, tree in bases:
        file.write_text(yaml.safe_dump(tree, sort_keys=False))
        load_run_config(load_script(ROOT / script).Config, str(file))


@pytest.mark.parametrize(
    ("code", "output", "expected"),
    [
        (0, "dry run: passed", "ran"),
        (2, "error: steps must be positive", "refused"),
        (3, "error: step 1: cls_loss is nan", "diverged"),
        (2, "usage: ...", "traceback"),
        (2, "error: " + 6000 * "x", "long"),
        (1, "Traceback (most recent call last)", "traceback"),
        (0, "Exception in thread: Traceback (most recent call last)", "traceback"),
        (99, "", "nonsense"),
        (-9, "", "hang"),
    ],
)
def test_outcomes(code, output, expected):
    assert fuzz_config.outcome(code, output) == expected


def test_mutations_are_repeatable(tmp_path):
    bases = fuzz_config.base_configs(tmp_path)
    seen = []
    for number in (*range(40), *range(40)):
        script, words = fuzz_config.mistake(number, 0, bases, tmp_path)
        seen.append((script, words, (tmp_path / "config.yaml").read_bytes()))
    assert seen[:40] == seen[40:]
    assert len({text for _, _, text in seen}) > 35


def test_a_few_mutations(capfd):
    results = fuzz_config.fuzz(range(25), seed=0)
    faults = [result for result in results if result.outcome in fuzz_config.FAULTS]
    assert faults == [], capfd.readouterr().out
    outcomes = {result.outcome for result in results}
    assert {"ran", "refused"} <= outcomes  # control: both happen
    assert f"| all | {sum(r.outcome == 'ran' for r in results)} |" in fuzz_config.table(results)


def test_control_a_fault_is_seen(tmp_path):
    def fail():
        raise KeyError("a defect")

    def refuse():
        raise UserError("a mistake")

    for work, expected in ((fail, "traceback"), (refuse, "refused"), (lambda: 0, "ran")):
        code, output, _ = fuzz_config.in_fork(work, tmp_path)
        assert fuzz_config.outcome(code, output) == expected
