"""Two-stage fine-tuning: what is frozen, when it switches, what is kept."""

import math
import re
import signal

import pytest
import torch

import data.domains
import models.network
from common.errors import UserError
from data import drawn, drawn_street, open_domains
from data.config import DomainConfig, LabeledDataConfig
from models import build_classifier, build_segmenter, cache_features
from models.backbones import BatchNorm
from models.config import ModelConfig
from tests.helpers import (
    TASKS,
    differing,
    finetune_config,
    metrics,
    others_slow,
    stop_after,
    stop_within_evaluation,
    summary,
    tiny_config,
    train,
    weights,
)
from training import folder as training_folder
from training import run as training_run
from training.stages import Stages

LAST = "checkpoints/step_00000010.pt"


def moved(a: dict, b: dict) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def at(folder, step: int) -> dict:
    return weights(folder, f"checkpoints/step_{step:08d}.pt")


# --- what is frozen


@pytest.mark.parametrize(
    ("augment", "task"),
    [
        (True, "classification"),
        (False, "classification"),
        (True, "segmentation"),
        pytest.param(False, "segmentation", marks=pytest.mark.slow),
    ],
)
def test_frozen_is_frozen_to_the_bit(tmp_path, monkeypatch, task, augment):
    """Stage 1 moves the head alone; stage 2 the head and layer4, not its statistics.

    On features or on images.
    """
    monkeypatch.setattr(training_folder, "KEEP", 20)
    keys = [] if augment else ["data.augment={}", "data.target.crop=null"]
    assert train("finetune", finetune_config(tmp_path, task), *keys, "save_every=1") == 0
    saved = {step: at(tmp_path / "run", step)["model"] for step in (1, 3, 4, 5, 10)}

    def is_head(name: str) -> bool:
        return name.startswith(("head.", "aux_head."))

    def is_statistic(name: str) -> bool:
        return "running" in name or "num_batches" in name

    parts = (
        [f"backbone.{k}." for k in range(14, 18)]
        if task == "segmentation"
        else ["backbone.layer4."]
    )
    layer4 = {name for name in saved[1] if name.startswith(tuple(parts))}
    assert moved(saved[1], saved[3])
    for step in (3, 4):  # 4 is the last of stage 1
        assert all(map(is_head, moved(saved[1], saved[step])))
    stage2 = moved(saved[4], saved[10])
    assert all(is_head(name) or name in layer4 for name in stage2)
    assert {name for name in layer4 if not is_statistic(name)} <= stage2
    assert not any(is_statistic(name) for name in stage2 & layer4)


def optimized(state: dict) -> int:
    return sum(len(group["params"]) for group in state["param_groups"])


def test_frozen_parameters_are_in_no_optimizer(tmp_path):
    assert train("finetune", finetune_config(tmp_path), "model.bottleneck=16") == 0
    state = weights(tmp_path / "run", LAST)
    assert (
        optimized(state["head_optimizer"]) == 2 + 4
    )  # Linear; Linear and batch norm of the bottleneck
    assert optimized(state["optimizer"]) == 2 + 4 + 3  # and convolution and batch norm of layer4
    assert (
        state["optimizer"]["param_groups"][0]["lr"]
        != state["head_optimizer"]["param_groups"][0]["lr"]
    )


def build(backbone: str, task: str = "classification", **keys):
    if task == "segmentation":
        return build_segmenter(ModelConfig(backbone=backbone, **keys), 3, ".")
    return build_classifier(ModelConfig(backbone=backbone, **keys), 3, ".")


