"""Self-training: its kernels against plain versions, and the real command."""

import copy
import itertools
import math
import signal

import pytest
import torch
import torch.nn.functional as F

import losses.pseudo_label
from common.averages import EMATeacher, RunningMean, class_mean
from data.classmix import class_mask, classmix
from losses.pseudo_label import (
    ConfidenceHistogram,
    PredictionStatistics,
    align_distribution,
    class_balanced_labels,
    pseudo_label_loss,
    pseudo_label_weights,
)
from tests.helpers import (
    ROOT,
    config_of,
    differing,
    load_script,
    metrics,
    street_config,
    summary,
    tiny_config,
    train,
    weights,
)
from training.collapse import VANISHED, AcceptedShares, CollapseMonitor
from training.schedules import warm_up

SHAPES = [(6, 5), (2, 5, 4, 3)]
STRONG = "strong_augment={photometric: {gain: [0.5, 1.5], noise: 0.2}, blur: {}, cutout: {}}"


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


# --- kernels


@pytest.mark.parametrize("shape", SHAPES)
def test_masked_cross_entropy_against_a_loop(shape):
    logits = (4 * rand(*shape)).requires_grad_()
    labels = (5 * rand(shape[0], *shape[2:], seed=1)).long()
    accepted = rand(shape[0], *shape[2:], seed=2) > 0.4
    loss = pseudo_label_loss(logits.log_softmax(1), labels, pseudo_label_weights(accepted, "mask"))

    rows = logits.detach().movedim(1, -1).reshape(-1, 5)
    total = 0.0
    for row, label, kept in zip(rows, labels.flatten(), accepted.flatten(), strict=True):
        if kept:
            total -= float(row[label] - row.exp().sum().log())
    assert loss.item() == pytest.approx(total / accepted.numel(), rel=1e-5)
    assert 0 < accepted.sum() < accepted.numel()

    loss.backward()
    by_class_last = logits.grad.movedim(1, -1).reshape(-1, 5)
    assert (by_class_last[~accepted.flatten()] == 0).all()  # what is not accepted pulls at nothing
    assert (by_class_last[accepted.flatten()] != 0).any()


@pytest.mark.parametrize("shape", SHAPES)
def test_confident_fraction_weighs_everything_by_the_accepted_share(shape):
    accepted = rand(shape[0], *shape[2:], seed=2) > 0.4
    given = pseudo_label_weights(accepted, "confident_fraction")
    assert given.shape == accepted.shape
    torch.testing.assert_close(given, torch.full_like(given, accepted.float().mean().item()))
    log_p, labels = rand(*shape).log_softmax(1), (5 * rand(shape[0], *shape[2:], seed=1)).long()
    expected = accepted.float().mean() * F.nll_loss(log_p, labels)
    torch.testing.assert_close(pseudo_label_loss(log_p, labels, given), expected)


@pytest.mark.parametrize("weighting", ["mask", "confident_fraction"])
@pytest.mark.parametrize("shape", [*SHAPES, (0, 5), (0, 5, 4, 3)])
def test_nothing_accepted_is_zero_and_attached(shape, weighting):
    logits = rand(*shape).requires_grad_()
    labels = torch.zeros(shape[0], *shape[2:], dtype=torch.int64)
    given = pseudo_label_weights(torch.zeros_like(labels, dtype=torch.bool), weighting)
    loss = pseudo_label_loss(logits.log_softmax(1), labels, given)
    assert loss.item() == 0
    loss.backward()
    assert (logits.grad == 0).all()


@pytest.mark.parametrize("shape", SHAPES)
def test_distribution_alignment_against_a_loop(shape):
    p, mean_s, mean_t = (
        rand(*shape).softmax(1),
        rand(5, seed=1).softmax(0),
        (3 * rand(5, seed=2)).softmax(0),
    )
    aligned = align_distribution(p, mean_s, mean_t).movedim(1, -1).reshape(-1, 5)
    for row, got in zip(p.movedim(1, -1).reshape(-1, 5), aligned, strict=True):
        scaled = [float(a * s / t) for a, s, t in zip(row, mean_s, mean_t, strict=True)]
        torch.testing.assert_close(got, torch.tensor([v / sum(scaled) for v in scaled]))
    torch.testing.assert_close(align_distribution(p, mean_s, mean_s), p)


