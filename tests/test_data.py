"""Order, augmentation, decoding, built-in sets, folders and lists, and the splits of domains."""

import ast
import inspect
import json
import math
import os
import pickle
import re

import numpy as np
import pytest
import torch
import torchvision
from PIL import Image, ImageOps
from torchvision.transforms.v2 import functional as F

import data.decoded
import data.digits
import data.folder
from common.errors import UserError
from data import classification, drawn, eval_loader, open_domains, segmentation, train_loader
from data.augment import IN_PLACE, Augment
from data.augment import OPERATIONS as ALL_OPERATIONS
from data.classification import TrainBatches
from data.config import DataConfig, DomainConfig, LabeledDataConfig, TargetDataConfig
from data.decoded import decode, decoded_images, image_size
from data.digits import CLASSES, blend, mnistm
from data.folder import read_list, scan_folder
from data.image_set import image_set
from data.order import Draws, Order, generator
from data.tasks import task_module
from data.views import to_views
from tests.helpers import (
    ROOT,
    TASKS,
    differing,
    finetune_config,
    street_config,
    summary,
    tiny_config,
    train,
    weights,
)

OPERATIONS = ALL_OPERATIONS["classification"]


def data_config(source=None, target=None, **keys) -> DataConfig:
    source, target = source or {"name": "drawn_digits"}, target or {"name": "drawn_digits_shifted"}
    target_test = keys.pop("target_test", None)
    return DataConfig(
        DomainConfig(**source),
        DomainConfig(**target),
        target_test and DomainConfig(**target_test),
        **{"root": "images", "cache": "cache", **keys},
    )


PHOTO, SKETCH = ({"name": "folder", "path": path} for path in ("photo", "sketch"))


def folder_config(**keys) -> DataConfig:
    return data_config(PHOTO, SKETCH, **keys)


def numbered(size: int, side: int = 4, channels: int = 3, labeled: bool = False):
    """A set whose image i is all i."""
    images = (
        torch.arange(size, dtype=torch.uint8)
        .view(-1, 1, 1, 1)
        .expand(-1, channels, side, side)
        .contiguous()
    )
    return image_set("numbered", images, list(range(size)) if labeled else None, None)


def equal_batches(a, b) -> bool:
    a, b = ([*x] if isinstance(x, (list, tuple)) else [x] for x in (a, b))
    return len(a) == len(b) and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# --- order and loaders


@pytest.mark.parametrize("batch", [1, 3, 7, 10, 64])
def test_a_pass_has_every_image_once_whatever_the_batch(batch):
    order, steps = Order(0, "source", 10), -(-40 // batch)
    seen = torch.cat([order.positions(step * batch, batch) for step in range(steps)])[:40].view(
        4, 10
    )
    assert (seen.sort(1).values == torch.arange(10)).all()
    assert len({tuple(row) for row in seen.tolist()}) == 4  # shuffled anew each pass
    assert torch.equal(seen.flatten(), Order(0, "source", 10).positions(0, 40))


def test_order_is_a_function_of_seed_domain_and_position():
    order = Order(3, "source", 50)
    late = order.positions(123, 20)
    assert torch.equal(order.positions(123, 20), late)
    assert torch.equal(Order(3, "source", 50).positions(0, 200)[123:143], late)
    assert not torch.equal(Order(4, "source", 50).positions(123, 20), late)
    assert not torch.equal(Order(3, "target", 50).positions(123, 20), late)


def test_unequal_domains_never_stop():
    config, counts = data_config(batch=4, size=4), {}
    for domain, size in (("source", 17), ("target", 5)):
        batches = list(train_loader(numbered(size), config, 0, domain, 0, 20))
        assert len(batches) == 20
        counts[domain] = torch.bincount(torch.cat(batches)[:, 0, 0, 0].long())
    assert (counts["target"] == 16).all()  # 80 draws of 5 images
    assert counts["source"].sum() == 80
    assert set(counts["source"].tolist()) == {4, 5}


def test_a_domain_smaller_than_the_batch_wraps():
    batch = TrainBatches(numbered(3), data_config(batch=8, size=4), 0, "target")[5]
    assert batch.shape == (8, 3, 4, 4)
    assert sorted(torch.bincount(batch[:, 0, 0, 0].long()).tolist()) == [2, 3, 3]


AUGMENT = {"affine": {"degrees": 30}, "photometric": {"gain": [0.5, 1.5], "noise": 0.1}, "flip": {}}


def noise_set(size: int = 23, labeled: bool = True):
    images = torch.randint(256, (size, 3, 12, 12), dtype=torch.uint8, generator=generator("noise"))
    return image_set("noise", images, list(range(size)) if labeled else None, None)


def test_a_batch_is_a_function_of_seed_domain_and_step():
    config, images = data_config(batch=6, size=12, augment=AUGMENT), noise_set()
    batches = TrainBatches(images, config, 1, "source")
    first = batches[7]
    torch.manual_seed(5)
    _ = batches[2], batches[8]
    assert equal_batches(batches[7], first)
    assert equal_batches(TrainBatches(images, config, 1, "source")[7], first)
    for other in (
        batches[8],
        TrainBatches(images, config, 2, "source")[7],
        TrainBatches(images, config, 1, "target")[7],
    ):
        assert not torch.equal(other[0], first[0])
        assert not torch.equal(other[1], first[1])
    assert not torch.equal(
        first[0], images.images[first[1]]
    )  # control: the augmentation takes place


def test_augmentation_is_drawn_anew_for_every_seed_domain_and_step():
    one = noise_set(size=1, labeled=False)  # all batches are this image, but for their augmentation

    def batch(seed: int, domain: str, step: int) -> bytes:
        config = data_config(batch=2, size=12, augment={"affine": {"degrees": 30}})
        return TrainBatches(one, config, seed, domain)[step].numpy().tobytes()

    assert (
        len(
            {
                batch(*key)
                for key in ((0, "source", 0), (1, "source", 0), (0, "target", 0), (0, "source", 1))
            }
        )
        == 4
    )


@pytest.mark.parametrize("workers", [0, 2])
def test_batches_do_not_depend_on_workers_or_on_where_a_run_resumes(workers):
    images, config = noise_set(), data_config(batch=6, size=12, augment=AUGMENT, workers=workers)
    expected = [TrainBatches(images, config, 1, "source")[step] for step in range(9)]
    state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    whole, tail = (list(train_loader(images, config, 1, "source", start, 9)) for start in (0, 5))
    assert len(whole) == 9
    assert all(equal_batches(a, b) for a, b in zip(whole, expected, strict=True))
    assert all(equal_batches(a, b) for a, b in zip(tail, whole[5:], strict=True))
    assert torch.equal(torch.get_rng_state(), state)  # loading leaves the global streams alone
    assert (np.random.get_state()[1] == numpy_state).all()


def test_evaluation_sees_every_image_once_in_order():
    config = data_config(size=4, eval_batch=10, augment={"photometric": {"invert": 1.0}})
    batches = list(eval_loader(numbered(23, labeled=True), config))
    assert [len(images) for images, _ in batches] == [10, 10, 3]
    assert torch.cat([labels for _, labels in batches]).tolist() == list(range(23))
    assert torch.cat([images for images, _ in batches])[:, 0, 0, 0].tolist() == list(
        range(23)
    )  # not augmented
    assert [images.shape[1:] for images in eval_loader(numbered(5), config)] == [
        (3, 4, 4)
    ]  # without labels


@pytest.mark.parametrize("side", [6, 10])
def test_images_are_cropped_or_padded_at_the_centre(side):
    images = image_set(
        "gray", torch.randint(1, 256, (5, 1, side, side), dtype=torch.uint8), None, None
    )
    config = data_config(size=8, batch=5)
    (evaluated,) = eval_loader(images, config)
    trained = TrainBatches(images, config, 0, "source")[0][
        Order(0, "source", 5).positions(0, 5).argsort()
    ]
    for batch in (evaluated, trained):
        assert batch.shape == (5, 3, 8, 8)
        assert torch.equal(batch[:, 0], batch[:, 1])
        if side > 8:
            assert torch.equal(batch[:, :1], images.images[:, :, 1:9, 1:9])
        else:
            assert torch.equal(batch[:, :1, 1:7, 1:7], images.images)
            assert batch[:, :, [0, 7]].sum() + batch[..., [0, 7]].sum() == 0


# --- augmentation

STRONG = {
    "blur": {"sigma": [0.5, 3.0]},
    "cutout": {"side": 0.9},
    "affine": {"degrees": 30, "translate": 0.2, "scale": [0.7, 1.3], "shear": 20},
    "photometric": {
        "gain": [0.5, 1.5],
        "offset": 0.2,
        "channel_gain": [0.5, 1.5],
        "channel_offset": 0.2,
        "noise": 0.1,
    },
    "crop": {"scale": [0.3, 1.0]},
    "flip": {},
    "jitter": {"brightness": 0.5, "contrast": 0.5, "saturation": 0.5, "hue": 0.3},
}


def smooth(n: int, side: int = 32) -> torch.Tensor:
    """The same smooth colour picture n times."""
    coarse = torch.randint(256, (1, 3, 4, 4), dtype=torch.uint8, generator=generator("smooth"))
    return F.resize(coarse, [side, side]).expand(n, -1, -1, -1).contiguous()


def apply(
    name: str, images: torch.Tensor, seed: int = 0, size: int | None = None, **parameters
) -> torch.Tensor:
    draw, compute = OPERATIONS[name]
    numbers = draw(Draws(torch.arange(len(images)), seed), **parameters)
    out = compute(images.clone(), numbers, size or images.shape[-1])
    assert out.dtype == torch.uint8
    return out


def off(a: torch.Tensor, b: torch.Tensor) -> int:
    """The largest difference in grey levels."""
    return int((a.int() - b.int()).abs().max())


def test_every_operation_is_tested():
    assert set(STRONG) == set(OPERATIONS)
    assert set(IN_PLACE) < set(OPERATIONS)


@pytest.mark.parametrize("name", OPERATIONS)
def test_every_image_of_a_batch_has_its_own_parameters(name):
    out = apply(name, smooth(16), **STRONG[name])
    assert out.shape == (16, 3, 32, 32)
    assert len({image.numpy().tobytes() for image in out}) == (2 if name == "flip" else 16)
    assert torch.equal(apply(name, smooth(16), **STRONG[name]), out)
    assert not torch.equal(apply(name, smooth(16), seed=1, **STRONG[name]), out)


def test_control_torchvision_draws_once_for_a_batch():
    out = torchvision.transforms.v2.RandomAffine(30)(smooth(16))
    assert len({image.numpy().tobytes() for image in out}) == 1


@pytest.mark.parametrize("name", OPERATIONS)
def test_identity_parameters_change_nothing(name):
    identity = {
        "crop": {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]},
        "flip": {"probability": 0.0},
        "blur": {"sigma": [0.1, 0.1]},
        "cutout": {"side": 0.0},
    }.get(name, {})
    assert off(apply(name, smooth(4), **identity), smooth(4)) <= 1
    gray = smooth(4)[:, :1].contiguous()
    assert off(apply(name, gray, **identity), gray) <= 1  # one channel stays one


