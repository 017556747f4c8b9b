"""Networks: layers, weights, batch norm, discriminator, reversal."""

import pytest
import torch
import torchvision
from torch import nn

from common.config import ModelConfig
from common.runtime import UserError
from models import DomainDiscriminator, build_classifier, feature_vectors, forward_domains, gradient_reversal, init_from
from models.backbones import LAYERS, build_backbone
from models.network import check_layers


def build(num_classes: int = 5, root: str = ".", **keys):
    torch.manual_seed(0)
    return build_classifier(ModelConfig(**keys), num_classes, root).train()


def images(n: int, side: int = 28, seed: int = 0) -> torch.Tensor:
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d))]


def tensors(backbone: nn.Module) -> list[str]:
    """What weights files hold: all but the counters of batches, which older ones lack."""
    return [name for name in backbone.state_dict() if not name.endswith("num_batches_tracked")]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    return {k: v.clone() for k, v in model.state_dict().items() if "running" in k or "num_batches" in k}


# --- gradient reversal and discriminator


@pytest.mark.parametrize("coeff", [0.3, 1.0, 2.5, 0.0])
def test_the_gradient_through_the_reversal_is_minus_lambda_g(coeff):
    torch.manual_seed(0)
    x, tail = torch.randn(6, 4, requires_grad=True), nn.Linear(4, 1)
    assert torch.equal(gradient_reversal(x, coeff), x)
    plain_x, *plain_tail = torch.autograd.grad(tail(x).square().sum(), [x, *tail.parameters()])
    x_grad, *tail_grad = torch.autograd.grad(tail(gradient_reversal(x, coeff)).square().sum(), [x, *tail.parameters()])
    assert torch.equal(x_grad, -coeff * plain_x)
    assert all(
        torch.equal(a, b) for a, b in zip(tail_grad, plain_tail, strict=True)
    )  # at full strength, whatever lambda
    assert plain_x.abs().min() > 0


def test_lambda_zero_gives_zero_gradient_and_a_learning_discriminator():
    features, discriminator = torch.randn(8, 4, requires_grad=True), DomainDiscriminator(4, 16)
    discriminator(gradient_reversal(features, 0.0)).sum().backward()
    assert (features.grad == 0).all()
    assert discriminator.layers[-1].bias.grad.abs() > 0


def test_the_reversal_takes_any_shape_and_keeps_the_type():
    x = torch.randn(2, 3, 4, 5, dtype=torch.float16, requires_grad=True)
    gradient_reversal(x, 0.5).sum().backward()
    assert x.grad.dtype == torch.float16
    assert (x.grad == -0.5).all()


@pytest.mark.parametrize("norm", ["batch", "dropout", "none"])
def test_the_discriminator_gives_one_logit_an_image(norm):
    discriminator = DomainDiscriminator(6, 8, norm)
    kinds = {type(module) for module in discriminator.modules()}
    assert (nn.BatchNorm1d in kinds, nn.Dropout in kinds) == (norm == "batch", norm == "dropout")
    assert [m.out_features for m in discriminator.modules() if isinstance(m, nn.Linear)] == [8, 8, 1]
    assert discriminator(torch.randn(5, 6)).shape == (5,)
    assert discriminator.eval()(torch.randn(1, 6)).shape == (1,)  # a batch of one stays a batch
    logits = discriminator(100 * torch.randn(64, 6))
    assert logits.min() < 0 or logits.max() > 1  # logits: nothing squeezes them into [0, 1]


def test_feature_vectors_are_means_or_locations():
    maps = torch.randn(3, 6, 5, 4)
    torch.testing.assert_close(feature_vectors(maps, locations=False), maps.mean((2, 3)))
    vectors = [maps[n, :, y, x] for n in range(3) for y in range(5) for x in range(4)]
    assert torch.equal(feature_vectors(maps, locations=True), torch.stack(vectors))
    rows = torch.randn(3, 6)
    assert feature_vectors(rows, locations=True) is rows
    assert feature_vectors(rows, locations=False) is rows
    assert DomainDiscriminator(6, 8, "none")(rows[:1]).shape == (1,)


