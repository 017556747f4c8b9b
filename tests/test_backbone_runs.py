"""Every backbone in the scripts: dry run, training, exact resume, export, two processes.

One is tried always, all of them with `--slow`.
"""

import dataclasses
import gc
import itertools
import math

import pytest
import torch

from analysis.export import TOLERANCE, export
from common.errors import UserError
from models import ModelCard, build_classifier, build_segmenter, load_run
from models.backbones import BACKBONES, Transformer, has_windows
from models.config import ModelConfig, fitting_heads
from tests.helpers import (
    TASKS,
    config_of,
    differing,
    metrics,
    others_slow,
    stop_after,
    train,
    train_on,
    weights,
)

ALWAYS = [("mobilenet_v3_large", "train_dann", "classification")]
ALL = [
    (name, script, task)
    for name, script, task in itertools.product(
        BACKBONES, ("train_source", "train_dann", "train_pseudo"), TASKS
    )
    if not (name.startswith("lenet") and task == "segmentation")
]
ALL += [
    ("resnet18", script, "classification")
    for script in (
        "train_advent",
        "train_mmd",
        "train_mcc",
        "train_mdd",
        "train_adda",
        "train_selfsup",
        "train_mic",
    )
]
CASES = [
    pytest.param(*case, marks=() if case in ALWAYS else pytest.mark.slow, id="-".join(case))
    for case in ALL
]
STEPS, STOP = 5, 3


def keys_of(name: str, script: str, task: str) -> list[str]:
    keys = [f"model.backbone={name}", "log_every=1", f"steps={STEPS}", "optim.weight_decay=0"]
    keys += ["save_every=100", "eval_every=100", "optim.lr=0.001", "optim.clip_norm=1"]
    if not name.startswith("lenet"):
        keys += ["optim.layer_decay=0.9"]
    if task == "classification":
        return [*keys, "data.size=37", "data.batch=4"]
    keys += [f"model.head={fitting_heads(name)[-1]}", "model.output_stride=8", "data.batch=2"]
    keys += [f"data.{role}.crop=[53, 67]" for role in ("source", "target")]
    return keys


@pytest.mark.parametrize(("name", "script", "task"), CASES)
def test_a_backbone_in_a_script(tmp_path, capsys, monkeypatch, name, script, task):
    """On images whose sides are no multiples of anything."""
    config, keys = config_of(task, tmp_path, script), keys_of(name, script, task)
    assert train(script, config, *keys, "--dry-run") == 0
    assert not (tmp_path / "run").exists()
    # First, because the largest networks fill the memory of a small machine.
    train_on(2, script, config, *keys, "steps=2", f"out_dir={tmp_path}/two")
    assert all(value.isfinite().all() for value in weights(tmp_path / "two").values())

    assert train(script, config, *keys, f"out_dir={tmp_path}/whole") == 0
    lines = [line for line in metrics(tmp_path / "whole") if "lr" in line]
    assert len(lines) == STEPS
    for line in lines:
        losses = [value for name, value in line.items() if name.endswith("_loss")]
        assert losses
        assert all(math.isfinite(loss) for loss in losses)

    with monkeypatch.context() as patch:
        stop_after(patch, STOP)
        assert train(script, config, *keys) == 143
    gc.collect()
    before = weights(tmp_path / "run", f"checkpoints/step_{STOP:08d}.pt")["model"]
    stem = next(name for name in before if name.startswith("backbone."))
    before = before[stem].clone()
    assert train(script, config, *keys, "--resume") == 0
    gc.collect()
    last = f"checkpoints/step_{STEPS:08d}.pt"
    states = [weights(tmp_path / folder, last) for folder in ("run", "whole")]
    for state in states:
        del state["seconds"]
    assert differing(*states) == 0
    assert (before != states[0]["model"][stem]).any()  # a gradient has reached the stem
    del states, state

    network, card = load_run(tmp_path / "whole")
    if task == "segmentation" and has_windows(name):
        with pytest.raises(UserError, match=f"{name} is exported for images of one size"):
            export(network, card)
        card = dataclasses.replace(card, resize=[64, 70])
    assert export(network, card)[1] <= TOLERANCE


@pytest.mark.parametrize("task", others_slow(TASKS, ("classification",)))
def test_a_vit_is_exported_at_the_size_of_its_positions_too(monkeypatch, task):
    monkeypatch.setitem(BACKBONES, "vit_b_16", Transformer(128, 16, 4, 2, 32, "vit_b_16"))
    torch.manual_seed(0)
    config = ModelConfig(backbone="vit_b_16", head="upsampling")
    build, size = (build_classifier, 128) if task == "classification" else (build_segmenter, None)
    card = ModelCard(
        method="source",
        task=task,
        classes=["a", "b"],
        resize=size,
        size=size,
        exif=False,
        amp="float32",
        mean=[0.5] * 3,
        std=[0.2] * 3,
        model=config,
    )
    network = build(config, 2, ".").eval()
    program, most = export(network, card)
    assert most <= TOLERANCE
    images = torch.randint(256, (1, 3, 128, 128), dtype=torch.uint8)
    with torch.no_grad():
        difference = program.module()(images) - network(images).logits
    assert difference.abs().max() <= 1e-5


def test_all_backbones_are_tried():
    assert {case[0] for case in ALL} == set(BACKBONES)
    assert all(case in ALL for case in ALWAYS)
