"""Attracting and dispersing: the losses, the memory, and what a run does with them."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import data
from common.errors import UserError
from losses.aad import NeighborBank, attraction_loss, dispersion_loss
from models import build_classifier
from models.config import ModelConfig
from tests.helpers import (
    ROOT,
    aad_config,
    differing,
    load_script,
    metrics,
    stop_after,
    street_config,
    summary,
    train,
    weights,
)

LAST = "checkpoints/step_00000010.pt"


def probabilities(*shape: int, seed: int = 0) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    return (3 * torch.randn(*shape, generator=random)).softmax(-1)


# --- the losses


@pytest.mark.parametrize(("images", "neighbors", "classes"), [(5, 3, 4), (1, 1, 2), (2, 4, 3)])
def test_attraction_against_a_loop(images, neighbors, classes):
    p, others = probabilities(images, classes), probabilities(images, neighbors, classes, seed=1)
    sums = [
        sum(float(p[i, k] * others[i, j, k]) for j in range(neighbors) for k in range(classes))
        for i in range(images)
    ]
    assert float(attraction_loss(p, others)) == pytest.approx(-sum(sums) / images, rel=1e-5)
    one_hot = F.one_hot(torch.zeros(2, dtype=torch.int64), 3).float()
    assert float(attraction_loss(one_hot, one_hot[:, None])) == -1


@pytest.mark.parametrize(("images", "classes"), [(6, 4), (2, 3), (1, 3)])
def test_dispersion_against_a_loop(images, classes):
    p = probabilities(images, classes)
    sums = [
        sum(float(p[i] @ p[m]) for m in range(images) if m != i)  # itself is none of the others
        for i in range(images)
    ]
    loss = float(dispersion_loss(p, torch.arange(images)))
    assert loss == pytest.approx(sum(sums) / images, rel=1e-5, abs=1e-6)


def test_an_image_that_is_there_twice_is_no_other_image():
    p = probabilities(3, 4)
    twice, numbers = p[[0, 1, 2, 1]], torch.tensor([5, 2, 9, 2])
    expected = sum(float(twice[i] @ twice[m]) for i in range(4) for m in range(4)) / 4
    expected -= sum(float(twice[i] @ twice[m]) for i, m in [(0, 0), (2, 2)]) / 4
    expected -= sum(float(twice[i] @ twice[m]) for i in (1, 3) for m in (1, 3)) / 4
    assert float(dispersion_loss(twice, numbers)) == pytest.approx(expected, rel=1e-5)


def test_the_gradient_of_dispersion_reaches_both_images():
    p = probabilities(3, 4).requires_grad_()
    (gradient,) = torch.autograd.grad(dispersion_loss(p, torch.arange(3)), p)
    expected = 2 * (p.sum(0) - p) / 3
    assert torch.allclose(gradient, expected.detach(), atol=1e-6)


def test_losses_of_no_image_are_zero_and_attached():
    p = torch.zeros(0, 4, requires_grad=True)
    for loss in (attraction_loss(p, torch.zeros(0, 2, 4)), dispersion_loss(p, torch.arange(0))):
        assert float(loss.detach()) == 0
        loss.backward()


# --- the memory


def test_the_nearest_are_those_of_a_loop():
    features = F.normalize(torch.randn(9, 4, generator=torch.Generator().manual_seed(0)), dim=1)
    bank, p = NeighborBank(9, 4, 3), probabilities(9, 3)
    bank.remember(torch.arange(9), features, p)
    images = torch.tensor([4, 0, 7])
    found = bank.nearest(images, features[images], 3)
    for row, i in enumerate(images.tolist()):
        others = [j for j in range(9) if j != i]
        others.sort(key=lambda j: -float(features[i] @ features[j]))
        assert torch.equal(found[row], p[others[:3]])
    with_itself = (features[images] @ features.T).topk(3).indices  # control
    assert with_itself[:, 0].tolist() == images.tolist()


def test_the_memory_is_of_constants_and_replaces_rows():
    bank = NeighborBank(4, 2, 2)
    features = torch.eye(2).requires_grad_()
    bank.remember(torch.tensor([3, 1]), features, features)
    assert bank.features.tolist() == [[0, 0], [0, 1], [0, 0], [1, 0]]
    assert not bank.p.requires_grad
    bank.remember(
        torch.tensor([2, 0, 2]), torch.tensor([[1.0, 2], [3, 4], [5, 6]]), torch.ones(3, 2)
    )
    assert bank.features.tolist() == [[3, 4], [0, 1], [1, 2], [1, 0]]  # of two rows the first
    assert set(bank.state_dict()) == {"features", "p"}


# --- the script


def test_a_pass_over_the_target_starts_from_nothing():
    """Processes add up what they have forwarded, so that no row of a stopped pass may remain."""
    fill = load_script(ROOT / "train_aad.py").fill
    model = build_classifier(ModelConfig(batch_norm=False), 10, "")
    bank = NeighborBank(6, model.channels[model.head_layer], 10)
    bank.features.fill_(1)
    bank.p.fill_(1)
    images = torch.randint(256, (2, 3, 28, 28), dtype=torch.uint8)
    fill(bank, model, [(1, images)], 2, torch.autocast("cpu", enabled=False), torch.device("cpu"))
    assert (bank.p.sum(1) > 0).tolist() == [False, False, True, True, False, False]
    assert torch.allclose(bank.features.norm(dim=1)[2:4], torch.ones(2))
    assert model.training


def test_the_memory_has_every_image_of_the_target(tmp_path):
    """It starts with one pass over the target in eval mode."""
    config = aad_config(tmp_path, save_every=1, steps=1)
    assert train("train_aad", config, "optim.lr=1e-30", "optim.weight_decay=0") == 0
    state = weights(tmp_path / "run", "checkpoints/step_00000001.pt")["bank"]
    assert state["p"].shape == (200, 10)
    assert torch.allclose(state["p"].sum(1), torch.ones(200), atol=1e-5)
    assert torch.allclose(state["features"].norm(dim=1), torch.ones(200), atol=1e-5)
    # It does not depend on how many are forwarded at once.
    keys = ["optim.lr=1e-30", "optim.weight_decay=0", "data.eval_batch=7", "data.workers=2"]
    assert train("train_aad", config, *keys, f"out_dir={tmp_path}/other") == 0
    other = weights(tmp_path / "other", "checkpoints/step_00000001.pt")["bank"]
    assert torch.allclose(state["p"], other["p"], atol=1e-5)
    assert (state["p"][0] != state["p"][1:]).any()  # control: images differ


def test_each_row_is_of_its_image(tmp_path):
    """Steps that train nothing forward the images as the first pass has: no row changes."""
    config = aad_config(tmp_path, save_every=1, model="{bn: frozen}")
    still = ["optim.lr=1e-30", "optim.weight_decay=0", "data.augment={}"]
    for steps in (1, 26):  # 25 batches are one pass over the target
        keys = [f"steps={steps}", f"save_every={steps}", f"out_dir={tmp_path}/{steps}"]
        assert train("train_aad", config, *still, *keys) == 0
    files = [tmp_path / f"{steps}/checkpoints/step_{steps:08d}.pt" for steps in (1, 26)]
    first, last = (torch.load(file, weights_only=True)["bank"] for file in files)
    for name in ("features", "p"):
        assert torch.allclose(first[name], last[name], atol=1e-5)
        assert not torch.allclose(first[name], last[name].roll(1, 0), atol=1e-5)  # control


def test_a_step_replaces_what_the_memory_knows_of_its_images(tmp_path):
    config = aad_config(tmp_path, save_every=1, steps=2)
    assert train("train_aad", config) == 0
    files = [f"checkpoints/step_0000000{k}.pt" for k in (1, 2)]
    first, second = (weights(tmp_path / "run", file)["bank"]["p"] for file in files)
    assert (first != second).any(1).sum() == 8  # a batch


def test_the_weight_of_dispersion_decays(tmp_path):
    keys = ["log_every=1", "disperse_weight=2", "disperse_decay=1"]
    assert train("train_aad", aad_config(tmp_path), *keys) == 0
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    coefficients = [line["disperse_coeff"] for line in lines]
    assert coefficients == pytest.approx([2 / (1 + t) for t in range(10)])


@pytest.mark.parametrize(("stop", "workers"), [(6, 0), (4, 2)])
def test_resume_is_exact(tmp_path, monkeypatch, stop, workers):
    config = aad_config(tmp_path)
    assert train("train_aad", config, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert train("train_aad", config, f"data.workers={workers}") == 143
    assert train("train_aad", config, "--resume") == 0
    whole, resumed = (weights(tmp_path / run, LAST) for run in ("whole", "run"))
    del whole["seconds"], resumed["seconds"]
    assert differing(whole, resumed) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


def test_control_a_lost_memory_is_seen(tmp_path, monkeypatch):
    config = aad_config(tmp_path)
    assert train("train_aad", config, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_aad", config) == 143
    file = tmp_path / "run/checkpoints/step_00000006.pt"
    state = torch.load(file, weights_only=True)
    state["bank"]["features"] = state["bank"]["features"].roll(1, 0)
    file.with_name(file.name + ".sha256").unlink()
    torch.save(state, file)
    assert train("train_aad", config, "--resume") == 0
    models = (weights(tmp_path / run, LAST)["model"] for run in ("whole", "run"))
    assert differing(*models) > 0


def test_target_labels_do_not_train_or_select(tmp_path, monkeypatch):
    config = aad_config(tmp_path)
    assert train("train_aad", config, f"out_dir={tmp_path}/plain") == 0
    opener = data.classification.open_drawn

    def permuted(name, train_split):
        images = opener(name, train_split)
        return dataclasses.replace(images, labels=images.labels.roll(1, 0))

    monkeypatch.setattr(data.classification, "open_drawn", permuted)
    assert train("train_aad", config, f"out_dir={tmp_path}/permuted") == 0
    assert differing(weights(tmp_path / "plain"), weights(tmp_path / "permuted")) == 0
    plain, other = (summary(tmp_path / run)["target"] for run in ("plain", "permuted"))
    assert plain["last"]["accuracy"] != other["last"]["accuracy"]  # control


def test_what_cannot_be_asked_for(tmp_path):
    config = aad_config(tmp_path)
    with pytest.raises(UserError, match="neighbors: the target has 200 images"):
        train("train_aad", config, "neighbors=200")
    with pytest.raises(UserError, match="init_from is missing"):
        train("train_aad", config, "init_from=null")
    street = street_config(tmp_path, "train_aad")
    with pytest.raises(UserError, match=r"data\.task must be classification"):
        train("train_aad", street, "data.source=null", f"init_from={tmp_path}/source")