def _spot(right: int, down: int, side: int = 65) -> torch.Tensor:
    """64 images with a white spot that far from the centre."""
    images = torch.zeros(64, 3, side, side, dtype=torch.uint8)
    row, column = side // 2 + down, side // 2 + right
    images[:, :, row - 2 : row + 3, column - 2 : column + 3] = 255
    return images


def _centre(images: torch.Tensor) -> torch.Tensor:
    """(right, down) of each image's centre of mass, from the middle."""
    mass, side = images[:, 0].float(), images.shape[-1]
    axis = torch.arange(side) - (side - 1) / 2
    return torch.stack([(mass.sum(1) * axis).sum(1), (mass.sum(2) * axis).sum(1)], 1) / mass.sum(
        (1, 2)
    ).unsqueeze(1)


def test_affine_rotates():
    centre = _centre(apply("affine", _spot(20, 0), degrees=40))
    assert ((centre.norm(dim=1) - 20).abs() < 0.5).all()
    angle = torch.atan2(centre[:, 1], centre[:, 0]).rad2deg()
    assert angle.abs().max() < 41
    assert (angle.min(), angle.max()) < (-25, 25)
    assert angle.max() > 25


def test_affine_shifts():
    centre = _centre(apply("affine", _spot(0, 0), translate=0.2))
    assert centre.abs().max() < 0.2 * 65 + 0.5
    assert (centre.max(0).values > 8).all()
    assert (centre.min(0).values < -8).all()


def test_affine_scales():
    centre = _centre(apply("affine", _spot(16, 8), scale=[0.5, 1.5]))
    zoom = centre / torch.tensor([16.0, 8.0])
    torch.testing.assert_close(zoom[:, 0], zoom[:, 1], atol=0.06, rtol=0)
    assert 0.45 < zoom.min() < 0.65
    assert 1.35 < zoom.max() < 1.55


def test_affine_shears():
    centre = _centre(apply("affine", _spot(0, 20), shear=30))
    assert ((centre[:, 1] - 20).abs() < 0.5).all()  # along the rows
    assert centre[:, 0].abs().max() < 20 * math.tan(math.radians(31))
    assert centre[:, 0].min() < -5
    assert centre[:, 0].max() > 5


def test_affine_repeats_the_edges():
    assert (
        apply(
            "affine",
            torch.full((8, 3, 16, 16), 200, dtype=torch.uint8),
            translate=0.5,
            scale=[0.5, 0.5],
        )
        == 200
    ).all()


def test_photometric_inverts():
    assert off(apply("photometric", smooth(4), invert=1.0), 255 - smooth(4)) <= 1
    some = apply("photometric", smooth(40), invert=0.5)
    inverted = [off(image, 255 - smooth(1)[0]) <= 1 for image in some]
    assert 8 < sum(inverted) < 32
    assert all(
        was or off(image, smooth(1)[0]) <= 1 for image, was in zip(some, inverted, strict=True)
    )


def test_photometric_gain_and_offset():
    two = torch.tensor([100, 156], dtype=torch.uint8).view(1, 1, 1, 2).expand(64, 3, 2, 2)
    gain = apply("photometric", two, gain=[0.5, 1.5]).float()
    spread, middle = (gain[..., 1] - gain[..., 0]) / 56, gain.mean((1, 2, 3))
    assert 0.47 < spread.min() < 0.65
    assert 1.35 < spread.max() < 1.53
    assert (middle - 128).abs().max() <= 1
    shift = apply("photometric", two, offset=0.2).float() - two
    assert (shift.amax((1, 2, 3)) - shift.amin((1, 2, 3))).max() <= 1  # of the whole image
    assert shift.abs().max() <= 0.2 * 255 + 1
    assert shift.min() < -25
    assert shift.max() > 25


def test_photometric_colour_and_noise():
    gray = torch.full((64, 1, 8, 8), 100, dtype=torch.uint8)
    for parameters in ({"channel_gain": [0.5, 1.5]}, {"channel_offset": 0.2}):
        out = apply("photometric", gray, **parameters)
        assert out.shape == (64, 3, 8, 8)
        assert (out.amax((2, 3)) == out.amin((2, 3))).all()  # a colour for each image
        assert (out[:, 0] != out[:, 1]).any()
    deviation = apply("photometric", gray, noise=0.1).float().std((1, 2, 3))
    assert deviation.max() < 0.13 * 255
    assert deviation.min() < 0.03 * 255 < 0.07 * 255 < deviation.max()


def test_crop_of_the_whole_is_a_resize():
    whole = {"scale": [1.0, 1.0], "ratio": [1.0, 1.0]}
    assert torch.equal(
        apply("crop", smooth(4), size=12, **whole), F.resize(smooth(4), [12, 12], antialias=True)
    )


def test_crop_has_the_area_and_aspect_asked_for():
    """Every pixel tells its place, so that a crop tells its box."""
    place = 4 * torch.arange(64)
    image = torch.stack(
        [place.expand(64, 64), place.view(-1, 1).expand(64, 64), torch.zeros(64, 64)]
    )
    out = (
        apply(
            "crop",
            image.to(torch.uint8).expand(200, -1, -1, -1),
            scale=[0.2, 0.5],
            ratio=[0.5, 2.0],
        ).float()
        / 4
    )
    (left, top), (right, bottom) = out[:, :2].amin((2, 3)).T, out[:, :2].amax((2, 3)).T
    width, height = right - left + 1, bottom - top + 1
    share, aspect = width * height / 64**2, width / height
    assert 0.17 < share.min() < 0.26
    assert 0.44 < share.max() < 0.53
    assert 0.44 < aspect.min() < 0.65
    assert 1.5 < aspect.max() < 2.25
    assert left.min() < 3
    assert right.max() > 60


def test_flip():
    assert torch.equal(apply("flip", smooth(4), probability=1.0), smooth(4).flip(3))
    flipped = [torch.equal(image, smooth(1)[0].flip(2)) for image in apply("flip", smooth(40))]
    assert 8 < sum(flipped) < 32


def test_jitter():
    image = smooth(40)
    brightness = apply("jitter", image, brightness=0.4).float().mean(
        (1, 2, 3)
    ) / image.float().mean((1, 2, 3))
    assert 0.58 < brightness.min() < 0.75
    assert 1.2 < brightness.max() < 1.42
    contrast = apply("jitter", image, contrast=0.4).float().std((1, 2, 3)) / image.float().std(
        (1, 2, 3)
    )
    assert 0.55 < contrast.min() < 0.75
    assert 1.2 < contrast.max() < 1.45
    gray = image[:, :1].expand(-1, 3, -1, -1).contiguous()
    assert off(apply("jitter", gray, saturation=0.9, hue=0.4), gray) <= 1  # no colour to change
    assert off(apply("jitter", image, saturation=0.9), image) > 20
    assert off(apply("jitter", image, hue=0.4), image) > 20


SOMETIMES = {"jitter": {"brightness": 0.9, "hue": 0.4}, "blur": {"sigma": [2.0, 3.0]}}


@pytest.mark.parametrize("name", SOMETIMES)
def test_a_probability_is_drawn_for_each_image(name):
    images = smooth(400)
    out = apply(name, images, probability=0.3, **SOMETIMES[name])
    unchanged = (out == images).flatten(1).all(1)
    assert 0.6 < unchanged.float().mean() < 0.8
    everything = apply(name, images, **SOMETIMES[name])
    assert torch.equal(out[~unchanged], everything[~unchanged])
    assert torch.equal(apply(name, images, probability=0.0, **SOMETIMES[name]), images)


@pytest.mark.parametrize(
    "name", ["affine", "crop", "flip", "photometric", "jitter", "blur", "cutout"]
)
def test_each_process_augments_its_rows_as_one_process_does(name):
    parameters = {
        "affine": {"degrees": 20.0, "translate": 0.1},
        "photometric": {"gain": [0.5, 1.5], "channel_offset": 0.2, "noise": 0.1},
        "jitter": {"brightness": 0.4, "gamma": [0.5, 2.0], "probability": 0.5},
        "blur": {"sigma": [0.5, 2.0], "probability": 0.5},
    }
    augment = Augment({name: parameters.get(name, {}), "flip": {}}, 32)

    def views(*positions: int, seed: int = 1) -> torch.Tensor:
        images = smooth(len(positions))
        return augment.apply(images, augment.draw(Draws(torch.tensor(positions), seed)))

    batch = views(*range(6))
    assert torch.equal(torch.cat([views(0, 1, 2), views(3, 4, 5)]), batch)
    assert torch.equal(views(5, 0, 70)[:2], batch[[5, 0]])  # whatever else is in the batch
    assert not torch.equal(views(6, 7, 8, 9, 10, 11), batch)  # control
    assert not torch.equal(views(*range(6), seed=2), batch)


def test_blur_keeps_the_mass_and_spreads_it():
    out = apply("blur", _spot(0, 0), sigma=[2.0, 2.0])
    assert out.float().sum().item() == pytest.approx(_spot(0, 0).float().sum().item(), rel=0.05)
    assert out.max() < 200
    assert _centre(out).abs().max() < 0.1


def test_blur_wider_than_the_image():
    assert apply("blur", smooth(2, side=8), sigma=[20.0, 20.0]).shape == (2, 3, 8, 8)


def test_cutout_is_a_grey_rectangle():
    images = torch.zeros(200, 3, 20, 30, dtype=torch.uint8)
    out = apply("cutout", images, side=0.5)
    assert set(out.unique().tolist()) == {0, 127}
    cut = (out == 127).all(1)
    assert ((out == 127) == cut[:, None]).all()  # every channel alike
    for mask in cut[cut.flatten(1).any(1)]:
        rows, columns = mask.any(1).nonzero()[:, 0], mask.any(0).nonzero()[:, 0]
        assert mask.sum() == len(rows) * len(columns)  # a rectangle
        assert (rows.diff() == 1).all()
        assert len(rows) <= 11
        assert len(columns) <= 16
    assert 0.02 < cut.float().mean() < 0.07  # a quarter of a half, squared, less at the border


@pytest.mark.parametrize("workers", [0, 2])
def test_two_views(workers):
    """The weak view is that of training without a strong one; the strong one changes."""
    images, config = (
        noise_set(labeled=False),
        data_config(batch=6, size=12, augment={"flip": {}}, workers=workers),
    )
    weak = list(train_loader(images, config, 1, "target", 0, 6))
    spec = {"photometric": {"gain": [0.5, 1.5]}, "cutout": {}}
    pairs = list(train_loader(images, config, 1, "target", 0, 6, spec))
    assert all(torch.equal(a, b) for a, (b, _) in zip(weak, pairs, strict=True))
    assert all(not torch.equal(a, b) for a, b in pairs)
    tail = list(train_loader(images, config, 1, "target", 3, 6, spec))
    assert all(torch.equal(a, b) for (_, a), (_, b) in zip(pairs[3:], tail, strict=True))
    same = list(train_loader(images, config, 1, "target", 0, 6, {}))
    assert all(torch.equal(a, b) for a, b in same)
    one = noise_set(size=1, labeled=False)
    strong = [s.numpy().tobytes() for _, s in train_loader(one, config, 1, "target", 0, 6, spec)]
    assert len(set(strong)) == 6


