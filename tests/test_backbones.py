"""Backbones: the table, features beside torchvision's, stages, dilation, published files."""

import re

import pytest
import torch
import torch.nn.functional as F
import torchvision
from torch import nn
from torchvision.ops import StochasticDepth

from benchmarks.backbones import without_values
from common.errors import UserError
from models import build_classifier, build_segmenter
from models.backbones import (
    BACKBONES,
    LAYERS,
    STRIDES,
    Caffe,
    Cut,
    Digits,
    Transformer,
    build_backbone,
    can_be_dilated,
    measure,
    set_drop_path,
)
from models.config import ModelConfig
from models.dilation import dilate
from models.published import enum_of, normalization
from models.vit import SelfAttention, bicubic_weights
from models.weights import load_weights
from tests.helpers import others_slow


def images(n: int, height: int, width: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8, generator=random)


# --- the table


WIDTHS = {
    "lenet": (64, 128, 128, 128),
    "lenet_classic": (20, 50, 50, 800),
    "resnet18": (64, 128, 256, 512),
    "resnet34": (64, 128, 256, 512),
    "resnet50": (256, 512, 1024, 2048),
    "resnet101": (256, 512, 1024, 2048),
    "resnet152": (256, 512, 1024, 2048),
    "resnext50_32x4d": (256, 512, 1024, 2048),
    "resnet50_caffe": (256, 512, 1024, 2048),
    "resnet101_caffe": (256, 512, 1024, 2048),
    "convnext_tiny": (96, 192, 384, 768),
    "convnext_small": (96, 192, 384, 768),
    "convnext_base": (128, 256, 512, 1024),
    "swin_t": (96, 192, 384, 768),
    "swin_s": (96, 192, 384, 768),
    "swin_b": (128, 256, 512, 1024),
    "swin_v2_t": (96, 192, 384, 768),
    "regnet_y_400mf": (48, 104, 208, 440),
    "regnet_y_3_2gf": (72, 216, 576, 1512),
    "regnet_y_16gf": (224, 448, 1232, 3024),
    "densenet121": (256, 512, 1024, 1024),
    "mobilenet_v2": (24, 32, 96, 1280),
    "mobilenet_v3_large": (24, 40, 112, 960),
    "efficientnet_b0": (24, 40, 112, 1280),
    "efficientnet_v2_s": (48, 64, 160, 1280),
    "vit_b_16": (768,) * 4,
    "vit_b_16_384": (768,) * 4,
    "vit_l_16": (1024,) * 4,
    "vit_l_16_512": (1024,) * 4,
    "dinov2_vits14": (384,) * 4,
    "dinov2_vitb14": (768,) * 4,
    "dinov2_vitl14": (1024,) * 4,
}
DENSE_LAST = {
    "mobilenet_v2": 320,
    "mobilenet_v3_large": 160,
    "efficientnet_b0": 320,
    "efficientnet_v2_s": 256,
}
# One of each family, the smallest.
FAMILIES = (
    "resnext50_32x4d",
    "convnext_tiny",
    "swin_t",
    "swin_v2_t",
    "regnet_y_400mf",
    "densenet121",
    "mobilenet_v2",
    "mobilenet_v3_large",
    "efficientnet_b0",
    "efficientnet_v2_s",
    "vit_b_16",
)
PARTS = ("convnext_tiny", "swin_t", "swin_v2_t", "dinov2_vits14")  # divide images into patches


def strides_of(name: str) -> tuple[int, ...]:
    entry = BACKBONES[name]
    if isinstance(entry, Digits):
        return entry.strides
    return (entry.patch,) * 4 if isinstance(entry, Transformer) else STRIDES


def test_every_backbone_of_the_table_is_tested():
    assert set(WIDTHS) == set(BACKBONES)
    assert ModelConfig.__annotations__["backbone"].__args__ == tuple(BACKBONES)


SHOWN = (*FAMILIES, "lenet", "resnet18", "resnet50_caffe", "dinov2_vits14")  # others: --slow
KINDS = [(name, False) for name in BACKBONES if name != "lenet_classic"]
KINDS += [(name, True) for name in (*DENSE_LAST, *PARTS)]


