"""Strict configs: precedence, pitfalls of yaml, all mistakes at once, and the command line."""

import dataclasses
import os
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import ClassVar

import pytest
import torch
import yaml

from common.config import (
    all_keys,
    changed_keys,
    cut,
    dump,
    flat_values,
    load_config,
    not_negative,
    parse_yaml,
    positive,
    range_rules,
)
from common.errors import UserError, require
from tests.helpers import ROOT, TRAINING, load_script, tiny_config, train
from train_dann import Config
from training.config import RunConfig, default_out_dir, load_run_config, parse_args
from training.device import get_device
from training.free_keys import FREE_AT_RESUME

MINIMAL = (
    "out_dir: run\ndata: {source: {name: drawn_digits}, target: {name: drawn_digits_shifted}}\n"
)


def write(path: str | Path, text: str) -> None:
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    Path(path).write_text(text, encoding="utf-8")


def load(text: str = MINIMAL, *overrides: str, cls=Config):
    write("config.yaml", text)
    return load_config(cls, "config.yaml", overrides)


def mistakes(text: str = MINIMAL, *overrides: str) -> list[str]:
    """The lines of the error, without the file or the override that begins each."""
    with pytest.raises(UserError) as caught:
        load(text, *overrides)
    assert caught.value.code == 2
    lines = [line.strip() for line in str(caught.value).splitlines()]
    origins = ["config.yaml", *(cut(override, 80) for override in overrides)]
    begins = [next(f"{o}: " for o in origins if line.startswith(f"{o}: ")) for line in lines]
    return [line.removeprefix(start) for line, start in zip(lines, begins, strict=True)]


def test_default_then_yaml_then_override():
    assert (load().steps, load().optim.lr, load().data.source.name) == (4000, 0.01, "drawn_digits")
    text = MINIMAL + "steps: 7\noptim: {lr: 0.5}\n"
    assert (load(text).steps, load(text).optim.lr) == (7, 0.5)
    config = load(
        text, "steps=9", "optim.lr=0.25", "steps=10", "data.source.name=usps", "out_dir=a=b"
    )
    assert (config.steps, config.optim.lr, config.data.source.name) == (10, 0.25, "usps")
    assert config.out_dir == "a=b"  # the first = ends the key
    assert config.optim.momentum == 0.9  # its neighbours keep their defaults


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.0e-4", ".0001", "+1e-4", "1e-04"])
def test_numbers_with_an_exponent_are_numbers(text):
    assert load(MINIMAL + f"optim: {{lr: {text}}}\n").optim.lr == 1e-4
    assert load(MINIMAL, f"optim.lr={text}").optim.lr == 1e-4
    assert not isinstance(yaml.safe_load("1e-4"), float)  # control: what plain yaml makes of it


@pytest.mark.parametrize("word", ["off", "no", "y", "on", "Off"])
def test_only_true_and_false_are_truth_values(word):
    assert mistakes(MINIMAL + f"model: {{channels_last: {word}}}\n") == [
        f"model.channels_last must be true | false, not {word!r}"
    ]
    assert load(MINIMAL, f"out_dir={word}").out_dir == word
    assert load(MINIMAL, "model.channels_last=true").model.channels_last is True


def test_yaml_scalars_are_decimal_and_literal():
    assert parse_yaml("[010, 1_000, 12:30, 0x10, null, ~, 2020-01-01]", "f") == [
        10, "1_000", "12:30", "0x10", None, None, "2020-01-01"]  # fmt: skip


def test_a_whole_number_is_a_number_but_no_other_type_is_another():
    assert load(MINIMAL, "optim.lr=1").optim.lr == 1.0
    assert isinstance(load(MINIMAL, "optim.lr=1").optim.lr, float)


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("steps=1.5", "steps must be int, not 1.5"),
        ("steps=10.0", "steps must be int, not 10.0"),
        ("steps=true", "steps must be int, not True"),
        ("steps='3'", "steps must be int, not '3'"),
        ("seed=null", "seed must be int, not None"),
        ("seed=", "seed must be int, not None"),
        ("model.channels_last=1", "model.channels_last must be true | false, not 1"),
        ("model.channels_last=0", "model.channels_last must be true | false, not 0"),
        ("optim.lr=fast", "optim.lr must be number, not 'fast'"),
        ("optim.lr=true", "optim.lr must be number, not True"),
        ("optim.lr=[1]", "optim.lr must be number, not [1]"),
        ("out_dir=3", "out_dir must be text | null, not 3"),
        (
            "feature_layers=pooled",
            "feature_layers must be list of text, not 'pooled'; write ['pooled']",
        ),
        ("layer_weights=[1, x]", "layer_weights must be list of number, not [1, 'x']"),
        ("amp=fp16", "amp must be float32 | float16 | bfloat16, not 'fp16'"),
        ("model.bottleneck=1.5", "model.bottleneck must be int | null, not 1.5"),
        ("disc_lr=[]", "disc_lr must be number | null, not []"),
        ("reversal_progress=half", "reversal_progress must be int | total, not 'half'"),
        ("data.augment=[flip]", "data.augment must be mapping, not ['flip']"),
        ("model=lenet", "model must be a mapping, not 'lenet'"),
        ("data.source=null", "data.source must be a mapping, not None"),
        ("seed.x=1", "seed must be int, not {'x': 1}"),
    ],
)
def test_wrong_types(override, expected):
    assert mistakes(MINIMAL, override) == [expected]


@pytest.mark.parametrize(
    "value",
    [".nan", ".inf", "-.inf", "nan", "1e999", "!!float .nan", "!!float .inf", "1" + 400 * "0"],
)
def test_numbers_are_finite(value):
    (line,) = mistakes(MINIMAL, f"optim.lr={value}")
    assert line.startswith("optim.lr must be number, not ")


@pytest.mark.parametrize(
    ("typo", "meant"),
    [
        ("sed", "seed"),
        ("epochs", "steps"),
        ("out", "out_dir"),
        ("adv_wieght", "adv_weight"),
        ("reversal_gama", "reversal_gamma"),
        ("eval_evry", "eval_every"),
        ("lr", "optim.lr"),
        ("batch", "data.batch"),
        ("num_workers", "data.workers"),
        ("data.batchsize", "data.batch"),
        ("data.source.pth", "data.source.path"),
        ("model.backbon", "model.backbone"),
        ("optim.weightdecay", "optim.weight_decay"),
    ],
)
def test_an_unknown_key_names_the_nearest(typo, meant):
    assert mistakes(MINIMAL, f"{typo}=1") == [f"unknown key {typo}; did you mean {meant}?"]


def test_a_constant_of_the_class_is_no_key():
    (line,) = mistakes(MINIMAL, "method=other")
    assert line.startswith("unknown key method; did you mean ")
    assert load().method == "dann"


