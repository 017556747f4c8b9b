"""Metrics against slow versions, criteria against numpy, and what is chosen by them."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from common.evaluation import IGNORE_INDEX, Criteria, accuracies, choose, confusion_matrix, evaluate
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
    metrics = evaluate(model, batches, [images[:7]], batches[:1], 3, device)
    assert set(metrics) == {"source_val", "target", "criteria"}
    assert metrics["source_val"] == accuracies(torch.from_numpy(_slow_confusion(images, labels, 3)))
    assert metrics["target"] == accuracies(torch.from_numpy(_slow_confusion(images[:6], labels[:6], 3)))
    assert metrics["criteria"]["source_val"] == metrics["source_val"]["accuracy"]
    assert {k: metrics["criteria"][k] for k in ("entropy", "infomax")} == pytest.approx(
        _numpy_criteria(images[:7]), rel=1e-5
    )
    assert not any(model.modes)  # in eval, without gradients
    assert model.training  # as it came
    model.eval()
    unlabelled = evaluate(model, batches, [images], None, 3, device)
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