@pytest.mark.parametrize("shape", [(4000,), (4, 25, 40)])
@pytest.mark.parametrize("portion", [0.05, 0.2, 0.5, 1.0])
def test_class_balanced_cut_is_within_a_bin_of_a_sort(shape, portion):
    """Of unsure classes and of sure ones, whose confidences all lie above 0.99."""
    labels = (3.999 * rand(*shape, seed=1) ** 2).long()  # classes of unequal size
    confidence = 1 - 10 ** -(labels + rand(*shape))
    confidence[labels == 0] = (0.02 + 0.03 * rand(*shape))[
        labels == 0
    ]  # as of an untrained network
    histogram = ConfidenceHistogram(5, decay=1.0)
    for chunk, chunk_labels in zip(confidence.split(2), labels.split(2), strict=True):
        histogram.add(chunk, chunk_labels)
    cut = histogram.thresholds(portion)
    width = (histogram.HIGH - histogram.LOW) / histogram.bins  # in log-odds
    for k in range(4):
        own = confidence[labels == k].sort(descending=True).values
        exact = own[math.ceil(portion * len(own)) - 1].item()
        assert -1e-2 <= math.log(exact / (1 - exact)) - torch.logit(cut[k]).item() <= width + 1e-2
        assert portion - 0.01 <= (own >= cut[k]).float().mean() <= portion + 0.05
    assert cut[4] == 1  # never predicted


@pytest.mark.parametrize("shape", SHAPES)
def test_class_balanced_labels_against_a_loop(shape):
    """The class of the largest ratio, which need not be that of the largest probability."""
    p, thresholds = (3 * rand(*shape)).softmax(1), torch.tensor([0.95, 0.4, 0.25, 0.3, 1.0])
    labels, accepted = class_balanced_labels(p, thresholds)
    rows = p.movedim(1, -1).reshape(-1, 5).tolist()
    for row, label, taken in zip(rows, labels.flatten(), accepted.flatten(), strict=True):
        ratios = [value / limit for value, limit in zip(row, thresholds.tolist(), strict=True)]
        assert label == max(range(5), key=ratios.__getitem__)
        assert taken == (max(ratios) >= 1)
    assert 0 < accepted.sum() < accepted.numel()
    assert (labels != p.argmax(1)).any()


def test_a_rare_class_is_chosen_before_one_that_misses_its_threshold():
    road_or_pole = torch.tensor([[0.55, 0.45], [0.61, 0.39], [0.96, 0.04]])
    labels, accepted = class_balanced_labels(road_or_pole, torch.tensor([0.95, 0.40]))
    assert labels.tolist() == [1, 1, 0]
    assert accepted.tolist() == [True, False, True]


@pytest.mark.parametrize("shape", SHAPES)
def test_ignored_source_positions_do_not_count(shape):
    p = (3 * rand(*shape)).softmax(1)
    y = (4.999 * rand(shape[0], *shape[2:], seed=1)).long()
    y[rand(*y.shape, seed=2) > 0.5] = 255
    statistics = PredictionStatistics(5)
    statistics.add_source(p, torch.full_like(y, 255))
    assert torch.equal(statistics.mean_s.value, torch.full((5,), 0.2))  # nothing to learn from
    assert statistics.confidence_s.value == 1
    for labels in (y, y.clamp_max(4)):  # the second without any ignored position
        statistics = PredictionStatistics(5)
        statistics.add_source(p, labels)
        rows = p.movedim(1, -1)[labels != 255]
        torch.testing.assert_close(statistics.mean_s.value, rows.mean(0))
        torch.testing.assert_close(statistics.confidence_s.value, rows.amax(1).mean())
    assert (rows.mean(0) - p.movedim(1, -1)[y != 255].mean(0)).abs().max() > 1e-3  # control
    many = PredictionStatistics(300)  # of so many classes, 255 is one
    many.add_source((9 * rand(2, 300)).softmax(1), torch.tensor([255, 255]))
    assert many.confidence_s.value < 1


def test_the_histogram_counts_beyond_what_float32_adds_one_by_one():
    histogram = ConfidenceHistogram(1, bins=10, decay=1.0)
    histogram.counts[0, 0] = 2.0**24
    histogram.add(torch.zeros(1000), torch.zeros(1000, dtype=torch.int64))
    assert histogram.counts[0, 0] == 2.0**24 + 1000


def test_the_histogram_forgets():
    histogram = ConfidenceHistogram(1, decay=0.5)
    for confidence in (0.95, 0.2):
        for _ in range(10):
            histogram.add(torch.full((8,), confidence), torch.zeros(8, dtype=torch.int64))
        assert histogram.thresholds(0.5).item() == pytest.approx(confidence, abs=0.005)


