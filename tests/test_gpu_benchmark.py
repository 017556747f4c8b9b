"""`make gpu` and benchmarks/input.py, tried without a GPU."""

import json
import re

import pytest
import torch

from benchmarks import gpu, input
from benchmarks.speed import HEADER
from common.errors import UserError
from tests.helpers import ROOT, load_script
from training.config import load_run_config

TINY = """\
data:
  source: {name: folder, path: source}
  target: {name: folder, path: target}
  size: 32
  batch: 4
model: {backbone: lenet}
"""
ROW = {"recipe": "digits", "batch": 64, "load": 1.0, "draw": 2.0, "pixels": 30.0, "raw": 3.2}


def test_the_command_writes_what_was_measured(tmp_path, monkeypatch, capsys):
    """One tiny speed row is real; tests and input are not run again here."""
    run, seen = gpu.run, []

    def some(words, seconds):
        seen.append(words)
        if "pytest" in words:
            return 0, "....\n4 passed, 2 skipped in 1.00s\n"
        if words[0] == "benchmarks/input.py":
            rows = [{**ROW, "images_per_second": {"0": 1000.0, "4": 4000.0}}]
            with open(words[words.index("--json") + 1], "w") as file:
                json.dump(rows, file)
            return 0, ""
        return run(words, seconds)

    monkeypatch.setattr(gpu, "run", some)
    monkeypatch.setattr(gpu, "SPEED", [("train_source", TINY, []), ("train_mcc", TINY, ["stp=1"])])
    assert gpu.main(["--device", "cpu", "--out", str(tmp_path / "runs/gpu")]) == 1
    figures = json.loads((tmp_path / "runs/gpu.json").read_text())
    assert figures["tests"]["outcome"] == "4 passed, 2 skipped in 1.00s"
    assert figures["left_out"] == ["train_mcc stp=1"]  # a wrong key
    assert re.fullmatch(r"\| train_source, images \| 4 \| .*", figures["speed"][0])
    text = (tmp_path / "runs/gpu.md").read_text()
    assert f"{HEADER}\n{figures['speed'][0]}" in text
    assert "| digits | 64 | 1 | 2 | 30 | 3 | 1,000 | 4,000 |" in text
    assert "Left out: train_mcc stp=1." in text
    assert "stp" in capsys.readouterr().err


def test_the_configs_of_the_command_load(tmp_path):
    """Every row of the table is one that its script takes."""
    for script, text, overrides in gpu.SPEED:
        file = tmp_path / "config.yaml"
        file.write_text(text)
        config = load_run_config(load_script(ROOT / f"{script}.py").Config, [str(file)], overrides)
        assert config.model.channels_last


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_one_line_says_so():
    with pytest.raises(UserError, match="torch sees no GPU; run this where there is one"):
        gpu.main([])


def test_a_command_that_takes_too_long_is_ended():
    assert gpu.run(["-c", "import time; print('begun', flush=True); time.sleep(60)"], 1)[0] == 124


@pytest.mark.parametrize("name", input.RECIPES)
def test_the_stages_of_a_recipe(name):
    recipe = input.RECIPES[name]
    figures = input.stages(recipe, torch.device("cpu"), 0.0)
    assert set(figures) == {"load", "draw", "pixels", "raw"}
    assert all(value >= 0 for value in figures.values())
    images, config = input.generated(recipe, 0)
    assert (images.labels is None) == (recipe.strong is not None)
    assert len(images) >= config.batch


def test_training_on_files():
    figures = input.train_on_files(250)
    assert all(figures[name] > 0 for name in ("first step", "first pass", "second pass"))
    assert figures["cache_gb"] * 2**30 == pytest.approx(0.1 * 250 * 3 * 256**2)
    assert figures["GiB"] < 1
