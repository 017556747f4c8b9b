"""Metrics against slow versions, criteria against numpy, and what is chosen by them."""

import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common.evaluation import IGNORE_INDEX, Criteria, accuracies, choose, confusion_matrix, evaluate, ious
from common.pictures import class_colours, save_pictures
from common.runtime import UserError
from models import ModelOutput


def _slow_confusion(logits: torch.Tensor, labels: torch.Tensor, num_classes: int) -> np.ndarray:
    counts = np.zeros((num_classes, num_classes), np.int64)
    scores = logits.movedim(1, -1).reshape(-1, num_classes).tolist()
    for row, label in zip(scores, labels.flatten().tolist(), strict=True):
        if label != IGNORE_INDEX:
            counts[label, row.index(max(row))] += 1
    return counts


@pytest.mark.parametrize("shape", [(50,), (3, 6, 5), (2, 4, 3, 2)])
def test_confusion_matrix(shape):
    torch.manual_seed(0)
    labels = torch.randint(4, shape)  # class 4 is absent
    labels[torch.rand(shape) < 0.2] = IGNORE_INDEX
    logits = torch.randn(shape[0], 5, *shape[1:])
    confusion = confusion_matrix(logits, labels, 5)
    assert confusion.dtype == torch.int64
    assert (labels == IGNORE_INDEX).any()
    assert np.array_equal(confusion.numpy(), _slow_confusion(logits, labels, 5))


def test_confusion_matrix_of_nothing():
    assert confusion_matrix(torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64), 3).tolist() == [[0] * 3] * 3
    assert confusion_matrix(torch.zeros(2, 3), torch.full((2,), IGNORE_INDEX), 3).sum() == 0


def test_a_class_numbered_255_is_a_class():
    """More than 255 classes leave no number to ignore."""
    logits, labels = torch.eye(300), torch.arange(300)
    assert confusion_matrix(logits, labels, 300).diag().tolist() == [1] * 300


def test_accuracies():
    confusion = torch.tensor([[8, 2, 0], [1, 1, 0], [0, 0, 0]])  # class 2 is absent
    assert accuracies(confusion) == pytest.approx({"accuracy": 75.0, "mean_class_accuracy": 65.0})
    assert accuracies(torch.eye(4, dtype=torch.int64)) == {"accuracy": 100.0, "mean_class_accuracy": 100.0}
    assert accuracies(torch.zeros(3, 3, dtype=torch.int64)) == {"accuracy": None, "mean_class_accuracy": None}
    many = torch.tensor([[2**40, 1], [0, 1]])
    assert accuracies(many)["accuracy"] < 100  # beyond what float32 can count


def _numpy_criteria(logits: torch.Tensor) -> dict[str, float]:
    x = np.moveaxis(logits.double().numpy(), 1, -1).reshape(-1, logits.shape[1])
    p = np.exp(x - np.log(np.exp(x).sum(1, keepdims=True)))
    entropy, mean = -(p * np.log(p)).sum(1).mean(), p.mean(0)
    diversity = -(mean * np.log(mean)).sum()
    return {"entropy": -entropy / np.log(p.shape[1]), "infomax": (diversity - entropy) / np.log(p.shape[1])}