def test_all_mistakes_are_reported_at_once():
    text = (
        "data: {source: {name: drawn_digits}, target: {nme: usps}, batch: x}\n"
        "step: 3\noptim: {lr: [1]}\n"
    )
    assert sorted(mistakes(text, "model.bn=none", "optim.momentun=0.9")) == [
        "data.batch must be int, not 'x'",
        "data.target.name is missing (text)",
        "model.bn must be concat | separate | frozen, not 'none'",
        "optim.lr must be number, not [1]",
        "unknown key data.target.nme; did you mean data.target.name?",
        "unknown key optim.momentun; did you mean optim.momentum?",
        "unknown key step; did you mean steps?",
    ]


def test_a_wrong_type_hides_no_broken_rule():
    found = mistakes(
        MINIMAL, "optim.lr=x", "optim.momentum=2", "data.batch=0", "data.size=[1]", "disc_lr=-1"
    )
    assert sorted(found) == [
        "data.batch must be positive",
        "data.size must be int, not [1]",
        "disc_lr must be positive",
        "optim.lr must be number, not 'x'",
        "optim.momentum must lie in [0, 1)",
    ]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (
            ["model={bn: seperate, bn_running: target}"],
            "model.bn must be concat | separate | frozen, not 'seperate'",
        ),
        (["data.target={name: folder, path: 5}"], "data.target.path must be text | null, not 5"),
    ],
)
def test_a_wrong_type_invents_no_broken_rule(overrides, expected):
    assert mistakes(MINIMAL, *overrides) == [expected]


def test_changed_keys_sees_the_order_of_augmentation():
    """Operations apply in the order written, so that another order is another training."""
    one = load(MINIMAL, "data.augment={flip: {}, affine: {degrees: 5}}")
    other = load(MINIMAL, "data.augment={affine: {degrees: 5}, flip: {}}")
    assert list(changed_keys(one, other)) == ["data.augment"]
    assert changed_keys(one, one) == {}
    assert changed_keys(load(), load(MINIMAL, "optim.lr=0.5")) == {"optim.lr": (0.01, 0.5)}


def test_changed_keys_leaves_out_the_free_ones():
    before, now = load(), load(MINIMAL, "data.workers=3", "out_dir=elsewhere", "seed=1")
    assert changed_keys(before, now, FREE_AT_RESUME) == {"seed": (0, 1)}
    assert changed_keys(before, now) == {
        "data.workers": (0, 3),
        "out_dir": ("run", "elsewhere"),
        "seed": (0, 1),
    }
    assert set(FREE_AT_RESUME) <= set(all_keys(RunConfig))  # a name that is no key frees nothing


def test_changed_keys_of_a_section_that_appears():
    now = load(MINIMAL, "data.target_test.name=usps")
    name, labels = "data.target_test.name", "data.target_test.labels"  # all but null
    assert changed_keys(load(), now) == {name: (None, "usps"), labels: (None, True)}
    assert changed_keys(now, load()) == {name: ("usps", None), labels: (True, None)}


def test_flat_values_keep_mappings_whole():
    domains = [f"{{name: {name}, augment: {{flip: {{}}}}}}" for name in ("usps", "mnist")]
    sources = f"data.source=[{', '.join(domains)}]"
    flat = flat_values(load(MINIMAL, "data.augment={affine: {degrees: 5}}", sources))
    assert flat["data.augment"] == {"affine": {"degrees": 5}}
    assert [s["name"] for s in flat["data.source"]] == ["usps", "mnist"]
    assert flat["data.source"][0]["augment"] == {"flip": {}}
    assert (flat["data.target.name"], flat["data.target_test"]) == ("drawn_digits_shifted", None)
    assert (flat["optim.lr"], flat["layer_weights"]) == (0.01, [1.0])
    assert set(flat) <= set(all_keys(Config))


def test_broken_rules_are_reported_at_once():
    """Of every section, of shared keys and of the method's own, with mistakes of other kinds."""
    found = mistakes(
        MINIMAL,
        "data.batch=0",
        "optim.lr=-1",
        "optim.momentum=2",
        "seed=-1",
        "adv_weight=-1",
        "stps=3",
    )
    assert sorted(found) == [
        "adv_weight must not be negative",
        "data.batch must be positive",
        "optim.lr must be positive",
        "optim.momentum must lie in [0, 1)",
        "seed must not be negative",
        "unknown key stps; did you mean steps?",
    ]


