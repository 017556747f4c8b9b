"""Every script on a CUDA device that computes shapes and no values, since CI has no GPU.

What mixes devices raises, and so does what reads a value, for which a GPU would be waited for.
"""

import contextlib
import warnings
from unittest import mock

import pytest
import torch
from torch._subclasses.fake_tensor import (
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

from data import operations
from data.views import Raw
from models.config import fitting_heads
from tests.helpers import RUNS, TASKS, TRAINING, any_config, others_slow, train
from training import collapse, evaluation, state
from training.log import Log

STEPS = 3  # the last of them is not finished


class FakeCuda(TorchDispatchMode):
    """Tensors of CUDA devices have shapes and no values; others are as usual."""

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        device = kwargs.get("device")
        if device is None or torch.device(device).type != "cuda":
            return function(*args, **kwargs)
        args = tree_map_only(torch.Tensor, self._without_values, args)
        with self.fake:
            return function(*args, **kwargs)

    def _without_values(self, x: torch.Tensor) -> torch.Tensor:
        return x if isinstance(x, FakeTensor) else self.fake.from_tensor(x)


class Passed(BaseException):
    """Leaves a script."""


def gradients(outputs, inputs, **options):
    """In place of torch's, which needs a GPU."""
    return [torch.zeros_like(x) for x in inputs]


@contextlib.contextmanager
def fake_cuda():
    """A context with a CUDA device, which every script takes for real.

    Without gradients, since the engine that computes them needs a GPU, optimizers do nothing.
    """
    answers = {
        "_lazy_init": None,
        "is_available": True,
        "device_count": 1,
        "current_device": 0,
        "get_device_name": "fake",
        "is_bf16_supported": True,
    }
    nothing = lambda *args, **kwargs: None  # noqa: E731
    noise = lambda seeds, images: torch.zeros(images.shape, device=images.device)  # noqa: E731
    stubs = [(torch.cuda, name, lambda *args, x=x: x) for name, x in answers.items()]
    stubs += [(torch.amp.GradScaler, name, nothing) for name in ("unscale_", "step", "update")]
    stubs += [(torch.Tensor, "backward", nothing), (torch.autograd, "grad", gradients)]
    stubs += [(torch.Tensor, "pin_memory", lambda x, *args: x), (operations, "normal", noise)]
    torch._C._ensureCUDADeviceGuardSet()
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        with contextlib.ExitStack() as stack:
            for owner, name, stub in stubs:
                stack.enter_context(mock.patch.object(owner, name, stub))
            stack.enter_context(warnings.catch_warnings())
            for text in ("pin_memory", "Accessing the data pointer of FakeTensor", "The .grad att"):
                warnings.filterwarnings("ignore", f".*{text}")
            stack.enter_context(FakeCuda())
            yield
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)
        torch.use_deterministic_algorithms(False)


def take_steps(script: str, config, *keys: str) -> None:
    """Run a script to the end of the losses of step `STEPS`."""
    add, taken = Log.add, []

    def add_and_leave(self, **values):
        add(self, **values)
        taken.append(1)
        if len(taken) == STEPS:
            raise Passed

    views = Raw.views

    def views_in_full_precision(batch):
        assert not torch.is_autocast_enabled("cuda"), "views are computed under autocast"
        return views(batch)

    keys = ("device=cuda", "log_every=100", "eval_every=100", "save_every=100", *keys)
    leave = mock.patch.object(Log, "add", add_and_leave)
    watch = mock.patch.object(Raw, "views", views_in_full_precision)
    with fake_cuda(), leave, watch, pytest.raises(Passed):
        train(script, config, *keys)