@pytest.mark.parametrize("shape", [(40, 7), (4, 3, 5, 6)])
def test_criteria_in_unequal_batches(shape):
    torch.manual_seed(1)
    logits, criteria = 3 * torch.randn(shape), Criteria(shape[1])
    for batch in logits.split([1, shape[0] - 1]):
        criteria.add(batch)
    assert criteria.values() == pytest.approx(_numpy_criteria(logits), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_criteria_at_the_extremes(dtype):
    """Entropy lies in [-1, 0] and infomax in [0, 1]; infinitely sure predictions stay finite in half precision."""
    one_hot = 1e4 * (2 * torch.eye(4) - 1)
    for logits, entropy, infomax in (
        (torch.zeros(8, 4), -1, 0),  # knows nothing
        (one_hot, 0, 1),  # sure, all classes
        (one_hot[:1].expand(8, 4), 0, 0),  # sure, one class: collapsed
        (torch.tensor([[1e4, 1e4, -1e4, -1e4]]), -0.5, 0),
    ):
        criteria = Criteria(4)
        criteria.add(logits.to(dtype))
        assert criteria.values() == pytest.approx({"entropy": entropy, "infomax": infomax}, abs=1e-6)


CLASSES = ["a", "b", "c"]


class Answers(nn.Module):
    """Answers with its images' first numbers as logits."""

    def __init__(self):
        super().__init__()
        self.dropout, self.modes = nn.Dropout(0.5), []

    def forward(self, images):
        self.modes += [self.training or torch.is_grad_enabled()]
        return ModelOutput(self.dropout(images), {})


def test_evaluate():
    model, device = Answers(), torch.device("cpu")
    torch.manual_seed(0)
    images, labels = torch.randn(10, 3), torch.randint(3, (10,))
    batches = [(images[:6], labels[:6]), (images[6:], labels[6:])]
    metrics = evaluate(model, batches, [images[:7]], batches[:1], CLASSES, accuracies, device)
    assert set(metrics) == {"source_val", "target", "criteria", "examples"}
    assert metrics["examples"] == []
    assert metrics["source_val"] == accuracies(torch.from_numpy(_slow_confusion(images, labels, 3)))
    assert metrics["target"] == accuracies(torch.from_numpy(_slow_confusion(images[:6], labels[:6], 3)))
    assert metrics["criteria"]["source_val"] == metrics["source_val"]["accuracy"]
    assert {k: metrics["criteria"][k] for k in ("entropy", "infomax")} == pytest.approx(
        _numpy_criteria(images[:7]), rel=1e-5
    )
    assert not any(model.modes)  # in eval, without gradients
    assert model.training  # as it came
    model.eval()
    unlabelled = evaluate(model, batches, [images], None, CLASSES, accuracies, device)
    assert unlabelled["target"] == {"accuracy": None, "mean_class_accuracy": None}
    assert unlabelled["source_val"] == metrics["source_val"]
    assert not model.training


def _entry(step: int, infomax: float, entropy: float, accuracy: float | None) -> dict:
    target = {"accuracy": accuracy, "mean_class_accuracy": accuracy and accuracy - 1}
    return {"step": step, "criteria": {"infomax": infomax, "entropy": entropy}, "target": target}


HISTORY = [
    (10, 0.2, -0.1, 55.0),
    (20, 0.9, -0.4, 40.0),
    (30, 0.5, -0.3, 80.0),
    (40, 0.9, -0.1, 60.0),
    (50, 0.3, -0.2, 80.0),
]


def test_last_selected_and_oracle_differ():
    chosen = choose([_entry(*entry) for entry in HISTORY], "infomax")
    assert chosen == {
        "last": {"step": 50, "accuracy": 80.0, "mean_class_accuracy": 79.0},
        "selected": {"step": 20, "accuracy": 40.0, "mean_class_accuracy": 39.0},  # the first of two equals
        "oracle": {"step": 30, "accuracy": 80.0, "mean_class_accuracy": 79.0},
    }
    assert choose([_entry(*entry) for entry in HISTORY], "entropy")["selected"]["step"] == 10
    assert choose([_entry(*HISTORY[0])], "infomax") == {
        name: {"step": 10, "accuracy": 55.0, "mean_class_accuracy": 54.0} for name in ("last", "selected", "oracle")
    }


def test_without_target_labels_there_are_no_figures():
    history = [_entry(step, infomax, entropy, None) for step, infomax, entropy, _ in HISTORY]
    nothing = {"accuracy": None, "mean_class_accuracy": None}
    assert choose(history, "infomax") == {
        "last": {"step": 50, **nothing},
        "selected": {"step": 20, **nothing},
        "oracle": {"step": None, **nothing},
    }


def test_target_labels_do_not_select():
    other = [_entry(step, infomax, entropy, 100 - accuracy) for step, infomax, entropy, accuracy in HISTORY]
    chosen = choose(other, "infomax")
    assert (chosen["last"]["step"], chosen["selected"]["step"]) == (50, 20)
    assert chosen["oracle"]["step"] == 20  # control: the labels did change


def test_an_oracle_of_zero_percent_is_still_an_entry():
    assert choose([_entry(1, 0.1, 0.0, 0.0), _entry(2, 0.2, 0.0, 0.0)], "infomax")["oracle"]["step"] == 1


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_criterion_that_is_no_number_is_not_selected(position):
    history = [_entry(*entry) for entry in HISTORY]
    history[position]["criteria"]["infomax"] = math.nan
    assert choose(history, "infomax")["selected"]["step"] == 20


# --- maps


NAMES = ["sky", "road", "car", "tree"]


def _slow_ious(predictions: torch.Tensor, labels: torch.Tensor, k: int) -> list[float | None]:
    pairs = [(p, t) for p, t in zip(predictions.flatten().tolist(), labels.flatten().tolist(), strict=True)]
    pairs = [(p, t) for p, t in pairs if t != IGNORE_INDEX]
    values = []
    for c in range(k):
        both, either = sum(p == t == c for p, t in pairs), sum(c in pair for pair in pairs)
        values.append(100 * both / either if any(t == c for _, t in pairs) else None)
    return values


def test_ious_against_a_slow_version():
    random = torch.Generator().manual_seed(0)
    labels = torch.randint(3, (4, 9, 7), generator=random)  # class 3 is absent, but predicted
    labels[torch.rand(labels.shape, generator=random) < 0.2] = IGNORE_INDEX
    logits = torch.randn(4, 4, 9, 7, generator=random)
    confusion = sum(confusion_matrix(x, y, 4) for x, y in zip(logits.split(1), labels.split(1), strict=True))
    figures, slow = ious(confusion, NAMES), _slow_ious(logits.argmax(1), labels, 4)
    assert list(figures["iou"]) == NAMES
    assert figures["iou"]["tree"] is None is slow[3]
    assert list(figures["iou"].values())[:3] == pytest.approx(slow[:3])
    assert figures["mean_iou"] == pytest.approx(sum(slow[:3]) / 3)
    assert ious(confusion, NAMES, ["sky", "tree"])["mean_iou"] == pytest.approx(slow[0])
    right = (logits.argmax(1) == labels).sum() / (labels != IGNORE_INDEX).sum()
    assert figures["pixel_accuracy"] == pytest.approx(100 * right.item())
    by_batch = [
        ious(confusion_matrix(x, y, 4), NAMES)["mean_iou"]
        for x, y in zip(logits.split(1), labels.split(1), strict=True)
    ]
    assert sum(by_batch) / 4 != pytest.approx(figures["mean_iou"])  # control: the mean of batches is another figure


def test_ious_of_nothing():
    figures = ious(torch.zeros(4, 4, dtype=torch.int64), NAMES)
    assert figures == {"mean_iou": None, "pixel_accuracy": None, "iou": dict.fromkeys(NAMES)}
    perfect = ious(torch.eye(4, dtype=torch.int64), NAMES)
    assert (perfect["mean_iou"], perfect["pixel_accuracy"]) == (100, 100)


def _map_batches(count: int, labelled: bool = True):
    random = torch.Generator().manual_seed(1)
    images = torch.randn(count, 4, 6, 8, generator=random)
    labels = torch.randint(4, (count, 6, 8), generator=random)
    return [(x, y) if labelled else x for x, y in zip(images.split(1), labels.split(1), strict=True)]


def test_evaluate_maps_at_the_size_of_their_labels():
    batches, device = _map_batches(8), torch.device("cpu")
    large = [(x, y.repeat_interleave(2, 1).repeat_interleave(2, 2)) for x, y in batches]
    measure = lambda confusion: ious(confusion, NAMES)  # noqa: E731
    metrics = evaluate(Answers(), batches, [x for x, _ in batches], large, NAMES, measure, device)
    expected = sum(
        confusion_matrix(torch.nn.functional.interpolate(x, size=(12, 16), mode="bilinear"), y, 4) for x, y in large
    )
    assert metrics["target"] == ious(expected, NAMES)
    assert metrics["criteria"]["source_val"] == metrics["source_val"]["mean_iou"]
    assert len(metrics["examples"]) == 4
    numbers = [next(i for i, (x, _) in enumerate(batches) if torch.equal(x[0], e[0])) for e in metrics["examples"]]
    assert numbers == [0, 2, 4, 6]  # spread over the set
    assert torch.equal(metrics["examples"][1][2], large[2][1][0])
    unlabelled = evaluate(Answers(), batches, [x for x, _ in batches[:3]], None, NAMES, measure, device)
    assert [label for *_, label in unlabelled["examples"]] == [None] * 3
    assert unlabelled["target"]["mean_iou"] is None
    void = [(x, torch.full_like(y, IGNORE_INDEX)) for x, y in batches]
    with pytest.raises(UserError, match="none of the held-out source images has a labelled pixel"):
        evaluate(Answers(), void, [], None, NAMES, measure, device)


def test_the_oracle_of_maps_goes_by_mean_iou():
    def entry(step: int, mean_iou: float, pixels: float) -> dict:
        return {"step": step, "criteria": {"entropy": step}, "target": {"mean_iou": mean_iou, "pixel_accuracy": pixels}}

    chosen = choose([entry(1, 30.0, 70.0), entry(2, 40.0, 60.0), entry(3, 20.0, 80.0)], "entropy")
    assert {name: e["step"] for name, e in chosen.items()} == {"last": 3, "selected": 3, "oracle": 2}


def test_pictures_show_image_prediction_and_label_in_the_colours_of_the_classes(tmp_path):
    names = ["road", "sky", "fence post"]  # the last is none of Cityscapes'
    colours = class_colours(names)
    assert colours[0].tolist() == [128, 64, 128]
    assert colours[1].tolist() == [70, 130, 180]
    assert len({tuple(c) for c in class_colours([f"class {i}" for i in range(40)])[:40].tolist()}) == 40
    assert class_colours(["a", "b"])[:3].tolist() == [[128, 0, 0], [0, 128, 0], [128, 128, 0]]  # PASCAL VOC's
    image = torch.full((3, 10, 20), 99, dtype=torch.uint8)
    prediction = torch.zeros(10, 20, dtype=torch.int64)
    label = torch.full((20, 40), 1)
    label[:10] = IGNORE_INDEX
    save_pictures(tmp_path / "pictures/a.png", [(image, prediction, label)] * 2, names)
    pixels = np.asarray(Image.open(tmp_path / "pictures/a.png"))
    assert pixels.shape == (2 * 14 + 4, 3 * 24 + 4, 3)
    for (y, x), colour in {
        (9, 10): [99] * 3,
        (9, 34): [128, 64, 128],
        (5, 58): [0] * 3,
        (12, 58): [70, 130, 180],
    }.items():
        assert pixels[y, x].tolist() == colour
