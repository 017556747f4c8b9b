"""Evaluation of a model on the sets of a run, what is chosen by it, and pictures."""

import functools
import itertools
import math

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from common import drawing
from common.drawing import class_colors
from common.errors import UserError
from common.metrics import IGNORE_INDEX, Criteria, accuracies, confusion_matrix, ious
from data import EvaluationSets
from models import ModelOutput
from training.evaluation import choose, compact, evaluate
from training.pictures import save_pictures

CLASSES = ["a", "b", "c"]
NOTHING = {
    "accuracy": None,
    "mean_class_accuracy": None,
    "class_accuracy": dict.fromkeys(CLASSES),
}


class Answers(nn.Module):
    """Answers with its images' first numbers as logits."""

    def __init__(self):
        super().__init__()
        self.dropout, self.modes = nn.Dropout(0.5), []
        self.unused = nn.Parameter(torch.zeros(()))  # its device is the model's

    def forward(self, images):
        self.modes += [self.training or torch.is_grad_enabled()]
        return ModelOutput(self.dropout(images), {})


def sets_of(source_val, target_train, target_test, val_loss: bool = False) -> EvaluationSets:
    """Sets of classification."""
    measure = functools.partial(accuracies, classes=CLASSES)
    return EvaluationSets(source_val, target_train, target_test, CLASSES, measure, val_loss)


def criteria_of(logits: torch.Tensor) -> dict[str, float]:
    criteria = Criteria(logits.shape[1])
    criteria.add(logits)
    return criteria.values()