LAYER_WEIGHTS = "layer_weights needs one weight, not negative, for each of feature_layers"
RULES = [
    ("seed=-1", "seed must not be negative"),
    ("steps=0", "steps must be positive"),
    ("eval_every=0", "eval_every must be positive"),
    ("save_every=-5", "save_every must be positive"),
    ("log_every=0", "log_every must be positive"),
    ("data.size=0", "data.size must be positive"),
    ("data.batch=0", "data.batch must be positive"),
    ("data.eval_batch=0", "data.eval_batch must be positive"),
    ("data.select_images=0", "data.select_images must be positive"),
    ("data.workers=-1", "data.workers must not be negative"),
    ("data.cache_gb=-1", "data.cache_gb must not be negative"),
    ("data.source.name=minst", "data.source.name: no data set 'minst'; did you mean 'mnist'?"),
    ("data.source.name=folder", "data.source.path is missing for name: folder"),
    ("data.target.classes=c.txt", "data.target.classes goes with name: list only"),
    ("data.target.resize=0", "data.target.resize must be positive"),
    ("data.augment.afine={}", "data.augment: no operation 'afine'; did you mean affine?"),
    (
        "data.augment.flip=yes",
        "data.augment.flip must be a mapping of parameters, {} for the defaults, not 'yes'",
    ),
    (
        "data.augment.affine.degree=3",
        "data.augment.affine: unknown parameter degree; did you mean degrees?",
    ),
    ("data.augment.affine.scale=2", "data.augment.affine.scale must be [low, high], not 2"),
    (
        "data.augment.affine.scale=[2, 1]",
        "data.augment.affine.scale must be [low, high], not [2, 1]",
    ),
    ("data.augment.affine.shear=x", "data.augment.affine.shear must be a number, not 'x'"),
    (
        "model={backbone: resnet18, batch_norm: false}",
        "model.batch_norm: false is for backbone: lenet",
    ),
    ("model.bn_running=target", "model.bn_running: target needs bn: separate"),
    ("model.bottleneck=0", "model.bottleneck must be positive"),
    ("model.bottleneck_relu=false", "model.bottleneck_relu: false needs a bottleneck"),
    ("optim.lr=0", "optim.lr must be positive"),
    ("optim.backbone_lr_scale=-1", "optim.backbone_lr_scale must not be negative"),
    ("optim.momentum=1", "optim.momentum must lie in [0, 1)"),
    ("optim.weight_decay=-1", "optim.weight_decay must not be negative"),
    ("optim.schedule_progress=0", "optim.schedule_progress must be positive"),
    ("feature_layers=[]", "feature_layers must name a layer"),
    ("layer_weights=[1, 1]", LAYER_WEIGHTS),
    ("reversal_max=-1", "reversal_max must not be negative"),
    ("layer_weights=[-1]", LAYER_WEIGHTS),
    ("reversal_progress=0", "reversal_progress must be positive"),
    ("disc_hidden=0", "disc_hidden must be positive"),
    ("disc_hidden=100001", "disc_hidden must be at most 100000, not 100001"),
    ("data.batch=100001", "data.batch must be at most 100000, not 100001"),
    ("data.eval_batch=100001", "data.eval_batch must be at most 100000, not 100001"),
    ("data.workers=1001", "data.workers must be at most 1000, not 1001"),
    ("data.size=1", "data.size must be at least 2"),
    ("data.source.resize=1", "data.source.resize must be at least 2"),
    ("data.size=100001", "data.size must be at most 100000, not 100001"),
    ("data.source.resize=100001", "data.source.resize must be at most 100000"),
    ("model.bottleneck=100001", "model.bottleneck must be at most 100000, not 100001"),
    ("optim.lr=1e4", "optim.lr must be at most 1000, not 10000.0"),
    ("optim.weight_decay=1e4", "optim.weight_decay must be at most 1000, not 10000.0"),
    ("disc_lr=1e4", "disc_lr must be at most 1000, not 10000.0"),
    ("optim.betas=[0.5, 0.9]", "optim.betas are for name: adam or adamw; leave them out"),
    ("optim={name: adam, momentum: 0.5}", "optim.momentum is for name: sgd; leave it out"),
    (
        "data.source.path=MNIST",
        "data.source.path is not read for name: drawn_digits; leave it out",
    ),
    ("device=gpu", "device must be auto, cpu, cuda, cuda:N or mps, not 'gpu'"),
    ("device=cuda-1", "device must be auto, cpu, cuda, cuda:N or mps, not 'cuda-1'"),
    ("disc_lr=0", "disc_lr must be positive"),
    ("data.source.crop=[8, 8]", "data.source: crop for task: segmentation only"),
    ("data.source.ids=[a, b]", "data.source: ids for task: segmentation only"),
    (
        "data.source.resize=[8, 8]",
        "data.source.resize must be a number for task: classification",
    ),
    (
        "data.source.name=drawn_street",
        "data.source.name: drawn_street is for task: segmentation",
    ),
    ("data.iou_classes=[a]", "data.iou_classes is for task: segmentation"),
    (
        "data.augment.zoom={}",
        "data.augment: no operation 'zoom'; there are affine, crop, flip, photometric, jitter, "
        "blur, cutout",
    ),
    ("model.aux_weight=0.1", "model: aux_weight for task: segmentation only"),
    (
        "model={head: deeplab_v3, output_stride: 16}",
        "model: head, output_stride for task: segmentation only",
    ),
]


@pytest.mark.parametrize(("override", "expected"), RULES)
def test_rules(override, expected):
    assert expected in mistakes(MINIMAL, override)


MAPS = """
out_dir: run
data: {task: segmentation, source: {name: drawn_street}, target: {name: folder, path: dusk}}
model: {backbone: resnet18}
feature_layers: [layer4]
"""
TOO_LARGE = "data.target.crop [9, 9] is larger than resize [8, 9]"


RULES_OF_SEGMENTATION = [
    ("model.backbone=lenet", "model.backbone: lenet is for task: classification; choose another"),
    ("model.bottleneck=8", "model.bottleneck is for task: classification"),
    ("model.head_hidden=8", "model.head_hidden is for task: classification"),
    ("model.weight_norm=true", "model.weight_norm is for task: classification"),
    ("model.aux_weight=-1", "model.aux_weight must not be negative"),
    ("data.source.name=mnist", "data.source.name: mnist is for task: classification"),
    ("data.target.masks=masks", "data.target.ids is missing: what the numbers of its masks mean"),
    ("data.target.resize=64", "data.target.resize must be [height, width] for task: segmentation"),
    ("data.target.resize=[64]", "data.target.resize must be a number or [height, width]"),
    ("data.target.crop=[64]", "data.target.crop must be [height, width]"),
    ("data.target.crop=[64, 0]", "data.target.crop must be positive"),
    ("data.target={name: list, path: a, crop: [9, 9], resize: [8, 9]}", TOO_LARGE),
    ("data.source.masks=masks", "data.source.masks goes with name: folder only"),
    ("data.source.image_suffix=x", "data.source.image_suffix goes with name: folder only"),
    ("data.target.mask_suffix=x", "data.target.mask_suffix goes with masks"),
    (
        "data.target={name: list, path: a, classes: b}",
        "data.target.classes: the classes of masks are named by ids",
    ),
    (
        "data.augment.affine={}",
        "data.augment: no operation 'affine'; there are zoom, flip, photometric, jitter, blur, "
        "cutout",
    ),
    (
        "data.augment.zoom.scale=[0, 1]",
        "data.augment.zoom.scale must lie in [0.01, 100], not [0, 1]",
    ),
    (
        "data.augment.jitter.gamma=[0, 1]",
        "data.augment.jitter.gamma must lie in [0.01, 100], not [0, 1]",
    ),
    ("data.target.crop=[9, 1]", "data.target.crop must be at least 2"),
    ("data.target.resize=[1, 9]", "data.target.resize must be at least 2"),
    ("data.target.crop=[9, 100001]", "data.target.crop must be at most 100000"),
]


@pytest.mark.parametrize(("override", "expected"), RULES_OF_SEGMENTATION)
def test_rules_of_segmentation(override, expected):
    assert expected in mistakes(MAPS, override)


def test_defaults_that_follow_the_task(tmp_path):
    for text, select, batch in ((MINIMAL, "infomax", 250), (MAPS, "neg_entropy", 1)):
        (tmp_path / "c.yaml").write_text(text)
        config = load_config(Config, str(tmp_path / "c.yaml"))
        assert (config.select, config.data.eval_batch) == (select, batch)
        (tmp_path / "again.yaml").write_text(dump(config))
        assert load_config(Config, str(tmp_path / "again.yaml")) == config
        chosen = load_config(
            Config, str(tmp_path / "c.yaml"), ["select=source_val", "data.eval_batch=7"]
        )
        assert (chosen.select, chosen.data.eval_batch) == ("source_val", 7)


def test_the_order_of_ids_is_part_of_the_config(tmp_path):
    """It numbers the classes."""
    configs = []
    for ids in ("{sky: 0, road: 1}", "{road: 1, sky: 0}"):
        (tmp_path / "c.yaml").write_text(MAPS)
        target = f"data.target={{name: folder, path: dusk, masks: m, ids: {ids}}}"
        configs.append(load_config(Config, str(tmp_path / "c.yaml"), [target]))
    assert list(changed_keys(*configs)) == ["data.target.ids"]
    assert changed_keys(configs[0], configs[0]) == {}