@pytest.mark.parametrize("workers", [0, 2])
def test_a_view_depends_on_its_position_alone(workers):
    """Neither on the batch size nor on the loader: where pixels are computed is left open."""
    augment = {"affine": {"degrees": 20}, "crop": {}, "photometric": {"gain": [0.5, 1.5]}}
    strong, views = {"flip": {}, "cutout": {}}, []
    for batch, steps in ((4, 6), (6, 4), (24, 1)):
        config = data_config(batch=batch, size=12, augment=augment, workers=workers)
        images = noise_set(size=12, labeled=False)
        pairs = list(train_loader(images, config, 1, "target", 0, steps, strong))
        views.append([torch.cat(parts) for parts in zip(*pairs, strict=True)])
    assert all(torch.equal(*pair) for pair in zip(views[0], views[1], strict=True))
    assert all(torch.equal(*pair) for pair in zip(views[0], views[2], strict=True))
    raw = TrainBatches(images, config, 1, "target", strong, raw=True)[0]
    assert all(map(torch.equal, to_views(raw, torch.device("cpu")), views[0]))
    moved = raw._replace(images=raw.images.roll(1, 0))  # control: an image has its own numbers
    assert not any(map(torch.equal, to_views(moved, torch.device("cpu")), views[0]))


def test_augmentation_changes_no_stored_image(pictures):
    """Operations overwrite the images that they are given."""
    pictures("photo", {"cat": 8, "dog": 8})
    pictures("sketch", {"cat": 3, "dog": 3})
    augment = {"flip": {"probability": 1}, "cutout": {}, "jitter": {"brightness": 0.5}, "blur": {}}
    domains = open_domains(data_config(PHOTO, SKETCH, size=20, batch=8, augment=augment), 0)
    everything = torch.arange(16)
    before = domains.source.images[everything].clone()
    changed = [x for x, _ in domains.batches("source", 0, 4)]
    assert torch.equal(domains.source.images[everything], before)
    assert not any(torch.equal(x, before[:8]) for x in changed)  # control


def test_a_domain_may_have_an_augmentation_of_its_own():
    plain, augmented = {"name": "drawn_digits"}, {"photometric": {"invert": 1.0}}
    images, batches = noise_set(), {}
    for name, source, both in (
        ("none", None, {}),
        ("own", augmented, {}),
        ("shared", None, augmented),
        ("without", {}, augmented),
    ):
        config = data_config({**plain, "augment": source}, batch=6, size=12, augment=both)
        batches[name] = {d: TrainBatches(images, config, 1, d)[0][0] for d in ("source", "target")}
    for one, other in (("own", "shared"), ("without", "none")):
        assert torch.equal(batches[one]["source"], batches[other]["source"])
    assert torch.equal(batches["own"]["target"], batches["none"]["target"])
    assert not torch.equal(batches["own"]["source"], batches["none"]["source"])


def test_jitter_beyond_its_range_stays_an_image():
    for name in ("brightness", "contrast", "saturation"):
        assert apply("jitter", smooth(40), **{name: 1.5}).shape == (40, 3, 32, 32)


# --- decoded images


@pytest.fixture
def decoded(monkeypatch):
    """The paths decoded so far."""
    calls, plain = [], data.decoded.decode
    monkeypatch.setattr(
        data.decoded, "decode", lambda path, *rest: (calls.append(path), plain(path, *rest))[1]
    )
    return calls


def test_memory_file_and_not_kept_give_the_same_pixels(pictures, tmp_path, decoded):
    paths, index = sorted(pictures("flat", 6).iterdir()), torch.tensor([4, 0, 4, 2])
    expected = torch.stack([decode(paths[i], (16, 16)) for i in index])
    assert expected.shape == (4, 3, 16, 16)
    cache = tmp_path / "cache"
    for keys, kept, files in (
        ((None, 1e9, False), False, 0),
        ((cache, 1e9, False), True, 0),
        ((cache, 6 * 3 * 16 * 16, False), True, 0),  # exactly at the limit
        ((cache, 6 * 3 * 16 * 16 - 1, False), True, 1),
        ((cache, 1e9, True), True, 1),  # read by several workers; finds the file of the line above
    ):
        del decoded[:]
        images = decoded_images(paths, (16, 16), *keys)
        for _ in range(3):
            assert torch.equal(images[index], expected)
        if kept and keys != (cache, 1e9, True):
            assert sorted(set(decoded)) == [paths[0], paths[2], paths[4]]
            assert len(decoded) <= 4
        else:
            assert len(decoded) == (0 if kept else 9)  # each image once per batch
        assert len(list(cache.glob("*")) if cache.exists() else []) == files
        assert len(images) == 6


def test_one_damaged_image_among_many_is_named(pictures, tmp_path):
    """They are decoded by several threads."""
    paths = sorted(pictures("flat", 8).iterdir())
    content = paths[5].read_bytes()
    images = decoded_images(paths, (16, 16), tmp_path / "cache", 1e9, False)
    paths[5].write_bytes(content[:-60])
    with pytest.raises(UserError, match=r"005.png: cannot be read as an image"):
        images[torch.arange(8)]
    paths[5].write_bytes(content)
    expected = torch.stack([decode(path, (16, 16)) for path in paths])
    assert torch.equal(images[torch.arange(8)], expected)  # nothing else was lost


def test_files_are_decoded_anew_to_the_same_pixels(pictures, tmp_path, decoded):
    pictures("photo", {"cat": 8, "dog": 8})
    pictures("sketch", {"cat": 3, "dog": 3})
    batches, calls = {}, {}
    for storage in ("decoded", "files"):
        config = data_config(PHOTO, SKETCH, size=14, batch=8, storage=storage)
        domains = open_domains(config, 0)
        del decoded[:]
        batches[storage] = [x for x, _ in domains.batches("source", 0, 6)]
        calls[storage] = len(decoded)
        assert ("decoded whenever it is used" in domains.describe()) == (storage == "files")
    assert all(torch.equal(*pair) for pair in zip(*batches.values(), strict=True))
    assert calls["decoded"] <= 16 < 40 < calls["files"] <= 48
    assert not (tmp_path / "cache").exists()


def test_a_file_of_decoded_images_is_found_by_later_runs(pictures, tmp_path, decoded):
    paths = sorted(pictures("flat", 5).iterdir())
    Image.new("RGB", (20, 20), (5, 5, 5)).save(paths[3], "bmp")

    def read(side: int = 16):
        return decoded_images(paths, (side, side), tmp_path / "cache", 0, False)[torch.arange(5)]

    first = read()
    assert len(decoded) == 5
    assert torch.equal(read(), first)
    assert len(decoded) == 5
    read(8)
    assert len(decoded) == 10  # another size is another file

    (file,) = (tmp_path / "cache").glob("decoded_16x16_*.bin")
    file.unlink()
    assert torch.equal(read(), first)
    assert len(decoded) == 15

    Image.new("RGB", (20, 20), (9, 9, 9)).save(paths[3], "bmp")  # of the same size in bytes
    os.utime(paths[3], ns=(1, 1))
    again = read()
    assert (again[3] == 9).all()  # a changed image is decoded again
    assert torch.equal(again[:3], first[:3])


def test_workers_share_the_file(pictures, tmp_path, decoded):
    paths = sorted(pictures("flat", 4).iterdir())
    here = decoded_images(paths, (16, 16), tmp_path / "cache", 0, False)
    there = pickle.loads(pickle.dumps(here))
    pixels = there[torch.arange(4)]
    assert torch.equal(here[torch.arange(4)], pixels)
    assert len(decoded) == 4
    assert len(pickle.dumps(here)) < 4096  # the pixels do not travel


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
def test_every_kind_of_image_becomes_rgb(tmp_path, mode):
    Image.new("RGB", (30, 20), (200, 200, 200)).convert(mode).save("image.tif")
    pixels = decode(tmp_path / "image.tif", (8, 8))
    assert pixels.shape == (3, 8, 8)
    assert pixels.dtype == torch.uint8


def test_decoding_is_resizing_and_jpeg_shortcuts_are_close(tmp_path):
    picture = Image.fromarray(smooth(1, 400)[0].permute(1, 2, 0).numpy())
    picture.save("image.png")
    exact = torch.from_numpy(np.array(picture.resize((16, 16), Image.Resampling.BILINEAR))).permute(
        2, 0, 1
    )
    assert torch.equal(decode(tmp_path / "image.png", (16, 16)), exact)
    picture.save("image.jpg", quality=95)
    assert off(decode(tmp_path / "image.jpg", (16, 16)), exact) < 12


def test_a_set_that_does_not_fit_into_memory_names_its_key(pictures, monkeypatch):
    pictures("photo", {"cat": 2, "dog": 2})
    monkeypatch.setattr(torch, "empty", lambda *_, **__: torch.zeros(2**50))
    with pytest.raises(UserError, match=r"4 decoded images .* need 0\.0 GiB; lower data\.cache_gb"):
        open_domains(folder_config(), 0)


@pytest.mark.parametrize("content", [b"", b"no image", b"\x89PNG\r\n\x1a\n", "half"])
def test_an_unreadable_image_is_named(pictures, content):
    path = sorted(pictures("flat", 1).iterdir())[0]
    path.write_bytes(path.read_bytes()[:200] if content == "half" else content)
    with pytest.raises(
        UserError, match=r"000\.png: cannot be read as an image \(.+\); \w+ or remove it"
    ) as caught:
        decode(path, (8, 8))
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize(
    ("mode", "suffix"), [("I;16", "png"), ("I;16", "tif"), ("I", "tif"), ("F", "tif")]
)
def test_images_with_more_than_8_bits_are_refused(pictures, tmp_path, mode, suffix):
    """PIL would keep the lowest bits of each, which makes nearly all of them white."""
    pictures("photo", {"cat": 3, "dog": 3})
    pictures("sketch", {"cat": 3, "dog": 3})
    assert open_domains(folder_config(), 0)  # control
    values = (np.arange(4096).reshape(64, 64) * 16).astype({"F": "f4", "I": "i4"}.get(mode, "u2"))
    for name in ("deep", "deeper"):
        Image.fromarray(values).save(tmp_path / f"images/photo/dog/{name}.{suffix}")
    message = r"photo/dog/deep\.\w+: an image has 8 bits .*\(mode [IF]\S*\); save it as 8 bit"
    for keys in ({}, {"workers": 1}, {"cache_gb": 0.0}):
        with pytest.raises(UserError, match="2 files cannot be used:") as error:
            open_domains(folder_config(**keys), 0)
        assert re.search(message, str(error.value))
        assert len(str(error.value).splitlines()) == 3
    with pytest.raises(UserError, match=message):
        decode(tmp_path / f"images/photo/dog/deep.{suffix}")


@pytest.mark.parametrize("suffix", ["jpg", "png", "webp", "tif"])
def test_images_are_turned_by_their_orientation(tmp_path, suffix):
    pixels = np.zeros((40, 64, 3), np.uint8)
    pixels[:20, :32] = [250, 0, 0]
    pixels[:20, 32:] = [0, 250, 0]
    kinds = set()
    for orientation in range(1, 9):
        file = tmp_path / f"{orientation}.{suffix}"
        exif = Image.Exif()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(file, exif=exif)
        expected = np.asarray(ImageOps.exif_transpose(Image.open(file)).convert("RGB"))
        for size in (None, (16, 24)):
            turned = decode(file, size).permute(1, 2, 0).numpy()
            assert turned.shape[:2] == (size or expected.shape[:2])
            corners = np.ix_([2, -3], [2, -3])
            assert np.abs(turned[corners].astype(int) - expected[corners]).max() < 40
        kinds.add((decode(file)[:, [2, -3]][:, :, [2, -3]] > 120).numpy().tobytes())
        assert image_size(file) == expected.shape[:2]
        assert image_size(file, exif=False) == tuple(decode(file, exif=False).shape[1:])
        if suffix != "tif":  # PIL turns these by itself
            assert image_size(file, exif=False) == (40, 64)
    assert len(kinds) == 8  # control: all of them differ


