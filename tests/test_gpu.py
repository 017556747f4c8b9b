"""On a CUDA device: every precision trains, no host sync between log steps, resume is exact.

Without such a device these tests are skipped aloud.
"""

import pytest
import torch

from benchmarks.input import RECIPES, generated
from common.resize import resize_maps
from data import to_views
from data.tasks import task_module
from tests.helpers import (
    RUNS,
    SCRIPTS,
    TASKS,
    TRAINING,
    any_config,
    config_of,
    differing,
    metrics,
    stop_after,
    train,
    weights,
)
from training import log

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
    pytest.mark.filterwarnings("ignore:Synchronization debug mode"),
]


VARIANTS = [
    ("train_dann", ["model.bn=separate", "model.bn_running=target"]),
    ("train_dann", ["conditional=cdan_e"]),
    ("train_advent", ["adv_weight=0.5"]),
    ("train_pseudo", ["threshold_mode=class_balanced", "distribution_alignment=true"]),
    ("train_pseudo", ["threshold_mode=relative", "weighting=confident_fraction"]),
    ("train_mmd", ["coral_weight=1"]),
    ("train_adda", ["source_steps=10"]),
    ("train_shot", ["centroid_every=20"]),  # a pass over the target waits for the device
    ("finetune", ["head_steps=20", "data.augment={}", "data.target.crop=null"]),
    ("finetune", ["head_steps=0"]),
    ("train_dann", ["data.target_labeled=1"]),
    ("train_selfsup", ["location_weight=1", "contrastive_weight=1", "strong_augment={blur: {}}"]),
]
OTHERS = ("train_shot", "finetune", "adapt_online")
VARIANTS += [(path.stem, []) for path in TRAINING if path.stem not in OTHERS]
CASES = [
    (script, task, keys) for task in TASKS for script, keys in VARIANTS if (script, task) in RUNS
]
# The stream of the street scenes has no 20 batches in these tests. A look for harm waits.
CASES += [("adapt_online", "classification", ["check_every=100"])]


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("script", SCRIPTS)
@pytest.mark.parametrize("amp", ["float32", "float16", "bfloat16"])
def test_every_precision_trains(tmp_path, script, amp, task):
    config = config_of(task, tmp_path, script)
    assert train(script, config, "device=cuda", f"amp={amp}", "steps=30", "log_every=5") == 0
    losses = [line["cls_loss"] for line in metrics(tmp_path / "run") if "cls_loss" in line]
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("amp", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("script", "task", "keys"), CASES)
def test_no_host_sync_between_log_steps(tmp_path, monkeypatch, script, keys, amp, task):
    """Between the first step and the log, anything that waits for the device raises."""
    add, seen = log.Log.add, []

    def watch(self, **values):
        add(self, **values)
        seen.append(1)
        torch.cuda.set_sync_debug_mode("error" if 1 <= len(seen) < 19 else "default")

    if task == "segmentation" and "conditional=cdan_e" in keys:
        keys = ["disc_locations=true"]  # in its place: conditioning is for one vector an image
    rare = {"eval_every": 20, "save_every": 20, "log_every": 20}
    config = any_config(script, tmp_path, task, **rare)
    monkeypatch.setattr(log.Log, "add", watch)
    try:
        assert train(script, config, "device=cuda", f"amp={amp}", "steps=20", *keys) == 0
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(seen) == 20


@pytest.mark.parametrize(("script", "task"), RUNS)
def test_resume_is_exact(tmp_path, monkeypatch, script, task):
    config = any_config(script, tmp_path, task)
    arguments = ["device=cuda"] + (["disc_norm=dropout"] if script == "train_dann" else [])
    assert train(script, config, *arguments, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train(script, config, *arguments) == 143
    assert train(script, config, *arguments, "--resume") == 0
    assert differing(weights(tmp_path / "whole"), weights(tmp_path / "run")) == 0


@pytest.mark.parametrize("name", RECIPES)
def test_views_are_those_of_a_cpu(name):
    """Within a gray level of rounding, which jitter after a crop may multiply; without noise."""
    recipe = RECIPES[name]
    if recipe.strong and "photometric" in recipe.strong:
        pytest.skip("the noise is that of the device")
    images, config = generated(recipe, 0)
    batches = task_module(config).TrainBatches(images, config, 0, "source", recipe.strong, raw=True)
    ours, theirs = (to_views(batches[0], torch.device(kind)) for kind in ("cuda", "cpu"))
    pairs = zip(ours, theirs, strict=True) if isinstance(ours, tuple) else [(ours, theirs)]
    for view, expected in pairs:
        difference = (view.cpu().int() - expected.int()).abs()
        assert difference.max() <= (16 if {"crop", "jitter"} <= set(recipe.augment) else 1)
        assert difference.float().mean() < 0.5


@pytest.mark.parametrize("keys", [["deterministic=false"], ["compile=true"], ["accumulate=2"]])
@pytest.mark.parametrize("task", TASKS)
def test_keys_of_a_gpu(tmp_path, task, keys):
    config = config_of(task, tmp_path, "train_pseudo")
    assert train("train_pseudo", config, "device=cuda", "amp=bfloat16", *keys) == 0
    assert any("cls_loss" in line for line in metrics(tmp_path / "run"))


def test_maps_are_resized_to_the_same_bits():
    torch.manual_seed(0)
    x = torch.randn(2, 19, 64, 128, device="cuda", requires_grad=True)
    outcomes = []
    for _ in range(3):
        resized = resize_maps(x, (512, 1024))
        (gradient,) = torch.autograd.grad(resized.square().sum(), x)
        outcomes.append((resized.detach(), gradient))
    assert all(torch.equal(a, b) for one in outcomes for a, b in zip(one, outcomes[0], strict=True))
    expected = torch.nn.functional.interpolate(x.cpu(), size=(512, 1024), mode="bilinear")
    torch.testing.assert_close(outcomes[0][0].cpu(), expected, rtol=0, atol=1e-5)