def learning(model) -> set[str]:
    return {name for name, p in model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize(
    "backbone",
    [
        "lenet",
        "resnet18",
        "resnet50_caffe",
        "mobilenet_v2",
        "efficientnet_b0",
        "convnext_tiny",
        "swin_t",
        "dinov2_vits14",
    ],
)
def test_stages_of_every_family(backbone):
    model = build(backbone)
    stages = model.backbone.stages()
    assert list(stages) == ["layer1", "layer2", "layer3", "layer4"]
    counts = [
        sum(p.numel() for m in modules for p in m.parameters()) for modules in stages.values()
    ]
    assert min(counts) > 0
    assert sum(counts) == sum(p.numel() for p in model.backbone.parameters())  # each in one stage
    model.freeze("backbone")
    assert learning(model) == {"head.weight", "head.bias"}
    model.unfreeze(["layer4"])
    learnt = sum(
        p.numel()
        for name, p in model.named_parameters()
        if p.requires_grad and name.startswith("backbone")
    )
    assert learnt == counts[3]
    model.train()
    assert not any(m.training for m in model.backbone.modules())
    assert model.head.training


def test_the_last_share_of_the_layers():
    model = build("resnet18")
    model.freeze("backbone")
    model.unfreeze(0.3)
    layers = [name for name, m in model.backbone.named_modules() if m._parameters]
    convolutions = [name for name in layers if "conv" in name or name.endswith("downsample.0")]
    first = convolutions[-math.ceil(0.3 * len(convolutions))]
    expected = layers[layers.index(first) :]
    assert {name.rsplit(".", 1)[0] for name in learning(model) if name.startswith("backbone.")} == {
        f"backbone.{name}" for name in expected
    }
    model.unfreeze(1.0)
    assert len(learning(model)) == len(list(model.parameters()))
    model = build("dinov2_vits14")
    model.freeze("backbone")
    model.unfreeze(0.25)  # of 1 convolution and 12 blocks with 4 matrices each
    blocks = {name.split(".")[3] for name in learning(model) if ".layers." in name}
    assert blocks == {f"encoder_layer_{i}" for i in (8, 9, 10, 11)}
    assert not any("pos_embedding" in name or "conv_proj" in name for name in learning(model))
    model.unfreeze(1.0)
    assert len(learning(model)) == len(list(model.parameters()))
    model = build("resnet18", bn_affine="frozen")
    model.freeze("backbone")
    model.unfreeze(["layer4"])
    assert not any(".bn" in name for name in learning(model))
    assert any("layer4.0.conv1" in name for name in learning(model))
    with pytest.raises(
        UserError, match="unfreeze: no stage 'layer5'; there are layer1, layer2, layer3, layer4"
    ):
        model.unfreeze(["layer5"])


def test_dropout_is_of_the_head_and_of_training(tmp_path):
    model, x = build("lenet", dropout=0.5), torch.randint(256, (4, 3, 28, 28), dtype=torch.uint8)
    model.freeze("backbone")
    model.train()
    assert not torch.equal(model(x).logits, model(x).logits)
    model.eval()
    assert torch.equal(model(x).logits, model(x).logits)
    assert list(model.state_dict()) == list(build("lenet").state_dict())


# --- the features of stage 1


CPU = torch.device("cpu")
CACHED = [
    ("lenet", "classification"),
    ("efficientnet_b0", "classification"),
    ("mobilenet_v2", "segmentation"),
    ("efficientnet_b0", "segmentation"),
]


class Items(list):
    """As the dataset of a loader: item k is batch k, of the images `set`."""


class Loader(list):
    """Batches of three of the images and labels, as of `Domains.labeled_pass`."""

    def __init__(self, x: torch.Tensor, y: torch.Tensor):
        super().__init__(zip(x.split(3), y.split(3), strict=True))
        self.dataset = Items(self)
        self.dataset.set = x


@pytest.fixture
def frozen_model():
    """`frozen_model(backbone, task)`: a model in eval mode, and seven images with labels."""

    def make(backbone: str, task: str):
        torch.manual_seed(0)
        dense = task == "segmentation"
        model = build(backbone, task, **({"aux_weight": 0.1, "output_stride": 16} if dense else {}))
        x = torch.randint(256, (7, 3, 64, 64), dtype=torch.uint8)
        y = torch.randint(3, (7, 64, 64)) if dense else torch.arange(7)
        for module in model.modules():
            if isinstance(module, BatchNorm):
                module.momentum = 1.0
        model(x)  # statistics of these images: with the initial ones their logits are all alike
        model.freeze("backbone")
        model.eval()
        logits = model(x).logits
        assert (logits[1:] - logits[:1]).abs().flatten(1).amax(1).min() > 0.01
        return model, x, y

    return make


def assert_same_output(cached, out) -> None:
    torch.testing.assert_close(cached.logits, out.logits, rtol=1e-4, atol=1e-5)
    assert (cached.aux_logits is None) == (out.aux_logits is None)
    if out.aux_logits is not None:
        torch.testing.assert_close(cached.aux_logits, out.aux_logits, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("backbone", "task"), CACHED)
def test_features_predict_what_images_do(frozen_model, backbone, task):
    model, x, y = frozen_model(backbone, task)
    cache = cache_features(model, Loader(x, y), 1.0, CPU)
    assert torch.equal(cache.labels, y)
    assert cache.features.size == (64, 64)
    features = cache.features.features
    assert all(not feature.requires_grad for feature in features.values())
    assert_same_output(model(cache.features), model(x))
    if task == "classification":
        assert {name: feature.shape for name, feature in features.items()} == {
            "pooled": (7, model.channels["layer4"])
        }


@pytest.mark.parametrize(("backbone", "task"), CACHED[::2])
def test_batches_of_features_are_those_of_the_images_in_that_order(frozen_model, backbone, task):
    model, x, y = frozen_model(backbone, task)
    cache = cache_features(model, Loader(x, y), 1.0, CPU)
    positions = torch.tensor([[4, 0, 4], [6, 1, 2]]).unbind()
    batches = list(cache.batches(positions))
    assert len(batches) == 2
    for rows, (features, labels) in zip(positions, batches, strict=True):
        assert torch.equal(labels, y[rows])
        assert_same_output(model(features), model(x[rows]))
    assert list(cache.batches(())) == []


def test_features_beyond_the_limit_are_not_kept(frozen_model, capsys):
    model, x, y = frozen_model("lenet", "classification")
    needed = (4 * model.channels["layer4"] + 8) * 7 / 2**30  # float32 features, int64 labels
    assert cache_features(model, Loader(x, y), 1.01 * needed, CPU) is not None
    assert capsys.readouterr().out == ""
    assert cache_features(model, Loader(x, y), 0.99 * needed, CPU) is None
    assert "features of 7 images" in capsys.readouterr().out


@pytest.mark.parametrize("task", TASKS)
def test_the_cache_gives_the_losses_of_the_full_forward(tmp_path, monkeypatch, task):
    config = finetune_config(tmp_path, task, log_every=1, head_steps=8, patience=20)
    keys = ["data.augment={}", "data.target.crop=null"]
    passes = []
    labeled_pass = data.domains.Domains.labeled_pass
    monkeypatch.setattr(
        data.domains.Domains, "labeled_pass", lambda d: passes.append(1) or labeled_pass(d)
    )
    assert train("finetune", config, *keys) == 0
    assert len(passes) == 1
    monkeypatch.setattr(data.domains.Domains, "unchanging", False)
    assert train("finetune", config, *keys, f"out_dir={tmp_path}/full") == 0
    assert len(passes) == 1
    cached, full = (
        [m["cls_loss"] for m in metrics(tmp_path / run) if "lr" in m] for run in ("run", "full")
    )
    assert cached == pytest.approx(full, rel=1e-4)
    assert len(set(full)) == 10  # control


def test_features_too_large_are_computed_anew(tmp_path, capsys):
    config = finetune_config(tmp_path, log_every=1)
    keys = ["data.augment={}", "feature_gb=0"]
    assert train("finetune", config, *keys) == 0
    out = capsys.readouterr().out
    assert re.search(r"features of 160 images .*GiB, more than feature_gb", out)
    assert train("finetune", config, keys[0], f"out_dir={tmp_path}/cached") == 0
    anew, cached = (
        [m["cls_loss"] for m in metrics(tmp_path / run) if "lr" in m] for run in ("run", "cached")
    )
    assert anew == pytest.approx(cached, rel=1e-4)


def test_augmented_images_are_not_cached(tmp_path, monkeypatch):
    monkeypatch.setattr(data.domains.Domains, "labeled_pass", None)
    assert train("finetune", finetune_config(tmp_path)) == 0
    with pytest.raises(TypeError):
        train(
            "finetune", finetune_config(tmp_path), "data.augment={}", f"out_dir={tmp_path}/control"
        )


# --- the stages


def stages_of(losses: list[float], head_steps: int = 100, **keys) -> list[tuple[int, bool]]:
    """(stage, whether it ended) after each of the validation losses, ten steps apart."""
    told: list[str] = []
    stages = Stages(head_steps, **{"patience": 2, "min_delta": 0.1, "max_jump": 0.5, **keys})
    seen = []
    for i, loss in enumerate(losses, 1):
        end = stages.end(10 * i, loss, told.append)
        seen.append((stages.number, end))
        if end and stages.number == 1:
            stages.begin_second(10 * i)
        restored = Stages(head_steps, 2, 0.1, 0.5)
        restored.load_state_dict(stages.state_dict())
        stages = restored
    return seen, stages, told


def test_a_stage_ends_when_its_loss_is_flat():
    seen, stages, told = stages_of([2.0, 1.5, 1.45, 1.0, 0.95, 0.93, 0.9, 0.5, 0.45, 0.45])
    assert seen == [(1, False)] * 5 + [(1, True)] + [(2, False)] * 3 + [(2, True)]
    assert (stages.switch, stages.began_with) == (60, 0.93)
    assert told == []
    assert stages.jump == 0  # below all along


def test_slow_progress_counts_in_the_end():
    """min_delta is to the best loss that counted, not to the one before."""
    seen, _, _ = stages_of([1.0, 0.94, 0.88, 0.82, 0.76])
    assert not any(end for _, end in seen)


def test_stage_1_ends_with_its_steps():
    seen, stages, _ = stages_of([3, 2, 1], head_steps=30)
    assert seen == [(1, False), (1, False), (1, True)]
    assert stages.switch == 30


def test_a_jump_is_told_once_with_its_remedy():
    _, stages, told = stages_of([1.0, 1.0, 1.0, 1.4, 1.6, 2.0])
    assert stages.jump == pytest.approx(1.0)
    (told,) = told
    assert "step 50: after unfreezing the validation loss rose from 1.000 to 1.600" in told
    assert "lower finetune_lr or unfreeze less" in told
    assert "stage1.pt" in told


def test_overfitting_after_a_good_switch_is_no_jump():
    _, stages, told = stages_of([1.0, 1.0, 1.0, 1.2, 0.8, 2.0])
    assert stages.jump == pytest.approx(0.2)
    assert told == []


@pytest.mark.parametrize("task", others_slow(TASKS, ("classification",)))
def test_a_run(tmp_path, task):
    config = finetune_config(tmp_path, task)
    assert train("finetune", config) == 0
    result, figure = (
        summary(tmp_path / "run"),
        {"classification": "accuracy", "segmentation": "mean_iou"}[task],
    )
    assert result["method"] == "finetune"
    assert result["target_test"] == "20 % of the target, held out"
    assert (result["stage1"]["steps"], result["stage2"]["steps"]) == (4, 6)
    assert result["stage1"]["step"] == 4
    assert result["stage2"]["step"] in (8, 10)
    assert result["stage1"][figure] is not None
    history = {m["step"]: m for m in metrics(tmp_path / "run") if "criteria.neg_val_loss" in m}
    assert list(history) == [4, 8, 10]
    lowest = max(history, key=lambda step: history[step]["criteria.neg_val_loss"])
    assert result["target"]["selected"]["step"] == lowest
    assert result["selection"] == {
        "criterion": "neg_val_loss",
        "value": history[lowest]["criteria.neg_val_loss"],
        "source_val": None,
        "neg_entropy": None,
        "infomax": None,
        "source_count": 0,
        "source_vetoes": True,  # the statistics are those of the start
        "part_of_training_loss": False,
    }
    jump = max(0, history[4]["criteria.neg_val_loss"] - history[8]["criteria.neg_val_loss"])
    if jump > 0:
        jump = max(jump, history[4]["criteria.neg_val_loss"] - history[10]["criteria.neg_val_loss"])
    assert result["stage2"]["jump"] == pytest.approx(jump)
    train_list, val_list = (
        (tmp_path / f"run/{name}.txt").read_text().splitlines() for name in ("train", "val")
    )
    assert not set(train_list) & set(val_list)
    total = {"classification": drawn.COUNT, "segmentation": drawn_street.COUNT}[task]["train"]
    assert len(train_list) + len(val_list) == total
    lines = [m for m in metrics(tmp_path / "run") if "lr" in m]
    assert [(m["stage"], m["lr"]) for m in lines] == [
        (1, pytest.approx(0.02 / (1 + 7.5) ** 0.75)),
        (2, pytest.approx(0.01 / (1 + 5.0) ** 0.75)),
        (2, pytest.approx(0.01 / (1 + 10 * 5 / 6) ** 0.75)),
    ]


def test_the_best_of_stage_1_goes_on_and_is_kept(tmp_path):
    """A rate that ruins stage 2: told, and stage1.pt and model.pt hold what was before."""
    config = finetune_config(tmp_path, max_jump=0.01, eval_every=1, save_every=1)
    assert train("finetune", config, "finetune_lr=5", "patience=3", "steps=20") == 0
    result = summary(tmp_path / "run")
    assert result["stage2"]["jump"] > 0.01
    assert result["target"]["selected"]["step"] <= 4
    assert differing(weights(tmp_path / "run"), weights(tmp_path / "run", "stage1.pt")) == 0
    assert result["stage1"]["step"] == result["target"]["selected"]["step"]


def test_a_jump_is_printed(tmp_path, capsys):
    assert train("finetune", finetune_config(tmp_path, max_jump=0.01), "finetune_lr=5") == 0
    assert "lower finetune_lr or unfreeze less" in capsys.readouterr().out
    assert (
        train("finetune", finetune_config(tmp_path), "finetune_lr=1e-6", f"out_dir={tmp_path}/calm")
        == 0
    )
    assert "lower finetune_lr" not in capsys.readouterr().out


def test_the_head_alone_and_no_head_first(tmp_path):
    config = finetune_config(tmp_path)
    assert (
        train("finetune", config, "unfreeze=[]", "head_steps=10", f"out_dir={tmp_path}/head") == 0
    )
    result = summary(tmp_path / "head")
    assert result["stage2"] is None
    assert result["stage1"]["steps"] == 10
    assert train("finetune", config, "head_steps=0", f"out_dir={tmp_path}/direct") == 0
    result = summary(tmp_path / "direct")
    assert result["stage1"] is None
    assert result["stage2"]["steps"] == 10
    assert not (tmp_path / "direct/stage1.pt").exists()


def test_each_stage_learns(tmp_path):
    keys = ["steps=80", "eval_every=20", "data.batch=16", "data.size=28"]
    source = f"out_dir={tmp_path}/source"
    assert train("train_source", tiny_config(tmp_path, optim="{lr: 0.03}"), *keys, source) == 0
    config = finetune_config(
        tmp_path,
        head_steps=40,
        optim="{lr: 0.05, schedule: constant}",
        init_from=tmp_path / "source",
    )
    assert train("finetune", config, *keys, "finetune_lr=0.002", "unfreeze=1.0") == 0
    loss = {
        m["step"]: -m["criteria.neg_val_loss"]
        for m in metrics(tmp_path / "run")
        if "criteria.neg_val_loss" in m
    }
    assert loss[40] < loss[20] - 0.03
    assert loss[80] < loss[40] - 0.1
    result = summary(tmp_path / "run")
    before = summary(tmp_path / "source")["target"]["selected"]["accuracy"]
    assert result["stage2"]["accuracy"] >= result["stage1"]["accuracy"] > before + 5


@pytest.mark.parametrize("task", others_slow(TASKS, ("classification",)))
@pytest.mark.parametrize(
    ("stop", "augment", "workers"),
    [
        pytest.param(2, True, 2, marks=pytest.mark.slow),
        (3, False, 2),
        pytest.param(4, True, 0, marks=pytest.mark.slow),
        (7, False, 0),
    ],
)
def test_resume_is_exact_on_either_side_of_the_switch(
    tmp_path, monkeypatch, task, stop, augment, workers
):
    dropout = ["model.dropout=0.5"] if task == "classification" else []
    keys = dropout if augment else [*dropout, "data.augment={}", "data.target.crop=null"]
    config = finetune_config(tmp_path, task, eval_every=3)
    assert train("finetune", config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert train("finetune", config, *keys, f"data.workers={workers}") == 143
    assert train("finetune", config, *keys, "--resume") == 0
    assert_same(tmp_path / "whole", tmp_path / "run", LAST)


def assert_same(whole, resumed, last: str) -> None:
    states = [weights(folder, last) for folder in (whole, resumed)]
    for state in states:
        del state["seconds"]
    assert differing(*states) == 0
    assert metrics(whole) == metrics(resumed)
    files = sorted(file.name for file in whole.glob("*.pt"))
    assert files == sorted(file.name for file in resumed.glob("*.pt"))
    for file in files:
        assert differing(weights(whole, file), weights(resumed, file)) == 0


EARLY = {
    "steps": 200,
    "head_steps": 100,
    "eval_every": 2,
    "save_every": 2,
    "log_every": 1,
    "patience": 2,
    "min_delta": 100,
}


@pytest.mark.parametrize("stop", others_slow((3, 5, 6, 7, 11), (5, 7)))
def test_resume_is_exact_where_patience_decides(tmp_path, monkeypatch, stop):
    """No loss is lower by min_delta: a stage ends at its third evaluation, after six steps."""
    config = finetune_config(tmp_path, **EARLY)
    assert train("finetune", config, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert train("finetune", config) == 143
    assert train("finetune", config, "--resume") == 0
    assert_same(tmp_path / "whole", tmp_path / "run", "checkpoints/step_00000012.pt")


@pytest.mark.parametrize("number", [2, 3, 4, 6])
@pytest.mark.parametrize("augment", others_slow((True, False), (False,)))
def test_resume_is_exact_after_a_stop_within_an_evaluation(tmp_path, monkeypatch, number, augment):
    """The third ends stage 1, and the sixth the run."""
    keys = ["data.eval_batch=20", *([] if augment else ["data.augment={}"])]
    config = finetune_config(tmp_path, **EARLY)
    assert train("finetune", config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        batches = stop_within_evaluation(patch, number)
        assert train("finetune", config, *keys) == 143
    assert len(batches) == 1
    assert at(tmp_path / "run", 2 * number)["evaluation_due"]
    assert train("finetune", config, *keys, "--resume") == 0
    assert_same(tmp_path / "whole", tmp_path / "run", "checkpoints/step_00000012.pt")
    one, other = (summary(tmp_path / run) for run in ("whole", "run"))
    del one["seconds"], other["seconds"]
    assert one == other


@pytest.mark.parametrize("stop", [None, 3], ids=["at the start", "after a resume"])
def test_a_signal_while_features_are_computed_saves_and_leaves(tmp_path, monkeypatch, stop):
    config, keys = finetune_config(tmp_path), ["data.augment={}", "data.eval_batch=40"]
    assert train("finetune", config, *keys, f"out_dir={tmp_path}/whole") == 0
    if stop:
        with monkeypatch.context() as patch:
            stop_after(patch, stop)
            assert train("finetune", config, *keys) == 143
    normalize, seen = models.network.Network.normalize, []

    def stopped(self, images):
        if not seen:
            signal.raise_signal(signal.SIGTERM)
        seen.append(len(images))
        return normalize(self, images)

    with monkeypatch.context() as patch:
        patch.setattr(models.network.Network, "normalize", stopped)
        assert train("finetune", config, *keys, *(["--resume"] if stop else [])) == 143
    assert seen == [1]  # the image that tells how much memory is needed
    assert (at(tmp_path / "run", stop or 0)["step"]) == (stop or 0)
    assert train("finetune", config, *keys, "--resume") == 0
    assert_same(tmp_path / "whole", tmp_path / "run", LAST)


def test_the_last_steps_of_a_run_that_ends_early_are_logged(tmp_path):
    config = finetune_config(tmp_path, **{**EARLY, "log_every": 5})
    assert train("finetune", config) == 0
    assert [m["step"] for m in metrics(tmp_path / "run") if "lr" in m] == [5, 10, 12]


ALONE = {"unfreeze": [], "head_steps": 12, "steps": 12, "patience": 20}


@pytest.mark.parametrize("stages", [EARLY, {**EARLY, **ALONE}])
@pytest.mark.parametrize("task", others_slow(TASKS, ("classification",)))
def test_a_run_that_ended_is_only_finished(tmp_path, monkeypatch, task, stages):
    """Killed between its last checkpoint and its summary, it takes no further step."""
    keys = (
        [] if stages == EARLY else ["data.augment={}", "data.target.crop=null"]
    )  # from the features too
    config = finetune_config(tmp_path, task, **stages)
    assert train("finetune", config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        patch.setattr(training_run.Run, "finish", lambda *_, **__: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train("finetune", config, *keys)
    assert not (tmp_path / "run/summary.json").exists()
    assert train("finetune", config, *keys, "--resume") == 0
    assert_same(tmp_path / "whole", tmp_path / "run", "checkpoints/step_00000012.pt")
    one, other = (summary(tmp_path / run) for run in ("whole", "run"))
    del one["seconds"], other["seconds"]
    assert one == other
    assert one["steps"] == 12
    if task == "segmentation":
        assert [file.name for file in (tmp_path / "run/pictures").iterdir()] == [
            "step_00000012.png"
        ]


def test_a_run_that_ends_early_is_finished(tmp_path, capsys):
    config = finetune_config(tmp_path, **EARLY)
    assert train("finetune", config) == 0
    result = summary(tmp_path / "run")
    # 2 counts as better than nothing, 4 and 6 do not
    assert (result["stage1"]["steps"], result["stage2"]["steps"]) == (6, 6)
    assert (tmp_path / "run/checkpoints/step_00000012.pt").is_file()
    capsys.readouterr()
    assert train("finetune", config, "--resume") == 0
    assert "finished already" in capsys.readouterr().out


# --- where it starts


def test_a_head_of_other_classes_is_replaced_and_said(tmp_path, capsys, pictures):
    assert (
        train("train_source", tiny_config(tmp_path), f"out_dir={tmp_path}/digits", "steps=4") == 0
    )
    pictures("fruit", {"apple": 8, "pear": 8, "plum": 8})
    data = f"{{target: {{name: folder, path: fruit}}, size: 28, batch: 4, root: {tmp_path}/images}}"
    config = finetune_config(tmp_path, data=data, unfreeze="[]", head_steps=10)
    capsys.readouterr()
    assert train("finetune", config, f"init_from={tmp_path}/digits") == 0
    assert "digits/model.pt, with a new head for 3 classes" in capsys.readouterr().out
    digits, fruit = weights(tmp_path / "digits"), weights(tmp_path / "run")
    assert fruit["head.weight"].shape == (3, 128)
    assert all(torch.equal(digits[k], fruit[k]) for k in digits if k.startswith("backbone."))


def test_a_head_of_the_same_classes_stays(tmp_path, capsys):
    assert (
        train("train_source", tiny_config(tmp_path), f"out_dir={tmp_path}/digits", "steps=4") == 0
    )
    capsys.readouterr()
    config = finetune_config(tmp_path)
    assert (
        train(
            "finetune",
            config,
            f"init_from={tmp_path}/digits",
            "optim.lr=1e-30",
            "optim.weight_decay=0",
        )
        == 0
    )
    assert "new head" not in capsys.readouterr().out
    digits, own = weights(tmp_path / "digits"), weights(tmp_path / "run", "stage1.pt")
    assert torch.equal(digits["head.weight"], own["head.weight"])


def test_as_many_classes_of_other_names_get_a_new_head(tmp_path, capsys, pictures):
    for name, classes in (("a", ("x", "y")), ("b", ("cat", "dog"))):
        pictures(name, dict.fromkeys(classes, 8))
    root = f"size: 28, batch: 4, root: {tmp_path}/images}}"
    source = tiny_config(
        tmp_path, data="{source: {name: folder, path: a}, target: {name: folder, path: a}, " + root
    )
    assert train("train_source", source, f"out_dir={tmp_path}/first", "steps=2") == 0
    capsys.readouterr()
    config = finetune_config(tmp_path, data="{target: {name: folder, path: b}, " + root)
    assert train("finetune", config, f"init_from={tmp_path}/first") == 0
    assert "with a new head for 2 classes" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["init_from=nowhere"], "init_from: there is no nowhere"),
        (
            ["init_from=digits", "model.bottleneck=8"],
            r"does not fit this model: 7 tensors are missing \(first: bottleneck",
        ),
        (
            ["init_from=digits", "model={backbone: resnet18}"],
            "does not fit this model: .* are missing .* are unknown",
        ),
        (["unfreeze=[layer5]"], "unfreeze: no stage 'layer5'; there are layer1, layer2"),
        (["unfreeze=1.5"], r"unfreeze must be stages such as \[layer4\], or a share in \(0, 1\]"),
        (
            ["unfreeze=[]", "head_steps=0"],
            "unfreeze: .* is stage 1 alone, and head_steps: 0 leaves it out",
        ),
        (["head_steps=11"], "head_steps must be at least 0 and at most steps"),
        (["data.val_share=1.0"], "data.val_share must lie between 0 and 1"),
        (
            ["data.val_share=0.01"],
            "data.val_share: 0.01 of the .* images of class 0 leaves none to measure on",
        ),
        (
            ["data.val_share=0.99"],
            "data.val_share: 0.99 of the .* images of class 0 leaves none to train on",
        ),
        (["data.source={name: drawn_digits}"], "data.source must be null"),
        (
            ["data.target_test={name: drawn_digits}", "data.val_share=0.3"],
            "val_share is for a target without",
        ),
        (["optim.backbone_lr_scale=0"], "unfreeze needs an optim.backbone_lr_scale above 0"),
        (["patience=0"], "patience must be positive"),
        (["optim.lr=0"], "optim.lr must be positive"),
        (["model.dropout=1.0"], r"dropout must lie in \[0, 1\)"),
        (["select=infomax"], "select must be neg_val_loss"),
    ],
)
def test_bad_input(tmp_path, keys, match):
    if "init_from=digits" in keys:
        assert (
            train("train_source", tiny_config(tmp_path), f"out_dir={tmp_path}/digits", "steps=1")
            == 0
        )
    with pytest.raises(UserError, match=match):
        train("finetune", finetune_config(tmp_path), *keys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("path", "match"),
    [
        (
            "fruit",
            "folder fruit: 12 of 12 validation images are trained on too",
        ),
        (
            "pets",
            "folder pets: its classes differ from the target's: only here: cat, dog; only in",
        ),
    ],
)
def test_a_validation_set_that_is_none(tmp_path, pictures, path, match):
    pictures("fruit", {"apple": 6, "pear": 6})
    pictures("pets", {"cat": 6, "dog": 6})
    target, test = (f"{{name: folder, path: {name}}}" for name in ("fruit", path))
    data = f"{{target: {target}, target_test: {test}, root: {tmp_path}/images}}"
    with pytest.raises(UserError, match=match):
        train("finetune", finetune_config(tmp_path, data=data))


def test_an_unknown_class_of_the_mean(tmp_path):
    with pytest.raises(UserError, match=r"data\.iou_classes: no class 'sea'; there are sky, road"):
        train("finetune", finetune_config(tmp_path, "segmentation"), "data.iou_classes=[sea]")


def test_half_of_the_steps_are_the_heads_by_default(tmp_path):
    text = finetune_config(tmp_path).read_text().replace("head_steps: 4", "head_steps: null")
    (tmp_path / "half.yaml").write_text(text)
    assert train("finetune", tmp_path / "half.yaml") == 0
    assert summary(tmp_path / "run")["stage1"]["steps"] == 5
    assert (
        train("finetune", tmp_path / "half.yaml", "unfreeze=[]", f"out_dir={tmp_path}/alone") == 0
    )
    assert summary(tmp_path / "alone")["stage1"]["steps"] == 10


def test_an_image_listed_twice(tmp_path, pictures):
    folder = pictures("fruit", {"apple": 6, "pear": 6})
    lines = [
        f"{name}/{i:03d}.png {k}\n" for k, name in enumerate(("apple", "pear")) for i in range(6)
    ]
    (folder / "list.txt").write_text("".join(2 * lines))
    listed = f"root: {tmp_path}/images, target: {{name: list, path: fruit/list.txt}}, "
    data = f"{{{listed} val_share: 0.4}}"
    with pytest.raises(UserError, match=r"list\.txt:13: names .* again; name each image once"):
        train("finetune", finetune_config(tmp_path, data=data))
    (folder / "list.txt").write_text("".join(lines))  # once, in the training and the validation set
    data = f"{{{listed} target_test: {{name: list, path: fruit/list.txt}}}}"
    with pytest.raises(
        UserError, match="validation images are trained on too; name each image once"
    ):
        train("finetune", finetune_config(tmp_path, data=data))


def test_every_mistake_is_told_at_once(tmp_path):
    with pytest.raises(UserError, match=r"(?s)batch must be positive.*val_share must lie between"):
        train("finetune", finetune_config(tmp_path), "data.batch=0", "data.val_share=2")


def test_images_without_labels(tmp_path, pictures):
    pictures("flat", 6)
    data = f"{{target: {{name: folder, path: flat}}, root: {tmp_path}/images}}"
    with pytest.raises(
        UserError, match="folder flat: fine-tuning needs labels: a folder per class"
    ):
        train("finetune", finetune_config(tmp_path, data=data))


# --- the split


def test_a_share_of_each_class_validates(tmp_path, pictures):
    pictures("fruit", {"apple": 10, "pear": 5, "plum": 20})
    config = LabeledDataConfig(
        target=DomainConfig("folder", path="fruit"), root=str(tmp_path / "images")
    )
    domains = open_domains(config, 0)
    for images, counts in ((domains.target_labeled, [8, 4, 16]), (domains.target_test, [2, 1, 4])):
        assert torch.bincount(images.labels[images.indices]).tolist() == counts
    assert domains.lists["val.txt"] != open_domains(config, 1).lists["val.txt"]
    (tmp_path / "images/train.txt").write_text(domains.lists["train.txt"])
    (tmp_path / "images/val.txt").write_text(domains.lists["val.txt"])
    (tmp_path / "images/classes.txt").write_text("apple\npear\nplum\n")
    train_set, val_set = (
        DomainConfig("list", path=f"{name}.txt", classes="classes.txt") for name in ("train", "val")
    )
    given = open_domains(
        LabeledDataConfig(target=train_set, target_test=val_set, root=str(tmp_path / "images")), 5
    )
    assert given.lists == {}
    assert given.target_test_note == "data.target_test"
    for role in ("target_labeled", "target_test"):
        one, other = getattr(domains, role), getattr(given, role)
        assert [one.images.paths[i] for i in one.indices] == [
            other.images.paths[i] for i in other.indices
        ]


@pytest.mark.parametrize("task", TASKS)
def test_a_dry_run_writes_nothing(tmp_path, capsys, task):
    for keys in (
        [],
        ["data.augment={}", "data.target.crop=null"],
        ["head_steps=1"],
        ["head_steps=0"],
    ):
        assert train("finetune", finetune_config(tmp_path, task), "--dry-run", *keys) == 0
        assert "nothing was written" in capsys.readouterr().out
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("amp", [pytest.param("float16", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("augment", [True, False])
def test_mixed_precision(tmp_path, amp, augment):
    config = finetune_config(tmp_path, log_every=1)
    keys = [] if augment else ["data.augment={}"]
    for precision in (amp, "float32"):
        assert (
            train("finetune", config, *keys, f"amp={precision}", f"out_dir={tmp_path}/{precision}")
            == 0
        )
    low, full = (
        [m["cls_loss"] for m in metrics(tmp_path / p) if "lr" in m] for p in (amp, "float32")
    )
    assert low != full
    assert low[0] == pytest.approx(full[0], rel=0.05)
