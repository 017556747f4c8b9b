"""Rare class sampling of source images, `data.rare_class_temperature`."""

import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from common.metrics import IGNORE_INDEX
from data import open_domains, rare_classes
from data.image_set import image_set, join
from data.rare_classes import LEAST_SHARE, RareClassOrder, class_counts
from tests.helpers import (
    ROOT,
    TASKS,
    batches_in_pieces,
    config_of,
    differing,
    load_script,
    stop_after,
    tiny_config,
    train,
    weights,
)
from training.config import load_run_config

# Four images of 900 labels: class 2 is rare, class 3 rarer than LEAST_SHARE, class 4 never occurs.
COUNTS = torch.tensor([[900, 0, 0, 0, 0], [600, 300, 0, 0, 0], [540, 350, 10, 0, 0]])
COUNTS = torch.cat([COUNTS, torch.tensor([[899, 0, 0, 1, 0]])])


def order_of(temperature: float, counts: torch.Tensor = COUNTS, batch: int = 4) -> RareClassOrder:
    return RareClassOrder(0, "source", counts, batch, temperature)


def test_classes_are_drawn_by_their_rarity():
    """As often as the formula says, written out for each class."""
    temperature, total = 0.3, COUNTS.sum().item()
    weights = [math.exp((1 - COUNTS[:, c].sum().item() / total) / temperature) for c in range(4)]
    expected = torch.tensor([w / sum(weights) for w in weights])
    drawn = order_of(temperature).classes(torch.arange(20_000))
    shares = drawn.bincount(minlength=5) / len(drawn)
    assert shares[4] == 0
    deviation = (expected * (1 - expected) / len(drawn)).sqrt()
    assert ((shares[:4] - expected).abs() < 4 * deviation).all()
    even = order_of(1e6).classes(torch.arange(20_000)).bincount(minlength=5)[:4] / 20_000
    assert (even - 0.25).abs().max() < 0.02  # a high temperature knows no rare class


def test_an_image_shows_the_class_that_was_drawn():
    order, positions = order_of(0.5), torch.arange(4000)
    classes, images = order.classes(positions), order.positions(0, 4000)
    enough = {0: {0, 1, 2, 3}, 1: {1, 2}, 2: {2}, 3: {3}}  # image 3 has too little of class 3
    for c, shown in enough.items():
        assert set(images[classes == c].tolist()) == shown
    assert COUNTS[3, 3] < LEAST_SHARE * 900 <= COUNTS[2, 2]
    few = torch.cat([COUNTS, torch.tensor([[0, 0, 0, 900, 0]])])  # now another image has enough
    order = order_of(0.5, few)
    images = order.positions(0, 4000)
    assert set(images[order.classes(positions) == 3].tolist()) == {4}


def test_positions_alone_decide():
    order = order_of(0.1)
    whole = order.positions(0, 40)
    assert torch.equal(order_of(0.1).positions(17, 9), whole[17:26])
    assert torch.equal(order_of(0.1, batch=10).rows(2)[1], whole[20:30])
    other = RareClassOrder(1, "source", COUNTS, 4, 0.1).positions(0, 40)
    assert not torch.equal(other, whole)


def masks_of(count: int = 5) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    masks = torch.randint(4, (count, 8, 9), dtype=torch.uint8, generator=random)
    return masks.masked_fill(masks == 3, IGNORE_INDEX)


def test_counts_of_masks_and_of_class_numbers():
    masks, classes = masks_of(), ["a", "b", "c"]
    images = image_set("m", torch.zeros(5, 3, 8, 9), masks, classes)
    counts = class_counts(images, None)
    for i in range(5):
        assert counts[i].tolist() == [int((masks[i] == c).sum()) for c in range(3)]
    part = images.subset(torch.tensor([4, 1]))
    assert torch.equal(class_counts(part, None), counts[[4, 1]])
    renamed = images.relabeled(["c", "a", "b"])
    assert torch.equal(class_counts(renamed, None), counts[:, [2, 0, 1]])
    other = replace(images, classes=["c", "a", "b"], indices=torch.tensor([3]))
    both = class_counts(join([images, other]), None)
    assert torch.equal(both, torch.cat([counts, counts[[3]][:, [1, 2, 0]]]))
    numbers = image_set("n", torch.zeros(4, 3, 2, 2), [2, 0, 0, 1], classes)
    expected = [[0, 0, 1], [1, 0, 0], [1, 0, 0], [0, 1, 0]]
    assert class_counts(numbers, None).tolist() == expected