def labeled_batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Ten images with labels, in batches of 6 and 4."""
    random = torch.Generator().manual_seed(0)
    images = torch.randn(10, 3, generator=random)
    labels = torch.randint(3, (10,), generator=random)
    return list(zip(images.split([6, 4]), labels.split([6, 4]), strict=True))


def figures_of(*batches: tuple[torch.Tensor, torch.Tensor]) -> dict:
    return accuracies(sum(confusion_matrix(x, y, 3) for x, y in batches), CLASSES)


def test_evaluate():
    model, batches = Answers(), labeled_batches()
    images = torch.cat([x for x, _ in batches])
    metrics, examples, _ = evaluate(model, sets_of(batches, [images[:7]], batches[:1]))
    names = {"source_val", "source_count", "target", "criteria", "predicted", "confusion"}
    assert set(metrics) == names
    assert metrics["source_count"] == 10
    counts = images[:7].argmax(1).bincount(minlength=3).tolist()
    assert metrics["predicted"] == dict(zip(CLASSES, counts, strict=True))
    assert examples == []
    assert metrics["source_val"] == figures_of(*batches)
    assert metrics["target"] == figures_of(batches[0]) != metrics["source_val"]
    assert metrics["criteria"] == {
        "source_val": metrics["source_val"]["accuracy"],
        **criteria_of(images[:7]),
    }
    assert len(model.modes) == 4
    assert not any(model.modes)  # in eval mode, without gradients
    assert model.training  # the mode is restored
    model.eval()
    unlabeled, _, _ = evaluate(model, sets_of(batches, [images], None))
    assert unlabeled["target"] == NOTHING
    assert unlabeled["confusion"] is None
    assert unlabeled["source_val"] == metrics["source_val"]
    assert not model.training


def test_evaluate_without_a_source():
    first, second = labeled_batches()
    metrics, _, _ = evaluate(Answers(), sets_of(None, [first[0]], [second]))
    assert metrics["source_val"] == NOTHING
    assert metrics["target"] == figures_of(second)
    assert metrics["confusion"].equal(confusion_matrix(*second, 3))
    assert metrics["criteria"] == criteria_of(first[0])  # no source_val among them


def test_the_validation_loss_is_a_criterion_where_labels_may_be_used():
    batches = labeled_batches()
    metrics, _, _ = evaluate(Answers(), sets_of(None, None, batches, val_loss=True))
    images, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
    loss = nn.functional.cross_entropy(images, labels).item()
    assert metrics["criteria"] == {"neg_val_loss": pytest.approx(-loss, rel=1e-5)}
    void = [(x, torch.full_like(y, IGNORE_INDEX)) for x, y in batches]
    with pytest.raises(UserError, match="none of the validation images has a labeled pixel"):
        evaluate(Answers(), sets_of(None, None, void, val_loss=True))
    metrics, _, _ = evaluate(Answers(), sets_of(None, None, batches))  # control
    assert metrics["criteria"] == {}


def _entry(
    step: int, infomax: float, entropy: float, accuracy: float | None, collapsed=None
) -> dict:
    target = {"accuracy": accuracy, "mean_class_accuracy": accuracy and accuracy - 1}
    return {
        "step": step,
        "criteria": {"infomax": infomax, "neg_entropy": entropy},
        "target": target,
        "collapsed": collapsed,
    }


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
        # The first of two equals.
        "selected": {"step": 20, "accuracy": 40.0, "mean_class_accuracy": 39.0},
        "oracle": {"step": 30, "accuracy": 80.0, "mean_class_accuracy": 79.0},
    }
    assert choose([_entry(*entry) for entry in HISTORY], "neg_entropy")["selected"]["step"] == 10
    last = choose([_entry(*entry) for entry in HISTORY], "last")  # no criterion: the last one
    assert last == {**chosen, "selected": chosen["last"]}
    assert choose([_entry(*HISTORY[0])], "infomax") == {
        name: {"step": 10, "accuracy": 55.0, "mean_class_accuracy": 54.0}
        for name in ("last", "selected", "oracle")
    }


def test_a_collapsed_evaluation_is_not_selected():
    collapsed = {20: "one class", 40: "one class"}  # both of the highest infomax
    history = [_entry(*entry, collapsed.get(entry[0])) for entry in HISTORY]
    chosen = choose(history, "infomax")
    assert chosen["selected"]["step"] == 30
    assert choose(history, "neg_entropy")["selected"]["step"] == 10
    history = [_entry(*entry, "one class") for entry in HISTORY]
    assert choose(history, "infomax")["selected"]["step"] == 20  # all are: there is no other
    assert choose(history[:4], "last")["selected"]["step"] == 40
    assert choose(history, "infomax")["oracle"] == chosen["oracle"]


@pytest.mark.parametrize("parts", [[], [20], [30], [20, 40]])
@pytest.mark.parametrize("labeled", [True, False])
def test_a_compact_history_gives_the_same_choice(parts, labeled):
    """At every step of a run that is stopped and resumed after each evaluation."""
    history, kept = [], []
    for step, infomax, entropy, accuracy in HISTORY:
        new = _entry(step, infomax, entropy, accuracy if labeled else None)
        new["source_val"] = {"accuracy": 1.0}
        if step in parts:
            new["part_ends"] = True
        history.append(new)
        kept = compact([*kept, new], "infomax")
        assert choose(kept, "infomax") == choose(history, "infomax")
        assert kept[-1] == new
    ends = [0, *parts, 50]
    for begin, end in itertools.pairwise(ends):
        whole, short = ([e for e in h if begin < e["step"] <= end] for h in (history, kept))
        assert choose(short, "infomax")["selected"] == choose(whole, "infomax")["selected"]
    assert ("source_val" in kept[0]) != labeled  # control: with labels, nothing chooses it
    assert compact([], "infomax") == []


def test_without_target_labels_there_are_no_figures():
    history = [_entry(step, infomax, entropy, None) for step, infomax, entropy, _ in HISTORY]
    nothing = {"accuracy": None, "mean_class_accuracy": None}
    assert choose(history, "infomax") == {
        "last": {"step": 50, **nothing},
        "selected": {"step": 20, **nothing},
        "oracle": {"step": None, **nothing},
    }


def test_target_labels_do_not_select():
    other = [
        _entry(step, infomax, entropy, 100 - accuracy)
        for step, infomax, entropy, accuracy in HISTORY
    ]
    chosen = choose(other, "infomax")
    assert (chosen["last"]["step"], chosen["selected"]["step"]) == (50, 20)
    assert chosen["oracle"]["step"] == 20  # control: the labels did change


def test_an_oracle_of_zero_percent_is_still_an_entry():
    history = [_entry(1, 0.1, 0.0, 0.0), _entry(2, 0.2, 0.0, 0.0)]
    assert choose(history, "infomax")["oracle"]["step"] == 1


@pytest.mark.parametrize("position", [0, 2, 4])
def test_a_criterion_that_is_no_number_is_not_selected(position):
    history = [_entry(*entry) for entry in HISTORY]
    history[position]["criteria"]["infomax"] = math.nan
    assert choose(history, "infomax")["selected"]["step"] == 20


# --- segmentation


NAMES = ["sky", "road", "car", "tree"]


def _map_batches(count: int, labeled: bool = True):
    random = torch.Generator().manual_seed(1)
    images = torch.randn(count, 4, 6, 8, generator=random)
    labels = torch.randint(4, (count, 6, 8), generator=random)
    return [(x, y) if labeled else x for x, y in zip(images.split(1), labels.split(1), strict=True)]


def sets_of_maps(source_val, target_train, target_test) -> EvaluationSets:
    measure = functools.partial(ious, classes=NAMES)
    return EvaluationSets(source_val, target_train, target_test, NAMES, measure)


def test_evaluate_maps_at_the_size_of_their_labels():
    batches = _map_batches(8)
    images = [x for x, _ in batches]
    large = [(x, y.repeat_interleave(2, 1).repeat_interleave(2, 2)) for x, y in batches]
    metrics, _, _ = evaluate(Answers(), sets_of_maps(batches, images, large))
    enlarged = functools.partial(nn.functional.interpolate, size=(12, 16), mode="bilinear")
    expected = sum(confusion_matrix(enlarged(x), y, 4) for x, y in large)
    assert metrics["target"] == ious(expected, NAMES)
    assert metrics["criteria"]["source_val"] == metrics["source_val"]["mean_iou"]
    unlabeled, _, _ = evaluate(Answers(), sets_of_maps(batches, images[:3], None))
    assert unlabeled["target"]["mean_iou"] is None
    void = [(x, torch.full_like(y, IGNORE_INDEX)) for x, y in batches]
    with pytest.raises(UserError, match="none of the held-out source images has a labeled pixel"):
        evaluate(Answers(), sets_of_maps(void, [], None))


def test_examples_are_spread_over_the_target():
    batches = _map_batches(8)
    images = [x for x, _ in batches]
    _, examples, _ = evaluate(Answers(), sets_of_maps(batches, images, batches))
    assert len(examples) == 4
    for (image, prediction, label), number in zip(examples, (0, 2, 4, 6), strict=True):
        assert torch.equal(image, images[number][0])
        assert torch.equal(prediction, images[number][0].argmax(0))
        assert torch.equal(label, batches[number][1][0])
    _, examples, _ = evaluate(Answers(), sets_of_maps(batches, images[:3], None))
    assert [label for *_, label in examples] == [None] * 3
    assert all(torch.equal(e[0], x[0]) for e, x in zip(examples, images, strict=False))


def test_the_oracle_of_maps_goes_by_mean_iou():
    def entry(step: int, mean_iou: float, pixels: float) -> dict:
        return {
            "step": step,
            "criteria": {"neg_entropy": step},
            "collapsed": None,
            "target": {"mean_iou": mean_iou, "pixel_accuracy": pixels},
        }

    history = [entry(1, 30.0, 70.0), entry(2, 40.0, 60.0), entry(3, 20.0, 80.0)]
    steps = {name: e["step"] for name, e in choose(history, "neg_entropy").items()}
    assert steps == {"last": 3, "selected": 3, "oracle": 2}


def test_what_has_lost_the_source_is_not_selected():
    """The margin is two points below the best source validation so far."""

    def steps(*pairs: tuple[float, float]) -> list[int]:
        """The step selected after each evaluation (source validation, infomax)."""
        history, selected = [], []
        for step, (source_val, infomax) in enumerate(pairs, 1):
            entry = _entry(step, infomax, 0.0, 50.0)
            entry["criteria"] |= {"infomax": infomax, "source_val": source_val}
            history.append(entry)
            selected.append(choose(history, "infomax")["selected"]["step"])
        return selected

    assert steps((90.0, 0.1), (88.0, 0.5), (87.9, 0.9)) == [1, 2, 2]
    # The first two are ruled out by the third, whose weights are at hand then.
    assert steps((80.0, 0.9), (82.0, 0.8), (90.0, 0.1), (89.0, 0.3)) == [1, 1, 3, 4]
    # A collapsed evaluation is not selected.
    history = [_entry(1, 0.5, 0.0, 50.0), _entry(2, 0.9, 0.0, 50.0, "one class")]
    for entry, source_val in zip(history, (80.0, 90.0), strict=True):
        entry["criteria"]["source_val"] = source_val
    assert choose(history, "infomax")["selected"]["step"] == 1
    # Nor does it rule out what came before.
    history.append(_entry(3, 0.1, 0.0, 50.0))
    history[2]["criteria"]["source_val"] = 60.0
    assert choose(history, "infomax")["selected"]["step"] == 1
    # Nor, if it came first, what comes after.
    values = (95.0, 0.5, "one class"), (80.0, 0.9), (70.0, 0.1), (60.0, 0.05)
    history = []
    for step, (source_val, infomax, *collapsed) in enumerate(values, 1):
        history.append(_entry(step, infomax, 0.0, 50.0, *collapsed))
        history[-1]["criteria"]["source_val"] = source_val
    steps_then = [choose(history[:n], "infomax")["selected"]["step"] for n in (1, 2, 3, 4)]
    assert steps_then == [1, 2, 2, 2]
    history[0]["collapsed"] = None  # control: each later one is ruled out by the first
    assert choose(history, "infomax")["selected"]["step"] == 1
    # Two of the 30 held-out images are 6.7 points.
    history = [_entry(1, 0.5, 0.0, 50.0), _entry(2, 0.9, 0.0, 50.0)]
    for entry, source_val in zip(history, (90.0, 83.4), strict=True):
        entry["criteria"]["source_val"] = source_val
        entry["source_count"] = 30
    assert choose(history, "infomax")["selected"]["step"] == 2
    history[1]["source_count"] = 1000  # control
    assert choose(history, "infomax")["selected"]["step"] == 1
    for entry in history:
        entry["source_vetoes"] = False
    assert choose(history, "infomax")["selected"]["step"] == 2
    # The second would be the best of those that remain, and its weights are gone.
    assert steps((88.0, 0.9), (89.0, 0.8), (90.5, 0.1)) == [1, 1, 3]


def test_class_colors():
    """Cityscapes' where it has all of the classes, and black for ignored pixels."""
    colors = class_colors(["road", "sky"])
    assert colors[:2].tolist() == [[128, 64, 128], [70, 130, 180]]
    assert colors[IGNORE_INDEX].tolist() == [0, 0, 0]
    mixed = class_colors(["road", "sky", "fence post"])  # the last is no class of Cityscapes
    assert mixed[:2].tolist() != colors[:2].tolist()
    assert torch.equal(mixed[:2], class_colors(["a", "b"])[:2])  # by number alone


