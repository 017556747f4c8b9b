"""The sample of predictions that a run leaves on unlabeled target images."""

import types

import pytest
import torch

from common import ranks
from common.files import load_tensors, save_tensors
from tests.helpers import street_config, train
from training.predictions import (
    LARGEST,
    POINTS,
    PREDICTIONS,
    Sample,
    agreement_of,
    pixels_of,
    predictions_of,
    share_that_differs,
)


class Numbered:
    """A set of images whose numbers begin with 10."""

    def __init__(self, images: int):
        self.indices = torch.arange(10, 10 + images)

    def __len__(self) -> int:
        return len(self.indices)


class Batches:
    """Batches of a set, of given sizes."""

    def __init__(self, sizes: list[int], images: int):
        self.sizes, self.set = sizes, Numbered(images)

    def start(self, k: int) -> int:
        return sum(self.sizes[:k])


def loader(sizes: list[int], images: int | None = None):
    images = sum(sizes) if images is None else images
    return types.SimpleNamespace(dataset=Batches(sizes, images))


def maps(count: int, side: int = 8) -> torch.Tensor:
    return torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))


def rows_of(sizes: list[int], logits: torch.Tensor) -> torch.Tensor:
    sample = Sample(loader(sizes))
    for batch in logits.split(sizes):
        sample.add(batch)
    return sample.rows()