@pytest.mark.parametrize("copy_buffers", [False, True])
def test_teacher_against_the_closed_formula(copy_buffers):
    """After 100 updates weights k count (1 - d_k) times all later decays.

    Buffers are those of the start, or the model's last.
    """
    student = torch.nn.Sequential(
        torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4), torch.nn.Dropout(0.5)
    )
    teacher = EMATeacher(student, 0.95, copy_buffers)
    at_first = copy.deepcopy(list(student.buffers()))
    assert not teacher.training
    assert not any(p.requires_grad for p in teacher.parameters())
    seen = []
    for step in range(100):
        with torch.no_grad():
            student[0].weight.copy_(rand(4, 3, seed=step))
        student(rand(8, 3, seed=step))
        seen.append(copy.deepcopy(student[0].weight.detach()).double())
        teacher.update_parameters(student)
    decays = [min(1 - 1 / (t + 1), 0.95) for t in range(100)]
    assert decays[0] == 0
    assert decays[1] == 0.5
    expected = sum((1 - decays[k]) * math.prod(decays[k + 1 :]) * seen[k] for k in range(100))
    torch.testing.assert_close(teacher.module[0].weight.double(), expected, rtol=1e-4, atol=1e-6)
    assert all((a != b).any() for a, b in zip(student.buffers(), at_first, strict=True))
    buffers = list(student.buffers()) if copy_buffers else at_first
    for ours, buffer in zip(teacher.module.buffers(), buffers, strict=True):
        assert torch.equal(ours, buffer)
    x = rand(6, 3)
    assert torch.equal(teacher(x), teacher(x))  # without dropout


