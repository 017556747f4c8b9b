"""Self-supervision: problems and contrastive loss against plain versions, and the real command."""

import contextlib
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

from common import ranks
from common.errors import UserError
from data.order import generator
from data.selfsup import (
    digit_rotations,
    flips,
    make_problem,
    quadrants,
    rotations,
    square_crops,
)
from losses.contrastive import nt_xent_loss
from models import load_run
from models.network import Network
from tests.helpers import metrics, street_config, tiny_config, train, weights

ALL = ["flip_weight=1", "location_weight=1", "contrastive_weight=1"]
VIEWS = {"strong_augment": "{photometric: {gain: [0.5, 1.5], noise: 0.2}}"}


def randn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def pixels(*shape: int) -> torch.Tensor:
    """Images of which no two pixels are alike in an image."""
    return torch.arange(math.prod(shape)).reshape(shape)


# --- problems

# What the classes mean, of an image (C, H, W) in numpy.
PLAIN = {
    rotations: [lambda x, k=k: np.rot90(x, k, (1, 2)) for k in range(4)],
    digit_rotations: [
        lambda x: x,
        lambda x: x.transpose(0, 2, 1),
        lambda x: x[:, :, ::-1],
        lambda x: np.rot90(x, -1, (1, 2)),
    ],
    flips: [lambda x: x, lambda x: x[:, ::-1]],
    quadrants: [
        lambda x, top=top, left=left: x[:, top : top + 3, left : left + 3]
        for top, left in itertools.product((0, 3), (0, 3))
    ],
}


@pytest.mark.parametrize("transform", PLAIN, ids=lambda function: function.__name__)
def test_an_image_is_transformed_as_its_label_says(transform):
    images = pixels(40, 2, 6, 6)
    views, labels = make_problem(images, transform, generator(0, "problem"))
    assert sorted(set(labels.tolist())) == list(range(len(PLAIN[transform])))
    for image, view, label in zip(images.numpy(), views.numpy(), labels.tolist(), strict=True):
        for k, plain in enumerate(PLAIN[transform]):  # the others are the control
            assert np.array_equal(view, plain(image)) == (k == label)


@pytest.mark.parametrize(("height", "width"), [(5, 9), (9, 5), (5, 5)])
def test_squares_lie_at_random_places_of_the_image(height, width):
    images = pixels(60, 1, height, width)
    squares = square_crops(images, generator(0, "crop"))
    assert squares.shape == (60, 1, 5, 5)
    starts = (squares[:, 0, 0, 0] - images[:, 0, 0, 0]).tolist()
    step = 1 if width > height else width
    places = range(abs(height - width) + 1)
    assert sorted(set(starts)) == [step * place for place in places]
    for image, square, start in zip(images, squares, starts, strict=True):
        top, left = divmod(start, width)
        assert torch.equal(square, image[:, top : top + 5, left : left + 5])


@pytest.mark.parametrize("size", [(6, 6), (5, 9)])
def test_processes_draw_as_one(monkeypatch, size):
    images = pixels(12, 3, *size)
    whole, labels = make_problem(images, rotations, generator(0, "problem"))
    monkeypatch.setenv("WORLD_SIZE", "3")
    for number in range(3):
        monkeypatch.setenv("RANK", str(number))
        rows = ranks.rows(12)
        views, part = make_problem(images[rows], rotations, generator(0, "problem"))
        assert torch.equal(part, labels[rows])
        assert torch.equal(views, whole[rows])
    alone, _ = make_problem(images[rows], rotations, generator(0, "other"))  # control
    assert not torch.equal(alone, whole[rows])


# --- the contrastive loss


def plain_nt_xent(z_1: torch.Tensor, z_2: torch.Tensor, temperature: float) -> float:
    """Equation 1 and algorithm 1 of the paper, in which the views 2k - 1 and 2k are one image."""
    z = [row.tolist() for pair in zip(z_1, z_2, strict=True) for row in pair]

    def similarity(a: list, b: list) -> float:
        dot = sum(x * y for x, y in zip(a, b, strict=True))
        return dot / math.hypot(*a) / math.hypot(*b) / temperature

    total = 0.0
    for i, view in enumerate(z):
        others = [math.exp(similarity(view, z[k])) for k in range(len(z)) if k != i]
        total -= similarity(view, z[i ^ 1]) - math.log(sum(others))
    return total / len(z)


@pytest.mark.parametrize("temperature", [0.1, 0.5, 2.0])
def test_the_contrastive_loss_against_loops(temperature):
    z_1, z_2 = randn(7, 5), randn(7, 5, seed=1)
    plain = plain_nt_xent(z_1, z_2, temperature)
    assert nt_xent_loss(z_1, z_2, temperature).item() == pytest.approx(plain, rel=1e-5)
    assert nt_xent_loss(3 * z_1, z_2, temperature).item() == pytest.approx(plain, rel=1e-5)
    shuffled = nt_xent_loss(z_1, z_2.roll(1, 0), temperature).item()
    assert shuffled != pytest.approx(plain, rel=1e-3)  # control: pairs matter


def test_the_contrastive_loss_at_its_limits():
    one = torch.ones(4, 3)
    assert nt_xent_loss(one, one).item() == pytest.approx(math.log(7))
    assert nt_xent_loss(torch.eye(4), torch.eye(4), 0.01).item() < 1e-6
    assert nt_xent_loss(one[:1], -one[:1]).item() == 0  # no other image
    nothing = torch.zeros(0, 3, requires_grad=True)
    loss = nt_xent_loss(nothing, nothing)
    assert loss.item() == 0
    loss.backward()


