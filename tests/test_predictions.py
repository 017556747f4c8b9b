"""The sample of predictions that a run leaves on unlabeled target images."""

import types

import pytest
import torch

from common import ranks
from common.files import save_tensors
from training.predictions import (
    LARGEST,
    POINTS,
    Sample,
    pixels_of,
    predictions_of,
    share_that_differs,
)


class Batches:
    """Batches of a set, of given sizes."""

    def __init__(self, sizes: list[int], images: int):
        self.sizes, self.set = sizes, range(images)

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
    assert rows_of([1], large).tolist() == [[LARGEST, -LARGEST, 0.0]]


def test_pixels_against_a_plain_loop():
    logits = maps(4)
    points = POINTS // 4
    expected = []
    for image in range(4):
        for n in range(image * points, (image + 1) * points):
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
    save_tensors(file, {"images": "x", "classes": ["a"], "last": now, "selected": before})
    for start in (tmp_path, file):
        assert torch.equal(predictions_of(str(start), "x", ["a"]), before)
    assert predictions_of(str(tmp_path), "y", ["a"]) is None
    assert predictions_of(str(tmp_path), "x", ["b"]) is None
    assert predictions_of(str(tmp_path / "gone"), "x", ["a"]) is None
    assert predictions_of(None, "x", ["a"]) is None
    save_tensors(file, {"images": "x"})  # it is not such a file, and none that can be read
    assert predictions_of(str(tmp_path), "x", ["a"]) is None
    file.write_text("damaged")
    assert predictions_of(str(tmp_path), "x", ["a"]) is None