def test_points_lie_evenly_at_the_same_places_of_any_map():
    numbers = torch.arange(4000)
    rows, columns = pixels_of(numbers, 10, 20)
    assert rows.min() >= 0
    assert rows.max() < 10
    assert columns.max() < 20
    counts = (20 * rows + columns).bincount(minlength=200)
    assert counts.min() >= 16  # 20 on average
    assert counts.max() <= 24
    coarse = pixels_of(numbers, 5, 10)
    assert torch.equal(rows // 2, coarse[0])
    assert torch.equal(columns // 2, coarse[1])


def test_images_are_taken_entirely_in_order():
    logits = torch.randn(7, 3)
    assert torch.equal(rows_of([3, 3, 1], logits), logits.half())
    assert torch.equal(rows_of([7], logits), logits.half())
    large = torch.tensor([[1e9, -1e9, 0.0]])
    assert rows_of([1], large).tolist() == [[LARGEST, -LARGEST, -LARGEST]]
    two = torch.tensor([[70_000.0, 90_000.0, 50_000.0]])  # of which the second stays the largest
    assert rows_of([1], two).tolist() == [[40_000.0, LARGEST, 20_000.0]]


def test_pixels_against_a_plain_loop():
    logits = maps(4)
    points = POINTS // 4
    expected = []
    for image in range(4):
        for n in range((10 + image) * points, (11 + image) * points):
            row = int((0.5 + n) * 0.5698402909980532 % 1 * 8)
            column = int((0.5 + n) * 0.7548776662466927 % 1 * 8)
            expected.append(logits[image, :, row, column])
    assert torch.equal(rows_of([4], logits), torch.stack(expected).half())
    # Whatever the batches, the pixels are the same.
    assert torch.equal(rows_of([1, 3], logits), rows_of([4], logits))
    assert not torch.equal(rows_of([4], logits), rows_of([4], logits.flip(0)))  # control


def test_many_maps_have_few_pixels_each():
    sample = Sample(loader([2], images=3 * POINTS))
    sample.add(maps(2))
    assert sample.rows().shape == (2, 3)


def test_nothing_is_none():
    assert Sample(loader([], images=0)).rows() is None


def test_two_processes_have_the_sample_of_one(monkeypatch):
    """Batches 0 and 2 are those of process 0, batch 1 that of process 1."""
    logits, sizes = maps(5), [2, 2, 1]
    monkeypatch.setattr(ranks, "count", lambda: 2)
    samples = []
    for number in (0, 1):
        monkeypatch.setattr(ranks, "number", lambda number=number: number)
        sample = Sample(loader(sizes))
        for batch in logits.split(sizes)[number::2]:
            sample.add(batch)
        samples.append(sample)
    both = [[(k, x) for k, x in sample.numbered] for sample in samples]
    monkeypatch.setattr(ranks, "gather_objects", lambda own: both)
    shared = samples[0].rows()
    monkeypatch.undo()
    assert torch.equal(shared, rows_of(sizes, logits))


def test_the_predictions_of_a_start(tmp_path):
    before = torch.eye(3)[[0, 1, 2, 0]]
    now = torch.eye(3)[[0, 1, 1, 1]]
    assert share_that_differs(before, now) == pytest.approx(0.5)
    assert share_that_differs(now, now) == 0
    file = tmp_path / "predictions.pt"
    sample = {"set": "x", "numbers": torch.tensor([1, 2, 5, 7]), "classes": ["a"]}
    save_tensors(file, {**sample, "last": now, "selected": before})
    for start in (tmp_path, file):
        assert torch.equal(predictions_of(str(start), sample), before)
    assert predictions_of(str(tmp_path), {**sample, "set": "y"}) is None
    assert predictions_of(str(tmp_path), {**sample, "classes": ["b"]}) is None
    assert predictions_of(str(tmp_path), {**sample, "numbers": torch.arange(4)}) is None
    assert predictions_of(str(tmp_path / "gone"), sample) is None
    assert predictions_of(None, sample) is None
    save_tensors(file, {"set": "x"})  # it is not such a file, and none that can be read
    assert predictions_of(str(tmp_path), sample) is None
    file.write_text("damaged")
    assert predictions_of(str(tmp_path), sample) is None


@pytest.mark.parametrize("per_image", [1, 3])
def test_agreement_of_two_runs_against_a_loop(per_image):
    random = torch.Generator().manual_seed(0)

    def run(numbers: list[int]) -> dict:
        logits = torch.randn(len(numbers) * per_image, 4, generator=random).half()
        numbers = torch.tensor(numbers, dtype=torch.int32)
        return {"set": "x", "classes": ["a"], "numbers": numbers, "selected": logits}

    first, second = run([1, 3, 4, 8, 9]), run([0, 3, 8, 9, 11, 12])
    places = {
        number: [x["numbers"].tolist().index(number) for x in (first, second)]
        for number in (3, 8, 9)
    }
    equal = []
    for i, j in places.values():
        for k in range(per_image):
            row, other = first["selected"][i * per_image + k], second["selected"][j * per_image + k]
            equal.append(float(row.argmax() == other.argmax()))
    assert 0 < sum(equal) < len(equal)  # control
    assert agreement_of(first, second) == pytest.approx(sum(equal) / len(equal))
    assert agreement_of(first, first) == 1
    assert agreement_of(first, run([2, 5])) is None
    assert agreement_of(first, {**second, "set": "y"}) is None
    assert agreement_of(first, {**second, "classes": ["b"]}) is None
    fewer = {**second, "selected": second["selected"].repeat_interleave(2, 0)}
    assert agreement_of(first, fewer) is None  # other pixels of each map


def test_the_same_pixels_of_two_seeds(tmp_path):
    """Of two seeds that begin with the same weights and keep them."""
    config, saved = street_config(tmp_path, "train_source", steps=1, eval_every=1), []
    still = ["optim.lr=1e-30", "optim.weight_decay=0", "model.bn=frozen"]
    assert train("train_source", config, f"out_dir={tmp_path}/start") == 0
    for seed in (0, 1):
        keys = [f"seed={seed}", f"out_dir={tmp_path}/{seed}", f"init_from={tmp_path}/start"]
        assert train("train_source", config, *still, *keys) == 0
        saved.append(load_tensors(tmp_path / f"{seed}/{PREDICTIONS}"))
    assert torch.equal(saved[0]["numbers"], saved[1]["numbers"])
    assert len(saved[0]["numbers"]) == 4  # of twelve scenes
    assert saved[0]["selected"].shape == (4 * (POINTS // 4), 7)  # seven classes
    assert torch.equal(saved[0]["selected"], saved[1]["selected"])
    start = load_tensors(tmp_path / f"start/{PREDICTIONS}")
    assert not torch.equal(start["selected"], start["selected"].flip(0))  # control
    assert agreement_of(*saved) == 1