@pytest.mark.parametrize(
    ("name", "dense"),
    [pytest.param(*x, marks=[pytest.mark.slow] * (x[0] not in SHOWN)) for x in KINDS],
)
def test_widths_and_strides(name, dense):
    widths = list(WIDTHS[name])
    widths[3] = DENSE_LAST.get(name, widths[3]) if dense else widths[3]
    backbone, channels = without_values(name, dense)
    strides = strides_of(name)
    side = 4 * max(strides)
    with torch.device("meta"):
        assert measure(backbone) == (channels, dict(zip(LAYERS, strides, strict=True)))
        features = backbone(torch.empty(1, 3, side, 2 * side))
    assert channels == dict(zip(LAYERS, widths, strict=True))
    border = 1 if name.endswith("_caffe") else 0
    for layer, width, stride in zip(LAYERS, widths, strides, strict=True):
        size = (side // stride + border, 2 * side // stride + border)
        assert features[layer].shape == (1, width, *size)
    assert ("pooled" in features) != dense
    assert dense or features["pooled"].shape == (1, widths[3])


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
    ("ends", "match"),
    [
        (("3", "6", "13", "17"), None),
        (("2", "6", "13", "18"), None),
        (("1", "6", "13", "18"), r"mobilenet_v2: .* strides .*'layer1': 2"),
        (("3", "6", "14", "17"), r"'layer3': 32, 'layer4': 32"),
        (("3", "6", "13", "6"), r"mobilenet_v2: .* layers"),
    ],
)
def test_a_wrong_entry_of_the_table_is_noticed(monkeypatch, ends, match):
    monkeypatch.setitem(BACKBONES, "mobilenet_v2", Cut(ends, "features"))
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


def test_the_classic_lenet_on_digits():
    """Its maps of 4x4 are the vector of each image, as `view` has them; in training some are 0."""
    backbone, channels = build_backbone("lenet_classic")
    assert channels == dict(zip(LAYERS, WIDTHS["lenet_classic"], strict=True))
    images = torch.randn(2, 3, 28, 28)
    features = backbone.eval()(images)
    shapes = [(2, 20, 12, 12), (2, 50, 4, 4), (2, 50, 4, 4), (2, 800, 1, 1)]
    assert [tuple(features[name].shape) for name in LAYERS] == shapes
    assert torch.equal(features["pooled"], features["layer2"].flatten(1))
    plain = torch.relu(F.max_pool2d(backbone.layer1[0](images), 2))
    plain = torch.relu(F.max_pool2d(backbone.layer2[0](plain), 2))
    torch.testing.assert_close(features["layer2"], plain)
    dropped = (backbone.train()(images)["layer2"] == 0).all((2, 3))
    assert 20 < dropped.sum() < 80  # half of 100
    assert backbone.eval()(torch.randn(1, 3, 37, 37))["pooled"].shape == (1, 800)


def test_lenet_ends_at_one_pixel():
    backbone, _ = build_backbone("lenet")
    features = backbone.eval()(torch.zeros(2, 3, 28, 28))
    assert [features[name].shape[2] for name in LAYERS] == [7, 4, 2, 1]
    assert [features[name].shape[3] for name in LAYERS] == [7, 4, 2, 1]


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize(
    "name", ["lenet", "lenet_classic", "resnet18", "resnet50_caffe", *FAMILIES]
)
def test_stages_and_depths_divide_the_backbone(name, dense):
    """Every parameter belongs to one stage and to one depth; the stem to the first of both."""
    backbone, _ = without_values(name, dense)
    stages = backbone.stages()
    assert list(stages) == list(LAYERS)
    parts = [[p for m in stage for p in m.parameters()] for stage in stages.values()]
    depths = backbone.parameters_by_depth()
    for groups in (parts, depths):
        listed = [id(p) for group in groups for p in group]
        assert sorted(listed) == sorted(id(p) for p in backbone.parameters())
    first = next(backbone.parameters())
    assert any(p is first for p in parts[0])
    assert any(p is first for p in depths[0])
    assert all(depths[:-1])  # only what follows the last block may be nothing
    assert len(depths) == 2 if name.startswith("lenet") else len(depths) > 8


