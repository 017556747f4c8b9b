"""Backbones: widths and strides of the table, and dilation."""

import pytest
import torch
import torchvision
from torch import nn
from torchvision.models._utils import IntermediateLayerGetter

from common.errors import UserError
from models import build_classifier, build_segmenter
from models.backbones import (
    BACKBONES,
    LAYERS,
    STRIDES,
    Entry,
    backbone_stages,
    build_backbone,
    dilate,
    measure,
)
from models.config import ModelConfig


def images(n: int, height: int, width: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8, generator=random)


# --- the table


WIDTHS = {
    "lenet": (64, 128, 128, 128),
    "resnet18": (64, 128, 256, 512),
    "resnet34": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "resnet101": (256, 512, 1024, 2048),
    "mobilenet_v2": (24, 32, 96, 1280),
    "efficientnet_b0": (24, 40, 112, 1280),
}
DENSE_WIDTHS = {"mobilenet_v2": (24, 32, 96, 320), "efficientnet_b0": (24, 40, 112, 320)}


def test_every_backbone_of_the_table_is_tested():
    assert set(WIDTHS) == set(BACKBONES)
    assert ModelConfig.__annotations__["backbone"].__args__ == tuple(BACKBONES)


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("name", BACKBONES)
def test_widths_and_strides(name, dense):
    widths = (DENSE_WIDTHS if dense else {}).get(name, WIDTHS[name])
    with torch.device("meta"):  # shapes only
        backbone, channels = build_backbone(name, dense=dense)
        assert measure(backbone) == (channels, dict(zip(LAYERS, STRIDES, strict=True)))
        features = backbone(torch.empty(1, 3, 128, 96))
    assert channels == dict(zip(LAYERS, widths, strict=True))
    for layer, width, stride in zip(LAYERS, widths, STRIDES, strict=True):
        assert features[layer].shape == (1, width, 128 // stride, 96 // stride)


def test_measure_changes_nothing():
    backbone, _ = build_backbone("lenet")
    before = {name: value.clone() for name, value in backbone.state_dict().items()}
    for mode in (True, False):
        backbone.train(mode)
        rng = torch.get_rng_state()
        measure(backbone)
        assert {module.training for module in backbone.modules()} == {mode}
        assert torch.equal(rng, torch.get_rng_state())
    after = backbone.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    backbone.train()(torch.zeros(2, 3, 64, 64))  # control: this moves the statistics
    assert any((value != after[name]).any() for name, value in before.items())


@pytest.mark.parametrize(
    ("entry", "match"),
    [
        (Entry(("3", "6", "13", "17"), body="features"), None),
        (Entry(("2", "6", "13", "18"), body="features"), None),
        (Entry(("1", "6", "13", "18"), body="features"), r"mobilenet_v2: .* strides .*'layer1': 2"),
        (Entry(("3", "6", "14", "17"), body="features"), r"'layer3': 32, 'layer4': 32"),
        (Entry(("3", "6", "13", "6"), body="features"), r"mobilenet_v2: .* layers"),
    ],
)
def test_a_wrong_entry_of_the_table_is_noticed(monkeypatch, entry, match):
    monkeypatch.setitem(BACKBONES, "mobilenet_v2", entry)
    if match is None:  # control: another place of the same stride is allowed
        build_backbone("mobilenet_v2")
        return
    with pytest.raises(AssertionError, match=match):
        build_backbone("mobilenet_v2")


@pytest.mark.parametrize(
    ("keys", "widths"),
    [
        ({"backbone": "lenet"}, (64, 128, 128, 128)),
        ({"backbone": "lenet", "batch_norm": False}, (64, 128, 128, 128)),
        ({"backbone": "resnet18"}, (64, 128, 256, 512)),
        ({"backbone": "mobilenet_v2"}, (24, 32, 96, 1280)),
        ({"backbone": "lenet", "bottleneck": 16}, (64, 128, 128, 128)),
    ],
)
def test_a_classifier_has_the_layers_of_its_backbone(keys, widths):
    model = build_classifier(ModelConfig(**keys), 5, ".").eval()
    out = model(images(2, 64, 64))
    assert list(out.features) == [*LAYERS, "pooled", "logits"]
    for name, width, stride in zip(LAYERS, widths, STRIDES, strict=True):
        assert out.features[name].shape == (2, width, 64 // stride, 64 // stride)
    pooled = keys.get("bottleneck", widths[-1])
    channels = {**dict(zip(LAYERS, widths, strict=True)), "pooled": pooled, "logits": 5}
    assert model.channels == channels
    assert out.features["pooled"].shape == (2, pooled)
    assert out.logits.shape == (2, 5)
    assert out.features["logits"] is out.logits
    torch.testing.assert_close(out.logits, model.head(out.features[model.head_layer]))
    if "bottleneck" not in keys:
        torch.testing.assert_close(out.features["pooled"], out.features["layer4"].mean((2, 3)))


def test_a_bottleneck_without_relu_keeps_what_is_negative():
    for relu in (True, False):
        config = ModelConfig(bottleneck=16, bottleneck_relu=relu)
        model = build_classifier(config, 5, ".").eval()
        pooled = model(images(4, 28, 28)).features["pooled"]
        assert bool((pooled < 0).any()) != relu
    assert [type(m) for m in model.bottleneck] == [nn.Linear, nn.BatchNorm1d]


def test_a_classifier_with_weight_norm_has_a_length_and_a_direction_per_class():
    models = {}
    for normed in (False, True):
        torch.manual_seed(0)
        models[normed] = build_classifier(ModelConfig(weight_norm=normed), 5, ".").eval()
    plain, model = models.values()
    x = images(3, 28, 28)
    torch.testing.assert_close(model(x).logits, plain(x).logits)  # the same layer at the start
    length, direction = (value for name, value in model.head.named_parameters() if name != "bias")
    with torch.no_grad():
        direction.mul_(7)  # has no effect
        torch.testing.assert_close(model(x).logits, plain(x).logits)
        length.mul_(2)
        bias = plain.head.bias
        torch.testing.assert_close(model(x).logits - bias, 2 * (plain(x).logits - bias))


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_layer_is_the_last_of_its_stride(name):
    backbone, _ = build_backbone(name)
    x, last = torch.randn(1, 3, 64, 64), {}
    features = backbone.eval()(x)
    for module in backbone.children():
        x = module(x)
        last[64 // x.shape[-1]] = x
    for layer, stride in zip(LAYERS, STRIDES, strict=True):
        assert torch.equal(features[layer], last[stride])


def test_lenet_ends_at_one_pixel():
    backbone, _ = build_backbone("lenet")
    features = backbone.eval()(torch.zeros(2, 3, 28, 28))
    assert [features[name].shape[2] for name in LAYERS] == [7, 4, 2, 1]
    assert [features[name].shape[3] for name in LAYERS] == [7, 4, 2, 1]


@pytest.mark.parametrize("name", ["lenet", "resnet18", "mobilenet_v2"])
def test_stages_divide_the_backbone(name):
    """Every module belongs to one stage; the stem belongs to layer1."""
    backbone, _ = build_backbone(name)
    stages = backbone_stages(backbone)
    assert list(stages) == list(LAYERS)
    assert [id(m) for stage in stages.values() for m in stage] == [
        id(m) for m in backbone.children()
    ]
    if name != "lenet":
        assert len(stages["layer1"]) > 1


# --- dilation


@pytest.mark.parametrize("backbone", ["resnet18", "resnet50", "mobilenet_v2", "efficientnet_b0"])
@pytest.mark.parametrize(("output_stride", "strides"), [(8, (4, 8, 8, 8)), (16, (4, 8, 16, 16))])
def test_layers_keep_their_resolution_from_the_output_stride_on(backbone, output_stride, strides):
    config = ModelConfig(backbone=backbone, output_stride=output_stride)
    out = build_segmenter(config, 5, ".").eval()(images(1, 64, 128))
    for layer, stride in zip(LAYERS, strides, strict=True):
        assert out.features[layer].shape[2:] == (64 // stride, 128 // stride), layer
    assert out.logits.shape == (1, 5, 64, 128)


@pytest.mark.parametrize(
    ("output_stride", "replace"), [(8, [False, True, True]), (16, [False, False, True])]
)
def test_dilation_is_torchvisions(output_stride, replace):
    """Of bottleneck ResNets, which torchvision can dilate itself."""
    ours, _ = build_backbone("resnet50")
    dilate(ours, output_stride)
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=replace)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    ours.eval(), theirs.eval()
    x = torch.randn(1, 3, 64, 96)
    plain, _ = build_backbone("resnet50")
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for name in LAYERS:
            y = theirs.get_submodule(name)(y)
        assert torch.equal(ours(x)["layer4"], y)
        assert plain.eval()(x)["layer4"].shape != y.shape  # control


@pytest.mark.parametrize("name", ["resnet50", "mobilenet_v2", "efficientnet_b0"])
@pytest.mark.parametrize(("output_stride", "strides"), [(8, (4, 8, 8, 8)), (16, (4, 8, 16, 16))])
def test_dilation_leaves_the_strides_that_are_asked_for(name, output_stride, strides):
    with torch.device("meta"):
        backbone, channels = build_backbone(name, dense=True)
        dilate(backbone, output_stride)
        assert measure(backbone) == (channels, dict(zip(LAYERS, strides, strict=True)))


def convnext() -> nn.Module:
    body = torchvision.models.convnext_tiny(weights=None).features
    ends = dict(zip(("1", "3", "5", "7"), LAYERS, strict=True))
    return IntermediateLayerGetter(body, ends)


def pooled() -> nn.Module:
    """LeNet, whose strides are those of its pooling."""
    return build_backbone("lenet")[0]


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(
    ("build", "reason"),
    [(convnext, "4x4 convolution of stride 4"), (pooled, r"strides \(4, 8, 16, 32\)")],
)
def test_what_cannot_be_dilated_is_refused(build, reason, output_stride):
    with torch.device("meta"):
        backbone = build()
        assert tuple(measure(backbone)[1].values()) == STRIDES  # nothing else is wrong with it
        with pytest.raises(UserError, match=f"cannot be dilated .*{reason}.*; choose a ResNet"):
            dilate(backbone, output_stride)


@pytest.mark.parametrize("kernel", [2, 3])
def test_a_strided_convolution_of_even_width_is_refused(kernel):
    """It has no center, so that dilation would shift the map."""
    backbone, _ = build_backbone("resnet18")
    backbone.layer3[0].conv1 = nn.Conv2d(128, 256, kernel, stride=2, padding=kernel // 2)
    if kernel == 3:  # control
        dilate(backbone, 8)
        return
    with pytest.raises(UserError, match="2x2 convolution of stride 2"):
        dilate(backbone, 8)