@pytest.fixture
def rare_street(tmp_path):
    """A config of six images of 40x60 px, of which image 4 has a car of 8x8 px, others none."""
    for i in range(6):
        pixels = np.random.default_rng(i).integers(256, size=(40, 60, 3)).astype(np.uint8)
        mask = np.repeat(np.repeat([[0], [1]], 20, 0), 60, 1).astype(np.uint8)
        if i == 4:
            mask[16:24, 26:34] = 2
        for part, array in (("day/images", pixels), ("day/masks", mask), ("dusk", pixels)):
            (tmp_path / "images" / part).mkdir(parents=True, exist_ok=True)
            Image.fromarray(array).save(tmp_path / "images" / part / f"{i}.png")
    data = (
        "{task: segmentation, source_val: 0, target: {name: folder, path: dusk, crop: [16, 16]}, "
        "source: {name: folder, path: day/images, masks: day/masks, ids: [sky, road, car], "
        "crop: [16, 16]}, augment: {}, batch: 4, root: images, cache: cache}"
    )
    model = "{backbone: mobilenet_v2, output_stride: 16}"
    return tiny_config(tmp_path, data=data, model=model, steps=4)


def section_of(file, *keys):
    return load_run_config(load_script(ROOT / "train_source.py").Config, [file], keys).data


@pytest.mark.parametrize("workers", [0, 1])
def test_crops_show_the_rare_class(rare_street, workers):
    shares = {}
    for temperature in ("null", "0.01"):
        keys = f"data.rare_class_temperature={temperature}", f"data.workers={workers}"
        domains = open_domains(section_of(rare_street, *keys), 0)
        masks = torch.cat([y for _, y in domains.batches("source", 0, 20)])
        shares[temperature] = (masks == 2).flatten(1).any(1).float().mean()
        tail = torch.cat([y for _, y in domains.batches("source", 13, 20)])
        assert torch.equal(tail, masks[4 * 13 :])
    assert shares["null"] < 0.2
    assert shares["0.01"] > 0.9


def test_counts_of_files_are_stored(rare_street, monkeypatch):
    config = section_of(rare_street)
    images, folder = open_domains(config, 0).source, Path(config.cache)
    counts = class_counts(images, folder)
    assert counts.tolist() == [[1200, 1200, 0]] * 4 + [[1168, 1168, 64], [1200, 1200, 0]]
    (file,) = folder.glob("counts_*.pt")
    with monkeypatch.context() as patch:
        patch.setattr(rare_classes, "one", None)  # a mask is read by it
        assert torch.equal(class_counts(images, folder), counts)
        file.write_bytes(file.read_bytes()[:-7])
        with pytest.raises(TypeError):
            class_counts(images, folder)
    assert torch.equal(class_counts(images, folder), counts)
    Image.fromarray(np.zeros((40, 60), np.uint8)).save("images/day/masks/2.png")
    changed = class_counts(open_domains(config, 0).source, folder)
    assert changed[2].tolist() == [2400, 0, 0]


def test_processes_and_parts_share_a_batch(tmp_path, monkeypatch):
    file = config_of("classification", tmp_path, "train_source")
    domains = open_domains(section_of(file, "data.rare_class_temperature=0.1"), 3)
    monkeypatch.setattr(rare_classes.ranks, "first_on_machine", lambda function: function())
    pieces = batches_in_pieces(domains, "source", 3, monkeypatch)
    for step, whole in enumerate(pieces["whole"]):
        assert torch.equal(whole, pieces["processes"][step])
        assert torch.equal(whole, pieces["parts"][step])
    assert not torch.equal(pieces["whole"][0], pieces["whole"][1])  # control


@pytest.mark.parametrize("task", TASKS)
def test_a_run_with_it_trains_another_network_and_resumes(tmp_path, monkeypatch, task):
    config = config_of(task, tmp_path, "train_source")
    keys, last = ["steps=4"], "checkpoints/step_00000004.pt"
    assert train("train_source", config, *keys, f"out_dir={tmp_path}/plain") == 0
    keys += ["data.rare_class_temperature=0.1"]
    assert train("train_source", config, *keys, "--dry-run") == 0
    assert train("train_source", config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train("train_source", config, *keys) == 143
    assert train("train_source", config, *keys, "--resume") == 0
    states = [weights(tmp_path / name, last)["model"] for name in ("plain", "whole", "run")]
    assert differing(*states[:2]) > 1000
    assert differing(*states[1:]) == 0


def test_what_is_refused(tmp_path):
    file = config_of("classification", tmp_path, "train_source")
    with pytest.raises(UserError, match="rare_class_temperature must be positive"):
        section_of(file, "data.rare_class_temperature=0")
    keys = ["data.source=null", "init_from=runs/a", "data.rare_class_temperature=0.1"]
    with pytest.raises(UserError, match="rare_class_temperature is for source images, which"):
        load_run_config(load_script(ROOT / "train_shot.py").Config, [file], keys)
