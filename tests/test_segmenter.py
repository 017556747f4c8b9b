"""Segmentation networks and the discriminator of maps."""

import itertools

import pytest
import torch
from torch import nn

from common.errors import UserError
from models import FCDiscriminator, ModelOutput, build_segmenter, forward_domains
from models.backbones import BACKBONES
from models.config import ModelConfig, fitting_heads
from models.heads import DAFormerHead, DeepLabV2Head, SegFormerHead, UpsamplingHead


def build(num_classes: int = 5, **keys):
    torch.manual_seed(0)
    return build_segmenter(ModelConfig(**{"backbone": "resnet18", **keys}), num_classes, ".")


def images(n: int = 2, height: int = 64, width: int = 96) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, height, width), dtype=torch.uint8, generator=random)


def test_the_deeplab_v2_head_adds_up_four_dilations():
    head, x = DeepLabV2Head(6, 3), torch.randn(2, 6, 50, 60)
    parts = [
        nn.functional.conv2d(x, branch.weight, branch.bias, padding=d, dilation=d)
        for branch, d in zip(head.branches, (6, 12, 18, 24), strict=True)
    ]
    torch.testing.assert_close(head(x), parts[0] + parts[1] + parts[2] + parts[3])
    assert head.branches[0].weight.std().item() == pytest.approx(0.01, rel=0.2)