@pytest.mark.parametrize(
    "override",
    [
        "seed=99999999999999999999",  # more than torch can take
        "reversal_gamma=-1000",
        "data.augment.affine.scale=[0, 1]",
        "data.augment.affine.degrees=1e999",
        "data.augment.crop.ratio=[0, 1]",
        "data.augment.jitter.hue=0.7",
        "data.augment.flip.probability=1.5",
        "data.augment.photometric.noise=-0.1",
        "data.augment.affine.translate=-1",
        "data.augment.affine.translate=3",
        "data.augment.affine.degrees=1e12",
        "data.augment.affine.degrees=1" + 400 * "0",
        "data.augment.affine.shear=90",
        "data.augment.affine.scale=[1, 9223372036854775808]",
        "data.augment.crop.scale=[5, 10]",
        "data.augment.crop.scale=[0.5, 1.5]",
        "data.augment.photometric.offset=5",
        "data.augment.photometric.noise=1e9",
        "data.augment.photometric.gain=[1, 1e308]",
        "data.augment.photometric.channel_gain=[-1e308, 1]",
        "data.augment.jitter.brightness=1e6",
        "data.augment.blur.sigma=[1, 1e9]",
        "steps=9223372036854775808",
        "data.select_images=1" + 60 * "0",
    ],
)
def test_values_that_training_would_break_on(override):
    (line,) = mistakes(MINIMAL, override)
    assert line.startswith(override.split("=")[0] + " must ")


def test_conditional_takes_the_pooled_layer_only():
    layers = ["feature_layers=[layer4, pooled]", "layer_weights=[1, 1]"]
    assert mistakes(MINIMAL, "conditional=cdan", *layers) == [
        "conditional needs feature_layers: [pooled], which a classifier has"
    ]
    assert load(MINIMAL, *layers).layer_weights == [
        1.0,
        1.0,
    ]  # without conditioning there may be several
    assert load(MINIMAL, "conditional=cdan").conditional == "cdan"


def test_the_map_of_cdan_is_full_or_of_a_width():
    assert load(MINIMAL, "conditional=cdan").conditional_map == "full"
    assert load(MINIMAL, "conditional=cdan", "conditional_map=51200").conditional_map == 51200
    assert mistakes(MINIMAL, "conditional_map=1024") == [
        "conditional_map is for conditional: cdan or cdan_e"
    ]
    assert mistakes(MINIMAL, "conditional=cdan", "conditional_map=0") == [
        "conditional_map must be positive"
    ]


@pytest.mark.parametrize(
    "text", [MINIMAL + "seed: 1\nsteps: 2\nseed: 3\n", MINIMAL + "optim: {lr: 1, lr: 2}\n"]
)
def test_duplicate_keys_are_refused(text):
    with pytest.raises(UserError, match=r"config\.yaml:\d+: duplicate key '(seed|lr)'"):
        load(text)
    assert yaml.safe_load(text)  # control: plain yaml takes the last


@pytest.mark.parametrize(
    "text",
    [
        "- a\n- b\n",
        "out_dir: [run\n",
        "out_dir: run\n\tsteps: 3\n",
        "out_dir: 'run\n",
        "out_dir: run\x00\n",
        "? [a, b]\n: 1\n",
        "3: run\n",
        "steps: *nothing\n",
        "out_dir: !!bool maybe\n",
        "out_dir: !!timestamp soon\n",
        "!!map [a]\n",
        "a: " + 2000 * "[",
        "---\na: 1\n---\nb: 2\n",
    ],
)
def test_malformed_yaml_is_one_line(text):
    with pytest.raises(UserError, match=r"^config\.yaml") as caught:
        load(text)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    "value",
    [
        "!!python/object/apply:os.mkdir [executed]",
        "!!python/object/new:os.mkdir [executed]",
        "!!python/name:os.mkdir ''",
        "!!python/module:os ''",
    ],
)
def test_yaml_executes_nothing(tmp_path, value):
    with pytest.raises(UserError, match="could not determine a constructor"):
        load(MINIMAL + f"init_from: {value}\n")
    with pytest.raises(UserError, match="could not determine a constructor"):
        load(MINIMAL, f"init_from={value}")
    assert not (tmp_path / "executed").exists()
    yaml.unsafe_load("!!python/object/apply:os.mkdir [executed]")
    assert (tmp_path / "executed").exists()  # control: an unsafe loader would have


def test_a_config_that_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"nowhere\.yaml: cannot be read \(No such file"):
        load_config(Config, "nowhere.yaml")
    with pytest.raises(UserError, match=r"cannot be read \(Is a directory"):
        load_config(Config, str(tmp_path))
    (tmp_path / "latin.yaml").write_bytes(b"out_dir: \xfc\n")
    with pytest.raises(UserError, match="not utf-8 text"):
        load_config(Config, "latin.yaml")


@pytest.mark.parametrize("override", ["steps", "--steps", ""])
def test_an_override_is_key_equals_value(override):
    with pytest.raises(UserError, match="overrides are written key=value"):
        load(MINIMAL, override)


def test_a_nested_override_opens_a_null_section():
    config = load(MINIMAL, "data.target_test.name=usps", "data.target_test.resize=20")
    assert (config.data.target_test.name, config.data.target_test.resize) == ("usps", 20)
    assert (
        load(MINIMAL, "data.target_test.name=usps", "data.target_test=null").data.target_test
        is None
    )


def test_root_and_cache(monkeypatch):
    assert (load().data.root, load().data.cache) == ("datasets", "cache")
    monkeypatch.setenv("DA_DATA", "elsewhere")
    assert load().data.root == "elsewhere"
    assert load(MINIMAL, "data.root=here").data.root == "here"
    for cache in ("here", "here/cache", "here/../here/cache"):
        assert mistakes(MINIMAL, "data.root=here", f"data.cache={cache}") == [
            f"data.cache {cache} lies under root here; name another folder"
        ]
    assert load(MINIMAL, "data.root=here", "data.cache=here_too").data.cache == "here_too"


AWKWARD = [
    *("1e-4", "2e3", "1.", ".5", "08", "010", "1_000", "0x10", "12:30", "2020-01-01"),
    *("off", "no", "true", "null", "~", "<<", "=", "", " a ", "line\nbreak", "ünï", "a'b\"c"),
    *("a: b", "# no comment", "[x]", "&a", "*a", "!t"),
]


@pytest.mark.parametrize("word", AWKWARD)
def test_a_dumped_config_reads_back_the_same(word):
    config = load(
        MINIMAL,
        "optim.lr=1e-05",
        "data.target_test.name=usps",
        "data.augment={photometric: {gain: [0.5, 1.5]}, affine: {degrees: 15}}",
        "reversal_progress=10000",
        "disc_lr=1e-22",
    )
    # `~` is the home folder at the start of a path.
    config.out_dir, config.model.weights_missing = word if word not in ("", "~") else "run", [word]
    again = load(dump(config))
    assert again == config
    assert list(again.data.augment) == ["photometric", "affine"]  # the order is part of it


