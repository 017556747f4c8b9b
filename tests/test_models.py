"""Networks: gradient reversal, discriminators, images, parameter groups and batch norm."""

import pytest
import torch
from torch import nn

from common.errors import UserError
from models import (
    DomainDiscriminator,
    build_classifier,
    eval_mode,
    feature_vectors,
    forward_domains,
    gradient_reversal,
)
from models.backbones import LAYERS
from models.config import ModelConfig


def build(num_classes: int = 5, root: str = ".", **keys):
    torch.manual_seed(0)
    return build_classifier(ModelConfig(**keys), num_classes, root).train()


def images(n: int, side: int = 28, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return torch.randint(256, (n, 3, side, side), dtype=torch.uint8, generator=random)


def norms(model: nn.Module) -> list[nn.Module]:
    return [m for m in model.modules() if isinstance(m, (nn.BatchNorm2d, nn.BatchNorm1d))]


def statistics(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the running statistics of batch norm."""
    state = model.state_dict()
    names = [name for name in state if "running" in name or "num_batches" in name]
    return {name: state[name].clone() for name in names}


# --- gradient reversal and discriminator


@pytest.mark.parametrize("coeff", [0.3, 1.0, 2.5, 0.0])
def test_the_gradient_through_the_reversal_is_minus_lambda_g(coeff):
    torch.manual_seed(0)
    x, tail = torch.randn(6, 4, requires_grad=True), nn.Linear(4, 1)
    assert torch.equal(gradient_reversal(x, coeff), x)
    plain_x, *plain_tail = torch.autograd.grad(tail(x).square().sum(), [x, *tail.parameters()])
    reversed_loss = tail(gradient_reversal(x, coeff)).square().sum()
    x_grad, *tail_grad = torch.autograd.grad(reversed_loss, [x, *tail.parameters()])
    assert torch.equal(x_grad, -coeff * plain_x)
    # The layers behind the reversal learn at full strength, whatever lambda.
    assert all(torch.equal(a, b) for a, b in zip(tail_grad, plain_tail, strict=True))
    assert plain_x.abs().min() > 0


def test_the_reversed_gradient_is_bounded():
    x, tail = torch.randn(6, 4, requires_grad=True), nn.Linear(4, 3)
    (plain,) = torch.autograd.grad(tail(x).square().sum(), x)
    for share, expected in ((0.5, 0.5), (10.0, 2.0)):  # of the plain gradient's norm; lambda is 2
        bound = share * plain.norm()
        applied = torch.ones(())
        loss = tail(gradient_reversal(x, 2.0, bound, applied)).square().sum()
        (grad,) = torch.autograd.grad(loss, x, retain_graph=True)
        torch.testing.assert_close(grad, -expected * plain)
        torch.testing.assert_close(applied, torch.tensor(1 + expected))
        tail_grad = torch.autograd.grad(loss, tail.weight)[0]
        plain_tail = torch.autograd.grad(tail(x).square().sum(), tail.weight)[0]
        # The discriminator learns at full strength.
        torch.testing.assert_close(tail_grad, plain_tail)
    loss = (0 * tail(gradient_reversal(x, 2.0, torch.zeros(())))).sum()
    assert (torch.autograd.grad(loss, x)[0] == 0).all()  # 0 / 0 is no nan


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
def test_the_discriminator_gives_one_logit_per_image(norm):
    discriminator = DomainDiscriminator(6, 8, norm)
    kinds = {type(module) for module in discriminator.modules()}
    assert (nn.BatchNorm1d in kinds, nn.Dropout in kinds) == (norm == "batch", norm == "dropout")
    linear = [m for m in discriminator.modules() if isinstance(m, nn.Linear)]
    assert [m.out_features for m in linear] == [8, 8, 1]
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


# --- images, layers and parameter groups


def test_images_are_normalized_inside_and_left_alone():
    model, seen = build().eval(), []
    model.backbone.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    batch = images(2)
    before = batch.clone()
    model(batch)
    mean = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1)
    std = torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    torch.testing.assert_close(seen[0], (before.float() / 255 - mean) / std)
    assert torch.equal(batch, before)


def test_an_unknown_layer_is_refused_with_the_names():
    model = build()
    model.check_layers(["layer1", "pooled"])
    names = "no layer 'layer5'; there are layer1, layer2, layer3, layer4, pooled"
    with pytest.raises(UserError, match=f"^feature_layers: {names}"):
        model.check_layers(["layer1", "layer5"])
    with pytest.raises(UserError, match=f"^feature_layer: {names}"):
        model.check_layers(["layer5"], "feature_layer")


def test_param_groups_hold_every_trained_parameter_once():
    model = build(bottleneck=8, bn_affine="frozen")
    old, new = model.param_groups(0.1)
    assert (old["lr_scale"], new["lr_scale"]) == (0.1, 1.0)
    new_layers = nn.ModuleList([model.bottleneck, model.head])
    assert {id(p) for p in new["params"]} == {id(p) for p in new_layers.parameters()}
    grouped = [id(p) for group in (old, new) for p in group["params"]]
    assert sorted(grouped) == sorted(id(p) for p in model.parameters() if p.requires_grad)


def test_channels_last_is_a_matter_of_speed_only():
    plain, last = build().eval(), build(channels_last=True).eval()
    assert last.backbone.layer1[1][0].weight.is_contiguous(memory_format=torch.channels_last)
    logits = [model(images(2)).logits for model in (plain, last)]
    torch.testing.assert_close(*logits, atol=1e-4, rtol=1e-4)


# --- batch norm


def test_frozen_batch_norm_is_frozen_from_the_start():
    assert not any(m.training for m in norms(build_classifier(ModelConfig(bn="frozen"), 5, ".")))


def test_frozen_batch_norm_stays_frozen():
    """In the backbone; a new bottleneck has no pretrained statistics to keep."""
    for bn, moves in (("frozen", False), ("concat", True)):
        model = build(bn=bn, bottleneck=8)
        model.eval().train()
        before = statistics(model)
        model(images(4))
        moved = {k.split(".")[0] for k, v in statistics(model).items() if (before[k] != v).any()}
        assert moved == ({"backbone", "bottleneck"} if moves else {"bottleneck"})
        assert model.training
        assert {m.training for m in norms(model.backbone)} == {moves}


@pytest.mark.parametrize(
    ("keys", "learns"),
    [
        ({}, True),
        ({"batch_norm": False}, False),
        ({"bn": "frozen"}, False),
        ({"bn": "frozen", "bottleneck": 4}, True),
        ({"backbone": "convnext_tiny"}, False),
        ({"backbone": "convnext_tiny", "bottleneck": 4}, True),
    ],
)
def test_whether_statistics_are_learned(keys, learns):
    network = build_classifier(ModelConfig(**keys), 3, ".")
    assert network.learns_statistics == learns
    before = {name: x.clone() for name, x in network.named_buffers() if "running" in name}
    network.train()(torch.zeros(2, 3, 32, 32, dtype=torch.uint8))
    after = dict(network.named_buffers())
    assert any((value != after[name]).any() for name, value in before.items()) == learns
    if "bottleneck" in keys:
        network.freeze("bottleneck")
        assert not network.learns_statistics


def test_frozen_scale_and_shift():
    frozen, trained = build(bn_affine="frozen", bottleneck=8), build(bottleneck=8)
    assert len(norms(frozen.backbone)) == 5
    assert not any(p.requires_grad for m in norms(frozen.backbone) for p in m.parameters())
    rest = {id(p) for m in norms(frozen.backbone) for p in m.parameters()}
    assert all(p.requires_grad for p in frozen.parameters() if id(p) not in rest)
    assert all(p.requires_grad for p in trained.parameters())


BN = [
    {"bn": "concat"},
    {"bn": "separate"},
    {"bn": "separate", "bn_running": "target"},
    {"bn": "frozen"},
]


def test_statistics_of_both_domains_together_or_of_each():
    """The first layer by hand, for each of `BN`.

    A step to the joint mean; to the mean of each domain in turn; to that of the target; none.
    """
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
    gaps = [(expected[i] - expected[j]).abs().max() for i in range(4) for j in range(i)]
    assert min(gaps) > 1e-2  # control


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
        logits = together if keys["bn"] == "concat" else alone
        for out, n, expected in zip(outputs, (5, 3), logits, strict=True):
            assert list(out.features) == [*LAYERS, "pooled", "logits"]
            assert torch.equal(out.features["logits"], out.logits)
            assert {len(feature) for feature in (*out.features.values(), out.logits)} == {n}
            torch.testing.assert_close(out.logits, expected)
    assert (together[0] - alone[0]).abs().max() > 1e-3  # control


def test_frozen_statistics_make_one_forward_equal_to_two():
    model = build(bn="frozen")
    x_s, x_t = images(5), images(3, seed=1)
    outputs = forward_domains(model, x_s, x_t, ModelConfig(bn="frozen"))
    for together, alone in zip(outputs, (model(x_s), model(x_t)), strict=True):
        torch.testing.assert_close(together.logits, alone.logits)
        for name in LAYERS:
            torch.testing.assert_close(together.features[name], alone.features[name])


@pytest.mark.parametrize(
    ("keys", "works"),
    [
        ({"bn": "concat"}, True),  # two images, one per domain
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
    with pytest.raises(UserError, match="use parts of 2 or more images") as caught:
        forward_domains(model, images(1), images(1, seed=1), ModelConfig(**keys))
    # Advice that would help.
    assert ("bn: frozen" in str(caught.value)) == ("bottleneck" not in keys)
    assert len(str(caught.value).splitlines()) == 1
    assert {m.momentum for m in norms(model)} == {0.1}  # as it was
    assert model.eval()(images(1)).logits.shape == (1, 5)


WITHOUT = [{"bn": "frozen"}, {"bn_affine": "frozen"}, {"bn": "separate", "bn_running": "target"}]


@pytest.mark.parametrize("keys", WITHOUT, ids=lambda keys: list(keys)[-1])
def test_keys_of_batch_norm_need_batch_norm(keys):
    key, value = list(keys.items())[-1]
    match = rf"^model\.{key}: {value}: backbone lenet has no batch norm"
    for bottleneck in (None, 8):  # the batch norm of a new bottleneck is not meant
        with pytest.raises(UserError, match=match):
            build(**keys, batch_norm=False, bottleneck=bottleneck)
        build(**keys, bottleneck=bottleneck)  # control
    build(batch_norm=False, bn="separate")  # control: it sets nothing that batch norm has


def test_fixed_running_statistics_are_fixed_within():
    model = build(bottleneck=8)
    before = {k: v for k, v in statistics(model).items() if "running" in k}
    with model.running_statistics(fixed=True):
        model(images(4))
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in before.items())
    assert {m.momentum for m in norms(model)} == {0.1}
    with model.running_statistics(fixed=False):
        model(images(4))
    assert all((v != model.state_dict()[k]).any() for k, v in before.items())  # control


@pytest.mark.parametrize("bn", ["concat", "frozen"])
def test_eval_mode_with_the_statistics_of_the_batch(bn):
    """Without dropout; batch norm, if it is not frozen, as in train mode."""
    x, plain = images(4), build(bn=bn, bottleneck=8)
    before, model = statistics(plain), build(bn=bn, bottleneck=8, dropout=0.5)
    eval_mode(model, batch_statistics=True)
    assert torch.equal(model(x).logits, plain(x).logits)  # plain has no dropout, and trains
    moved = {k.split(".")[0] for k, v in statistics(model).items() if (before[k] != v).any()}
    assert moved == ({"bottleneck"} if bn == "frozen" else {"backbone", "bottleneck"})
    assert all(torch.equal(v, statistics(plain)[k]) for k, v in statistics(model).items())
    after = statistics(model)
    eval_mode(model, batch_statistics=False)
    assert torch.equal(model(x).logits, plain.eval()(x).logits)
    assert all(torch.equal(v, statistics(model)[k]) for k, v in after.items())
    model.train()  # control
    assert (model(x).logits != plain.train()(x).logits).any()