@pytest.mark.parametrize("bn", ["concat", "frozen"])
@pytest.mark.parametrize("head", ["deeplab_v2", "deeplab_v3"])
@pytest.mark.parametrize("size", [(64, 96), (65, 97)])
def test_a_batch_of_one_at_the_size_of_the_input(head, bn, size):
    model = build(head=head, bn=bn, aux_weight=0.1, output_stride=16)
    model.train()
    out = model(images(1, *size))
    assert isinstance(out, ModelOutput)
    assert out.logits.shape == out.aux_logits.shape == (1, 5, *size)
    (out.logits.sum() + out.aux_logits.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_segformers_head_is_linear_layers_at_the_size_of_layer1():
    torch.manual_seed(0)
    head = SegFormerHead([4, 6, 8], 3, dropout=0.0).eval()
    sizes = [(8, 12), (4, 6), (2, 3)]
    maps = [torch.randn(2, c, *size) for c, size in zip((4, 6, 8), sizes, strict=True)]
    joined = []
    for embedding, x in zip(head.embeddings, maps, strict=True):
        norm, linear = embedding
        x = nn.functional.layer_norm(x.movedim(1, -1), x.shape[1:2], norm.weight, norm.bias, 1e-6)
        y = (x @ linear.weight[:, :, 0, 0].T + linear.bias).movedim(-1, 1)
        joined.append(nn.functional.interpolate(y, (8, 12), mode="bilinear"))
    expected = head.classifier(head.fusion(torch.cat(joined, dim=1)))
    assert expected.shape == (2, 3, 8, 12)
    torch.testing.assert_close(head(*maps), expected)


def test_daformers_head_sees_context():
    """A pixel changes logits as far away as the widest dilation and the last convolution reach."""
    torch.manual_seed(0)
    maps = [torch.randn(1, 4, 48, 48), torch.randn(1, 6, 24, 24)]
    other = [maps[0].clone(), maps[1]]
    other[0][:, :, 24, 24] += 1
    reach = {}
    for kind in (SegFormerHead, DAFormerHead):
        head = kind([4, 6], 3, dropout=0.0).eval()
        changed = (head(*maps) - head(*other)).abs().amax((0, 1, 2)).nonzero()
        reach[kind] = int((changed - 24).abs().max())
    assert reach == {SegFormerHead: 0, DAFormerHead: 18 + 1}


def test_the_upsampling_head_has_a_quarter_of_the_stride():
    head = UpsamplingHead(16, 3, dropout=0.0)
    assert head(torch.randn(2, 16, 5, 7)).shape == (2, 3, 20, 28)


def test_heads_fit_backbones_or_are_refused():
    expected = {
        "resnet50": ["deeplab_v2", "deeplab_v3", "segformer", "daformer"],
        "resnet101_caffe": ["deeplab_v2", "deeplab_v3"],
        "convnext_tiny": ["segformer", "daformer"],
        "densenet121": ["segformer", "daformer"],
        "swin_t": ["segformer", "daformer"],
        "dinov2_vitb14": ["upsampling"],
    }
    assert {name: fitting_heads(name) for name in expected} == expected
    for name in BACKBONES:
        for head in ("deeplab_v2", "segformer", "upsampling"):
            rules = ModelConfig(backbone=name, head=head).rules("segmentation")
            texts = [text for holds, text in rules if not holds]
            if name.startswith("lenet"):
                assert any(f"{name} is for task: classification" in text for text in texts)
            elif head in fitting_heads(name):
                assert not texts
            else:
                assert texts == [
                    f"model.head: {head} does not fit {name}, which takes "
                    f"{' or '.join(fitting_heads(name))}"
                ]
    for keys, key in (({"output_stride": 16}, "output_stride"), ({}, None)):
        rules = ModelConfig(backbone="resnet18", head="segformer", **keys).rules("segmentation")
        texts = [text for holds, text in rules if not holds]
        assert [key in text for text in texts] == ([True] if key else [])


@pytest.mark.parametrize(
    ("backbone", "head"),
    [("convnext_tiny", "segformer"), ("swin_t", "daformer"), ("dinov2_vits14", "upsampling")],
)
def test_a_network_of_today_trains_at_any_size(backbone, head):
    keys = {"backbone": backbone, "head": head, "aux_weight": 0.1, "drop_path": 0.0}
    model = build(**keys).train()
    for size in ((65, 97), (32, 32)):
        out = model(images(2, *size))
        assert out.logits.shape == out.aux_logits.shape == (2, 5, *size)
    (out.logits.sum() + out.aux_logits.sum()).backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


def test_batch_norm_keys_are_refused_by_a_network_without_any():
    plain = {"backbone": "dinov2_vits14", "head": "upsampling"}
    for keys in (
        {"bn": "separate", "bn_running": "target"},
        {"bn": "frozen"},
        {"bn_affine": "frozen"},
        {"bn_sync": True},
    ):
        with pytest.raises(UserError, match=r"model.bn.* has no batch norm.*; leave the key out"):
            build(**plain, **keys)
    build(**plain, bn="separate")  # the same as concat then
    build(backbone="swin_t", head="segformer", bn_sync=True)  # of the head


def statistics(module: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of the running statistics of batch norm."""
    state = module.state_dict()
    names = [name for name in state if "running" in name or "num_batches" in name]
    return {name: state[name].clone() for name in names}


@pytest.mark.parametrize("head", ["deeplab_v2", "deeplab_v3"])
def test_frozen_statistics_of_the_backbone_stay(head):
    model = build(head=head, bn="frozen", bn_affine="frozen").train()
    before = statistics(model.backbone)
    model(images())
    after = statistics(model.backbone)
    assert all(torch.equal(before[name], after[name]) for name in before)
    norms = [m for m in model.backbone.modules() if isinstance(m, nn.BatchNorm2d)]
    assert not any(p.requires_grad for m in norms for p in m.parameters())
    free = build(head=head).train()
    free(images())
    after = statistics(free.backbone)
    assert any((before[name] != after[name]).any() for name in before)  # control


def test_the_auxiliary_head_is_switched_by_its_weight():
    assert build().aux_head is None
    assert build()(images()).aux_logits is None
    model = build(aux_weight=0.1)
    assert sum(len(g["params"]) for g in model.param_groups(0.1)) == len(list(model.parameters()))
    new = {id(p) for p in model.param_groups(0.1)[1]["params"]}
    assert new == {id(p) for m in (model.head, model.aux_head) for p in m.parameters()}


def test_two_sizes_need_two_forwards():
    x_s, x_t = images(1), images(1, 32, 64)
    for bn in ("separate", "frozen"):
        config = ModelConfig(backbone="resnet18", bn=bn, aux_weight=0.1)
        out_s, out_t = forward_domains(build(bn=bn, aux_weight=0.1), x_s, x_t, config)
        assert (out_s.logits.shape[2:], out_t.aux_logits.shape[2:]) == ((64, 96), (32, 64))
    match = r"concat .* source images are 64x96 px and target images 32x64; .*same crop"
    with pytest.raises(UserError, match=match):
        forward_domains(build(), x_s, x_t, ModelConfig(backbone="resnet18"))


def test_one_forward_on_both_gives_each_its_own_part():
    config = ModelConfig(backbone="resnet18", bn="frozen", aux_weight=0.1)
    model, x = build(bn="frozen", aux_weight=0.1).eval(), images(3)
    out_s, out_t = forward_domains(model, x[:2], x[2:], config)
    for part, whole in ((out_s, model(x[:2])), (out_t, model(x[2:]))):
        for ours, expected in (
            (part.logits, whole.logits),
            (part.aux_logits, whole.aux_logits),
            (part.features["layer3"], whole.features["layer3"]),
        ):
            # A batch of three may be multiplied in another order than one of two.
            torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_the_discriminator_of_maps_is_the_papers():
    discriminator = FCDiscriminator(7)
    convolutions = [m for m in discriminator.modules() if isinstance(m, nn.Conv2d)]
    shapes = [
        (m.in_channels, m.out_channels, m.kernel_size, m.stride, m.padding) for m in convolutions
    ]
    widths = (7, 64, 128, 256, 512, 1)
    assert shapes == [(a, b, (4, 4), (2, 2), (1, 1)) for a, b in itertools.pairwise(widths)]
    slopes = [m.negative_slope for m in discriminator.modules() if isinstance(m, nn.LeakyReLU)]
    assert slopes == [0.2] * 4
    assert discriminator(torch.rand(2, 7, 64, 97)).shape == (2, 1, 2, 3)
    assert discriminator(torch.rand(1, 7, 32, 32)).shape == (1, 1, 1, 1)
    assert discriminator(torch.zeros(0, 7, 32, 32)).shape == (0, 1, 1, 1)
    with pytest.raises(UserError, match=r"needs 32x32 px, not 31x64; use larger crops"):
        discriminator(torch.rand(1, 7, 31, 64))