def test_the_key_exif_turns_the_orientation_off(pictures, tmp_path):
    folder = pictures("photo", {"cat": 3, "dog": 3})
    pictures("sketch", {"cat": 3, "dog": 3})
    exif = Image.Exif()
    exif[0x0112] = 3
    Image.open(folder / "cat/000.png").save(folder / "cat/000.png", exif=exif)
    read = {}
    for key in (True, False):
        images = open_domains(folder_config(exif=key, cache_gb=0.0), 0).source.images
        read[key] = images[torch.arange(6)]
    assert torch.equal(read[True][1:], read[False][1:])
    assert not torch.equal(read[True][0], read[False][0])
    assert (read[True][0].int() - read[False][0].flip(1, 2).int()).abs().max() <= 1
    assert len(list((tmp_path / "cache").glob("decoded_*_unturned_*.bin"))) == 2


def test_a_pipe_among_the_images_is_named(pictures, tmp_path):
    pictures("photo", {"cat": 3, "dog": 3})
    pictures("sketch", {"cat": 3, "dog": 3})
    os.mkfifo(tmp_path / "images/photo/cat/x.png")
    for keys in ({}, {"workers": 1}):
        with pytest.raises(UserError, match=r"photo/cat/x\.png .*no regular file"):
            open_domains(folder_config(**keys), 0)
    with pytest.raises(UserError, match=r"photo/cat/x\.png: .*\(not a regular file\)"):
        decode(tmp_path / "images/photo/cat/x.png")


def test_every_unreadable_header_is_named_at_once(pictures, tmp_path):
    folder = pictures("photo", {"cat": 30, "dog": 3})
    pictures("sketch", {"cat": 3, "dog": 3})
    for i in range(24):
        (folder / f"cat/{i:03d}.png").write_bytes(b"no image")
    for dry_run in (False, True):
        with pytest.raises(UserError, match="24 files cannot be used:") as error:
            open_domains(folder_config(), 0, dry_run)
        lines = str(error.value).splitlines()
        assert len(lines) == 1 + 20 + 1
        assert "cat/019.png: cannot be read as an image" in lines[20]
        assert lines[-1].strip() == "and 4 more"


def test_headers_are_read_until_a_cache_file_is_there(pictures, monkeypatch):
    pictures("photo", {"cat": 3, "dog": 3})
    pictures("sketch", {"cat": 3, "dog": 3})
    opened, plain = [], data.decoded.image_size
    monkeypatch.setattr(
        data.decoded, "image_size", lambda *args: opened.append(args) or plain(*args)
    )
    for keys, count in (({}, 12), ({"cache_gb": 0.0}, 12), ({"cache_gb": 0.0}, 0)):
        open_domains(folder_config(**keys), 0)
        assert len(opened) == count
        del opened[:]


# --- the cache file


@pytest.fixture
def cached(pictures, tmp_path):
    """`cached()` -> (a set of eight images in a cache file, which is filled, and the file)."""
    paths = sorted(pictures("flat", 8).iterdir())

    def make():
        images = decoded_images(paths, (16, 16), tmp_path / "cache", 0, False)
        return images, images.file

    images, _ = make()
    images[torch.arange(8)]
    return make


@pytest.mark.parametrize("damage", ["bit", "zeros", "cut", "empty"])
def test_a_damaged_cache_file_is_decoded_again(cached, decoded, capsys, damage):
    images, file = cached()
    expected = images[torch.arange(8)]
    content = file.read_bytes()
    assert not decoded
    record = len(content) // 8
    if damage == "bit":
        middle = 3 * record + record // 2
        file.write_bytes(content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :])
    elif damage == "zeros":  # as a power cut may leave it: the checksum without its image
        file.write_bytes(content[: 3 * record + 4] + bytes(record - 4) + content[4 * record :])
    else:
        file.write_bytes(content[: 3 * record + 100 if damage == "cut" else 0])
    for reader in (cached()[0], images):  # a later run, and the one that has it open
        assert torch.equal(reader[torch.arange(8)], expected)
    assert len(decoded) == {"bit": 1, "zeros": 1, "cut": 5, "empty": 8}[damage]
    # Not told of an empty file: it is as a new one.
    assert capsys.readouterr().out.count("has damaged images") == (damage != "empty")
    assert file.read_bytes() == content


def test_a_cache_file_that_is_removed_or_cut_in_mid_run(cached):
    """A mapped file would kill the process without a message."""
    images, file = cached()
    expected = images[torch.arange(8)]
    os.truncate(file, 100)
    assert torch.equal(images[torch.arange(8)], expected)
    file.unlink()
    assert torch.equal(images[torch.arange(8)], expected)


def test_other_cache_files_of_the_images_are_told(cached, pictures, tmp_path, capsys):
    first = cached()[1]
    assert "data.cache" not in capsys.readouterr().out
    pictures("flat", 9)
    paths = sorted((tmp_path / "images/flat").iterdir())
    second = decoded_images(paths, (16, 16), tmp_path / "cache", 0, False).file
    out = capsys.readouterr().out
    assert re.search(rf"has 1 others .*first: {first.name}\); remove those that no run needs", out)
    assert first.exists()
    assert decoded_images(paths, (16, 16), tmp_path / "cache", 0, False).file == second
    other = sorted(pictures("other", 3).iterdir())
    decoded_images(other, (16, 16), tmp_path / "cache", 0, False)
    assert "data.cache" not in capsys.readouterr().out  # not for a file that was there, or others


# --- built-in and digit sets


def test_drawn_digits_are_the_same_on_every_call():
    for split in ("train", "test"):
        for shifted in (False, True):
            torch.manual_seed(1)
            images, labels = drawn.draw.__wrapped__(split, shifted)
            torch.manual_seed(2)
            again, same_labels = drawn.draw.__wrapped__(split, shifted)
            assert torch.equal(images, again)
            assert torch.equal(labels, same_labels)
            assert images.shape == (drawn.COUNT[split], 3, 28, 28)
            assert images.dtype == torch.uint8
            assert set(labels.tolist()) == set(range(10))


def test_drawn_domains_and_splits_differ():
    plain, shifted = drawn.draw("train", False)[0].float(), drawn.draw("train", True)[0].float()
    colour = [(x[:, 0] - x[:, 2]).abs().mean() for x in (plain, shifted)]
    ground = [x[:, :, 0, 0].std() for x in (plain, shifted)]
    assert colour[1] > 2 * colour[0]
    assert ground[1] > 5 * ground[0]
    test = drawn.draw("test", False)[0]
    assert not any((plain == image).all(3).all(2).all(1).any() for image in test)


def test_mnistm_is_the_difference_of_patch_and_digit():
    digits = torch.randint(256, (5, 1, 28, 28), dtype=torch.uint8, generator=generator("digits"))
    photographs = [
        np.random.default_rng(i).integers(0, 256, (30 + i, 40, 3), dtype=np.uint8) for i in range(3)
    ]
    blended, random = blend(digits, photographs, generator("x")), generator("x")
    which, corners = torch.randint(3, (5,), generator=random), torch.rand((5, 2), generator=random)
    for i in range(5):
        photograph = photographs[which[i]]
        top, left = (
            int(c * (n - 28 + 1))
            for c, n in zip(corners[i].tolist(), photograph.shape[:2], strict=True)
        )
        for row in range(28):
            for column in range(28):
                for channel in range(3):
                    patch = int(photograph[top + row, left + column, channel])
                    assert blended[i, channel, row, column] == abs(
                        patch - int(digits[i, 0, row, column])
                    )


def test_mnistm_is_kept_and_found_again(pictures, tmp_path, monkeypatch):
    root, cache = pictures("photographs", 3, side=40).parent, tmp_path / "cache"
    digits = {
        train: torch.randint(256, (6, 1, 28, 28), dtype=torch.uint8) for train in (True, False)
    }
    monkeypatch.setattr(
        data.digits, "mnist", lambda root, train, read_only: (digits[train], torch.arange(6))
    )

    def made(train=True, read_only=False):
        return mnistm(root, "photographs", train, cache, read_only)[0]

    first = made(read_only=True)
    assert not cache.exists()  # a dry run writes nothing
    assert torch.equal(made(), first)
    assert not torch.equal(made(train=False), first)
    with monkeypatch.context() as patch:
        patch.setattr(data.digits, "blend", lambda *_: pytest.fail("not kept"))
        assert torch.equal(made(), first)
    for kept in cache.glob("mnistm_train*.npy"):
        kept.write_bytes(kept.read_bytes()[:500])
    assert torch.equal(made(), first)  # a file cut short is made again
    with pytest.raises(UserError, match=r"mnistm: no photographs in .*nowhere"):
        mnistm(root, "nowhere", True, cache, False)
    pictures("photographs", 4, side=20)
    with pytest.raises(UserError, match=r"000\.png is smaller than 28 px"):
        made()


@pytest.mark.parametrize("name", ["mnist", "usps", "svhn"])
def test_an_absent_set_says_so_and_a_dry_run_downloads_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setattr("urllib.request.urlopen", lambda *_, **__: pytest.fail("a download"))
    config = data_config({"name": name})
    with pytest.raises(UserError, match=f"{name}: .* is not there.*--dry-run"):
        open_domains(config, 0, dry_run=True)

    def offline(*_, **__):
        raise OSError("no route to host")

    monkeypatch.setattr("urllib.request.urlopen", offline)
    with pytest.raises(
        UserError,
        match=rf"{name}: .*(could not be downloaded \(.*set data\.root|pip install scipy)",
    ) as caught:
        open_domains(config, 0)
    assert len(str(caught.value).splitlines()) == 1


# --- folders and lists


def test_a_folder_per_class(pictures, tmp_path):
    folder = pictures("photo", {"dog": 2, "cat": 3})
    (folder / "cat" / "notes.txt").write_text("no image")
    (folder / ".hidden").mkdir()
    files, labels, classes = scan_folder("photo", tmp_path / "images", "data.source.path")[:3]
    assert classes == ["cat", "dog"]
    assert labels == [0, 0, 0, 1, 1]
    assert [f.parent.name for f in files] == ["cat"] * 3 + ["dog"] * 2
    pictures("flat", 3)
    files, labels, classes = scan_folder("flat", tmp_path / "images", "data.target.path")[:3]
    assert (len(files), labels, classes) == (3, None, None)


@pytest.fixture
def lists(pictures, tmp_path):
    """`lists("a.txt", "cat/000.png 0\\n")`, beside the pictures of cat (3) and dog (2)."""
    pictures("photo", {"cat": 3, "dog": 2})

    def read(text: str, classes: str | None = None):
        (tmp_path / "images" / "photo" / "a.txt").write_text(text)
        if classes is not None:
            (tmp_path / "images" / "classes.txt").write_text(classes)
        return read_list(
            "photo/a.txt",
            None if classes is None else "classes.txt",
            tmp_path / "images",
            "source",
        )[:3]

    return read