# --- beside torchvision, and odd images


def torchvisions(name: str) -> nn.Module:
    """torchvision's network, in eval mode, none of whose parameters or statistics has no effect."""
    torch.manual_seed(0)
    network = torchvision.models.get_model(name, weights=None)
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    for parameter in network.parameters():
        if parameter.dim() == 1:
            nn.init.normal_(parameter, 0.5, 0.2)
    return network.eval()


@torch.no_grad()
def input_of_the_head(network: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """What the first linear layer of a network's classifier reads."""
    head = getattr(network, "classifier", None) or getattr(network, "heads", None)
    linear = [m for m in (head or network).modules() if isinstance(m, nn.Linear)]
    seen = []
    (linear[0] if head else linear[-1]).register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    network(x)
    return seen[0]


# vit_b_16 takes 224 px alone, and swin_t is cut as swin_v2_t is.
QUICK = tuple(name for name in FAMILIES if name not in ("vit_b_16", "swin_t"))


@pytest.mark.parametrize("name", others_slow(FAMILIES, QUICK))
def test_a_file_of_torchvision_gives_its_features(name, tmp_path, capsys):
    network = torchvisions(name)
    torch.save(network.state_dict(), tmp_path / "weights.pth")
    backbone, _ = build_backbone(name)
    side = 224 if name == "vit_b_16" else 96  # torchvision's takes no other
    x = torch.randn(2, 3, side, side)
    untrained = backbone.eval()(x)["pooled"]
    load_weights(backbone, name, "weights.pth", str(tmp_path), [])
    count = re.search(r"loaded (\d+) of (\d+) tensors", capsys.readouterr().out)
    assert count[1] == count[2]
    with torch.no_grad():
        pooled = backbone.eval()(x)["pooled"]
    expected = input_of_the_head(network, x)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    assert (untrained - expected).abs().max() > 0.1  # control
    dense, _ = build_backbone(name, dense=True)
    load_weights(dense, name, "weights.pth", str(tmp_path), [])
    assert "pooled" not in dense(x)


@pytest.mark.parametrize("name", PARTS)
def test_an_image_of_any_size_is_covered_entirely(name):
    """It is enlarged to whole patches: the map has them all, and sees the last row and column."""
    backbone, _ = build_backbone(name)
    backbone.eval()
    x = torch.rand(1, 3, 71, 99)
    other = x.clone()
    other[:, :, -1, -1] += 1
    with torch.no_grad():
        features, changed = backbone(x), backbone(other)
    unit = backbone.multiple
    for layer, stride in zip(LAYERS, strides_of(name), strict=True):
        size = [-(-side // unit) * unit // stride for side in (71, 99)]
        assert list(features[layer].shape[2:]) == size
        assert (features[layer] != changed[layer])[..., -1, -1].any()
    small = build_classifier(ModelConfig(backbone=name), 3, ".").eval()
    assert small(images(1, 9, 5)).logits.isfinite().all()


def test_bicubic_weights_are_those_of_torch():
    """With the scale factor that DINOv2 gives it."""
    grid = torch.randn(1, 5, 37, 37)
    offset = torch.tensor(0.1)
    rows, columns = (bicubic_weights(37, n, offset).float() for n in (16, 50))
    scale = (16.1 / 37, 50.1 / 37)
    expected = F.interpolate(grid, scale_factor=scale, mode="bicubic")
    torch.testing.assert_close(rows @ (grid @ columns.T), expected, rtol=1e-5, atol=1e-5)
    plain = F.interpolate(grid, size=(16, 50), mode="bicubic")
    assert (expected - plain).abs().max() > 1e-3  # control: without the offset
    same = bicubic_weights(37, 37, torch.tensor(0.0))
    assert torch.equal(same, torch.eye(37, dtype=torch.float64))


@pytest.mark.parametrize("name", ["resnet18", "convnext_tiny", "swin_t", "dinov2_vits14"])
def test_gradients_pass_through_the_features(name):
    """The bound of DANN's reversal is the norm of the classifier's gradient at a feature."""
    model = build_classifier(ModelConfig(backbone=name, drop_path=None), 3, ".").eval()
    model.head.weight.data.normal_()
    stem = next(p for p in model.backbone.parameters() if p.dim() == 4)
    for layer in ("layer1", "layer3"):
        features = model(images(2, 64, 64)).features
        feature, loss = features[layer], features["logits"].square().sum()
        whole, at_feature = torch.autograd.grad(loss, [stem, feature], retain_graph=True)
        assert at_feature.abs().max() > 0
        feature.register_hook(torch.zeros_like)
        (rest,) = torch.autograd.grad(loss, stem)
        if name == "dinov2_vits14":  # the class token leads there, too
            assert (rest != whole).any()
        else:
            assert not rest.any()
            assert whole.any()


def test_positions_and_images_keep_their_precision_under_autocast():
    backbone, _ = build_backbone("dinov2_vits14")
    seen = []
    backbone.conv_proj.register_forward_pre_hook(lambda _, x: seen.append(x[0]))
    interpolated = backbone._interpolated
    backbone._interpolated = lambda *args: seen.append(interpolated(*args)) or seen[-1]
    x = torch.rand(1, 3, 70, 99)
    for enabled in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled), torch.no_grad():
            backbone(x)
    for plain, autocast in zip(seen[:2], seen[2:], strict=True):
        assert autocast.dtype == torch.float32
        assert torch.equal(plain, autocast)


def test_attention_of_a_deterministic_gpu_is_that_of_torch(monkeypatch):
    attention, x = SelfAttention(32, 4), torch.randn(2, 7, 32)
    fused = attention(x)[0]
    monkeypatch.setattr(torch, "are_deterministic_algorithms_enabled", lambda: True)
    monkeypatch.setattr(torch.Tensor, "is_cuda", True)
    torch.testing.assert_close(attention(x)[0], fused)
    monkeypatch.setattr(F, "scaled_dot_product_attention", None)  # control: it is not called
    attention(x)


def test_layer4_of_a_vit_classifies_nothing():
    model = build_classifier(ModelConfig(backbone="dinov2_vits14"), 3, ".")
    with pytest.raises(UserError, match=r"feature_layer: .* reads the class token and not layer4"):
        model.check_layers(["layer4"], "feature_layer")
    model.check_layers(["layer1", "layer3", "pooled", "logits"])
    config = ModelConfig(backbone="dinov2_vits14", head="upsampling")
    build_segmenter(config, 3, ".").check_layers(["layer4"])
    build_classifier(ModelConfig(backbone="resnet18"), 3, ".").check_layers(["layer4"])


# --- published files by other names


def dinov2_state(width: int = 384, depth: int = 12) -> dict[str, torch.Tensor]:
    """A random file in the names of DINOv2."""
    torch.manual_seed(1)

    def layer(name: str, out: int, into: int) -> dict[str, torch.Tensor]:
        return {
            f"{name}.weight": torch.randn(out, into) / into**0.5,
            f"{name}.bias": torch.randn(out) / 5,
        }

    def norm(name: str) -> dict[str, torch.Tensor]:
        return {f"{name}.weight": 1 + torch.randn(width) / 5, f"{name}.bias": torch.randn(width)}

    state = {
        "cls_token": torch.randn(1, 1, width),
        "pos_embed": torch.randn(1, 1 + 37 * 37, width),
        "mask_token": torch.zeros(1, width),
        "patch_embed.proj.weight": torch.randn(width, 3, 14, 14) / 20,
        "patch_embed.proj.bias": torch.randn(width),
    }
    for i in range(depth):
        block = f"blocks.{i}"
        state |= norm(f"{block}.norm1") | layer(f"{block}.attn.qkv", 3 * width, width)
        state |= layer(f"{block}.attn.proj", width, width) | norm(f"{block}.norm2")
        state |= layer(f"{block}.mlp.fc1", 4 * width, width)
        state |= layer(f"{block}.mlp.fc2", width, 4 * width)
        state |= {f"{block}.ls{j}.gamma": torch.rand(width) for j in (1, 2)}
    return state | norm("norm")


def plain_dinov2(state: dict, x: torch.Tensor, heads: int, depth: int = 12) -> list[torch.Tensor]:
    """The published forward, step by step: the tokens (N, 1 + T, D) after each block, normed."""

    def linear(name: str, x: torch.Tensor) -> torch.Tensor:
        return x @ state[f"{name}.weight"].T + state[f"{name}.bias"]

    def norm(name: str, x: torch.Tensor) -> torch.Tensor:
        return F.layer_norm(
            x, x.shape[-1:], state[f"{name}.weight"], state[f"{name}.bias"], eps=1e-6
        )

    patches = F.conv2d(x, state["patch_embed.proj.weight"], state["patch_embed.proj.bias"], 14)
    count, width, rows, columns = patches.shape
    tokens = patches.flatten(2).transpose(1, 2)
    tokens = torch.cat([state["cls_token"].expand(count, -1, -1), tokens], dim=1)
    first, grid = state["pos_embed"][:, :1], state["pos_embed"][:, 1:]
    if (rows, columns) != (37, 37):
        grid = F.interpolate(
            grid.reshape(1, 37, 37, width).permute(0, 3, 1, 2),
            scale_factor=((rows + 0.1) / 37, (columns + 0.1) / 37),
            mode="bicubic",
        )
        grid = grid.permute(0, 2, 3, 1).reshape(1, -1, width)
    tokens = tokens + torch.cat([first, grid], dim=1)
    outputs = []
    for i in range(depth):
        block = f"blocks.{i}"
        q, k, v = (
            part.reshape(count, -1, heads, width // heads).transpose(1, 2)
            for part in linear(f"{block}.attn.qkv", norm(f"{block}.norm1", tokens)).chunk(3, dim=2)
        )
        attention = (q @ k.transpose(2, 3) / (width // heads) ** 0.5).softmax(-1)
        mixed = (attention @ v).transpose(1, 2).reshape(count, -1, width)
        tokens = tokens + state[f"{block}.ls1.gamma"] * linear(f"{block}.attn.proj", mixed)
        hidden = F.gelu(linear(f"{block}.mlp.fc1", norm(f"{block}.norm2", tokens)))
        tokens = tokens + state[f"{block}.ls2.gamma"] * linear(f"{block}.mlp.fc2", hidden)
        outputs.append(tokens)
    return [*outputs[:-1], norm("norm", tokens)]


@pytest.mark.parametrize("size", others_slow([(70, 112), (518, 518)], ((70, 112),)))
def test_a_file_of_dinov2_gives_the_published_features(size, tmp_path, capsys):
    state = dinov2_state()
    torch.save(state, tmp_path / "dinov2.pth")
    backbone, _ = build_backbone("dinov2_vits14")
    load_weights(backbone, "dinov2_vits14", "dinov2.pth", str(tmp_path), [])
    assert "loaded 174 of 174 tensors" in capsys.readouterr().out
    x = torch.randn(1, 3, *size)
    with torch.no_grad():
        features, expected = backbone.eval()(x), plain_dinov2(state, x, heads=6)
    grid = [side // 14 for side in size]
    for number, layer in enumerate(LAYERS, 1):
        tokens = expected[3 * number - 1]
        maps = tokens[:, 1:].transpose(1, 2).unflatten(2, grid)
        torch.testing.assert_close(features[layer], maps, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(features["pooled"], expected[-1][:, 0], rtol=1e-4, atol=1e-4)


def test_a_file_of_dinov2_that_does_not_fit_is_refused(tmp_path):
    state = dinov2_state()
    torch.save({**state, "register_tokens": torch.zeros(1, 4, 384)}, tmp_path / "registers.pth")
    backbone, _ = build_backbone("dinov2_vits14")
    with pytest.raises(UserError, match=r"have registers, and dinov2_vits14 has none; .*_reg4"):
        load_weights(backbone, "dinov2_vits14", "registers.pth", str(tmp_path), [])
    del state["blocks.3.ls1.gamma"]
    torch.save(state, tmp_path / "short.pth")
    match = r"1 tensor is missing \(first: encoder.layers.encoder_layer_3.dropout.gamma\)"
    with pytest.raises(UserError, match=match):
        load_weights(backbone, "dinov2_vits14", "short.pth", str(tmp_path), [])


CONVNEXT_NAMES = (
    (r"^features\.([0246])\.", lambda m: f"downsample_layers.{int(m[1]) // 2}."),
    (r"^features\.([1357])\.(\d+)\.", lambda m: f"stages.{int(m[1]) // 2}.{m[2]}."),
    (r"\.block\.0\.", ".dwconv."),
    (r"\.block\.2\.", ".norm."),
    (r"\.block\.3\.", ".pwconv1."),
    (r"\.block\.5\.", ".pwconv2."),
    (r"\.layer_scale$", ".gamma"),
    (r"^classifier\.0\.", "norm."),
    (r"^classifier\.2\.", "head."),
)


@pytest.mark.parametrize("dinov3", [False, True])
def test_a_file_of_convnext_by_its_authors_names(dinov3, tmp_path, capsys):
    """Of the authors, or of DINOv3, which has no head and its last norm twice."""
    network = torchvisions("convnext_tiny")
    state = {}
    for name, value in network.state_dict().items():
        for pattern, new in CONVNEXT_NAMES:
            name = re.sub(pattern, new, name)
        state[name] = value.flatten() if name.endswith("gamma") else value
    if dinov3:
        state = {name: value for name, value in state.items() if not name.startswith("head.")}
        state |= {f"norms.3.{part}": state[f"norm.{part}"] for part in ("weight", "bias")}
    torch.save(state, tmp_path / "convnext.pth")
    backbone, _ = build_backbone("convnext_tiny")
    load_weights(backbone, "convnext_tiny", "convnext.pth", str(tmp_path), [])
    assert "loaded 180 of 180 tensors" in capsys.readouterr().out
    x = torch.randn(2, 3, 96, 96)
    with torch.no_grad():
        pooled = backbone.eval()(x)["pooled"]
    torch.testing.assert_close(pooled, input_of_the_head(network, x), rtol=1e-5, atol=1e-5)


def test_older_names_of_torchvision(tmp_path, capsys):
    renamed = {
        "densenet121": (r"(denselayer\d+\.(?:norm|conv))([12])\.", r"\1.\2."),
        "vit_b_16": (r"\.mlp\.([03])\.", lambda m: f".mlp.linear_{1 + int(m[1]) // 3}."),
    }
    for name, (pattern, old) in renamed.items():
        state = torchvisions(name).state_dict()
        older = {re.sub(pattern, old, key): value for key, value in state.items()}
        assert older.keys() != state.keys()
        torch.save(older, tmp_path / "older.pth")
        backbone, _ = build_backbone(name)
        load_weights(backbone, name, "older.pth", str(tmp_path), [])
        count = re.search(r"loaded (\d+) of (\d+) tensors", capsys.readouterr().out)
        assert count[1] == count[2]


def test_positions_of_another_size_are_refused(tmp_path):
    with torch.device("meta"):
        state = torchvision.models.vit_b_16(weights=None, image_size=384).state_dict()
    torch.save({name: torch.zeros(value.shape) for name, value in state.items()}, tmp_path / "w.pt")
    backbone, _ = build_backbone("vit_b_16")
    match = r"of another shape \(first: encoder.pos_embedding\).*; vit_b_16_384 is this network"
    with pytest.raises(UserError, match=match):
        load_weights(backbone, "vit_b_16", "w.pt", str(tmp_path), [])
    match = r"no weights 'IMAGENET1K_SWAG_E2E_V1'; there are .*; vit_b_16_384 is this network for"
    with pytest.raises(UserError, match=match):
        load_weights(backbone, "vit_b_16", "IMAGENET1K_SWAG_E2E_V1", str(tmp_path), [])
    backbone, _ = build_backbone("vit_b_16_384")
    load_weights(backbone, "vit_b_16_384", "w.pt", str(tmp_path), [])


class CaffeBlock(nn.Module):
    """The bottleneck of ADVENT's network: the stride is the first 1x1 convolution's."""

    def __init__(self, width: int, stride: int, dilation: int, into: int, shortcut: bool):
        super().__init__()
        self.conv1 = nn.Conv2d(into, width, 1, stride, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, 1, dilation, dilation, bias=False)
        self.bn2 = nn.BatchNorm2d(width)
        self.conv3 = nn.Conv2d(width, 4 * width, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(4 * width)
        if shortcut:
            convolution = nn.Conv2d(into, 4 * width, 1, stride, bias=False)
            self.downsample = nn.Sequential(convolution, nn.BatchNorm2d(4 * width))

    def forward(self, x):
        y = self.bn1(self.conv1(x)).relu()
        y = self.bn3(self.conv3(self.bn2(self.conv2(y)).relu()))
        return (y + (self.downsample(x) if hasattr(self, "downsample") else x)).relu()


class PlainCaffe(nn.Module):
    """ADVENT's ResNet-50, of output stride 8, on images in BGR less the mean, in 0..255."""

    def __init__(self):
        super().__init__()
        self.conv1 = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm2d(64)
        into = 64
        for number, (width, blocks, stride, dilation) in enumerate(
            [(64, 3, 1, 1), (128, 4, 2, 1), (256, 6, 1, 2), (512, 3, 1, 4)], 1
        ):
            stage = nn.Sequential()
            for i in range(blocks):
                step = stride if i == 0 else 1
                stage.append(CaffeBlock(width, step, dilation, into, shortcut=i == 0))
                into = 4 * width
            self.add_module(f"layer{number}", stage)

    def forward(self, x):
        x = F.max_pool2d(self.bn1(self.conv1(x)).relu(), 3, 2, 1, ceil_mode=True)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))


def test_the_caffe_resnet_is_the_authors(tmp_path, capsys):
    torch.manual_seed(0)
    plain = PlainCaffe().eval()
    for module in plain.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1)
            module.running_var.uniform_(0.5, 1.5)
    state = {f"Scale.{name}": value for name, value in plain.state_dict().items()}
    state["Scale.layer5.conv2d_list.0.weight"] = torch.zeros(21, 2048, 3, 3)
    torch.save(state, tmp_path / "DeepLab_resnet.pth")
    config = ModelConfig(backbone="resnet50_caffe", weights="DeepLab_resnet.pth")
    model = build_segmenter(config, 5, str(tmp_path)).eval()
    assert "loaded 265 of 265 tensors" in capsys.readouterr().out
    x = images(1, 65, 97)
    mean = torch.tensor([104.00698793, 116.66876762, 122.67891434]).view(3, 1, 1)
    with torch.no_grad():
        expected = plain(x.float().flip(1) - mean)
        layer4 = model(x).features["layer4"]
    torch.testing.assert_close(layer4, expected, rtol=1e-4, atol=1e-4 * float(expected.max()))
    small = model(images(1, 9, 9)).logits  # corners of the logits are those of the last map
    torch.testing.assert_close(
        small[..., 0, 0], model.head(model(images(1, 9, 9)).features["layer4"])[..., 0, 0]
    )
    torch.save(torchvision.models.resnet50(weights=None).state_dict(), tmp_path / "resnet50.pth")
    with pytest.raises(UserError, match=r"resnet50_caffe takes a file of Caffe's ResNet"):
        load_weights(model.backbone, "resnet50_caffe", "resnet50.pth", str(tmp_path), [])
    with pytest.raises(UserError, match=r"no weights 'IMAGENET1K_V1'; there are none to download"):
        load_weights(model.backbone, "resnet50_caffe", "IMAGENET1K_V1", str(tmp_path), [])
    wide = ModelConfig(backbone="resnet50_caffe", output_stride=16)
    features = build_segmenter(wide, 5, ".").eval()(images(1, 64, 64)).features
    assert [features[name].shape[2] for name in LAYERS] == [17, 9, 5, 5]


# --- normalization, drop path


def test_normalization_is_that_of_the_weights(monkeypatch):
    for name, entry in BACKBONES.items():
        if (enum := enum_of(name)) is not None:
            for weights in enum.__members__:
                preparation = enum[weights].transforms()
                assert normalization(name, weights) == (
                    tuple(preparation.mean),
                    tuple(preparation.std),
                )
        mean, std = normalization(name, "file.pth")
        assert (std == (1 / 255,) * 3) == isinstance(entry, Caffe)
        if name in ("lenet", "resnet50_caffe"):
            network = build_classifier(ModelConfig(backbone=name), 3, ".")
            torch.testing.assert_close(network.mean.flatten(), 255 * torch.tensor(mean))
    monkeypatch.setitem(BACKBONES, "efficientnet_v2_l", BACKBONES["efficientnet_v2_s"])
    half = (0.5, 0.5, 0.5)  # one that differs
    assert normalization("efficientnet_v2_l", "IMAGENET1K_V1") == (half, half)


@pytest.mark.parametrize("name", ["convnext_tiny", "swin_t", "dinov2_vits14", "vit_b_16"])
def test_drop_path_rises_with_depth_and_is_off_in_evaluation(name):
    backbone, _ = build_backbone(name)
    set_drop_path(backbone, name, 0.4)
    rates = [m.p for m in backbone.modules() if isinstance(m, StochasticDepth)]
    assert (rates[0], rates[-1]) == (0, 0.4)
    assert rates == sorted(rates)
    x = torch.randn(2, 3, 32, 32)
    outputs = {}
    with torch.no_grad():
        for mode in (False, True):
            backbone.train(mode)
            outputs[mode] = [backbone(x)["layer4"] for _ in range(2)]
    assert torch.equal(*outputs[False])
    assert not torch.equal(outputs[True][0], outputs[False][0])


def test_drop_path_is_refused_where_there_is_none():
    with pytest.raises(UserError, match=r"drop_path: backbone resnet18 has no drop path"):
        build_classifier(ModelConfig(backbone="resnet18", drop_path=0.1), 3, ".")
    build_classifier(ModelConfig(backbone="efficientnet_b0", drop_path=0.1), 3, ".")  # control


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
    ours, _ = build_backbone("resnet50", dense=True)
    dilate(ours, output_stride)
    theirs = torchvision.models.resnet50(weights=None, replace_stride_with_dilation=replace)
    theirs.load_state_dict(ours.state_dict(), strict=False)
    ours.eval(), theirs.eval()
    x = torch.randn(1, 3, 64, 96)
    plain, _ = build_backbone("resnet50", dense=True)
    plain.load_state_dict(ours.state_dict())
    with torch.no_grad():
        y = theirs.maxpool(theirs.relu(theirs.bn1(theirs.conv1(x))))
        for name in LAYERS:
            y = theirs.get_submodule(name)(y)
        assert torch.equal(ours(x)["layer4"], y)
        assert plain.eval()(x)["layer4"].shape != y.shape  # control


@pytest.mark.parametrize("name", others_slow(filter(can_be_dilated, BACKBONES), SHOWN))
@pytest.mark.parametrize(("output_stride", "strides"), [(8, (4, 8, 8, 8)), (16, (4, 8, 16, 16))])
def test_dilation_leaves_the_strides_that_are_asked_for(name, output_stride, strides):
    with torch.device("meta"):
        backbone, channels = build_backbone(name, dense=True)
        dilate(backbone, output_stride)
        assert measure(backbone) == (channels, dict(zip(LAYERS, strides, strict=True)))


@pytest.mark.parametrize("output_stride", [8, 16])
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("convnext_tiny", "4x4 convolution of stride 4"),
        ("dinov2_vits14", "14x14 convolution of stride 14"),
        ("lenet", r"strides \(4, 8, 16, 32\)"),  # those of its pooling
        ("densenet121", r"strides \(4, 8, 16, 32\)"),
    ],
)
def test_what_cannot_be_dilated_is_refused(name, reason, output_stride):
    assert not can_be_dilated(name)
    with torch.device("meta"):
        backbone, _ = build_backbone(name, dense=True)
        with pytest.raises(UserError, match=f"cannot be dilated .*{reason}"):
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
