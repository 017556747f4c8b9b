"""Metrics against slow versions, and criteria against numpy."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from common.metrics import (
    IGNORE_INDEX,
    Criteria,
    ValidationLoss,
    accuracies,
    confusion_matrix,
    ious,
    labeled_mask,
    main_metric,
    where_float64,
)


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
    none = torch.zeros(0, dtype=torch.int64)
    assert confusion_matrix(torch.zeros(0, 3), none, 3).tolist() == [[0] * 3] * 3
    assert confusion_matrix(torch.zeros(2, 3), torch.full((2,), IGNORE_INDEX), 3).sum() == 0


def test_a_class_numbered_255_is_a_class():
    """More than 255 classes leave no number to ignore."""
    logits, labels = torch.eye(300), torch.arange(300)
    assert confusion_matrix(logits, labels, 300).diag().tolist() == [1] * 300


def test_accuracies():
    confusion = torch.tensor([[8, 2, 0], [1, 1, 0], [0, 0, 0]])  # class 2 is absent
    found = accuracies(confusion, NAMES[:3])
    per_class = dict(zip(NAMES, (80.0, 50.0, None), strict=False))
    assert found == {
        "accuracy": 75.0,
        "mean_class_accuracy": pytest.approx(65.0),
        "class_accuracy": per_class,
    }
    for confusion, figure in ((torch.eye(3).long(), 100.0), (torch.zeros(3, 3).long(), None)):
        assert accuracies(confusion, NAMES[:3]) == {
            "accuracy": figure,
            "mean_class_accuracy": figure,
            "class_accuracy": dict.fromkeys(NAMES[:3], figure),
        }
    many = torch.tensor([[2**40, 1], [0, 1]])
    assert accuracies(many, NAMES[:2])["accuracy"] < 100  # beyond what float32 can count


def _numpy_criteria(logits: torch.Tensor) -> dict[str, float]:
    x = np.moveaxis(logits.double().numpy(), 1, -1).reshape(-1, logits.shape[1])
    p = np.exp(x - np.log(np.exp(x).sum(1, keepdims=True)))
    entropy, mean = -(p * np.log(p)).sum(1).mean(), p.mean(0)
    diversity = -(mean * np.log(mean)).sum()
    return {
        "neg_entropy": -entropy / np.log(p.shape[1]),
        "infomax": (diversity - entropy) / np.log(p.shape[1]),
    }


@pytest.mark.parametrize("shape", [(40, 7), (4, 3, 5, 6)])
def test_criteria_in_unequal_batches(shape):
    torch.manual_seed(1)
    logits, criteria = 3 * torch.randn(shape), Criteria(shape[1])
    for batch in logits.split([1, shape[0] - 1]):
        criteria.add(batch)
    assert criteria.values() == pytest.approx(_numpy_criteria(logits), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_criteria_at_the_extremes(dtype):
    """Entropy lies in [-1, 0] and infomax in [0, 1].

    Both stay finite for one-hot predictions, in half precision too.
    """
    one_hot = 1e4 * (2 * torch.eye(4) - 1)
    for logits, entropy, infomax in (
        (torch.zeros(8, 4), -1, 0),  # knows nothing
        (one_hot, 0, 1),  # sure, all classes
        (one_hot[:1].expand(8, 4), 0, 0),  # sure, one class: collapsed
        (torch.tensor([[1e4, 1e4, -1e4, -1e4]]), -0.5, 0),
    ):
        criteria = Criteria(4)
        criteria.add(logits.to(dtype))
        expected = {"neg_entropy": entropy, "infomax": infomax}
        assert criteria.values() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("shape", [(9,), (3, 6, 5)])
def test_validation_loss_in_unequal_batches(shape):
    """The mean over all labels, not over batches."""
    random = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(shape[0], 4, *shape[1:], generator=random)
    labels = torch.randint(4, shape, generator=random)
    labels[torch.rand(shape, generator=random) < 0.3] = IGNORE_INDEX
    loss = ValidationLoss()
    assert loss.value() is None
    loss.add(logits[:1], torch.full_like(labels[:1], IGNORE_INDEX))
    assert loss.value() is None
    for part in (slice(0, 1), slice(1, None)):
        loss.add(logits[part], labels[part])
    expected = torch.nn.functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX)
    assert loss.value() == pytest.approx(expected.item(), rel=1e-5)


def test_what_counts_as_labeled():
    labels = torch.tensor([0, 254, 255])
    assert labeled_mask(labels, 255).tolist() == [True, True, False]
    assert labeled_mask(labels, 256).tolist() == [True] * 3


# --- segmentation


NAMES = ["sky", "road", "car", "tree"]


def _slow_ious(predictions: torch.Tensor, labels: torch.Tensor, k: int) -> list[float | None]:
    pairs = zip(predictions.flatten().tolist(), labels.flatten().tolist(), strict=True)
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
    pairs = list(zip(logits.split(1), labels.split(1), strict=True))
    confusions = [confusion_matrix(x, y, 4) for x, y in pairs]
    confusion = sum(confusions)
    figures, slow = ious(confusion, NAMES), _slow_ious(logits.argmax(1), labels, 4)
    assert list(figures["iou"]) == NAMES
    assert figures["iou"]["tree"] is None is slow[3]
    assert list(figures["iou"].values())[:3] == pytest.approx(slow[:3])
    assert figures["mean_iou"] == pytest.approx(sum(slow[:3]) / 3)
    assert ious(confusion, NAMES, ["sky", "tree"])["mean_iou"] == pytest.approx(slow[0])
    right = (logits.argmax(1) == labels).sum() / (labels != IGNORE_INDEX).sum()
    assert figures["pixel_accuracy"] == pytest.approx(100 * right.item())
    by_batch = [ious(c, NAMES)["mean_iou"] for c in confusions]
    # Control: the mean over batches is another figure.
    assert sum(by_batch) / 4 != pytest.approx(figures["mean_iou"])


def test_ious_of_nothing():
    figures = ious(torch.zeros(4, 4, dtype=torch.int64), NAMES)
    assert figures == {"mean_iou": None, "pixel_accuracy": None, "iou": dict.fromkeys(NAMES)}
    perfect = ious(torch.eye(4, dtype=torch.int64), NAMES)
    assert (perfect["mean_iou"], perfect["pixel_accuracy"]) == (100, 100)


def test_the_figure_a_run_is_judged_by():
    confusion = torch.eye(4, dtype=torch.int64)
    assert main_metric(accuracies(confusion, NAMES)) == "accuracy"
    assert main_metric(ious(confusion, NAMES)) == "mean_iou"


def test_a_device_without_float64_hands_over_to_the_cpu():
    """No such device is at hand here: the tensor is a stand-in."""
    apple = SimpleNamespace(device=torch.device("mps"), cpu=lambda: "on the CPU")
    assert where_float64(apple) == "on the CPU"
    x = torch.ones(2)
    assert where_float64(x) is x