def test_the_contrastive_loss_brings_the_views_of_an_image_together():
    z = nn.Parameter(randn(2, 6, 4))

    def agreement() -> float:
        return torch.cosine_similarity(z[0], z[1]).mean().item()

    before, optimizer = agreement(), torch.optim.Adam([z], 0.05)
    for _ in range(100):
        optimizer.zero_grad()
        nt_xent_loss(z[0], z[1]).backward()
        optimizer.step()
    assert before < 0.5
    assert agreement() > 0.9


def test_autocast_leaves_the_contrastive_loss_in_full_precision():
    z_1, z_2 = randn(7, 5), randn(7, 5, seed=1)
    with torch.autocast("cpu", torch.bfloat16):
        loss = nt_xent_loss(z_1, z_2)
    assert torch.equal(loss, nt_xent_loss(z_1, z_2))


# --- runs


def test_a_head_learns_its_problem_on_the_target(tmp_path):
    """Location, which is learned soonest; all problems have the same lines."""
    config = tiny_config(tmp_path, steps=40, log_every=20, eval_every=1000, save_every=1000)
    keys = ["rotation_weight=0", "location_weight=1", "data.augment={}", "data.batch=16"]
    keys += ["data.size=28"]
    last = {}
    for rate in (0.05, 1e-30):
        assert (
            train("train_selfsup", config, *keys, f"optim.lr={rate}", f"out_dir={tmp_path}/{rate}")
            == 0
        )
        last[rate] = [line for line in metrics(tmp_path / str(rate)) if "lr" in line][-1]
    assert last[0.05]["location_accuracy"] > 50
    assert last[1e-30]["location_accuracy"] < 40  # control: one of four by chance


def test_a_weight_of_0_leaves_a_problem_out(tmp_path):
    config = tiny_config(tmp_path, steps=1, log_every=1, save_every=1, **VIEWS)
    heads = {}
    for name, keys in {"none": ["rotation_weight=0", "strong_augment={}"], "all": ALL}.items():
        assert train("train_selfsup", config, *keys, f"out_dir={tmp_path}/{name}") == 0
        state = weights(tmp_path / name, "checkpoints/step_00000001.pt")["heads"]
        heads[name] = {key.partition(".")[0] for key in state}
        logged = {key for line in metrics(tmp_path / name) for key in line}
        problems = {key.removesuffix("_loss") for key in logged if key.endswith("_loss")}
        assert problems - {"cls"} == heads[name]
    assert heads == {"none": set(), "all": {"rotation", "flip", "location", "contrastive"}}


def test_the_model_is_a_plain_one(tmp_path):
    config = tiny_config(tmp_path, steps=1)
    for script in ("train_source", "train_selfsup"):
        assert train(script, config, f"out_dir={tmp_path}/{script}") == 0
    plain, model = (weights(tmp_path / name) for name in ("train_source", "train_selfsup"))
    assert list(plain) == list(model)
    network, card = load_run(str(tmp_path / "train_selfsup"))
    images = torch.zeros(2, 3, 28, 28, dtype=torch.uint8)
    assert network(images).logits.shape == (2, len(card.classes))


BN = ["bn=concat"], ["bn=separate"], ["bn=separate", "bn_running=target"]


@pytest.mark.parametrize("bn", BN, ids="-".join)
def test_transformed_images_leave_the_running_statistics_alone(tmp_path, monkeypatch, bn):
    """They are those of a run without the problems, where the weights stay as they are."""
    config = tiny_config(tmp_path, steps=3, **VIEWS)
    keys = ["optim.lr=1e-30", *(f"model.{key}" for key in bn)]
    runs = {"plain": ["rotation_weight=0", "strong_augment={}"], "all": ALL, "control": ALL}
    statistics = {}
    for name, weight in runs.items():
        if name == "control":
            free = lambda self, fixed: contextlib.nullcontext()  # noqa: E731
            monkeypatch.setattr(Network, "running_statistics", free)
        assert train("train_selfsup", config, *keys, *weight, f"out_dir={tmp_path}/{name}") == 0
        state = weights(tmp_path / name)
        statistics[name] = [v for key, v in state.items() if "running" in key]
    assert len(statistics["plain"]) == 10
    pairs = zip(statistics["plain"], statistics["all"], strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    pairs = zip(statistics["plain"], statistics["control"], strict=True)
    assert not any(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("bn", ["concat", "separate", "frozen"])
def test_crops_that_are_not_square(tmp_path, bn):
    config = street_config(
        tmp_path, "train_selfsup", steps=2, strong_augment="{jitter: {gamma: [0.7, 1.5]}}"
    )
    crops = [f"data.{role}.crop=[64, 96]" for role in ("source", "target")]
    keys = [*ALL, *crops, f"model.bn={bn}", "log_every=1"]
    assert train("train_selfsup", config, *keys) == 0
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    for name in ("rotation", "flip", "location", "contrastive"):
        assert all(math.isfinite(line[f"{name}_loss"]) for line in lines)


def test_two_views_that_do_not_differ_are_refused(tmp_path):
    with pytest.raises(UserError, match="contrastive_weight needs strong_augment"):
        train("train_selfsup", tiny_config(tmp_path), "contrastive_weight=1")
    with pytest.raises(UserError, match="strong_augment is the second view"):
        train("train_selfsup", tiny_config(tmp_path), "strong_augment={noise: {}}")
    for keys in (["data.augment={flip: {}}"], ["data.target.augment={flip: {}}"]):
        with pytest.raises(UserError, match="leave flip out of augment"):
            train("train_selfsup", tiny_config(tmp_path), "rotation_set=digits", *keys)
        assert train("train_selfsup", tiny_config(tmp_path), "--dry-run", *keys) == 0  # control