def test_running_mean_is_a_plain_mean_at_first():
    values, mean = [rand(3, seed=i) for i in range(30)], RunningMean(torch.ones(3), 0.9)
    assert torch.equal(mean.value, torch.ones(3))
    for value in values[:10]:
        mean.update(value)
    torch.testing.assert_close(mean.value, torch.stack(values[:10]).mean(0))
    before = mean.value.clone()
    mean.update(values[10])
    torch.testing.assert_close(mean.value, 0.9 * before + 0.1 * values[10], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("seed", range(5))
def test_classmix_pixel_by_pixel(seed):
    random = torch.Generator().manual_seed(seed)
    y_s = torch.randint(0, 6, (3, 8, 9), generator=random)
    y_s[0] = 2  # one class alone
    y_s[1, :, :4] = 255
    y_s[2] = 255
    x_s, x_t = (
        torch.randint(0, 256, (3, 3, 8, 9), generator=random).to(torch.uint8) for _ in range(2)
    )
    y_t = torch.randint(0, 7, (3, 8, 9), generator=random)
    given = torch.rand(3, 8, 9, generator=random)
    mask = class_mask(y_s, 7, torch.Generator().manual_seed(seed))
    x, y, w = classmix((x_s, y_s), (x_t, y_t, given), 7, torch.Generator().manual_seed(seed))
    for i in range(3):
        chosen = set(y_s[i][mask[i]].tolist())
        present = set(y_s[i].flatten().tolist()) - {255}
        assert len(chosen) == math.ceil(len(present) / 2)
        for row in range(8):
            for column in range(9):
                at = (i, row, column)
                pasted = int(y_s[at]) in chosen
                assert bool(mask[at]) == pasted
                assert (
                    x[i, :, row, column].tolist()
                    == (x_s if pasted else x_t)[i, :, row, column].tolist()
                )
                assert int(y[at]) == int((y_s if pasted else y_t)[at])
                assert float(w[at]) == (1.0 if pasted else float(given[at]))


def test_classmix_chooses_every_class_in_turn():
    labels = torch.arange(4).view(1, 2, 2)
    chosen = [class_mask(labels, 4, torch.Generator().manual_seed(i)).flatten() for i in range(40)]
    share = torch.stack(chosen).float().mean(0)
    assert ((share > 0.2) & (share < 0.8)).all()


def test_warm_up():
    assert [warm_up(p, 0.5) for p in (0.0, 0.25, 0.5, 0.9)] == pytest.approx([0, 0.5, 1, 1])
    assert warm_up(0.0, 0.0) == 1


# --- what is watched


def test_accepted_shares_of_each_class():
    shares = AcceptedShares(["a", "b", "c"])
    shares.add(torch.tensor([0, 0, 1]), torch.tensor([True, False, False]))
    shares.add(torch.tensor([[0, 0]]), torch.tensor([[True, True]]))
    assert shares.report() == {
        "accepted": 0.6,
        "accepted.a": 0.75,
        "accepted.b": 0.0,
        "accepted.c": None,
    }
    assert shares.report() == {
        "accepted": 0,
        "accepted.a": None,
        "accepted.b": None,
        "accepted.c": None,
    }


def predictions(step: int, classes: list[int], shape=(32,)) -> torch.Tensor:
    """Logits of sure predictions of the classes given, evenly."""
    index = torch.randint(len(classes), shape, generator=torch.Generator().manual_seed(step))
    return (8 * F.one_hot(torch.tensor(classes)[index], 4).float()).movedim(-1, 1)


def monitor_of(source_shares=None, absent=()) -> tuple[CollapseMonitor, list[str]]:
    """A monitor of four classes, and what it tells."""
    told = []
    return CollapseMonitor(["a", "b", "c", "d"], source_shares, absent, told.append), told


@pytest.mark.parametrize("shape", [(32,), (2, 4, 4)])
def test_the_alarm_names_a_class_that_vanishes(shape):
    monitor, told = monitor_of()
    assert monitor.report(0) == {}  # nothing was watched yet
    for step in range(200):
        monitor.add(predictions(step, [0, 1, 2, 3], shape))
    assert monitor.report(200)["vanished"] == 0
    assert told == []
    for step in range(200, 1200):
        monitor.add(predictions(step, [0, 1, 3], shape))
        if step % 100 == 99:
            monitor.report(step + 1)
    assert monitor.report(1200)["vanished"] == 1
    assert len(told) == len(monitor.alarms) == 1  # told once
    assert "c vanished" in monitor.alarms[0]["reason"]
    assert monitor.recent.value[2] < VANISHED * monitor.largest[2]

    again, told = monitor_of()  # kept with the run
    again.load_state_dict(monitor.state_dict())
    assert again.alarms == monitor.alarms
    assert again.report(1200) == monitor.report(1200)
    assert told == []


def test_the_alarm_sees_a_sudden_collapse():
    monitor, told = monitor_of()
    for step in range(300):
        monitor.add(predictions(step, [0, 1, 2, 3] if step < 270 else [1]))
    assert monitor.report(300)["drift"] > 0.3
    assert any("moved" in text for text in told)


def test_the_alarm_sees_one_class_for_every_image_without_confidence():
    """Of a constant feature the best prediction is the mean label, whose mean never changes."""
    monitor, told = monitor_of([0.25] * 4)
    for step in range(300):
        monitor.add(
            predictions(step, [0, 1, 2, 3]) if step < 200 else torch.tensor(8 * [[0.1, 0, 0, 0]])
        )
    assert monitor.report(300) == {"vanished": 0, "drift": pytest.approx(0, abs=0.05)}
    assert len(told) == 1
    assert "a has 99.56 % of the target predictions" in told[0]
    never, told = monitor_of([0.25] * 4)  # control: an untrained network has no spread to lose
    for _ in range(300):
        never.add(torch.tensor([[0.1, 0, 0, 0]]))
    never.report(300)
    assert told == []


def test_a_rare_class_that_an_untrained_network_predicted_is_no_alarm():
    """At first all classes are predicted alike; the source's share bounds what is expected."""
    vanished = {}
    for bounds in ([0.94, 0.02, 0.02, 0.02], None):
        monitor, told = monitor_of(bounds)
        for step in range(1400):
            share = [0.25, 0.25, 0.25, 0.25] if step < 20 else [0.99, 0.005, 0.005, 0.0]
            monitor.add(torch.tensor(share).clamp_min(1e-9).log().expand(8, 4))
        vanished[bounds is None] = monitor.report(1400)["vanished"]
        assert any("d vanished" in text for text in told)
    assert vanished == {False: 1, True: 3}  # the second is the control: without the source


def test_a_class_that_never_was_there_is_no_alarm():
    monitor, told = monitor_of()
    for step in range(1000):
        monitor.add(predictions(step, [0, 1, 3]))
    monitor.report(1000)
    assert told == []


def test_a_class_that_the_target_lacks_may_vanish():
    for absent, names in (((), 1), (("c",), 0)):
        monitor, _ = monitor_of([0.25] * 4, absent)
        for step in range(1200):
            monitor.add(predictions(step, [0, 1, 2, 3] if step < 200 else [0, 1, 3]))
        assert monitor.report(1200)["vanished"] == names
        monitor.judge(1, {"a": 10, "b": 10, "c": 10, "d": 10})
        verdict = monitor.judge(2, {"a": 20, "b": 10, "c": 0, "d": 10})
        assert len(verdict["vanished_classes"]) == names
        assert (verdict["collapsed"] is not None) == bool(names)


# --- evaluations


def test_an_evaluation_is_judged_by_those_before_it():
    monitor, told = monitor_of([0.4, 0.3, 0.28, 0.02])
    even = {"a": 500, "b": 300, "c": 160, "d": 40}
    assert monitor.judge(1, even) == {"vanished_classes": [], "collapsed": None}
    rare = monitor.judge(2, even | {"d": 0})  # d has 2 % of the source: said, but no collapse
    assert rare == {"vanished_classes": ["d"], "collapsed": None}
    assert told == []
    reason = "c vanished from the target predictions: 0.12 %, expected 17 %"
    assert monitor.judge(3, even | {"c": 1}) == {"vanished_classes": ["c"], "collapsed": reason}
    monitor.judge(4, even | {"c": 1})
    assert told == [f"step 3  alarm: evaluation: {reason}"]  # told once
    assert monitor.alarms == [{"step": 3, "reason": f"evaluation: {reason}"}]
    again, _ = monitor_of([0.4, 0.3, 0.28, 0.02])
    again.load_state_dict(monitor.state_dict())
    assert again.judge(5, even | {"c": 1}) == monitor.judge(5, even | {"c": 1})
    assert again.judge(6, even)["collapsed"] is None


@pytest.mark.parametrize("shares", [None, [0.25] * 4, [0.97, 0.01, 0.01, 0.01]])
def test_one_class_for_all_images_is_a_collapse_from_the_first_evaluation_on(shares):
    """Unless the source has hardly another class, such as a background of 97 % of all pixels."""
    monitor, told = monitor_of(shares)
    verdict = monitor.judge(1, {"a": 990, "b": 10, "c": 0, "d": 0})
    if shares is None or shares[0] == 0.25:
        assert verdict["collapsed"] == "a has 99 % of the target predictions"
        assert len(told) == 1
    else:
        assert verdict["collapsed"] is None
    assert monitor.judge(2, {"a": 1000, "b": 0, "c": 0, "d": 0})["collapsed"] is not None
    few, told = monitor_of(shares)  # control: three images say nothing
    assert few.judge(1, {"a": 3, "b": 0, "c": 0, "d": 0})["collapsed"] is None
    assert told == []


@pytest.mark.parametrize("shape", SHAPES)
def test_class_mean(shape):
    p = rand(*shape)
    torch.testing.assert_close(class_mean(p), torch.stack([p[:, k].mean() for k in range(5)]))


# --- the real command


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_nothing_accepted_is_source_only(tmp_path, task):
    """Threshold 1.01: ratio 0, and to the bit the weights of a run without the loss."""
    config = config_of(
        task, tmp_path, "train_pseudo"
    )  # maps: with ClassMix, whose pasted pixels do count, and aux head
    keys = [STRONG, "mix=none", "pseudo_warmup=0", "log_every=1", "steps=5", "eval_every=5"]
    states, lines = {}, {}
    for run, own in {
        "none": ["threshold=1.01", "pseudo_weight=10"],
        "without": ["threshold=0.01", "pseudo_weight=0"],
        "all": ["threshold=0.01", "pseudo_weight=10"],
    }.items():
        assert train("train_pseudo", config, *keys, *own, f"out_dir={tmp_path}/{run}") == 0
        states[run] = weights(tmp_path / run, "checkpoints/step_00000005.pt")["model"]
        lines[run] = [m for m in metrics(tmp_path / run) if "lr" in m]
    assert len(lines["none"]) == 5
    names = ["pseudo_loss"] + ["aux_pseudo_loss"] * (task == "segmentation")
    assert all(m["accepted"] == m[name] == 0 for m in lines["none"] for name in names)
    assert all(
        m["accepted"] == 1 and m[name] > 0 for m in lines["all"] for name in names
    )  # control
    assert differing(states["none"], states["without"]) == 0
    assert differing(states["none"], states["all"]) > 1000


def test_without_the_target_it_is_source_only(tmp_path):
    """Frozen batch norm, nothing accepted: the network gets source-only's gradients."""
    config = tiny_config(tmp_path, model="{bn: frozen}")
    assert train("train_source", config, f"out_dir={tmp_path}/source") == 0
    assert train("train_pseudo", config, "threshold=1.01", f"out_dir={tmp_path}/none") == 0
    last = "checkpoints/step_00000010.pt"
    plain, none = (weights(tmp_path / run, last)["model"] for run in ("source", "none"))
    for name, value in plain.items():
        torch.testing.assert_close(none[name], value, rtol=1e-4, atol=1e-5, msg=name)


def test_the_auxiliary_head_learns_the_same_labels(tmp_path):
    """A pseudo-loss that weighs on the main head alone would leave the auxiliary one as it is."""
    config = street_config(tmp_path, "train_pseudo")
    keys = [
        "steps=1",
        "pseudo_warmup=0",
        "threshold=0.01",
        "optim.momentum=0",
        "optim.weight_decay=0",
    ]
    states = {}
    for weight in (0, 1, 2):
        assert (
            train(
                "train_pseudo",
                config,
                *keys,
                f"pseudo_weight={weight}",
                f"out_dir={tmp_path}/{weight}",
            )
            == 0
        )
        states[weight] = weights(tmp_path / str(weight), "checkpoints/step_00000001.pt")["model"]
    for name in ("head.branches.0.weight", "aux_head.branches.0.weight"):
        moved = [states[weight][name] - states[0][name] for weight in (1, 2)]
        assert moved[0].abs().max() > 1e-6
        torch.testing.assert_close(moved[1], 2 * moved[0], rtol=1e-2, atol=1e-7)


def test_threshold_and_alignment_from_the_predictions_of_the_steps_before(tmp_path, monkeypatch):
    """Relative to the mean confidence on the source; aligned by the mean predictions on both."""
    script = load_script(ROOT / "train_pseudo.py")
    targets, sources, aligned, accepted = [], [], [], []

    def spy(function, record):
        def call(*arguments):
            result = function(*arguments)
            record.append(copy.deepcopy((arguments, result)))  # running means move on
            return result

        return call

    script.class_mean = spy(script.class_mean, targets)
    monkeypatch.setattr(losses.pseudo_label, "class_mean", spy(class_mean, sources))
    script.align_distribution = spy(script.align_distribution, aligned)
    script.pseudo_label_weights = spy(script.pseudo_label_weights, accepted)
    config = tiny_config(tmp_path)
    mode = ["threshold_mode=relative", "threshold=0.7", "distribution_alignment=true", "steps=5"]
    handlers = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    script.main(["--config", str(config), *mode])
    for number, handler in handlers.items():
        signal.signal(number, handler)
    assert len(targets) == len(sources) == len(aligned) == len(accepted) == 5
    shares = []
    for step in range(5):
        (p, mean_s, mean_t), result = aligned[step]
        torch.testing.assert_close(p, targets[step][0][0])
        torch.testing.assert_close(mean_t, torch.stack([m for _, m in targets[: step + 1]]).mean(0))
        earlier = [m for _, m in sources[:step]] or [torch.full((10,), 0.1)]
        torch.testing.assert_close(mean_s, torch.stack(earlier).mean(0))
        confidences = [p_s.amax(1).mean() for (p_s,), _ in sources[:step]] or [torch.ones(())]
        expected = result.amax(1) >= 0.7 * torch.stack(confidences).mean()
        assert torch.equal(accepted[step][0][0], expected)
        shares.append(float(expected.float().mean()))
    assert 0 < sum(shares) < 5


MODES = {
    "fixed": ["threshold=0.12"],
    "relative": ["threshold_mode=relative", "threshold=0.8"],
    "class balanced": ["threshold_mode=class_balanced", "portions=[0.3, 0.6]"],
    "aligned": ["distribution_alignment=true", "threshold=0.12"],
    "by the student": ["teacher=none", "threshold=0.12"],
    "statistics of the student": ["teacher_bn=student", "threshold=0.12"],
    "by the student in eval mode": ["teacher=none", "teacher_bn=student", "threshold=0.12"],
    "fraction": ["weighting=confident_fraction", "threshold=0.12"],
    "diversity": ["div_weight=1", "threshold=0.12"],
}


def test_every_option_is_another_training(tmp_path):
    config = tiny_config(tmp_path, log_every=1, steps=7, eval_every=7)
    states, size = {}, "data.size=28"  # of smaller images no confidence reaches the thresholds
    for name, keys in MODES.items():
        assert (
            train(
                "train_pseudo",
                config,
                STRONG,
                size,
                "pseudo_warmup=0",
                *keys,
                f"out_dir={tmp_path}/{name}",
            )
            == 0
        )
        states[name] = weights(tmp_path / name, "checkpoints/step_00000007.pt")["model"]
    weak = "pseudo_warmup=0", "threshold=0.12", f"out_dir={tmp_path}/weak"
    assert train("train_pseudo", config, size, *weak) == 0
    states["no strong view"] = weights(tmp_path / "weak", "checkpoints/step_00000007.pt")["model"]
    names = list(states)
    for i, name in enumerate(names):
        for other in names[:i]:
            assert differing(states[name], states[other]) > 100, (name, other)


def test_portions_are_what_is_accepted(tmp_path):
    """Of a fixed model: the histogram looks back, and lags behind confidences that rise."""
    config = tiny_config(tmp_path, steps=40, log_every=1, eval_every=1000, model="{bn: frozen}")
    size = "data.size=28"  # of smaller images this model is too unsure
    assert train("train_source", config, f"out_dir={tmp_path}/source", "steps=120", size) == 0
    for portion in (0.2, 0.6):
        keys = [
            size,
            "threshold_mode=class_balanced",
            f"portions=[{portion}, {portion}]",
            "data.batch=20",
            "optim.lr=1e-30",
        ]
        start = [f"init_from={tmp_path}/source", f"out_dir={tmp_path}/{portion}", "ema_decay=0"]
        assert train("train_pseudo", config, *keys, *start) == 0
        accepted = [m["accepted"] for m in metrics(tmp_path / str(portion)) if "lr" in m][-20:]
        assert abs(sum(accepted) / 20 - portion) < 0.1


def test_class_balanced_labels_are_those_of_the_largest_ratio(tmp_path, monkeypatch):
    """One class has a threshold that every prediction reaches, the others one that none does."""
    limits = torch.where(torch.arange(10) == 3, 1e-6, 1.0)
    monkeypatch.setattr(ConfidenceHistogram, "thresholds", lambda histogram, portion: limits)
    config = tiny_config(tmp_path, log_every=1)
    assert train("train_pseudo", config, "threshold_mode=class_balanced") == 0
    for line in (line for line in metrics(tmp_path / "run") if "lr" in line):
        shares = [line[f"accepted.{name}"] for name in summary(tmp_path / "run")["classes"]]
        assert shares == [1.0 if k == 3 else None for k in range(10)]


def test_classmix_is_another_training(tmp_path):
    config = street_config(tmp_path, "train_source")
    for mix in ("none", "classmix"):
        keys = [
            STRONG,
            "pseudo_warmup=0",
            "threshold=0.1",
            f"mix={mix}",
            f"out_dir={tmp_path}/{mix}",
        ]
        assert train("train_pseudo", config, *keys) == 0
    assert differing(weights(tmp_path / "none"), weights(tmp_path / "classmix")) > 1000


def test_logged_metrics(tmp_path):
    assert train("train_pseudo", tiny_config(tmp_path), STRONG) == 0
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    classes = summary(tmp_path / "run")["classes"]
    names = [
        "step",
        "cls_loss",
        "pseudo_loss",
        "div_loss",
        "confidence",
        "agreement",
        "lr",
        "pseudo_weight",
        "accepted",
    ]
    assert list(lines[0]) == [*names, *(f"accepted.{c}" for c in classes), "vanished", "drift"]
    assert [line["pseudo_weight"] for line in lines] == pytest.approx(
        [warm_up(s / 10, 0.5) for s in (3, 7, 9)]
    )


@pytest.mark.parametrize("bn", ["own", "student"])
def test_the_teacher_follows_the_student(tmp_path, bn):
    keys = ["ema_decay=0.9", f"teacher_bn={bn}"]
    assert train("train_pseudo", tiny_config(tmp_path), *keys) == 0
    state = weights(tmp_path / "run", "checkpoints/step_00000010.pt")
    assert state["teacher"]["n_averaged"] == 10
    student, teacher = state["model"], state["teacher"]
    for name, value in student.items():
        ours = teacher[f"module.{name}"]
        if "running" in name or "num_batches" in name:
            assert torch.equal(ours, value) == (bn == "student" or "num_batches" in name), name
        else:
            assert (ours != value).any(), name
    keys = ["ema_decay=0", f"teacher_bn={bn}", f"out_dir={tmp_path}/zero"]
    assert train("train_pseudo", tiny_config(tmp_path), *keys) == 0
    state = weights(tmp_path / "zero", "checkpoints/step_00000010.pt")
    for name, value in state["model"].items():
        if bn == "student" or "running" not in name:
            torch.testing.assert_close(state["teacher"][f"module.{name}"], value, msg=name)


def test_whose_images_enter_the_statistics(tmp_path):
    """After one step, the running mean of the first layer, which starts at 0."""
    views = {"weak": [], "strong": ["strong_augment={photometric: {offset: 0.9}}"]}
    config, means = tiny_config(tmp_path, model="{bn: separate, bn_running: target}"), {}
    name = "backbone.layer1.0.2.running_mean"
    for teacher, bn, view in itertools.product(("ema", "none"), ("own", "student"), views):
        run = tmp_path / f"{teacher}_{bn}_{view}"
        keys = [*views[view], f"teacher={teacher}", f"teacher_bn={bn}", f"out_dir={run}"]
        assert train("train_pseudo", config, "steps=1", *keys) == 0
        state = weights(run, "checkpoints/step_00000001.pt")
        means[run.name] = state["model"][name]
        if teacher == "ema":
            means[f"its teacher, {bn}_{view}"] = state["teacher"][f"module.{name}"]
    weak, strong = means["ema_student_weak"], means["ema_student_strong"]
    assert (weak - strong).abs().max() > 1e-2  # control
    expected = {
        "ema_own_weak": weak,
        "ema_own_strong": strong,
        "its teacher, own_weak": weak,
        "its teacher, own_strong": weak,  # it never sees the strong view
        "its teacher, student_weak": weak,
        "its teacher, student_strong": strong,
        "none_own_weak": 1.9 * weak,  # the weak view, then the strong one
        "none_own_strong": 0.9 * weak + strong,
        "none_student_weak": weak,
        "none_student_strong": strong,
    }
    for run, mean in expected.items():
        torch.testing.assert_close(means[run], mean, rtol=1e-4, atol=1e-5, msg=run)


@pytest.mark.parametrize("teacher", ["ema", pytest.param("none", marks=pytest.mark.slow)])
def test_frozen_statistics_are_the_same_for_every_teacher(tmp_path, teacher):
    same = {}
    for model in ("{bn: frozen}", "{bn: separate}"):
        config, runs = tiny_config(tmp_path, model=model), []
        for bn in ("own", "student"):
            out = tmp_path / f"{model[5:8]}_{bn}"
            keys = ["threshold=0.12", "pseudo_warmup=0", f"teacher={teacher}", f"teacher_bn={bn}"]
            assert train("train_pseudo", config, STRONG, *keys, f"out_dir={out}") == 0
            runs.append([metrics(out), weights(out, "checkpoints/step_00000010.pt")["model"]])
        (lines, state), (other_lines, other_state) = runs
        same[model] = lines == other_lines and differing(state, other_state) == 0
    assert same == {"{bn: frozen}": True, "{bn: separate}": False}


def test_the_teacher_is_evaluated_and_saved(tmp_path):
    """It changes no training; model.pt holds the teacher's weights under the model's names."""
    config, last, lines = tiny_config(tmp_path, eval_every=1000), {}, {}
    for who in ("model", "teacher"):
        keys = ["ema_decay=0.9", f"evaluate={who}", f"out_dir={tmp_path}/{who}"]
        assert train("train_pseudo", config, *keys) == 0
        last[who] = weights(tmp_path / who, "checkpoints/step_00000010.pt")
        lines[who] = metrics(tmp_path / who)
    for part in ("model", "teacher"):
        assert differing(last["model"][part], last["teacher"][part]) == 0
    average = {k.removeprefix("module."): v for k, v in last["teacher"]["teacher"].items()}
    del average["n_averaged"]
    assert differing(weights(tmp_path / "teacher"), average) == 0
    assert differing(weights(tmp_path / "model"), last["model"]["model"]) == 0
    assert differing(weights(tmp_path / "model"), average) > 1000  # control
    assert lines["model"][:-1] == lines["teacher"][:-1]
    assert lines["model"][-1] != lines["teacher"][-1]

    start = [f"init_from={tmp_path}/teacher", "optim.lr=1e-30", "optim.weight_decay=0"]
    keys = ["steps=1", "model.bn=frozen", f"out_dir={tmp_path}/next"]
    assert train("train_source", config, *start, *keys) == 0
    assert differing(weights(tmp_path / "next"), average) == 0
    figures = {k: v for k, v in metrics(tmp_path / "next")[-1].items() if k.startswith("target")}
    assert figures
    assert figures == {k: lines["teacher"][-1][k] for k in figures}


@pytest.mark.parametrize(
    "keys",
    [
        ["ema_decay=0.9", "distribution_alignment=true"],
        pytest.param(["teacher=none"], marks=pytest.mark.slow),
    ],
)
def test_a_forced_collapse_raises_the_alarm_and_a_healthy_run_does_not(tmp_path, capsys, keys):
    """Every label believed, and weighing so much that the first mistakes become the rule."""
    short = [
        "steps=120",
        "save_every=1000",
        "log_every=10",
        "eval_every=1000",
        "data.batch=16",
        "pseudo_warmup=1",
        STRONG,
        *keys,
    ]
    config = tiny_config(tmp_path, optim="{lr: 0.02, schedule: constant}")
    healthy = [*short, "threshold=0.8", "steps=60", f"out_dir={tmp_path}/healthy"]
    assert train("train_pseudo", config, *healthy) == 0
    assert summary(tmp_path / "healthy")["collapse_alarms"] == []
    assert "  alarm: " not in capsys.readouterr().out

    # Statistics of the batch hold the classes apart for longer.
    collapse = ["threshold=0.05", "pseudo_weight=30", "optim.lr=0.05", "teacher_bn=student"]
    collapse = [*short, *collapse]
    assert train("train_pseudo", config, *collapse, f"out_dir={tmp_path}/collapsed") == 0
    alarms = summary(tmp_path / "collapsed")["collapse_alarms"]
    assert any("vanished" in alarm["reason"] for alarm in alarms)
    assert f"step {alarms[0]['step']}  alarm: {alarms[0]['reason']}" in capsys.readouterr().out
    lines = [m for m in metrics(tmp_path / "collapsed") if "lr" in m]
    assert lines[-1]["vanished"] > 0


def test_a_source_mask_of_void_alone_pastes_nothing(tmp_path, void_streets):
    config = street_config(tmp_path, "train_pseudo")
    assert train("train_pseudo", config, "mix=classmix", "threshold=1.01", "log_every=1") == 0
    lines = [m for m in metrics(tmp_path / "run") if "lr" in m]
    assert all(m["cls_loss"] == m["pseudo_loss"] == m["aux_pseudo_loss"] == 0 for m in lines)
    state = weights(tmp_path / "run", "checkpoints/step_00000010.pt")["statistics"]
    assert state["confidence_s.value"] == 1  # as at the start
    assert state["mean_s.value"].unique().numel() == 1
