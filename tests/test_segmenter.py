"""Segmentation networks and the discriminator of maps."""

import itertools

import pytest
import torch
from torch import nn

from common.errors import UserError
from models import FCDiscriminator, ModelOutput, build_segmenter, forward_domains
from models.config import ModelConfig
from models.segmenter import DeepLabV2Head


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