@pytest.mark.parametrize("script", TRAINING, ids=lambda path: path.stem)
def test_help_lists_every_key_with_its_comment(capsys, script):
    own = load_script(script).Config
    with pytest.raises(SystemExit) as stop:
        parse_args(own, "About this script.", ["--help"])
    assert stop.value.code == 0
    shown = capsys.readouterr().out
    assert "About this script." in shown
    assert all(option in shown for option in ("--config", "--resume", "--dry-run"))
    keys = [key for key in all_keys(own) if not key.startswith("data.target_test.")]
    sections = ("data", "data.source", "data.target", "model", "optim")
    described = re.findall(r"^  (\S+?)=\S.*\) \S", shown, re.MULTILINE)
    assert [key for key in keys if key not in (*sections, *described)] == []
    assert "  optim.lr=0.01  (number) " in shown
    assert "  out_dir=null  (text | null) " in shown
    assert "  data.target.name=required  (text) " in shown


@dataclasses.dataclass
class Minimized(Config):
    def trained_criteria(self):
        return {"neg_entropy"}


def test_frozen_statistics_of_untrained_weights_are_warned_of(capsys):
    load()
    command = ["--config", "config.yaml", "select=last"]
    parse_args(Config, "", [*command, "model.bn=frozen"])
    assert "warning: model.bn: frozen keeps the statistics" in capsys.readouterr().out
    parse_args(Config, "", command)
    parse_args(Config, "", [*command, "model.bn=frozen", "model.batch_norm=false"])
    weights = ["model.backbone=resnet18", "model.weights=file.pth"]
    parse_args(Config, "", [*command, "model.bn=frozen", *weights])
    assert capsys.readouterr().out == ""


def test_a_criterion_that_is_trained_on_is_warned_of(capsys):
    load()
    config, args = parse_args(Minimized, "", ["--config", "config.yaml", "select=neg_entropy"])
    assert (config.select, args.resume, args.dry_run) == ("neg_entropy", False, False)
    assert "warning: select: neg_entropy is part of the training loss" in capsys.readouterr().out
    parse_args(Minimized, "", ["--config", "config.yaml"])
    parse_args(Config, "", ["--config", "config.yaml", "select=neg_entropy"])
    parse_args(Minimized, "", ["--config", "config.yaml", "select=last"])
    assert "warning" not in capsys.readouterr().out


def test_options_may_stand_between_overrides():
    load()
    config, args = parse_args(
        Config, "", ["seed=3", "--resume", "--config", "config.yaml", "steps=5", "--dry-run"]
    )
    assert (config.seed, config.steps, args.resume, args.dry_run) == (3, 5, True, True)


@dataclasses.dataclass
class Forgetful(RunConfig):
    method: ClassVar[str] = "forgetful"


def test_a_method_states_its_trained_criteria():
    load()
    with pytest.raises(UserError, match=r"'forgetful' does not state its trained_criteria\(\)"):
        parse_args(Forgetful, "", ["--config", "config.yaml"])
    parse_args(Config, "", ["--config", "config.yaml"])  # control: this one states them


def test_overrides_are_recognized_wherever_they_stand():
    write("a.yaml", MINIMAL + "steps: 7\n")
    write("b.yaml", "optim: {lr: 0.5}\n")
    augment = "data.augment={affine: {degrees: 5}}"
    for words in (
        ["--config", "a.yaml", "b.yaml", "seed=3", augment],
        ["--config", "a.yaml", "b.yaml", "seed=4", "--resume", augment, "seed=3"],
        ["seed=4", "--config", "a.yaml", "b.yaml", "seed=3", augment],
        ["seed=3", augment, "--config", "a.yaml", "b.yaml"],
        ["seed=3", "--config", "a.yaml", "--resume", "--config", "b.yaml", augment],
        ["seed=3", "--config=a.yaml", augment, "--config=b.yaml"],
    ):
        config, args = parse_args(Config, "", words)
        assert (config.seed, config.steps, config.optim.lr) == (3, 7, 0.5), words
        assert config.data.augment == {"affine": {"degrees": 5}}
        assert (args.config, args.resume) == (["a.yaml", "b.yaml"], "--resume" in words)


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["--lr", "0.1"], "'--lr': .*keys are set without dashes: optim.lr=VALUE"),
        (["--seed=3"], "'--seed': .*keys are set without dashes: seed=VALUE"),
        (["--disc-hidden", "3"], "keys are set without dashes: disc_hidden=VALUE"),
        (["--resme"], r"'--resme': there is no such option; did you mean --resume\?"),
        (["--qqq"], "'--qqq': there is no such option; --help lists all"),
        (["--config", "config.yaml", "steps", "=", "3"], "write key=value without spaces around"),
    ],
)
def test_an_option_that_does_not_exist(words, hint):
    write("a.yaml", MINIMAL)
    for order in ([*words, "--config", "a.yaml"], ["--config", "a.yaml", *words]):
        with pytest.raises(UserError, match=hint):
            parse_args(Config, "", order)
    parse_args(Config, "", ["--config", "a.yaml", "--resume"])  # control


def test_words_that_are_no_override_are_files():
    write("a.yaml", MINIMAL)
    with pytest.raises(UserError, match=r"seed: cannot be read"):
        parse_args(Config, "", ["--config", "a.yaml", "seed"])
    with pytest.raises(UserError, match=r"unknown key eval-every; did you mean eval_every\?"):
        parse_args(Config, "", ["--config", "a.yaml", "eval-every=3"])
    folder = Path("lr=0.1")
    folder.mkdir()
    write(folder / "c.yaml", MINIMAL)
    assert parse_args(Config, "", ["--config", "./lr=0.1/c.yaml"])[0].out_dir == "run"
    with pytest.raises(
        UserError, match=r"^--config is missing; write --config 'a\.yaml' 'b\.yml'$"
    ):
        parse_args(Config, "", ["a.yaml", "b.yml", "seed=3"])
    for words in ([], ["--config"], ["seed=3"], ["--config", "seed=3"]):
        with pytest.raises(UserError, match=r"^[^\n]*--config[^\n]*--help lists[^\n]*$"):
            parse_args(Config, "", words)


# --- several files


def test_later_files_win():
    write("a.yaml", MINIMAL + "steps: 7\nseed: 1\n")
    write("b.yaml", "steps: 8\namp: float16\n")
    write("c.yaml", "steps: 9\n")
    config = load_config(Config, ["a.yaml", "b.yaml", "c.yaml"])
    assert (config.steps, config.seed, config.amp) == (9, 1, "float16")
    assert load_config(Config, ["c.yaml", "b.yaml", "a.yaml"]).steps == 7
    assert load_config(Config, ["a.yaml", "b.yaml"], ["steps=3"]).steps == 3