EVERYTHING = "{crop: {}, flip: {}, jitter: {contrast: 0.4, saturation: 0.4, hue: 0.1}, blur: {}, "
EVERYTHING += "cutout: {}}"
VARIANTS = {
    "train_source": [[f"data.augment={EVERYTHING}"], ["data.target_labeled=1"]],
    "train_dann": [
        ["model.bn=separate", "model.bn_running=target"],
        ["conditional=cdan_e"],
        ["data.target_labeled=1"],
        ["reversal_bound=null"],
    ],
    "train_advent": [["adv_weight=0.5"], ["adv_weight=0", "div_weight=1"]],
    "train_pseudo": [
        ["threshold_mode=class_balanced", "distribution_alignment=true"],
        ["threshold_mode=relative", "weighting=confident_fraction"],
        ["teacher=none", "strong_augment={jitter: {hue: 0.1}, blur: {}}"],
        ["teacher_bn=student"],
    ],
    "train_mmd": [["coral_weight=1"]],
    "train_adda": [["source_steps=1"]],
    "train_shot": [["centroid_every=2"]],
    "train_selfsup": [
        ["flip_weight=1", "location_weight=1", "contrastive_weight=1", "strong_augment={blur: {}}"]
    ],
    "adapt_online": [["prior_from=source", "updates=2", "ent_margin=0.4"]],
    "finetune": [["head_steps=0"], ["data.augment={}", "data.target.crop=null"]],
}
SHOWN = (
    "train_source",
    "train_dann",
    "train_pseudo",
    "train_advent",
    "train_mic",
)  # on maps; others: --slow
EVERY = [
    pytest.param(
        script, task, [], marks=[pytest.mark.slow] * (task != TASKS[0] and script not in SHOWN)
    )
    for script, task in RUNS
]
EVERY += [(script, "classification", keys) for script in VARIANTS for keys in VARIANTS[script]]
MAPS = [(script, "segmentation", keys) for script in VARIANTS for keys in VARIANTS[script]]
EVERY += [pytest.param(*case, marks=pytest.mark.slow) for case in MAPS]


@pytest.mark.parametrize(("script", "task", "keys"), EVERY)
def test_steps_do_not_wait_for_the_device(tmp_path, script, keys, task):
    if task == "segmentation" and "conditional=cdan_e" in keys:
        keys = ["disc_locations=true"]  # in its place: conditioning is for one vector per image
    if task == "segmentation" and f"data.augment={EVERYTHING}" in keys:
        keys = [keys[0].replace("crop: {}, ", "")]
    take_steps(script, any_config(script, tmp_path, task), "amp=bfloat16", *keys)


@pytest.mark.parametrize(
    ("name", "task"),
    [
        ("convnext_tiny", "segmentation"),
        pytest.param("swin_v2_t", "classification", marks=pytest.mark.slow),
        pytest.param("dinov2_vits14", "segmentation", marks=pytest.mark.slow),
    ],
)
def test_networks_and_optimizers_of_today_do_not_wait(tmp_path, name, task):
    keys = [f"model.backbone={name}", "amp=bfloat16", "optim.clip_norm=1", "optim.warmup=2"]
    keys += ["optim.name=adamw", "optim.layer_decay=0.9"]
    if task == "segmentation":
        keys += [f"model.head={fitting_heads(name)[-1]}", "model.output_stride=8"]
    take_steps("train_pseudo", any_config("train_pseudo", tmp_path, task), *keys)


@pytest.mark.parametrize("amp", ["float32", pytest.param("float16", marks=pytest.mark.slow)])
@pytest.mark.parametrize(
    "script", others_slow([path.stem for path in TRAINING], ("train_dann", "train_pseudo"))
)
def test_steps_of_other_precisions(tmp_path, script, amp):
    take_steps(script, any_config(script, tmp_path), f"amp={amp}")


def test_control_what_waits_is_found(tmp_path, monkeypatch):
    waiting = lambda numbers, size: torch.bincount(numbers.flatten(), minlength=size)  # noqa: E731
    monkeypatch.setattr(collapse, "occurrences", waiting)
    with pytest.raises(DynamicOutputShapeException):
        take_steps("train_dann", any_config("train_dann", tmp_path))


def test_control_a_second_device_is_found(tmp_path, monkeypatch):
    plain = collapse.class_mean
    monkeypatch.setattr(collapse, "class_mean", lambda p: plain(p).cpu())
    with pytest.raises(RuntimeError, match="device"):
        take_steps("train_dann", any_config("train_dann", tmp_path))


@pytest.mark.parametrize("task", others_slow(TASKS, ("classification",)))
@pytest.mark.parametrize(("module", "key"), [(evaluation, "eval_every=1"), (state, "save_every=1")])
def test_an_evaluation_and_a_save_read_all_tensors_at_once(
    tmp_path, monkeypatch, task, module, key
):
    """They come to what they read, and nothing has waited before."""

    def read(tensors):
        assert {x.device.type for x in tensors} == {"cuda"}
        raise Passed

    monkeypatch.setattr(module, "read", read)
    monkeypatch.setattr(Log, "check_finite", lambda log, step: None)  # a save reads the log, too
    config = any_config("train_pseudo", tmp_path, task)
    keys = ["device=cuda", "log_every=100", "eval_every=100", "save_every=100", key]
    with fake_cuda(), pytest.raises(Passed):
        train("train_pseudo", config, *keys)