@pytest.mark.parametrize(("count", "least"), [(2, 70), (6, 70), (11, 50), (19, 40), (40, 25)])
def test_the_colors_of_any_two_classes_differ_clearly(count, least):
    """In CIELAB, where 2 is just visible; pavement and car were 9 apart in two mixed palettes."""
    lab = drawing.lab(class_colors([f"class {i}" for i in range(count)])[: count + 1])
    distances = torch.cdist(lab, lab).fill_diagonal_(1000)
    assert distances.min() > least  # the last is black
    streets = ["sky", "building", "road", "pavement", "tree", "car"]
    lab = drawing.lab(class_colors(streets)[:6])
    assert torch.cdist(lab, lab).fill_diagonal_(1000).min() > 70
    lab = drawing.lab(torch.tensor([[0, 0, 128], [0, 0, 142]]))  # control: the two before
    assert torch.dist(*lab) < 10


def test_pictures_show_image_prediction_and_label_in_the_colors_of_the_classes(tmp_path):
    image = torch.full((3, 10, 20), 99, dtype=torch.uint8)
    prediction = torch.zeros(10, 20, dtype=torch.int64)
    label = torch.full((20, 40), 1)
    label[:10] = IGNORE_INDEX
    file = tmp_path / "pictures/a.png"
    save_pictures(file, [(image, prediction, label)] * 2, ["road", "sky"])
    pixels = np.asarray(Image.open(file))
    assert 3 * 24 + 4 <= pixels.shape[1] < 100
    road, sky, black = [128, 64, 128], [70, 130, 180], [0, 0, 0]
    shown = {(9, 10): [99] * 3, (9, 34): road, (5, 58): black, (12, 58): sky}
    assert {place: pixels[place].tolist() for place in shown} == shown
    lines, height = 3, 2 * 14 + 4  # of the legend: each entry has its own, the picture is narrow
    assert pixels.shape[0] == height + lines * (drawing.MARK + drawing.GAP)
    marks = [pixels[height + 22 * i + 7, drawing.GAP + 7].tolist() for i in range(lines)]
    assert marks == [road, sky, black]
    names = pixels[height:, drawing.GAP + drawing.MARK + 2 :]
    assert (names == 0).all(2).any()  # and they are written


def test_the_legend_has_the_classes_that_occur(tmp_path):
    image = torch.zeros(3, 20, 400, dtype=torch.uint8)
    few, many = torch.zeros(20, 400, dtype=torch.int64), torch.arange(400).expand(20, 400) % 60
    classes = [f"a class of number {i}" for i in range(60)]
    sizes = []
    for name, prediction in (("few", few), ("many", many)):
        save_pictures(tmp_path / name, [(image, prediction, None)], classes)
        sizes.append(Image.open(tmp_path / name).size)
    assert [width for width, _ in sizes] == [2 * 404 + 4] * 2
    assert sizes[0][1] == 28 + 22
    assert sizes[1][1] > 28 + 10 * 22
    save_pictures(tmp_path / "wide", [(image[:, :9, :9], few[:9, :9], None)], [99 * "x", "y"])
    assert Image.open(tmp_path / "wide").size[0] > 500  # a long name is not cut