def test_sections_merge_key_by_key_and_all_else_is_replaced():
    first = (
        "data:\n"
        "  source: {name: drawn_digits, resize: 20}\n"
        "  target: {name: drawn_digits_shifted}\n"
        "  target_test: {name: usps}\n"
        "  augment: {affine: {degrees: 5}, flip: {}}\n"
        "optim: {name: adam, lr: 0.5, betas: [0.1, 0.2]}\n"
        "feature_layers: [layer3, layer4]\n"
        "layer_weights: [1, 2]\n"
    )
    second = (
        "data: {source: {name: usps}, augment: {affine: {shear: 3}}, target_test: null}\n"
        "optim: {betas: [0.3, 0.4]}\n"
        "feature_layers: [pooled]\n"
        "layer_weights: [3]\n"
    )
    write("a.yaml", first)
    write("b.yaml", second)
    config = load_config(Config, ["a.yaml", "b.yaml"])
    data, optim = config.data, config.optim
    assert (data.source.name, data.source.resize) == ("usps", 20)
    assert data.target.name == "drawn_digits_shifted"
    assert data.augment == {"affine": {"shear": 3}}  # whole, not merged
    assert data.target_test is None
    assert (optim.name, optim.lr, optim.betas) == ("adam", 0.5, [0.3, 0.4])
    assert (config.feature_layers, config.layer_weights) == (["pooled"], [3.0])
    assert load_config(Config, ["a.yaml"]).data.target_test.name == "usps"  # control


def test_a_null_section_is_replaced_and_replaces():
    """A source of `null` removes the section, and a later mapping fills it again."""
    write("a.yaml", "data: {source: {name: mnist, resize: 20}, target: {name: usps}}\n")
    write("b.yaml", "data: {source: null}\ninit_from: run\n")
    write("c.yaml", "data: {source: {name: drawn_digits}}\ninit_from: null\n")
    shot = load_script(ROOT / "train_shot.py").Config
    config = load_config(shot, ["a.yaml", "b.yaml"])
    assert (config.data.source, config.data.target.name) == (None, "usps")
    with pytest.raises(UserError, match=r"a\.yaml: data\.source must be null"):
        load_config(shot, ["a.yaml"], ["init_from=run"])  # control
    with pytest.raises(UserError, match=r"^b\.yaml: data\.source must be a mapping"):
        load_config(Config, ["a.yaml", "b.yaml"])
    source = load_config(Config, ["a.yaml", "b.yaml", "c.yaml"]).data.source
    assert (source.name, source.resize) == ("drawn_digits", None)  # of the last file alone


def test_a_mistake_names_the_file_or_the_override_it_came_from():
    write("a.yaml", MINIMAL)
    write("b.yaml", "stps: 3\n")
    with pytest.raises(UserError, match=r"^b\.yaml: unknown key stps; did you mean steps"):
        load_config(Config, ["a.yaml", "b.yaml"])
    write("b.yaml", "steps: 3\nsteps: 4\n")
    with pytest.raises(UserError, match=r"^b\.yaml:2: duplicate key 'steps'"):
        load_config(Config, ["a.yaml", "b.yaml"])
    write("b.yaml", "[3]")
    with pytest.raises(UserError, match=r"^b\.yaml: a config is a mapping"):
        load_config(Config, ["a.yaml", "b.yaml"])


@pytest.mark.parametrize(
    ("files", "folder"),
    [
        (["configs/demo/digits.yaml"], "runs/demo/digits"),
        (["configs/x/mnist_usps.yaml", "configs/x/dann.yaml"], "runs/x/mnist_usps_dann"),
        (["configs/a/one.yaml", "configs/b/two.yaml", "three.yml"], "runs/a/one_two_three"),
        (["/home/me/project/configs/pair.yaml"], "runs/pair"),
        (["../configs/x/y/pair.yaml"], "runs/x/y/pair"),
        (["mine.yaml"], "runs/mine"),
        (["/home/me/mine.yaml", "configs/digits/dann.yaml"], "runs/mine_dann"),
        (["runs/digits/mnist_usps_dann/config.yaml"], "runs/config"),
    ],
)  # fmt: skip
def test_the_default_run_folder(files, folder):
    assert default_out_dir(files, "source") == folder


@pytest.mark.parametrize(
    ("files", "method", "folder"),
    [
        (["configs/digits/mnist_usps.yaml"], "mcc", "runs/digits/mnist_usps_mcc"),
        (["configs/pacs/finetune.yaml"], "finetune", "runs/pacs/finetune"),
        (["configs/demo/digits.yaml", "x/minent.yaml"], "advent", "runs/demo/digits_minent"),
    ],
)
def test_a_file_that_stands_alone_gets_the_name_of_the_method(files, method, folder):
    """So that another method on a pair of domains does not meet the run of source-only."""
    assert default_out_dir(files, method) == folder


def test_a_config_without_out_dir_gets_the_default_one():
    text = MINIMAL.removeprefix("out_dir: run\n")
    assert text != MINIMAL
    write("pair.yaml", text)
    write("dann.yaml", "steps: 7\n")
    assert load_run_config(Config, "pair.yaml").out_dir == "runs/pair_dann"
    config = load_run_config(Config, ["pair.yaml", "dann.yaml"])
    assert config.out_dir == "runs/pair_dann"
    assert load_run_config(Config, ["pair.yaml"], ["out_dir=here"]).out_dir == "here"
    write("runs/pair_dann/config.yaml", dump(config))
    again = load_run_config(Config, "runs/pair_dann/config.yaml")  # names its own folder
    assert again == config


def test_a_run_of_several_files_keeps_the_resolved_config(tmp_path):
    pair = tiny_config(tmp_path, steps=1, out_dir="null").rename("pair.yaml")
    write("dann.yaml", "disc_hidden: 8\noptim: {momentum: 0.5}\n")
    assert train("train_dann", pair, "dann.yaml", "seed=3") == 0
    text = Path("runs/pair_dann/config.yaml").read_text()
    tree = yaml.safe_load(text)
    assert (tree["steps"], tree["disc_hidden"], tree["seed"]) == (1, 8, 3)
    assert (tree["optim"]["lr"], tree["optim"]["momentum"]) == (0.02, 0.5)
    assert tree["out_dir"] == "runs/pair_dann"
    first = "# python train_dann.py --config pair.yaml dann.yaml seed=3  # 20"
    assert text.startswith(first)  # and the date
    config = load_config(Config, "runs/pair_dann/config.yaml")
    assert config == load_run_config(Config, ["pair.yaml", "dann.yaml"], ["seed=3"])
    # Given as the only config, it goes on with its own run.
    assert train("train_dann", Path("runs/pair_dann/config.yaml"), "--resume") == 0