def test_lists(lists, tmp_path):
    files, labels, classes = lists("dog/001.png 0\ncat/000.png 1\n\ncat/002.png 1\n")
    assert [str(f.relative_to(tmp_path / "images/photo")) for f in files] == [
        "dog/001.png",
        "cat/000.png",
        "cat/002.png",
    ]
    assert (labels, classes) == ([0, 1, 1], ["0", "1"])
    assert lists("dog/001.png cat\ncat/000.png dog\n", "dog\ncat\n")[1:] == ([1, 0], ["dog", "cat"])
    assert lists("dog/001.png 0\ncat/000.png 1\n", "dog\ncat\n")[1:] == ([0, 1], ["dog", "cat"])
    assert lists("dog/001.png\ncat/000.png\n")[1:] == (None, None)
    spaced = tmp_path / "images" / "photo" / "my cat.png"
    spaced.write_bytes((tmp_path / "images" / "photo" / "cat" / "000.png").read_bytes())
    assert lists("my cat.png 1\ndog/000.png 0\n")[:2] == (
        [spaced, tmp_path / "images/photo/dog/000.png"],
        [1, 0],
    )
    assert lists("my cat.png\n")[:2] == ([spaced], None)
    assert lists(f"{spaced} 0\ndog/000.png 1\n")[0][0] == spaced  # absolute, below the root
    (tmp_path / "images" / "photo" / "a.txt").write_text(f"{spaced} 0\ndog/000.png 1\n")
    root = tmp_path / "images" / ".." / "images"
    assert len(read_list("photo/a.txt", None, root, "source")[0]) == 2


@pytest.mark.parametrize(
    ("text", "classes", "match"),
    [
        ("cat/000.png 0\ncat/999.png 1\n", None, r"a\.txt:2: there is no file .*cat/999\.png"),
        (
            "cat/000.png 0\ndog/000.png tiger\n",
            None,
            r"a\.txt:2: label 'tiger' is .*class number; for names set data\.source\.classes",
        ),
        (
            "cat/000.png 0\ndog/000.png tiger\n",
            "cat\ndog\n",
            r"a\.txt:2: label 'tiger' is .* class number and .* name",
        ),
        (
            "cat/000.png 0\ndog/000.png 2\n",
            "cat\ndog\n",
            r"a\.txt:2: label 2 is unknown, .* numbers 0 to 1",
        ),
        ("cat/000.png 0\ndog/000.png -1\n", None, r"a\.txt:2: label '-1' is .* class number"),
        ("cat/000.png 0\ndog/000.png\n", None, r"a\.txt:2: has no label, .*other lines have"),
        ("cat/000.png 0\n../../secret.png 1\n", None, r"a\.txt:2: .*secret\.png lies outside"),
        (
            "cat/000.png 0\n/etc/secret.png 1\n",
            None,
            r"a\.txt:2: there is no file /etc/secret\.png",
        ),
        (
            "cat/000.png 0\ndog/000.png 2\n",
            None,
            r"a\.txt has no image of class 1; labels count from 0 without gaps",
        ),
        ("cat/000.png 0\ncat/001.png 0\n", "cat\ndog\n", r"a\.txt has no image of class dog"),
        ("cat/000.png 0\n", None, r"a\.txt has .* class 0"),
        ("\n", None, r"a\.txt names no image"),
        (
            "cat/000.png 0\n",
            "cat\ncat\n",
            r"classes\.txt must name at least two classes, each once",
        ),
    ],
)
def test_mistakes_in_a_list(lists, text, classes, match):
    with pytest.raises(UserError, match=match) as caught:
        lists(text, classes)
    assert len(str(caught.value).splitlines()) == 1


def test_a_label_out_of_all_proportion_is_refused_at_once(lists, monkeypatch):
    """Not after counting up to it."""
    monkeypatch.setattr(
        data.folder,
        "range",
        lambda n: range(n) if n < 10**6 else pytest.fail("counts"),
        raising=False,
    )
    with pytest.raises(
        UserError, match="has no image of class 1; labels count from 0 without gaps"
    ):
        lists("cat/000.png 0\ndog/000.png 999999999999\n")


def test_classes_in_another_order_are_matched_by_name(pictures, tmp_path):
    pictures("photo", {"ant": 4, "bee": 5, "cat": 6})
    pictures("sketch", {"ant": 3, "bee": 2, "cat": 1})
    names = ["cat", "ant", "bee"]
    (tmp_path / "images/classes.txt").write_text("\n".join(names))
    files = sorted((tmp_path / "images/sketch").glob("*/*.png"))
    lines = [
        f"{f.relative_to(tmp_path / 'images/sketch')} {names.index(f.parent.name)}\n" for f in files
    ]
    (tmp_path / "images/sketch/list.txt").write_text("".join(lines))
    target = {"name": "list", "path": "sketch/list.txt", "classes": "classes.txt"}
    domains = open_domains(data_config({"name": "folder", "path": "photo"}, target), 0)
    assert domains.classes == ["ant", "bee", "cat"]
    assert [domains.classes[label] for label in domains.target_test.labels] == [
        f.parent.name for f in files
    ]
    assert domains.target_test.labels.tolist() != [
        names.index(f.parent.name) for f in files
    ]  # control


def test_csv_lists(lists, tmp_path):
    """The ending decides; a header is a first line that names no file."""
    images = tmp_path / "images" / "photo"
    (images / "my, cat.png").write_bytes((images / "cat/000.png").read_bytes())
    rows = '"my, cat.png",wild cat\ndog/000.png,dog\n\n'
    (tmp_path / "images/classes.txt").write_text("wild cat\ndog\n")
    for name, text in (
        ("plain.csv", rows),
        ("header.CSV", "path,label\n" + rows),
        ("marked.csv", "\ufefffile,class\r\n" + rows),
        ("numbers.csv", rows.replace("wild cat", "0").replace(",dog\n", ",1\n")),
    ):
        (images / name).write_text(text)
        files = read_list(f"photo/{name}", "classes.txt", tmp_path / "images", "source")
        assert files.images == [images / "my, cat.png", images / "dog/000.png"]
        assert (files.labels, files.classes) == ([0, 1], ["wild cat", "dog"])
    (images / "bare.csv").write_text("image\ncat/000.png\ndog/000.png\n")
    files = read_list("photo/bare.csv", None, tmp_path / "images", "target")
    assert (len(files.images), files.labels) == (2, None)
    for text, match in (
        ("cat/000.png,0,x\n", r"bad\.csv:1: has 3 columns; a line is `path,label`"),
        ("cat/999.png,0\n", r"bad\.csv:1: there is no file"),  # no header: it has an ending
        ('path,label\n"cat/000.png,0\n', r"bad\.csv:2: is no csv .*; a line is `path,label`"),
    ):
        (images / "bad.csv").write_text(text)
        with pytest.raises(UserError, match=match):
            read_list("photo/bad.csv", None, tmp_path / "images", "source")


def test_a_list_names_an_image_once(lists):
    again = r"a\.txt:3: names .*cat/000\.png again; name each image once"
    for text in (
        "cat/000.png 0\ndog/000.png 1\ncat/000.png 1\n",  # under two labels
        "cat/000.png 0\ndog/000.png 1\n./cat/000.png 0\n",  # it could be trained and validated on
        "cat/000.png\ndog/000.png\ncat/000.png\n",
    ):
        with pytest.raises(UserError, match=again):
            lists(text)


def test_absolute_paths_may_lie_outside_the_root(pictures, tmp_path):
    """Two folders on two disks; a list that is drawn from them can be read again."""
    pictures("photo", {"cat": 5, "dog": 5})
    disk = tmp_path / "disk"
    pictures("sketch", {"cat": 4, "dog": 4}).rename(disk)
    config = data_config(
        {"name": "folder", "path": "photo"},
        {"name": "folder", "path": str(disk)},
        target_labeled=2,
        size=16,
    )
    domains = open_domains(config, 0)
    assert len(domains.target) == 4
    text = domains.lists["target_labeled.txt"]
    assert text.startswith(f"{disk}/cat/")
    (tmp_path / "images/few.txt").write_text(text)
    (disk / "classes.txt").write_text("cat\ndog\n")
    config.target_labeled = "few.txt"
    config.target_test = DomainConfig(
        "list", path=str(tmp_path / "images/few.txt"), classes=str(disk / "classes.txt")
    )
    with pytest.raises(UserError, match="leaves no image to test on"):  # they are the same images
        open_domains(config, 0)
    config.target_labeled = None
    assert len(open_domains(config, 0).target_test) == 4
    config.target.path = "../disk"
    with pytest.raises(
        UserError, match=r"data\.target\.path: \.\./disk lies outside images; write"
    ):
        open_domains(config, 0)


