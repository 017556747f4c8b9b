"""The operations of augmentation beside those of torchvision, and the numbers that are drawn."""

import math

import pytest
import torch
from torchvision.transforms.v2 import functional as F

from data import operations as ops
from data.order import Draws, generator
from tests.test_data import off, smooth


def photographs(count: int = 6, side: int = 48) -> torch.Tensor:
    """Different color pictures, smooth with some noise, their channels last in memory."""
    random = generator("photographs")
    coarse = torch.randint(256, (count, 3, 5, 5), dtype=torch.uint8, generator=random)
    noise = torch.randint(-8, 9, (count, 3, side, side), generator=random)
    images = (F.resize(coarse, [side, side]).int() + noise).clamp(0, 255).to(torch.uint8)
    return images.contiguous(memory_format=torch.channels_last)


def drawn(name: str, count: int, *purpose, **parameters) -> torch.Tensor:
    draw = getattr(ops, f"draw_{name}")
    return draw(Draws(torch.arange(count), *purpose), **parameters)


# --- numbers


def test_numbers_are_uniform_and_independent():
    numbers = Draws(torch.arange(20_000), 0, "source").uniform(count=20)
    assert numbers.min() >= 0
    assert numbers.max() < 1
    deviation = 1 / math.sqrt(12)
    assert (numbers.mean(0) - 0.5).abs().max() < 5 * deviation / math.sqrt(20_000)
    shares = (10 * numbers).long().flatten().bincount() / numbers.numel()
    assert (shares - 0.1).abs().max() < 0.003
    neighbors = torch.cat([numbers, numbers.roll(1, 0)], 1)  # of the position before, too
    correlation = torch.corrcoef(neighbors.T) - torch.eye(40)
    assert correlation.abs().max() < 0.04
    assert numbers.flatten().unique().numel() > 0.97 * numbers.numel()


def test_a_number_depends_on_purpose_position_and_its_own_number_only():
    whole = Draws(torch.arange(50), 3, "target", "augment").uniform(count=40)
    draws = Draws(torch.tensor([7, 30]), 3, "target", "augment")
    parts = [draws.uniform(count=count) for count in (1, 5, 20, 14)]
    assert torch.equal(torch.cat(parts, 1), whole[[7, 30]])
    for purpose in ((4, "target", "augment"), (3, "source", "augment"), (3, "target", "strong")):
        other = Draws(torch.arange(50), *purpose).uniform(count=40)
        assert (other != whole).float().mean() > 0.99
    assert Draws(torch.arange(0), 0).uniform(count=3).shape == (0, 3)


def test_ranges():
    draws = Draws(torch.arange(5000), "ranges")
    low_high = draws.uniform(-2.0, 3.0)
    assert -2 <= low_high.min() < -1.9 < 2.9 < low_high.max() <= 3
    ratio = draws.log_uniform(0.5, 2.0)
    assert 0.5 <= ratio.min() < 0.52 < 1.95 < ratio.max() <= 2
    assert (ratio < 1).float().mean() == pytest.approx(0.5, abs=0.03)
    assert (draws.log_uniform(1.0, 1.0) == 1).all()


# --- pixels


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_crop_is_that_of_torchvision(layout):
    images = photographs().contiguous(memory_format=layout)
    boxes = ops.crop_boxes(drawn("crop", 6, "crop"), 48)
    expected = torch.stack(
        [
            F.resized_crop(image, top, left, height, width, [32, 32], antialias=True)
            for image, (left, top, width, height) in zip(images, boxes.tolist(), strict=True)
        ]
    )
    assert torch.equal(ops.crop_one_by_one(images, boxes, 32), expected)
    assert off(ops.crop_together(images, boxes, 32), expected) <= 1
    shifted = boxes + torch.tensor([1, 0, 0, 0])  # control
    shifted[:, 0] = shifted[:, 0].minimum(48 - boxes[:, 2])
    assert off(ops.crop_together(images, shifted, 32), expected) > 8


@pytest.mark.parametrize("size", [20, 48, 77])
def test_a_gpu_resizes_to_smaller_and_larger_sizes_as_a_cpu(size):
    images, boxes = photographs(), torch.tensor([[0, 0, 48, 48]] * 5 + [[47, 3, 1, 2]])
    one_by_one = ops.crop_one_by_one(images, boxes, size)
    assert off(ops.crop_together(images, boxes, size), one_by_one) <= 1