def test_the_head_of_a_runs_config_has_every_start(tmp_path):
    config = tiny_config(tmp_path, steps=2, save_every=1)
    key = f"data.cache={tmp_path}/a\u2028'b"  # yaml would end the comment at this character
    assert train("train_source", config, key) == 0
    file = tmp_path / "run/config.yaml"
    before = file.read_text().splitlines()
    (tmp_path / "run/summary.json").unlink()  # not finished
    assert train("train_source", config, key, "--resume") == 0
    heads = [line for line in file.read_text().splitlines() if line.startswith("#")]
    assert len(heads) == 2
    assert heads[0] == before[0]
    for head, words in zip(heads, ([], ["--resume"]), strict=True):
        found = shlex.split(head, comments=False)
        assert found[1:3] == ["python", "train_source.py"]
        assert found[found.index("#", 1) - len(words) : found.index("#", 1)] == words
    source = load_script(ROOT / "train_source.py").Config
    assert load_config(source, str(file)).data.cache == f"{tmp_path}/a\u2028'b"


# --- help and ranges


@pytest.mark.parametrize("script", TRAINING, ids=lambda file: file.stem)
def test_help_lists_the_keys_of_the_method_first(capsys, script):
    """Also where the method declares the section `data` itself."""
    config = load_script(script).Config
    with pytest.raises(SystemExit):
        parse_args(config, "", ["--help"])
    shown = capsys.readouterr().out
    listed = re.findall(
        r"^  ([\w.]+)[=:]", shown[shown.index("keys of the config") :], re.MULTILINE
    )
    names = [spec.name for spec in dataclasses.fields(config)]
    own = [name for name in names if name in config.__annotations__ and name != "data"]
    assert listed[: len(own) + 1] == [*own, "out_dir"]
    assert names[0] == "out_dir"  # control: the fields come in another order


def test_a_file_of_comments_alone_changes_nothing():
    write("a.yaml", MINIMAL)
    write("b.yaml", "# The defaults.\n")
    assert load_config(Config, ["a.yaml", "b.yaml"]) == load_config(Config, "a.yaml")


def test_an_override_does_not_reach_into_a_list():
    text = MINIMAL.replace("source: {name: drawn_digits}", "source: [{name: drawn_digits}]")
    assert text != MINIMAL
    write("a.yaml", text)
    with pytest.raises(UserError, match=r"data\.source\.crop: source is a list; override it whole"):
        load_config(Config, "a.yaml", ["data.source.crop=[1, 1]"])


@dataclasses.dataclass
class Ranges:
    share: float = positive(0.5)
    count: int = not_negative(0)
    width: int | None = positive(None)
    over: int | str = positive("total")
    free: float = 1.0

    def __post_init__(self):
        require(*range_rules(self))


@pytest.mark.parametrize(
    ("values", "broken"),
    [
        ({}, []),
        ({"share": 0}, ["share must be positive"]),
        ({"share": -1.5, "count": -1}, ["share must be positive", "count must not be negative"]),
        ({"width": 0, "over": -3}, ["width must be positive", "over must be positive"]),
        ({"share": 1e-9, "count": 0, "width": 1, "over": 1, "free": -1}, []),
        ({"width": None, "over": "word"}, []),  # their types are judged elsewhere
        ({"count": True, "share": False}, []),
    ],
)
def test_ranges_of_fields(values, broken):
    if not broken:
        assert all(holds for holds, _ in range_rules(Ranges(**values)))
        return
    with pytest.raises(ValueError, match=broken[0]) as caught:
        Ranges(**values)
    assert str(caught.value).splitlines() == broken


def test_a_range_keeps_the_default_of_its_field():
    assert Ranges() == Ranges(0.5, 0, None, "total", 1.0)
    assert [name for name, spec in Ranges.__dataclass_fields__.items() if spec.metadata] == [
        "share",
        "count",
        "width",
        "over",
    ]


def test_a_method_without_a_name_is_refused():
    """Run folders and --resume tell methods apart by it."""
    nameless = dataclasses.make_dataclass("Config", [], bases=(RunConfig,))
    write("config.yaml", MINIMAL)
    with pytest.raises(UserError, match="must name its method"):
        load_run_config(nameless, "config.yaml")


def test_home_is_expanded(monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    config = load(
        MINIMAL, "out_dir=~/runs/a", "init_from=~/runs/b", "data.root=~/x", "data.cache=~/c"
    )
    assert (config.out_dir, config.init_from) == ("/home/me/runs/a", "/home/me/runs/b")
    assert (config.data.root, config.data.cache) == ("/home/me/x", "/home/me/c")
    shot = load_script(ROOT / "train_shot.py").Config
    text = "data: {target: {name: drawn_digits}, classes_from: ~/runs/a}\ninit_from: x\n"
    assert load(text, cls=shot).data.classes_from == "/home/me/runs/a"


# --- what is larger than any config, and aliases


ALIAS = "data: {source: &d {name: drawn_digits}, target: *d, batch: 4}\nout_dir: run\n"


def test_an_override_does_not_reach_a_second_domain_through_an_alias():
    """Else the labels of the target would train."""
    write("a.yaml", ALIAS)
    write("b.yaml", "data: {batch: 3}\n")
    shifted = "data.target.name=drawn_digits_shifted"
    for files in (["a.yaml"], ["a.yaml", "b.yaml"], ["b.yaml", "a.yaml"]):
        data = load_config(Config, files, [shifted]).data
        assert (data.source.name, data.target.name) == ("drawn_digits", "drawn_digits_shifted")
        data = load_config(Config, files, ["data.source.resize=20"]).data
        assert (data.source.resize, data.target.resize) == (20, None)
    tree = yaml.safe_load(ALIAS)
    assert tree["data"]["source"] is tree["data"]["target"]  # control: what plain yaml shares


BOMB = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"a{i}: &a{i} [{', '.join(10 * [f'*a{i - 1}'])}]\n" for i in range(1, 9)
)


@pytest.mark.parametrize(
    "text",
    [
        BOMB,
        MINIMAL + "init_from: &x [*x]\n",
        MINIMAL + "init_from: " + 60 * "[" + 60 * "]" + "\n",
        MINIMAL + "feature_layers: [" + 10_001 * "a, " + "]\n",
        MINIMAL + "# " + 2**18 * "x" + "\n",
        MINIMAL + "init_from: !!binary aGVsbG8=\n",
        MINIMAL + "data: !!set {a, b}\n",
    ],
)
def test_what_no_config_holds_is_refused_at_once(text):
    begin = time.monotonic()
    with pytest.raises(UserError, match=r"^config\.yaml") as caught:
        load(text)
    assert len(str(caught.value)) < 300
    assert time.monotonic() - begin < 20