# --- backbones


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
def test_every_backbone_has_the_layers_at_their_strides(keys, widths):
    model = build(**keys).eval()
    out = model(images(2, 64))
    assert list(out.features) == [*LAYERS, "pooled"]
    for name, width, stride in zip(LAYERS, widths, (4, 8, 16, 32), strict=True):
        assert out.features[name].shape == (2, width, 64 // stride, 64 // stride)
    pooled = keys.get("bottleneck", widths[-1])
    assert model.channels == {**dict(zip(LAYERS, widths, strict=True)), "pooled": pooled}
    assert out.features["pooled"].shape == (2, pooled)
    assert out.logits.shape == (2, 5)
    torch.testing.assert_close(out.logits, model.head(out.features["pooled"]))
    if "bottleneck" not in keys:
        torch.testing.assert_close(out.features["pooled"], out.features["layer4"].mean((2, 3)))


@pytest.mark.parametrize(
    ("name", "widths"),
    [
        ("resnet34", [64, 128, 256, 512]),
        ("resnet50", [256, 512, 1024, 2048]),
        ("resnet101", [256, 512, 1024, 2048]),
    ],
)
def test_channels_of_the_deeper_resnets(name, widths):
    with torch.device("meta"):  # shapes only
        backbone, channels = build_backbone(name)
        features = backbone(torch.empty(1, 3, 64, 64))
    assert list(channels.values()) == widths
    assert {k: (v.shape[1], 64 // v.shape[2]) for k, v in features.items()} == {
        layer: (width, stride) for layer, width, stride in zip(LAYERS, widths, (4, 8, 16, 32), strict=True)
    }


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v2"])
def test_a_layer_is_the_last_of_its_stride(name):
    backbone, _ = build_backbone(name)
    x, last = torch.randn(1, 3, 64, 64), {}
    features = backbone.eval()(x)
    for module in backbone.children():
        x = module(x)
        last[64 // x.shape[-1]] = x
    for layer, stride in zip(LAYERS, (4, 8, 16, 32), strict=True):
        assert torch.equal(features[layer], last[stride])


def test_lenet_ends_at_one_pixel():
    out = build().eval()(images(2, 28))
    assert [tuple(out.features[name].shape[2:]) for name in LAYERS] == [(7, 7), (4, 4), (2, 2), (1, 1)]


def test_images_are_normalised_inside_and_left_alone():
    model, seen = build().eval(), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = images(2)
    before = batch.clone()
    model(batch)
    mean, std = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(seen[0], (before.float() / 255 - mean) / std)
    assert torch.equal(batch, before)


def test_an_unknown_layer_is_refused_with_the_names():
    model = build()
    check_layers(model, ["layer1", "pooled"])
    with pytest.raises(UserError, match="no layer 'layer5'; there are layer1, layer2, layer3, layer4, pooled"):
        check_layers(model, ["layer1", "layer5"])


def test_param_groups_hold_every_trained_parameter_once():
    model = build(bottleneck=8, bn_affine="frozen")
    old, new = model.param_groups(0.1)
    assert (old["lr_scale"], new["lr_scale"]) == (0.1, 1.0)
    assert {id(p) for p in new["params"]} == {id(p) for m in (model.bottleneck, model.head) for p in m.parameters()}
    grouped = [id(p) for group in (old, new) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_channels_last_is_a_matter_of_speed_only():
    plain, last = build().eval(), build(channels_last=True).eval()
    assert last.backbone.layer1[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(plain(images(2)).logits, last(images(2)).logits, atol=1e-4, rtol=1e-4)


# --- weights


@pytest.fixture(scope="module")
def resnet18_file(tmp_path_factory):
    """A torchvision state dict, classifier included, some tensors float16 as in released files."""
    torch.manual_seed(3)
    state = torchvision.models.resnet18(weights=None).state_dict()
    state = {k: v.half() if k.startswith("layer4") and v.is_floating_point() else v for k, v in state.items()}
    file = tmp_path_factory.mktemp("root") / "weights.pth"
    torch.save(state, file)
    return file


def _rewritten(file, folder, change):
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, folder / "changed.pth")
    return {"backbone": "resnet18", "weights": "changed.pth", "root": str(folder)}


def test_weights_from_a_file(resnet18_file, capsys):
    model = build(backbone="resnet18", weights="weights.pth", root=str(resnet18_file.parent))
    total = len(tensors(model.backbone))
    assert capsys.readouterr().out == f"weights weights.pth: loaded {total} of {total} tensors\n"
    state = torch.load(resnet18_file, weights_only=True)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name
        assert value.dtype in (torch.float32, torch.int64)
    assert total == len([name for name in state if "num_batches" not in name]) - 2  # all but the classifier


def test_a_missing_tensor_is_an_error_unless_it_is_named(resnet18_file, tmp_path, capsys):
    keys = _rewritten(resnet18_file, tmp_path, lambda state: state.pop("layer1.0.conv1.weight"))
    with pytest.raises(UserError, match=r"changed\.pth lacks 1 of .*100.* the first layer1\.0\.conv1"):
        build(**keys)
    with pytest.raises(UserError, match="lacks 1"):
        build(**keys, weights_missing=["layer2"])
    capsys.readouterr()
    build(**keys, weights_missing=["layer1.0.conv1"])
    assert "loaded 99 of 100 tensors" in capsys.readouterr().out


def test_a_tensor_of_another_shape_is_missing(resnet18_file, tmp_path):
    keys = _rewritten(resnet18_file, tmp_path, lambda state: state.update({"conv1.weight": torch.zeros(64, 1, 7, 7)}))
    with pytest.raises(UserError, match=r"the first conv1\.weight"):
        build(**keys)


def test_weights_of_another_backbone(resnet18_file, tmp_path):
    for name in ("mobilenet_v2", "resnet50", "lenet"):
        with pytest.raises(UserError, match=f"lacks .*{name}.* the first .* weights of another backbone") as caught:
            build(backbone=name, weights="weights.pth", root=str(resnet18_file.parent))
        assert len(str(caught.value).splitlines()) == 1
    # a deeper sibling has every tensor, and more
    keys = _rewritten(resnet18_file, tmp_path, lambda state: state.update({"layer1.2.conv1.weight": torch.zeros(1)}))
    with pytest.raises(UserError, match=r"layer1\.2\.conv1\.weight"):
        build(**keys)


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"model\.weights: there is no file .*absent\.pth"):
        build(backbone="resnet18", weights="absent.pth", root=str(tmp_path))
    with pytest.raises(UserError, match=r"no weights 'IMAGENET1K_V7'; there are .*IMAGENET1K_V1"):
        build(backbone="resnet18", weights="IMAGENET1K_V7", root=str(tmp_path))
    (tmp_path / "text.pth").write_text("no weights")
    with pytest.raises(UserError, match=r"text\.pth: is no readable checkpoint"):
        build(backbone="resnet18", weights="text.pth", root=str(tmp_path))


def test_init_from_a_run(tmp_path):
    model = build(3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for path in (tmp_path, tmp_path / "model.pt"):
        other = build(3)
        nn.init.zeros_(other.head.weight)
        init_from(other, str(path), ["a", "b", "c"])
        assert torch.equal(other.head.weight, model.head.weight)
    with pytest.raises(
        UserError, match=r"does not fit this model: .* of another shape 2, the first head\.weight"
    ) as caught:
        init_from(build(4), str(tmp_path), ["a", "b", "c"])
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"init_from: there is no .*elsewhere"):
        init_from(model, str(tmp_path / "elsewhere"), ["a", "b", "c"])
    (tmp_path / "summary.json").write_text('{"classes": ["a", "c", "b"]}')
    with pytest.raises(UserError, match="on other classes, or in another order: its class 1 is 'c', here it is 'b'"):
        init_from(model, str(tmp_path), ["a", "b", "c"])


def test_the_state_dict_is_plain_and_survives_a_file(tmp_path):
    model = build(bottleneck=8)
    model(images(4))  # moves the statistics
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state, other = torch.load(tmp_path / "model.pt", weights_only=True), build(bottleneck=8)
    assert other.load_state_dict(state) == nn.modules.module._IncompatibleKeys([], [])
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[k], v) for k, v in other.state_dict().items())
    assert {name.split(".")[0] for name in state} == {"backbone", "bottleneck", "head"}
    assert torch.equal(other.eval()(images(3)).logits, model.eval()(images(3)).logits)


# --- batch norm


def test_frozen_batch_norm_is_frozen_from_the_start():
    assert not any(m.training for m in norms(build_classifier(ModelConfig(bn="frozen"), 5, ".")))


def test_frozen_batch_norm_stays_frozen():
    """In the backbone; a new bottleneck's has no statistics worth keeping."""
    for bn, moves in (("frozen", False), ("concat", True)):
        model = build(bn=bn, bottleneck=8)
        model.eval().train()
        before = statistics(model)
        model(images(4))
        moved = {k.split(".")[0] for k, v in statistics(model).items() if (before[k] != v).any()}
        assert moved == ({"backbone", "bottleneck"} if moves else {"bottleneck"})
        assert model.training
        assert {m.training for m in norms(model.backbone)} == {moves}


def test_frozen_scale_and_shift():
    frozen, trained = build(bn_affine="frozen", bottleneck=8), build(bottleneck=8)
    assert len(norms(frozen.backbone)) == 5
    assert not any(p.requires_grad for m in norms(frozen.backbone) for p in m.parameters())
    rest = {id(p) for m in norms(frozen.backbone) for p in m.parameters()}
    assert all(p.requires_grad for p in frozen.parameters() if id(p) not in rest)
    assert all(p.requires_grad for p in trained.parameters())


BN = [{"bn": "concat"}, {"bn": "separate"}, {"bn": "separate", "bn_running": "target"}, {"bn": "frozen"}]


def test_statistics_of_both_domains_together_or_of_each():
    """First layer, by hand: a momentum step to the joint mean; to each domain's in turn; to the target's; none."""
    x_s, x_t = images(6), images(4, seed=1) // 3
    means = []
    for keys in BN:
        model = build(**keys)
        first = model.backbone.layer1[0]
        pooled = [first[1](first[0]((x.float() - model.mean) / model.std)) for x in (x_s, x_t)]
        joint, source, target = (x.mean((0, 2, 3)) for x in (torch.cat(pooled), *pooled))
        forward_domains(model, x_s, x_t, ModelConfig(**keys))
        means += [first[2].running_mean]
    expected = [0.1 * joint, 0.9 * 0.1 * source + 0.1 * target, 0.1 * target, torch.zeros(32)]
    for mean, by_hand in zip(means, expected, strict=True):
        torch.testing.assert_close(mean, by_hand, atol=1e-5, rtol=1e-4)
    assert min((expected[i] - expected[j]).abs().max() for i in range(4) for j in range(i)) > 1e-2  # control


def test_the_bottleneck_keeps_the_same_statistics_as_the_backbone():
    x_s, x_t = images(6), images(4, seed=1) // 3
    keys, seen = {"bn": "separate", "bn_running": "target"}, []
    model = build(**keys, bottleneck=8)
    model.bottleneck[0].register_forward_hook(lambda *args: seen.append(args[2].detach().mean(0)))
    forward_domains(model, x_s, x_t, ModelConfig(**keys))
    torch.testing.assert_close(model.bottleneck[1].running_mean, 0.1 * seen[1])
    assert (seen[0] - seen[1]).abs().max() > 1e-3  # control


def test_forward_domains_is_one_forward_or_two():
    x_s, x_t = images(5), images(3, seed=1)
    alone = [build(bn="separate", bottleneck=8)(x).logits for x in (x_s, x_t)]
    together = build(bottleneck=8)(torch.cat([x_s, x_t])).logits.split([5, 3])
    for keys in BN[:3]:
        outputs = forward_domains(build(**keys, bottleneck=8), x_s, x_t, ModelConfig(**keys))
        for out, n, expected in zip(outputs, (5, 3), together if keys["bn"] == "concat" else alone, strict=True):
            assert list(out.features) == [*LAYERS, "pooled"]
            assert {len(feature) for feature in (*out.features.values(), out.logits)} == {n}
            torch.testing.assert_close(out.logits, expected)
    assert (together[0] - alone[0]).abs().max() > 1e-3  # control


def test_frozen_statistics_make_one_forward_equal_to_two():
    model = build(bn="frozen")
    x_s, x_t = images(5), images(3, seed=1)
    for together, alone in zip(
        forward_domains(model, x_s, x_t, ModelConfig(bn="frozen")), (model(x_s), model(x_t)), strict=True
    ):
        torch.testing.assert_close(together.logits, alone.logits)
        for name in LAYERS:
            torch.testing.assert_close(together.features[name], alone.features[name])


@pytest.mark.parametrize(
    ("keys", "works"),
    [
        ({"bn": "concat"}, True),  # two images, one a domain
        ({"bn": "frozen"}, True),
        ({"bn": "frozen", "bottleneck": 8}, True),
        ({"bn": "separate"}, False),
        ({"bn": "separate", "bn_running": "target"}, False),
        ({"bn": "separate", "batch_norm": False}, True),
        ({"bn": "separate", "batch_norm": False, "bottleneck": 8}, False),
    ],
)
def test_a_batch_of_one(keys, works):
    model = build(**keys)
    if works:
        out_s, out_t = forward_domains(model, images(1), images(1, seed=1), ModelConfig(**keys))
        assert (out_s.logits.shape, out_t.features["pooled"].shape[0]) == ((1, 5), 1)
        return
    with pytest.raises(UserError, match=r"data\.batch of 2 or more") as caught:
        forward_domains(model, images(1), images(1, seed=1), ModelConfig(**keys))
    assert ("bn: frozen" in str(caught.value)) == ("bottleneck" not in keys)  # advice that would help
    assert len(str(caught.value).splitlines()) == 1
    assert {m.momentum for m in norms(model)} == {0.1}  # as it was
    assert model.eval()(images(1)).logits.shape == (1, 5)


@pytest.mark.data
def test_real_weights(real_data, capsys):
    model = build(backbone="mobilenet_v2", weights="weights/mobilenet_v2_imagenet.pth", root=str(real_data("weights")))
    total = len(tensors(model.backbone))
    assert f"loaded {total} of {total} tensors" in capsys.readouterr().out