@pytest.mark.parametrize("side", [48, 160])  # a CPU uses tables from 148 px
@pytest.mark.parametrize(
    ("column", "adjust", "spread"),
    [
        (0, F.adjust_brightness, {"brightness": 0.5}),
        (1, F.adjust_contrast, {"contrast": 0.5}),
        (2, F.adjust_saturation, {"saturation": 0.9}),
        (3, F.adjust_hue, {"hue": 0.5}),
        (4, F.adjust_gamma, {"gamma": [0.4, 2.5]}),
    ],
)
def test_jitter_is_that_of_torchvision(column, adjust, spread, side):
    images = photographs(side=side)
    numbers = drawn("jitter", 6, "jitter", **spread)
    others = [i for i in range(5) if i != column]
    assert torch.equal(numbers[:, others], ops.UNCHANGED[others].expand(6, -1))
    out = ops.jitter(images.clone(), numbers, 0)
    for image, result, factor in zip(images, out, numbers[:, column].tolist(), strict=True):
        assert off(result, adjust(image, factor)) <= 1
    assert off(out, images) > 8  # control: it is not the identity that is compared


@pytest.mark.parametrize("side", [48, 160])
def test_blur_is_that_of_torchvision(side):
    images, numbers = photographs(side=side), drawn("blur", 6, "blur", sigma=[0.3, 4.0])
    out = ops.blur(images.clone(), numbers, 0)
    for image, result, sigma in zip(images, out, numbers[:, 0].tolist(), strict=True):
        size = 2 * math.ceil(2 * sigma) + 1
        assert off(result, F.gaussian_blur(image, [size, size], [sigma, sigma])) <= 1
    assert off(out, images) > 8


def test_affine_is_that_of_torchvision_inside_the_image():
    images, numbers = smooth(6, side=48), torch.zeros(6, 6)
    out = []
    for i, (angle, scale) in enumerate(
        [(10, 1.0), (-20, 1.2), (0, 0.9), (45, 1.0), (5, 2), (1, 1)]
    ):
        turn = math.radians(angle)
        rotation = torch.tensor(
            [[math.cos(turn), math.sin(turn)], [-math.sin(turn), math.cos(turn)]]
        )
        numbers[i] = torch.cat([rotation / scale, torch.zeros(2, 1)], 1).flatten()
        bilinear = F.InterpolationMode.BILINEAR
        out.append(F.affine(images[i], angle, [0, 0], scale, [0, 0], bilinear))
    middle = (..., slice(16, 32), slice(16, 32))
    assert off(ops.affine(images, numbers, 0)[middle], torch.stack(out)[middle]) <= 1
    assert off(images[middle], torch.stack(out)[middle]) > 8


def test_flip_and_cutout_are_those_of_torchvision():
    images, flips = photographs(), torch.tensor([[0.0], [1], [0], [1], [1], [0]])
    expected = [F.horizontal_flip(x) if f else x for x, f in zip(images, flips, strict=True)]
    assert torch.equal(ops.flip(images.clone(), flips, 0), torch.stack(expected))
    box = torch.tensor([[0.5, 0.25, 0.25, 0.125]]).expand(6, -1)  # rows 12 to 35, columns 6 to 17
    expected = F.erase(images, 12, 6, 24, 12, torch.tensor(127, dtype=torch.uint8))
    assert torch.equal(ops.cutout(images.clone(), box, 0), expected)


@pytest.mark.parametrize("channels", [1, 3])
@pytest.mark.parametrize("side", [20, 160])
def test_photometric_is_the_formula(channels, side):
    images = photographs(side=side)[:, :channels]
    parameters = {"invert": 0.5, "gain": [0.5, 1.5], "offset": 0.2, "channel_gain": [0.8, 1.2]}
    numbers = drawn("photometric", 6, "photometric", **parameters)
    slope, level = numbers.view(6, 2, 3, 1, 1).unbind(1)
    expected = ((images / 255 - 0.5) * slope + level).mul(255).round().clamp(0, 255)
    assert off(ops.photometric(images, numbers, 0), expected) <= 1


@pytest.mark.parametrize("name", ["jitter", "blur", "photometric", "flip", "cutout"])
def test_large_images_are_computed_as_small_ones(name, monkeypatch):
    """One by one and with tables, or all at once."""
    parameters = {
        "jitter": {"brightness": 0.4, "contrast": 0.4, "saturation": 0.4, "hue": 0.1},
        "blur": {"probability": 0.5},
        "photometric": {"gain": [0.5, 1.5], "channel_gain": [0.8, 1.2]},
    }
    images, numbers = photographs(), drawn(name, 6, **parameters.get(name, {}))
    outcomes = []
    for large in (1, 10**9):
        monkeypatch.setattr(ops, "LARGE", large)
        outcomes.append(getattr(ops, name)(images.clone(), numbers, 48))
    assert off(*outcomes) <= 1
    assert off(outcomes[0], images) > 8