def test_home_is_expanded_in_paths(pictures, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    pictures("photo", {"cat": 5, "dog": 5})
    photo = {"name": "folder", "path": "photo"}
    assert len(open_domains(data_config(photo, photo, root="~/images"), 0).source) == 9
    home = {"name": "folder", "path": "~/images/photo"}
    assert len(open_domains(data_config(home, home, root="elsewhere"), 0).source) == 9
    (tmp_path / "images/few.txt").write_text("photo/cat/000.png cat\n")
    few = data_config(
        home,
        {"name": "folder", "path": "~/images/photo/dog"},
        target_labeled="~/images/few.txt",
        root="elsewhere",
    )
    assert len(open_domains(few, 0).target_labeled) == 1


def test_files_that_are_no_images_are_counted(pictures):
    folder = pictures("photo", {"cat": 12, "dog": 12})
    pictures("sketch", 3)
    for name in ("cat/a.heic", "cat/b.HEIC", "dog/c.svg", "dog/noend", ".hidden"):
        (folder / name).write_text("")
    source = next(
        line
        for line in open_domains(folder_config(), 0).describe().splitlines()
        if "source " in line
    )
    assert source.endswith(
        "; 4 files that are no images were skipped (2 .heic, 1 .svg, 1 without ending)"
    )
    for image in (folder / "cat").glob("*.png"):
        image.unlink()
    with pytest.raises(UserError, match=r"the class \S*cat has no images \(2 files .*2 \.heic"):
        open_domains(folder_config(), 0)


def test_a_target_in_folders_that_are_no_classes(pictures):
    """By day and camera, in any depth: one unlabeled set."""
    pictures("photo", {"cat": 5, "dog": 5})
    pictures("days", {"monday": 3, "tuesday": 2})
    pictures("nested", {"monday/left": 3, "monday/right": 1, "tuesday/left": 2})
    for path, count, match in (
        ("days", 5, "only here: monday, tuesday; only in the source: cat, dog"),
        ("nested", 6, r"data\.target\.path: \S*monday/left is a folder inside the class monday"),
    ):
        target = {"name": "folder", "path": path}
        with pytest.raises(
            UserError, match=f"{match}.*; for unlabeled images .*data.target.labels"
        ):
            open_domains(data_config({"name": "folder", "path": "photo"}, target), 0)
        target["labels"] = False
        domains = open_domains(data_config({"name": "folder", "path": "photo"}, target), 0)
        assert len(domains.target) == count
        assert domains.target_test is None
    unlabeled = {"name": "folder", "path": "photo", "labels": False}
    with pytest.raises(UserError, match="the source needs labels"):
        open_domains(data_config(unlabeled, unlabeled), 0)
    with pytest.raises(ValueError, match="labels: false goes with name: folder only"):
        DomainConfig("list", path="a.txt", labels=False)


# --- what a file system may hold


def broken_entry(kind: str, folder, monkeypatch) -> str:
    """Add what cannot be read to the folder of a class; returns what a message must name."""
    if kind == "dangling":
        (folder / "cat/gone.png").symlink_to("nowhere.png")
        return r"cat/gone\.png is no regular file"
    if kind == "loop":
        (folder / "cat/loop.png").symlink_to("loop.png")
        return r"cat/loop\.png"
    if kind == "fifo":
        os.mkfifo(folder / "cat/pipe.png")
        return r"cat/pipe\.png is no regular file"
    if kind == "class name":
        os.mkdir(os.fsencode(folder) + b"/\xff")
        return r"'\S*photo/\\udcff' is not one line of utf-8 text; rename"
    scan = os.scandir

    def refuse(path):
        if str(path).endswith("photo/cat"):
            raise PermissionError(13, "Permission denied", str(path))
        return scan(path)

    monkeypatch.setattr(os, "scandir", refuse)
    return r"photo/cat cannot be read \(Permission denied\)"


@pytest.mark.parametrize("kind", ["dangling", "loop", "fifo", "class name", "permission"])
@pytest.mark.parametrize("labels", [True, False])
def test_what_cannot_be_read_is_named(pictures, monkeypatch, kind, labels):
    folder = pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", {"cat": 3, "dog": 3})
    named = broken_entry(kind, folder, monkeypatch)
    domain = {"name": "folder", "path": "photo", "labels": labels}
    config = data_config({"name": "folder", "path": "sketch"}, domain, cache_gb=0)
    if kind == "class name" and not labels:  # it is no class then
        assert len(open_domains(config, 0).target) == 10
        return
    with pytest.raises(UserError, match=rf"^data\.target\.path: .*{named}") as caught:
        open_domains(config, 0)
    assert len(str(caught.value).splitlines()) == 1


def test_folders_that_are_linked(pictures):
    folder = pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", 3)
    pictures("away", {"left": 4})
    (folder / "more").symlink_to("../away")
    target = {"name": "folder", "path": "photo", "labels": False}
    config = data_config({"name": "drawn_digits"}, target)
    assert len(open_domains(config, 0).target) == 14
    (folder / "cat/up").symlink_to("..")
    with pytest.raises(UserError, match=r"cat/up is a link to a folder that is read already"):
        open_domains(config, 0)


def test_a_name_that_is_no_utf8_can_be_cached(pictures, tmp_path):
    folder = pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", 3)
    (folder / "cat/000.png").rename(os.fsdecode(os.fsencode(folder) + b"/cat/\xff.png"))
    domains = open_domains(folder_config(cache_gb=0, size=16), 0)
    assert domains.source.images[torch.arange(10)].shape == (10, 3, 18, 18)
    assert list((tmp_path / "cache").glob("decoded_*.bin"))


@pytest.mark.parametrize("line", ["x" * 100_000, "x" * 100_000 + " 0", "\0\1 0"])
def test_a_list_of_rubbish(lists, tmp_path, line):
    with pytest.raises(UserError, match=r"a\.txt:1: there is no file ") as caught:
        lists(line + "\n")
    assert len(str(caught.value)) < 500
    (tmp_path / "images/photo/binary.txt").write_bytes(bytes(range(256)))
    with pytest.raises(
        UserError, match=r"binary\.txt cannot be read \(it is not a file of utf-8 text\)"
    ):
        read_list("photo/binary.txt", None, tmp_path / "images", "source")
    os.mkfifo(tmp_path / "images/photo/pipe.txt")  # to read it is to wait for ever
    with pytest.raises(
        UserError, match=r"pipe\.txt cannot be read \(it is not a file of utf-8 text\)"
    ):
        read_list("photo/pipe.txt", None, tmp_path / "images", "source")


@pytest.mark.parametrize("name", ["folder", "list"])
def test_a_path_longer_than_a_name_may_be(pictures, name):
    pictures("photo", {"cat": 5, "dog": 5})
    config = data_config({"name": "folder", "path": "photo"}, {"name": name, "path": "x" * 5000})
    with pytest.raises(UserError, match=r"data\.target\.path: .*File name too long") as caught:
        open_domains(config, 0)
    assert len(str(caught.value)) < 500


# --- classes that the target lacks


@pytest.fixture
def without_owl(pictures, tmp_path):
    """`without_owl(**keys)`: photographs of three classes, sketches of two; owl has a folder."""
    pictures("photo", {"cat": 6, "dog": 6, "owl": 6})
    pictures("sketch", {"cat": 4, "dog": 5})
    (tmp_path / "images/sketch/owl").mkdir()
    pictures("test", {"cat": 2, "dog": 2})
    (tmp_path / "images/classes.txt").write_text("owl\ncat\ndog\n")
    lines = [f"sketch/{k}/{i:03d}.png {k}\n" for k in ("cat", "dog") for i in range(2)]
    (tmp_path / "images/few.txt").write_text("".join(lines))

    def make(**keys) -> DataConfig:
        return folder_config(**{"absent_classes": ["owl"], "size": 16, "batch": 4, **keys})

    return make


def test_a_target_without_one_of_the_classes(without_owl):
    domains = open_domains(without_owl(), 0)
    assert domains.classes == ["cat", "dog", "owl"]
    assert domains.absent_classes == ["owl"]
    assert domains.target_test.labels.tolist() == [0] * 4 + [1] * 5
    assert "3 classes: cat, dog, owl; the target lacks owl" in domains.describe()
    apart = open_domains(without_owl(target_test={"name": "folder", "path": "test"}), 0)
    assert apart.target_test.labels.tolist() == [0, 0, 1, 1]
    listed = {"name": "list", "path": "few.txt", "classes": "classes.txt"}
    photo = {"name": "folder", "path": "photo"}
    config = data_config(photo, listed, absent_classes=["owl"])
    assert open_domains(config, 0).target_test.labels.tolist() == [0, 0, 1, 1]
    drawn = open_domains(without_owl(target_labeled=2), 0)
    assert len(drawn.target_labeled) == 4
    assert len(open_domains(without_owl(target_labeled="few.txt"), 0).target_labeled) == 4


def test_a_list_of_numbers_without_one_of_the_classes(pictures, tmp_path):
    pictures("photo", {"cat": 3, "dog": 3, "owl": 3})
    lines = {k: [f"photo/{k}/{i:03d}.png" for i in range(3)] for k in ("cat", "dog", "owl")}
    for name, numbers in (("all", {"cat": 0, "dog": 1, "owl": 2}), ("two", {"cat": 0, "owl": 2})):
        text = "".join(f"{line} {number}\n" for k, number in numbers.items() for line in lines[k])
        (tmp_path / f"images/{name}.txt").write_text(text)
    source, target = ({"name": "list", "path": f"{name}.txt"} for name in ("all", "two"))
    domains = open_domains(data_config(source, target, absent_classes=["1"]), 0)
    assert domains.classes == ["0", "1", "2"]
    assert domains.target_test.labels.tolist() == [0, 0, 0, 2, 2, 2]
    with pytest.raises(UserError, match=r"no image of class 1; .*data.absent_classes"):
        open_domains(data_config(source, target), 0)


def test_mistakes_in_absent_classes(without_owl, pictures, tmp_path):
    with pytest.raises(UserError, match=r"the class .*owl has no images; .* data.absent_classes"):
        open_domains(without_owl(absent_classes=[]), 0)
    with pytest.raises(UserError, match=r"data.absent_classes: no class 'fox'; there are cat, dog"):
        open_domains(without_owl(absent_classes=["fox"]), 0)
    with pytest.raises(UserError, match=r"data.absent_classes: names all classes"):
        open_domains(without_owl(absent_classes=["owl", "dog", "cat"]), 0)
    with pytest.raises(UserError, match=r"data.absent_classes: \S*dog has images .*; take dog out"):
        open_domains(without_owl(absent_classes=["owl", "dog"]), 0)
    listed = {"name": "list", "path": "few.txt", "classes": "classes.txt"}
    config = data_config({"name": "folder", "path": "photo"}, listed)
    config.absent_classes = ["owl", "dog"]
    with pytest.raises(UserError, match=r"few.txt:3: is of class dog, which data.absent_classes"):
        open_domains(config, 0)
    (tmp_path / "images/sketch/owl").rmdir()
    with pytest.raises(UserError, match=r"only in the source: owl; .* data.absent_classes"):
        open_domains(without_owl(absent_classes=[]), 0)
    digits = {"name": "drawn_digits"}
    with pytest.raises(UserError, match=r"data.absent_classes: drawn_digits has the class 3"):
        open_domains(data_config(digits, digits, absent_classes=["3"]), 0)
    with pytest.raises(ValueError, match="absent_classes: the classes are those of the target"):
        LabeledDataConfig(target=DomainConfig(**digits), absent_classes=["3"])


def test_a_run_on_a_target_without_one_of_the_classes(without_owl, tmp_path):
    domains = "{source: {name: folder, path: photo}, target: {name: folder, path: sketch}, "
    config = tiny_config(
        tmp_path, data=domains + "absent_classes: [owl], size: 16, batch: 4, root: images}"
    )
    without_owl()
    assert train("train_dann", config, "steps=2") == 0
    result = summary(tmp_path / "run")
    assert result["absent_classes"] == ["owl"]
    assert result["classes"] == ["cat", "dog", "owl"]
    assert 0 <= result["target"]["last"]["mean_class_accuracy"] <= 100


# --- domains


def test_target_labels_are_dropped(pictures):
    pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", {"cat": 4, "dog": 3})
    for config in (data_config(), folder_config()):
        domains = open_domains(config, 0)
        assert domains.target.labels is None
        assert domains.criteria.labels is None
        (batch,) = train_loader(domains.target, config, 0, "target", 0, 1)
        assert isinstance(batch, torch.Tensor)
        assert all(isinstance(batch, torch.Tensor) for batch in domains.evaluation().target_train)
        assert domains.target_test.labels is not None  # for reporting


def test_source_val_is_a_seeded_tenth(pictures):
    pictures("photo", {"cat": 20, "dog": 13})
    pictures("sketch", {"cat": 4, "dog": 3})
    domains, again, other = (open_domains(folder_config(), seed) for seed in (0, 0, 1))
    assert (len(domains.source), len(domains.source_val)) == (30, 3)
    assert sorted([*domains.source.indices.tolist(), *domains.source_val.indices.tolist()]) == list(
        range(33)
    )
    for part in (domains.source, domains.source_val):
        assert [domains.classes[label] for label in part.labels[part.indices]] == [
            part.images.paths[i].parent.name for i in part.indices
        ]
    assert torch.equal(again.source_val.indices, domains.source_val.indices)
    assert not torch.equal(other.source_val.indices, domains.source_val.indices)


@pytest.mark.parametrize(
    ("source_val", "count"),
    [(0.1, 3), (0.5, 16), (0.001, 1), (5, 5), (1, 1), (0, None), (0.0, None)],
)
def test_how_much_of_the_source_is_held_out(pictures, source_val, count):
    pictures("photo", {"cat": 20, "dog": 13})
    pictures("sketch", {"cat": 4, "dog": 3})
    domains = open_domains(folder_config(source_val=source_val), 0)
    assert len(domains.source) == 33 - (count or 0)
    assert domains.source_val is None if count is None else len(domains.source_val) == count
    if count is None:
        assert "source_val     none: data.source_val is 0, all" in domains.describe()
        assert domains.evaluation().source_val is None


def test_a_share_of_a_large_source_is_bounded(pictures):
    pictures("photo", {"cat": 20, "dog": 20})
    pictures("sketch", {"cat": 4, "dog": 4})
    assert len(open_domains(folder_config(source_val=0.5, select_images=6), 0).source_val) == 6
    assert len(open_domains(folder_config(source_val=20, select_images=6), 0).source_val) == 20
    photo, sketch = ({"name": "folder", "path": path} for path in ("photo", "sketch"))
    several = data_config(photo, sketch, source_val=0.5, select_images=6)
    several.source = [several.source, DomainConfig(**sketch)]
    several.target = DomainConfig("folder", path="photo/cat")
    assert len(open_domains(several, 0).source_val) == 6


@pytest.mark.parametrize(
    ("source_val", "match"),
    [(1.5, "a share below 1"), (-1, "not be negative"), (1.0, "a share below 1")],
)
def test_a_held_out_share_that_is_none(source_val, match):
    with pytest.raises(ValueError, match=match):
        data_config(source_val=source_val)


def test_what_needs_held_out_images(pictures, tmp_path):
    pictures("photo", {"cat": 5, "dog": 5})
    photo = {"name": "folder", "path": "photo"}
    with pytest.raises(
        UserError, match=r"data.source_val: 10 leaves none of the 10 images of folder"
    ):
        open_domains(data_config(photo, photo, source_val=10), 0)
    with pytest.raises(UserError, match=r"data.source_val: 0 leaves no test, since the target is"):
        open_domains(data_config(photo, photo, source_val=0), 0)
    half = open_domains(data_config(photo, photo, source_val=0.5), 0)
    assert half.target_test_note == "5 held-out images of the target"
    config = tiny_config(tmp_path)
    with pytest.raises(
        UserError, match="select: source_val needs held-out source images, but data"
    ):
        train("train_source", config, "data.source_val=0", "select=source_val")


def test_a_run_without_held_out_images(tmp_path, capsys):
    """All of the source trains, though the set has a test split, and nothing else changes."""
    config = tiny_config(tmp_path)
    runs = (("plain", []), ("none", ["data.source_val=0"]))
    for name, keys in runs:
        assert train("train_dann", config, *keys, f"out_dir={tmp_path}/{name}") == 0
    assert "source_val.accuracy" not in capsys.readouterr().out.split("none: data.source_val")[-1]
    plain, none = (summary(tmp_path / name) for name, _ in runs)
    assert none["source_val"]["accuracy"] is None
    assert plain["source_val"]["accuracy"] is not None  # control
    assert plain["target"] == none["target"]


def test_own_test_splits_are_used():
    domains = open_domains(data_config(), 0)
    assert [
        len(s) for s in (domains.source, domains.source_val, domains.target, domains.target_test)
    ] == [200, 30] * 2
    assert domains.target_test_note == "the target's own test split"


def test_a_target_test_set_of_its_own(pictures):
    pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", 6)
    pictures("held_out", {"cat": 2, "dog": 1})
    held_out = {"name": "folder", "path": "held_out"}
    domains = open_domains(folder_config(target_test=held_out), 0)
    assert (len(domains.target), len(domains.target_test)) == (6, 3)
    assert domains.target_test_note == "data.target_test"
    with pytest.raises(UserError, match="target_test needs labels"):
        open_domains(folder_config(target_test={"name": "folder", "path": "sketch"}), 0)


def test_labeled_target_images_are_reported_as_transductive(pictures):
    pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", {"cat": 4, "dog": 3})
    domains = open_domains(folder_config(), 0)
    assert torch.equal(domains.target_test.indices, domains.target.indices)
    assert "transductive" in domains.target_test_note


def test_a_share_of_the_target_is_held_out_for_the_test(pictures):
    pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", {"cat": 10, "dog": 5})
    domains = open_domains(folder_config(test_share=0.2), 0)
    test, train = domains.target_test, domains.target
    assert test.labels[test.indices].tolist() == [0, 0, 1]  # a fifth of each class
    assert sorted([*test.indices.tolist(), *train.indices.tolist()]) == list(range(15))
    assert train.labels is None
    assert domains.target_test_note == "20 % of the target, held out"
    files = [test.images.paths[i] for i in test.indices.tolist()]
    lines = [f"sketch/{file.parent.name}/{file.name} {file.parent.name}" for file in files]
    assert domains.lists["target_test.txt"].splitlines() == lines
    same, other = (open_domains(folder_config(test_share=0.2), seed) for seed in (0, 1))
    assert torch.equal(same.target_test.indices, test.indices)
    assert not torch.equal(other.target_test.indices, test.indices)
    labeled = open_domains(folder_config(test_share=0.2, target_labeled=2), 0)
    assert torch.equal(labeled.target_test.indices, test.indices)
    drawn = {*labeled.target_labeled.indices.tolist()}
    assert not drawn & {*test.indices.tolist(), *labeled.target.indices.tolist()}


def test_the_upper_bound_does_not_train_on_the_held_out_share(pictures):
    pictures("sketch", {"cat": 20, "dog": 15})
    same = {"name": "folder", "path": "sketch"}
    domains = open_domains(data_config(same, same, test_share=0.2), 0)
    test = {*domains.target_test.indices.tolist()}
    assert len(test) == 7
    seen = {*domains.source.indices.tolist(), *domains.source_val.indices.tolist()}
    assert seen | test == set(range(35))
    assert not seen & test


@pytest.mark.parametrize(
    ("keys", "says"),
    [
        (
            {
                "test_share": 0.2,
                "source": {"name": "drawn_digits"},
                "target": {"name": "drawn_digits_shifted"},
            },
            "a test split of its own",
        ),
        (
            {"test_share": 0.02, "source": PHOTO, "target": SKETCH},
            "0.02 of the 10 images of class cat leaves none to measure on",
        ),
        (
            {"test_share": 0.2, "source": PHOTO, "target": {**SKETCH, "path": "plain"}},
            "has no labels",
        ),
    ],
)
def test_a_share_that_cannot_be_held_out(pictures, keys, says):
    pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", {"cat": 10, "dog": 5})
    pictures("plain", 4)
    with pytest.raises(UserError, match=says):
        open_domains(data_config(**keys), 0)


@pytest.mark.parametrize(
    ("share", "test", "says"),
    [(1.0, None, "between 0 and 1"), (0.2, {"name": "drawn_digits"}, "without target_test")],
)
def test_a_wrong_test_share_is_a_mistake_of_the_config(share, test, says):
    with pytest.raises(ValueError, match=says):
        folder_config(test_share=share, target_test=test)


def test_the_upper_bound_is_not_measured_on_what_it_trains_on(pictures):
    """The labeled target as the source too: its held-out tenth is the test set."""
    pictures("sketch", {"cat": 20, "dog": 13})
    same = {"name": "folder", "path": "sketch"}
    domains = open_domains(data_config(same, same), 0)
    assert torch.equal(domains.target_test.indices, domains.source_val.indices)
    assert not set(domains.target_test.indices.tolist()) & set(domains.source.indices.tolist())
    assert "transductive" not in domains.target_test_note


def test_an_augmentation_of_the_source_alone_leaves_the_upper_bound_held_out(pictures):
    pictures("photo", {"cat": 12, "dog": 12})
    photo = {"name": "folder", "path": "photo"}
    domains = open_domains(data_config({**photo, "augment": {"flip": {}}}, photo, size=16), 0)
    assert domains.target_test_note == "a held-out tenth of the target"


def test_criteria_see_one_sample_of_target_training_images():
    chosen = [open_domains(data_config(select_images=50), seed).criteria.indices for seed in (0, 1)]
    assert len(chosen[0].unique()) == 50
    assert torch.equal(*chosen)
    assert chosen[0].diff().float().std() > 1  # not the first ones, and not every fourth
    assert len(open_domains(data_config(select_images=5000), 0).criteria) == 200


def test_criteria_of_seeds_that_hold_out_other_images_share_what_they_can(pictures):
    pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", {"cat": 50, "dog": 50})
    config = folder_config(test_share=0.3, select_images=30)
    domains = [open_domains(config, seed) for seed in (0, 1)]
    sampled = [set(x.criteria.indices.tolist()) for x in domains]
    trained = [set(x.target.indices.tolist()) for x in domains]
    assert trained[0] != trained[1]  # control
    assert all(len(x) == 30 and x <= y for x, y in zip(sampled, trained, strict=True))
    assert len(sampled[0] & sampled[1]) > 15  # of samples by chance 30 * 30 / 100 = 9


def test_without_target_labels_there_are_no_target_figures(pictures, tmp_path):
    pictures("photo", {"cat": 12, "dog": 12})
    pictures("sketch", 9)
    assert open_domains(folder_config(), 0).target_test is None
    config = tiny_config(
        tmp_path,
        data="{source: {name: folder, path: photo}, target: {name: folder, path: sketch}, "
        f"size: 16, batch: 4, root: {tmp_path}/images, cache: {tmp_path}/cache}}",
    )
    assert train("train_dann", config, "steps=2") == 0
    result = summary(tmp_path / "run")
    per_class = dict.fromkeys(result["classes"])
    nothing = {"accuracy": None, "mean_class_accuracy": None, "class_accuracy": per_class}
    assert result["confusion"] == {"last": None, "selected": None}
    assert result["target"] == {
        "last": {"step": 2, **nothing},
        "selected": {"step": 2, **nothing},
        "oracle": {"step": None, **nothing},
    }
    assert result["target_test"] == "none: no target labels"
    assert 0 <= result["source_val"]["accuracy"] <= 100


def images_of(batch) -> torch.Tensor:
    return batch if isinstance(batch, torch.Tensor) else batch[0]


def test_a_dry_run_evaluates_one_batch_and_keeps_nothing(pictures, tmp_path):
    pictures("photo", {"cat": 20, "dog": 20})
    pictures("sketch", {"cat": 9, "dog": 9})
    domains = open_domains(folder_config(eval_batch=3, cache_gb=0.0), 0, dry_run=True)
    sets = domains.evaluation()
    passes = sets.source_val, sets.target_train, sets.target_test, domains.target_pass()
    assert [sum(map(len, map(images_of, x))) for x in passes] == [3, 3, 3, 3]
    assert len(domains.target_test) == 18  # control: the set itself
    assert (len(domains.source), len(domains.target)) == (36, 18)
    domains.source.images[torch.arange(4)]
    assert not (tmp_path / "cache").exists()


# --- one module per task


def defined(tree: ast.Module) -> set[str]:
    """Public names that a module defines itself."""
    found = {x.name for x in tree.body if isinstance(x, (ast.FunctionDef, ast.ClassDef))}
    assigned = [target for x in tree.body if isinstance(x, ast.Assign) for target in x.targets]
    found |= {target.id for target in assigned}
    return {name for name in found if not name.startswith("_")}


def chooses_by_task(tree: ast.Module) -> bool:
    """Whether code reads a task, or compares with the name of one."""
    for node in ast.walk(tree):
        read = isinstance(node, (ast.Attribute, ast.Name)) and isinstance(node.ctx, ast.Load)
        if read and getattr(node, "attr", getattr(node, "id", None)) == "task":
            return True
        compared = [node.left, *node.comparators] if isinstance(node, ast.Compare) else []
        compared += [node.value] if isinstance(node, ast.MatchValue) else []
        if any(isinstance(x, ast.Constant) and x.value in TASKS for x in compared):
            return True
    return False


def data_modules() -> dict[str, ast.Module]:
    return {file.stem: ast.parse(file.read_text()) for file in (ROOT / "data").glob("*.py")}


def test_both_tasks_have_the_same_names():
    modules = data_modules()
    names = defined(modules["classification"])
    assert names == defined(modules["segmentation"])
    assert {"open_set", "TrainBatches", "EvalBatches", "measure", "LABELS"} <= names
    for name in names - {"LABELS", "CLASSES_DIFFER"}:
        one, other = (getattr(module, name) for module in (classification, segmentation))
        assert inspect.signature(one) == inspect.signature(other), name


def test_control_a_name_of_one_task_is_seen():
    text = "import ast\nA = 1\n_B = 2\ndef c():\n    D = 3\nclass E: pass\n"
    assert defined(ast.parse(text)) == {"A", "c", "E"}


def test_the_task_is_chosen_in_one_place():
    """data/config.py has the rules of each task besides."""
    choosing = {name for name, tree in data_modules().items() if chooses_by_task(tree)}
    assert choosing == {"tasks", "config"}


@pytest.mark.parametrize(
    "text",
    [
        "if config.task == 'segmentation': pass",
        "names = TABLE[task]",
        "if kind in ('x',) or 'classification' == kind: pass",
        "match kind:\n    case 'segmentation': pass",
    ],
)
def test_control_a_choice_by_task_is_seen(text):
    assert chooses_by_task(ast.parse(text))
    assert not chooses_by_task(ast.parse('"""For task: segmentation."""\nx = task_module(c)'))


# --- the batches of a run


def drawn_config(task: str, **keys) -> DataConfig:
    """The built-in sets of a task, in batches of 3."""
    names = {"classification": "drawn_digits", "segmentation": "drawn_street"}
    second = {"classification": "drawn_digits_shifted", "segmentation": "drawn_street_dusk"}
    source, target = {"name": names[task]}, {"name": second[task]}
    return data_config(source, target, task=task, batch=3, **keys)


@pytest.mark.parametrize("task", TASKS)
def test_batches_of_a_run(task):
    """Those of the set, of the run's seed, from `start` on; the same for a labeled set."""
    augment = {"photometric": {"gain": [0.5, 1.5]}, "flip": {}}
    config = drawn_config(task, augment=augment, target_labeled=2)
    domains = open_domains(config, 7)
    make = task_module(config).TrainBatches
    for role in ("source", "target", "target_labeled"):
        own = make(getattr(domains, role), config, 7, role)
        batches = list(domains.batches(role, 2, 5))
        assert len(batches) == 3
        for step, batch in enumerate(batches, 2):
            assert equal_batches(batch, own[step])
        other = make(getattr(domains, role), config, 8, role)
        assert not equal_batches(batches[0], other[2])  # control
        assert not equal_batches(batches[0], own[0])
        assert isinstance(batches[0], torch.Tensor) == (role == "target")  # without labels
    assert list(domains.batches("source", 5, 5)) == []


@pytest.mark.parametrize("task", TASKS)
def test_strong_views_of_a_run(task):
    config = drawn_config(task, augment={"flip": {}})
    domains = open_domains(config, 7)
    weak = list(domains.batches("target", 1, 3))
    pairs = list(domains.batches("target", 1, 3, {"cutout": {}}))
    for plain, (view, strong) in zip(weak, pairs, strict=True):
        assert torch.equal(plain, view)
        assert not torch.equal(plain, strong)
    for view, strong in domains.batches("target", 1, 3, {}):  # a pair all the same
        assert torch.equal(view, strong)


@pytest.mark.parametrize("task", TASKS)
def test_the_target_may_have_another_batch(task):
    config = drawn_config(task)
    config.target_batch = config.batch + 3
    domains = open_domains(config, 0)
    sizes = {"source": config.batch, "target": config.batch + 3}
    for role, size in sizes.items():
        batches = list(domains.batches(role, 2, 4))
        images = [batch[0] if role == "source" else batch for batch in batches]
        assert [len(batch) for batch in images] == [size, size]
        for numbers, batch in zip(domains.positions(role, 2, 4), images, strict=True):
            assert len(numbers) == len(batch)
    for weak, strong in domains.batches("target", 0, 2, {"blur": {}}):
        assert len(weak) == len(strong) == sizes["target"]
    text = f"{config.batch} source and {config.batch + 3} target images"
    assert text in domains.describe().splitlines()[-1]
    assert "per domain" in open_domains(drawn_config(task), 0).describe()


@pytest.mark.parametrize(
    ("script", "keys"),
    [
        ("train_dann", []),
        ("train_dann", ["conditional=cdan_e", "model.bn=separate"]),
        ("train_mmd", ["mmd_weight=0", "coral_weight=1"]),
        ("train_mcc", []),
        ("train_selfsup", ["contrastive_weight=1", "strong_augment={cutout: {}}"]),
        ("train_mdd", []),
        ("train_adda", ["source_steps=2"]),
        ("train_advent", []),
        ("train_pseudo", ["strong_augment={cutout: {}}", "distribution_alignment=true"]),
    ],
)
def test_a_run_with_another_target_batch(tmp_path, script, keys):
    """Every loss takes it, and it changes what is trained."""
    config = tiny_config(tmp_path, steps=4)
    for name, size in (("equal", 8), ("more", 20)):
        folder = f"out_dir={tmp_path}/{name}"
        assert train(script, config, *keys, f"data.target_batch={size}", folder) == 0
    assert train(script, config, *keys, f"out_dir={tmp_path}/null") == 0
    states = {name: weights(tmp_path / name) for name in ("equal", "more", "null")}
    assert differing(states["equal"], states["null"]) == 0
    assert differing(states["more"], states["null"]) > 100


def test_losses_that_pair_source_and_target_refuse_another_target_batch(tmp_path):
    match = "data.target_batch: mmd_loss pairs equal numbers of source and target images; leave"
    with pytest.raises(UserError, match=match):
        train("train_mmd", tiny_config(tmp_path), "data.target_batch=20")
    config = street_config(tmp_path, "train_pseudo")
    with pytest.raises(UserError, match=r"data.target_batch: mix: classmix pastes equal numbers"):
        train("train_pseudo", config, "data.target_batch=3")
    match = "data.target_batch: all target images are labeled; set batch"
    with pytest.raises(UserError, match=match.removeprefix("data.")):
        train("finetune", finetune_config(tmp_path), "data.target_batch=3")


def test_a_set_smaller_than_its_batch_is_said(pictures):
    pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", 3)
    last = open_domains(folder_config(batch=8, size=16), 0).describe().splitlines()[-1]
    assert last == "note: a batch of target has 8 images and the set 3: they repeat"
    assert "note:" not in open_domains(folder_config(batch=3, size=16), 0).describe()


def test_a_set_that_is_absent_has_no_batches(tmp_path):
    shifted = DomainConfig("drawn_digits_shifted")
    (tmp_path / "summary.json").write_text(json.dumps({"classes": CLASSES}))
    for config, roles in (
        (data_config(), {"target_labeled"}),
        (
            TargetDataConfig(target=shifted, classes_from=str(tmp_path)),
            {"source", "target_labeled"},
        ),
        (LabeledDataConfig(target=shifted), {"source", "target"}),
    ):
        domains = open_domains(config, 0)
        for role in ("source", "target", "target_labeled"):
            assert (domains.batches(role, 0, 1) is None) == (role in roles), role


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("start", [0, 5])
def test_positions_are_those_of_the_batches(task, start):
    config = drawn_config(task, target_labeled=2)
    domains, other = (open_domains(config, seed) for seed in (7, 8))
    for role in ("source", "target", "target_labeled"):
        images = getattr(domains, role)
        positions = domains.positions(role, start, 9)
        batches = list(domains.batches(role, start, 9))
        assert len(positions) == len(batches) == 9 - start
        for numbers, batch in zip(positions, batches, strict=True):
            x = batch if images.labels is None else batch[0]
            assert torch.equal(x, images.images[images.indices[numbers]])
        assert not torch.equal(torch.stack(positions), torch.stack(other.positions(role, start, 9)))
        assert len(domains.positions(role, 9, 9)) == 0


def test_positions_of_a_dry_run_are_those_of_its_pass():
    config = LabeledDataConfig(target=DomainConfig("drawn_digits_shifted"), batch=8, eval_batch=20)
    largest = {}
    for dry_run in (True, False):
        domains = open_domains(config, 0, dry_run)
        size = len(domains.labeled_pass().dataset.set)
        positions = torch.cat(domains.positions("target_labeled", 0, 30))
        assert size == (20 if dry_run else 160)
        assert positions.max() < size
        largest[dry_run] = int(positions.max())
    assert largest[False] >= 20  # control


# --- real data


@pytest.mark.data
def test_real_mnist_and_usps(real_data, tmp_path):
    config = data_config(
        {"name": "mnist"}, {"name": "usps", "resize": 20}, root=str(real_data("MNIST", "USPS"))
    )
    domains = open_domains(config, 0)
    assert [len(s) for s in (domains.source, domains.source_val)] == [60000, 10000]
    assert [len(s) for s in (domains.target, domains.target_test)] == [7291, 2007]
    assert torch.bincount(domains.source.labels[domains.source.indices]).tolist()[:3] == [
        5923,
        6742,
        5958,
    ]
    assert domains.source.images.shape == (60000, 1, 28, 28)
    assert domains.target.images.shape == (7291, 1, 20, 20)
    assert all(
        s.images.float().mean() < 100 for s in (domains.source, domains.target)
    )  # light digits on dark ground


@pytest.mark.data
def test_real_pacs(real_data):
    photo, art = ({"name": "folder", "path": f"PACS/{name}"} for name in ("photo", "art_painting"))
    domains = open_domains(data_config(photo, art, size=28, root=str(real_data("PACS"))), 0)
    assert domains.classes == ["dog", "elephant", "giraffe", "guitar", "horse", "house", "person"]
    assert len(domains.source) + len(domains.source_val) == 1670
    assert len(domains.target) == len(domains.target_test) == 2048
    assert domains.source.images[torch.tensor([0, 1000])].shape == (2, 3, 32, 32)


@pytest.mark.data
def test_real_mnistm(real_data, tmp_path):
    images, labels = mnistm(
        real_data("MNIST", "BSDS500"), "BSDS500/train", False, tmp_path / "cache", False
    )
    assert images.shape == (10000, 3, 28, 28)
    assert labels.shape == (10000,)
    assert 80 < images.float().mean() < 150