def test_long_values_and_many_mistakes_are_shortened():
    for override in (
        "steps=" + 10_000 * "x",
        "steps=[" + 1000 * "x, " + "]",
        "data.augment=" + 10_000 * "x",
        "data.source.name=" + 10_000 * "x",
        10_000 * "x" + "=1",
        "data.augment.affine.degrees=" + 10_000 * "x",
        "data.augment.flip." + 10_000 * "x" + "=1",
    ):
        with pytest.raises(UserError) as caught:
            load(MINIMAL, override)
        assert len(str(caught.value)) < 700, override[:20]
    begin = time.monotonic()
    with pytest.raises(UserError) as caught:
        load(MINIMAL + "".join(f"key{i}xxxxxxx: 1\n" for i in range(2000)))
    assert time.monotonic() - begin < 20
    lines = str(caught.value).splitlines()
    assert len(lines) == 51
    assert lines[-1].strip() == "and 1950 more mistakes"


# --- where a value came from


def test_each_mistake_names_where_its_value_came_from():
    write("a.yaml", MINIMAL + "steps: x\noptim: {lr: 0}\ndata.batch: 3\n")
    write("b.yaml", "optim: {momentum: 2}\nmodel: {bn: none}\nsteps: y\n")
    overrides = ["data.size=0", "data.augment={flip: 3}", "data.target.nme=x", "optim.betas=[3]"]
    with pytest.raises(UserError) as caught:
        load_config(Config, ["a.yaml", "b.yaml"], overrides)
    lines = [line.strip() for line in str(caught.value).splitlines()]
    assert sorted(lines) == [
        "a.yaml: optim.lr must be positive",
        "a.yaml: unknown key data.batch; in a file write data: {batch: ...}",
        "b.yaml: model.bn must be concat | separate | frozen, not 'none'",
        "b.yaml: optim.momentum must lie in [0, 1)",
        "b.yaml: steps must be int, not 'y'",
        "data.augment={flip: 3}: data.augment.flip must be a mapping of parameters, {} for the "
        "defaults, not 3",
        "data.size=0: data.size must be positive",
        "data.target.nme=x: unknown key data.target.nme; did you mean data.target.name?",
        "optim.betas=[3]: optim.betas are for name: adam or adamw; leave them out",
        "optim.betas=[3]: optim.betas must be two numbers in [0, 1)",
    ]


def test_what_is_missing_or_broken_together_names_who_wrote_it_last():
    write("a.yaml", "out_dir: run\ndata: {source: {name: mnist}}\n")
    write("b.yaml", "data: {target: {path: x}}\n")
    with pytest.raises(UserError, match=r"^b\.yaml: data\.target\.name is missing"):
        load_config(Config, ["a.yaml", "b.yaml"])
    with pytest.raises(UserError, match=r"^a\.yaml: data\.target must be a mapping|is missing"):
        load_config(Config, ["a.yaml"])
    write("empty.yaml", "")
    with pytest.raises(UserError, match=r"^empty\.yaml: data\.source"):
        load_config(Config, ["empty.yaml"])
    write("a.yaml", MINIMAL)
    with pytest.raises(UserError, match=r"^data\.source\.name=folder: data\.source\.path is miss"):
        load_config(Config, ["a.yaml"], ["data.source.name=folder", "seed=3"])
    with pytest.raises(UserError, match=r"^conditional=cdan: conditional needs feature_layers"):
        load_config(
            Config,
            ["a.yaml"],
            ["feature_layers=[layer4, pooled]", "layer_weights=[1, 1]", "conditional=cdan"],
        )


def test_a_key_of_another_script_is_said_to_be_one():
    write("a.yaml", MINIMAL + "ema_decay: 0.9\nthreshold: 0.9\nqqqqqq: 1\n")
    with pytest.raises(UserError) as caught:
        load_run_config(Config, "a.yaml", ["disc_hiden=3"])
    assert [line.strip() for line in str(caught.value).splitlines()] == [
        "a.yaml: unknown key ema_decay; it is a key of train_mic.py, train_pseudo.py",
        "a.yaml: unknown key threshold; it is a key of train_mic.py, train_pseudo.py",
        "a.yaml: unknown key qqqqqq; see --help",
        "disc_hiden=3: unknown key disc_hiden; did you mean disc_hidden?",
    ]


# --- the run to start from


def test_a_missing_start_names_the_command_that_makes_it(tmp_path):
    folder = tmp_path / "configs/mine"
    write(folder / "plain.yaml", "# Not a command.\nseed: 1\n")
    text = MINIMAL.removeprefix("out_dir: run\n")
    command = "python train_source.py --config configs/mine/pair.yaml"
    write(folder / "pair.yaml", f"# {command}\n{text}")
    files = ["--config", "configs/mine/pair.yaml", "configs/mine/plain.yaml"]
    for start, hint in (
        ("runs/mine/pair", f"make it by: {command}$"),
        ("runs/mine/pair_seed3", f"make it by: {command} seed=3 out_dir=runs/mine/pair_seed3$"),
        ("runs/mine/other", "train it first, or name another run$"),
    ):
        with pytest.raises(UserError, match=f"^init_from: there is no {start}; {hint}"):
            parse_args(Config, "", [*files, f"init_from={start}"])
    Path("runs/mine/pair").mkdir(parents=True)
    parse_args(Config, "", [*files, "init_from=runs/mine/pair"])  # control


# --- the device


def test_a_device_that_is_absent_is_refused(monkeypatch):
    chosen = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert get_device("auto") == get_device("cpu") == torch.device("cpu")
    for name in ("cuda", "cuda:0", "mps"):
        with pytest.raises(UserError, match=f"device: {name} is asked for but torch sees no"):
            get_device(name)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    assert get_device("auto") == get_device("cuda") == torch.device("cuda")
    assert get_device("cuda:1") == torch.device("cuda:1")
    with pytest.raises(UserError, match="torch sees 2 GPUs, cuda:0 to cuda:1; name one of them"):
        get_device("cuda:2")
    assert chosen == [torch.device("cuda:1")]


@pytest.mark.parametrize("amp", ["float16", "bfloat16"])
def test_half_precision_on_a_cpu_is_warned_of(tmp_path, capsys, amp):
    assert train("train_source", tiny_config(tmp_path, steps=1, amp=amp), "--dry-run") == 0
    assert ("amp: float16 is many times slower" in capsys.readouterr().out) == (amp == "float16")


FAULTS = """
import resource, torch
from training.device import get_device
get_device("cpu")
torch.zeros(2_000_000)  # the first block is new in any case
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(50):
    torch.zeros(10_000_000)  # 40 MB, larger than what glibc keeps by itself
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc is that of Linux")
def test_memory_is_kept_on_a_cpu():
    """Pages that are asked for again are no faults, unless a variable of malloc is set."""

    def faults(**variables: str) -> int:
        free = {k: v for k, v in os.environ.items() if not k.startswith("MALLOC_")}
        command = [sys.executable, "-c", FAULTS]
        run = subprocess.run(command, env={**free, **variables}, cwd=ROOT, capture_output=True)
        return int(run.stdout)

    kept, returned = faults(), faults(MALLOC_CHECK_="0")
    assert returned > 400_000  # all 9,766 pages of a block, 50 times
    assert kept < returned / 4
