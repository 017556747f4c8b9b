"""evaluate.py: figures, calibration, comparison, diagnosis, features, pictures."""

import csv
import json
import math
import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from analysis import figures, plots
from analysis.compare import difference, groups_of, mcnemar
from analysis.diagnosis import diagnose
from analysis.features import domain_features, principal_components, proxy_a_distance
from analysis.measure import BINS, Predictions, predict
from analysis.tables import against_summary, per_class
from common.errors import UserError
from common.metrics import IGNORE_INDEX, accuracies, ious
from models import load_run
from tests.helpers import ROOT, load_script, street_config, summary, tiny_config, train

evaluate = load_script(ROOT / "evaluate.py")


class Answers(torch.nn.Module):
    """A model whose logits are given, batch by batch."""

    def __init__(self, logits):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.logits = iter(logits)

    def forward(self, images):
        return type("Output", (), {"logits": next(self.logits)})


def predicted(logits, labels, measure=accuracies, batch=3) -> Predictions:
    """`predict` of these logits (N, K, ...) and labels (N, ...)."""
    k = logits.shape[1]
    classes = [f"c{i}" for i in range(k)]
    images = torch.zeros(len(labels), 3, 2, 2, dtype=torch.uint8)
    pairs = list(zip(images.split(batch), labels.split(batch), strict=True))
    names = [f"image {i}" for i in range(len(labels))]
    figures = lambda confusion: measure(confusion, classes)  # noqa: E731
    return predict(Answers(logits.split(batch)), pairs, classes, names, figures)


def random_maps(seed=0, n=5, k=4):
    generator = torch.Generator().manual_seed(seed)
    logits = 3 * torch.randn(n, k, 6, 7, generator=generator)
    labels = torch.randint(k, (n, 6, 7), generator=generator)
    labels[:, 0] = IGNORE_INDEX
    labels[1] = IGNORE_INDEX
    return logits, labels


def slow_ece(confidence, correct) -> float:
    """Guo et al. 2017, equation 3, bin by bin."""
    total, gap = len(confidence), 0.0
    for b in range(BINS):
        inside = [i for i, c in enumerate(confidence) if b / BINS < c <= (b + 1) / BINS]
        if inside:
            accuracy = sum(correct[i] for i in inside) / len(inside)
            mean = sum(confidence[i] for i in inside) / len(inside)
            gap += len(inside) / total * abs(accuracy - mean)
    return 100 * gap


def test_calibration_is_that_of_the_plain_loop():
    generator = torch.Generator().manual_seed(0)
    logits, labels = 2 * torch.randn(50, 5, generator=generator), torch.arange(50) % 5
    p = logits.double().softmax(1)
    correct = (p.argmax(1) == labels).tolist()
    found = predicted(logits, labels).figures()
    assert found["ece"] == pytest.approx(slow_ece(p.amax(1).tolist(), correct), abs=1e-3)
    assert found["confidence"] == pytest.approx(100 * float(p.amax(1).mean()), abs=1e-3)
    gap = 100 * (float(p.amax(1).mean()) - sum(correct) / 50)
    assert found["overconfidence"] == pytest.approx(gap, abs=1e-3)
    nats = torch.nn.functional.cross_entropy(logits.double(), labels)
    assert found["loss"] == pytest.approx(float(nats), abs=1e-5)
    certain = predicted(100 * torch.eye(5)[labels], labels).figures()
    assert certain["ece"] == pytest.approx(0, abs=1e-3)  # always right, and sure of it


def test_figures_without_a_label():
    logits, labels = random_maps()
    found = predicted(logits, torch.full_like(labels, IGNORE_INDEX), ious)
    figures = found.figures()
    assert figures["ece"] is figures["loss"] is figures["mean_iou"] is None
    assert found.image_ious().isnan().all()


def test_figures_of_each_image_are_those_of_the_plain_loop():
    logits, labels = random_maps()
    found = predicted(logits, labels, ious)
    assert found.maps
    prediction = logits.argmax(1)
    whole = torch.zeros(4, 4, dtype=torch.int64)
    for i in range(len(labels)):
        valid = labels[i] != IGNORE_INDEX
        own = torch.zeros(4, 4, dtype=torch.int64)
        for a, b in zip(labels[i][valid].tolist(), prediction[i][valid].tolist(), strict=True):
            own[a, b] += 1
        whole += own
        if not valid.any():
            assert math.isnan(found.shares()[i])
            assert math.isnan(found.image_ious()[i])
            continue
        names = found.classes
        assert float(found.image_ious()[i]) == pytest.approx(ious(own, names)["mean_iou"])
        assert float(found.shares()[i]) == pytest.approx(float(own.diag().sum() / own.sum()))
        p = logits[i].softmax(0).amax(0)[valid]
        assert float(found.confidence[i]) == pytest.approx(float(p.mean()), abs=1e-6)
    assert found.confusion().equal(whole)
    weights = torch.tensor([2.0, 1, 0, 0, 1], dtype=torch.float64)
    again = predicted(logits[[0, 0, 1, 4]], labels[[0, 0, 1, 4]], ious)
    assert found.confusion(weights).equal(again.confusion().double())


def test_shares_of_each_class():
    logits = torch.eye(3)[torch.tensor([0, 0, 1, 1])]
    rows = per_class(predicted(logits, torch.tensor([0, 1, 1, 1])))
    assert [row["recall"] for row in rows] == [100, pytest.approx(200 / 3), None]
    assert [row["precision"] for row in rows] == [50, 100, None]
    assert [row["iou"] for row in rows] == [50, pytest.approx(200 / 3), None]


def test_mcnemar():
    """Against sums of binomial coefficients, and beyond what a float can hold."""
    assert mcnemar(0, 0) == 1
    assert mcnemar(5, 5) == 1
    for a, b in ((1, 9), (3, 12), (0, 6)):
        tail = sum(math.comb(a + b, i) for i in range(a + 1)) / 2 ** (a + b)
        assert mcnemar(a, b) == pytest.approx(2 * tail) == pytest.approx(mcnemar(b, a))
    assert 0 < mcnemar(4800, 5200) < 1e-3


def test_the_interval_of_a_difference_covers_it(monkeypatch):
    """Of pairs of models that differ by 10 points, about 95 % of the intervals contain 10."""
    monkeypatch.setattr("analysis.compare.SAMPLES", 300)
    generator, covered = torch.Generator().manual_seed(0), 0
    labels = torch.zeros(60, dtype=torch.int64)
    for seed in range(40):
        right = torch.rand(2, 60, generator=generator) < torch.tensor([[0.7], [0.8]])
        first, second = (predicted(torch.eye(2)[(~r).long()], labels, batch=60) for r in right)
        found = difference(first, second, torch.arange(60), seed)
        assert found.difference == pytest.approx(100 * float(right[1].sum() - right[0].sum()) / 60)
        covered += found.low <= 10 <= found.high
    assert 34 <= covered <= 40


def test_frames_of_a_sequence_are_drawn_together(monkeypatch):
    """Ten copies of each image widen nothing if they are one unit, and the interval stays wide."""
    monkeypatch.setattr("analysis.compare.SAMPLES", 400)
    generator = torch.Generator().manual_seed(1)
    right = torch.rand(2, 12, generator=generator) < torch.tensor([[0.4], [0.8]])
    labels = torch.zeros(120, dtype=torch.int64)
    models = [
        predicted(torch.eye(2)[(~r).long().repeat_interleave(10)], labels, batch=120) for r in right
    ]
    names = [f"video{i // 10}_{i % 10}.png" for i in range(120)]
    groups = groups_of(names, r"video\d+")
    assert int(groups.max()) == 11
    together, apart = (difference(*models, g) for g in (groups, torch.arange(120)))
    assert together.high - together.low > 2 * (apart.high - apart.low)
    with pytest.raises(UserError, match=r"no regular expression.*correct it"):
        groups_of(names, "(")
    with pytest.raises(UserError, match=r"is not found in video0_0\.png"):
        groups_of(names, "clip")


def test_the_distance_of_two_domains():
    generator = torch.Generator().manual_seed(0)
    source, target = torch.randn(2, 400, 20, generator=generator)
    assert proxy_a_distance(source, target) < 0.3
    assert proxy_a_distance(source, target + 5) == pytest.approx(2)
    assert proxy_a_distance(source, target[:50] + 5) == pytest.approx(2)  # sizes may differ
    assert 0.5 < proxy_a_distance(source, target + 0.4) < 1.9
    constant = torch.cat([source, torch.ones(400, 3)], 1)
    assert proxy_a_distance(constant, constant) < 0.3
    assert proxy_a_distance(source[:19], target) is None


def test_features_of_each_domain_by_its_own_statistics(runs):
    """Shifting all images of a domain alters nothing, as in training with bn: separate."""
    run = evaluate.open_run(runs / "dann")
    before = {name: x.clone() for name, x in run.network.state_dict().items()}
    images = run.images
    darker = replace(images, images=images.images // 2)
    spread = []
    for separate in (False, True):
        first, _, second, _ = domain_features(
            run.network, images, darker, run.config.data, separate
        )
        spread.append(float((first - second).norm() / first.norm()))
    assert spread[1] < 0.3 * spread[0]
    after = run.network.state_dict()
    assert all(after[name].equal(x) for name, x in before.items())  # the model is not changed


def test_names_without_a_meaning_to_matplotlib(tmp_path):
    names = ["_background_", "x_{$", "a$b$"]
    plots.plot_confusion(torch.eye(3, dtype=torch.int64), names, tmp_path / "c.png")
    points = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
    columns = {"after": (points, torch.arange(6) % 3, points + 1, torch.arange(6) % 3)}
    plots.plot_features(columns, names, tmp_path / "f.png")
    assert Image.open(tmp_path / "c.png").size[0] > 200


def test_principal_components_keep_the_largest_variance():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(100, 6, generator=generator) * torch.tensor([9.0, 4, 1, 1, 1, 1])
    found = principal_components(x)
    eigenvalues = torch.linalg.eigvalsh(x.double().T.cov()).flip(0)[:2]
    assert found.var(0).tolist() == pytest.approx(eigenvalues.tolist())
    assert found.mean(0).abs().max() < 1e-9
    assert principal_components(torch.randn(4, 1)).shape == (4, 2)


def sentences(records=(), summary=None, figures=None, rows=(), distances=None, before=None) -> str:
    calm = {"accuracy": 70.0, "ece": 1.0, "ece_by_chance": 1.0, "overconfidence": 1.0}
    figures = {**calm, **(figures or {})}
    return "\n".join(diagnose(records, summary or {}, figures, rows, distances or {}, before))


def test_the_diagnosis_says_what_the_log_shows():
    assert sentences() == "nothing unusual"
    for accuracy, word in ((99, "has won"), (52, "confused"), (20, "run away"), (80, "partly")):
        records = [{"step": i, "domain_accuracy": 50.0 if i < 90 else accuracy} for i in range(100)]
        assert word in sentences([r for r in records if r["step"] >= 50])
    fallen = [{"step": i, "criteria.source_val": v} for i, v in ((10, 90.0), (20, 70.0))]
    assert "fallen from 90.0 at step 10 to 70.0" in sentences(fallen)
    assert "lower the weight" in sentences(fallen)
    learning = {"selection": {"source_vetoes": False}}
    assert "fallen from 90.0 at step 10 to 70.0, with batch norm" in sentences(fallen, learning)
    assert "fallen" not in sentences(fallen[:1])
    few = [{"step": 10, "accepted": 0.02}]
    assert "only 2 % of the pseudo-labels" in sentences(few)
    alarms = {
        "collapse_alarms": [{"step": 7, "reason": "cat vanished"}],
        "collapsed": {"last": "x"},
    }
    assert "the first at step 7: cat vanished" in sentences(summary=alarms)
    assert "the last evaluation is collapsed" in sentences(summary=alarms)
    target = {n: {"step": s, "accuracy": v} for n, s, v in (("last", 3, 50.0), ("oracle", 1, 80.0))}
    target["selected"] = {"step": 2, "accuracy": 79.0}
    assert "the last step has 50.0, but step 1 had 80.0" in sentences(summary={"target": target})
    assert "the selected step" not in sentences(summary={"target": target})
    off = {"ece": 30.0, "overconfidence": 29.0, "ece_by_chance": 3.0}
    assert "the model is overconfident" in sentences(figures=off)
    assert "both over- and under" in sentences(figures={**off, "overconfidence": -4.0})
    assert "calibration" not in sentences(figures={**off, "ece_by_chance": 20.0})  # few images
    names = ("class", "labels", "predictions", "precision")
    rows = [dict(zip(names, row, strict=True)) for row in (("dog", 9, 0, None), ("cat", 9, 18, 50))]
    found = sentences(rows=rows)
    assert "never predicted, though they occur (1 classes): dog" in found
    assert "cat is predicted too often: 18 times for 9 labels, of which 50 % are right" in found
    assert "0.50 before adaptation, 0.10 after" in sentences(
        distances={"before": 0.5, "after": 0.1}
    )
    assert "source and target: 0.10 (0:" in sentences(distances={"after": 0.1})
    worse, better = ({"accuracy": figure} for figure in (83.6, 60.0))
    assert "has made the model worse: accuracy 83.6 before, 70.0" in sentences(before=worse)
    assert "accuracy 60.0 before adaptation, 70.0 after" in sentences(before=better)
    none = [{"step": 1, "accepted": 0.9, "accepted.cat": 0.9, "accepted.dog": 0.0}]
    assert "no pseudo-label of these classes is accepted at the end: dog" in sentences(none)


def test_the_error_of_calibration_by_chance():
    """Of confidences that are true probabilities, in the mean over many draws."""
    generator = torch.Generator().manual_seed(0)
    p = 0.5 + 0.5 * torch.rand(80, generator=generator)
    logits = torch.stack([p.log(), (1 - p).log()], 1)
    errors = []
    for _ in range(200):
        labels = (torch.rand(80, generator=generator) > p).long()
        figures = predicted(logits, labels, batch=80).figures()
        errors.append(figures["ece"])
    assert figures["ece_by_chance"] == pytest.approx(sum(errors) / len(errors), rel=0.15)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Runs of the source, of MCC with few target images, and on street scenes."""
    folder = tmp_path_factory.mktemp("runs")
    for name in ("source", "dann"):
        config = tiny_config(folder, out_dir=folder / name, log_every=2)
        assert train(f"train_{name}", config, "data.size=28") == 0
    config = tiny_config(folder, out_dir=folder / "other", steps=1, eval_every=1)
    config.write_text(config.read_text().replace("drawn_digits_shifted", "drawn_digits"))
    assert train("train_source", config, "data.source_val=5") == 0
    config = street_config(folder, "train_source", out_dir=folder / "street", steps=4)
    assert train("train_source", config) == 0
    return folder


def rows_of(file) -> list[dict]:
    with open(file, newline="") as text:
        return list(csv.DictReader(text))


def test_a_classifier_is_evaluated(runs, capsys):
    words = [
        str(runs / "dann"),
        "--before",
        str(runs / "source"),
        "--compare",
        str(runs / "source"),
    ]
    assert evaluate.main(words) == 0
    printed = capsys.readouterr().out
    folder = runs / "dann" / "evaluation" / "drawn_digits_shifted"
    report, before = json.loads((folder / "figures.json").read_text()), summary(runs / "dann")
    assert report["figures"]["accuracy"] == before["target"]["selected"]["accuracy"]
    assert "exactly the figures of summary.json" in printed
    assert set(report["a_distance"]) == {"before", "after"}
    assert (
        report["comparison"][0]["second"]
        == summary(runs / "source")["target"]["selected"]["accuracy"]
    )
    table = rows_of(folder / "images.csv")
    hits = [row["label"] == row["prediction"] for row in table]
    assert 100 * sum(hits) / len(hits) == pytest.approx(report["figures"]["accuracy"])
    matrix = [[int(x) for x in list(row.values())[1:]] for row in rows_of(folder / "confusion.csv")]
    assert matrix == before["confusion"]["selected"]
    features = np.load(folder / "features.npz")
    assert features["after_target"].shape == (30, 128)
    assert not np.array_equal(features["after_source"], features["before_source"])
    pictures = {file.name for file in folder.glob("*.png")}
    wanted = {"confusion", "reliability", "curves", "features", "worst", "best"}
    assert pictures <= {f"{name}.png" for name in wanted}
    assert len(pictures) >= 5
    assert all(min(Image.open(folder / name).size) > 100 for name in pictures)


def test_a_segmenter_is_evaluated(runs, capsys):
    assert evaluate.main([str(runs / "street")]) == 0
    assert "exactly the figures of summary.json" in capsys.readouterr().out
    (folder,) = (runs / "street" / "evaluation").iterdir()
    found = json.loads((folder / "figures.json").read_text())["figures"]
    assert found["mean_iou"] == summary(runs / "street")["target"]["selected"]["mean_iou"]
    assert Image.open(folder / "overlays.png").size[0] > 1000
    assert len(rows_of(folder / "images.csv")) == 5


def test_other_weights_have_other_figures(runs, tmp_path):
    """The control of `exactly the figures of summary.json`."""
    run = evaluate.open_run(runs / "dann")
    before = evaluate.predict_run(run)
    network, _ = load_run(runs / "source")
    run.network.load_state_dict(network.state_dict())
    other = evaluate.predict_run(run)
    assert other.log_likelihood != before.log_likelihood
    text = against_summary(other.figures(), summary(runs / "dann"))
    assert text.startswith("note: summary.json has")


def write_digits(folder, name="0", count=3):
    for label in range(10):
        for i in range(count):
            place = folder / f"{label}"
            place.mkdir(parents=True, exist_ok=True)
            noise = np.random.RandomState(10 * i + label).randint(0, 255, (30, 40, 3))
            Image.fromarray(noise.astype(np.uint8)).save(place / f"{name}{i}.png")


def test_another_set_is_evaluated(runs, tmp_path, capsys):
    write_digits(tmp_path / "new set")
    words = ["data.target_test.name=folder", f"data.target_test.path={tmp_path / 'new set'}"]
    assert evaluate.main([str(runs / "dann"), *words, "--out", str(tmp_path / "out")]) == 0
    assert "30 images of folder" in capsys.readouterr().out
    names = [row["image"] for row in rows_of(tmp_path / "out/images.csv")]
    assert names[0].endswith("new set/0/00.png")
    assert not (tmp_path / "out/features.npz").exists()  # the source is not opened
    assert "warning" not in capsys.readouterr().out
    (tmp_path / "new set/0").rename(tmp_path / "new set/zero")
    with pytest.raises(UserError, match=r"only here: zero; only in the source: 0"):
        evaluate.main([str(runs / "dann"), *words])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], r"there is no run none|none: has no config.yaml"),
        (["{runs}/dann", "data.bathc=3"], r"unknown key data.bathc"),
        (["{runs}/dann", "adv_weight=3"], r"unknown key adv_weight"),
        (["{runs}/dann", "--sequences", "x"], "goes with --compare"),
        (["{runs}/dann", "--compare", "{runs}/street"], "has other test images"),
        (["{runs}/dann", "--compare", "{runs}/other"], "has other test images"),
        (["{runs}/dann", "{runs}/source"], "name one run, not 2"),
        (["{runs}/dann", "data.target_test=null"], r"data\.target_test is null: name a set"),
        (
            ["{runs}/dann", "--before", "{runs}/source", "data.target_test.name=drawn_digits"],
            "leave one of them out",
        ),
    ],
)
def test_mistakes_are_one_line(runs, words, message):
    with pytest.raises(UserError, match=message) as error:
        evaluate.main([word.format(runs=runs) for word in words])
    assert "\n" not in str(error.value)


def test_without_matplotlib_there_are_tables(runs, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(figures, "optional", lambda name: None)
    assert evaluate.main([str(runs / "source"), "--out", str(tmp_path / "out")]) == 0
    assert figures.HINT in capsys.readouterr().out
    made = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"figures.json", "per_class.csv", "confusion.csv", "images.csv", "worst.png"} <= made
    assert not made & {"confusion.png", "reliability.png", "features.png", "curves.png"}


@pytest.mark.parametrize("count", [3, 65])
def test_a_confusion_matrix_shows_every_name(count, tmp_path):
    """No label is cut off: the ink of the names lies within the picture."""
    names = [f"class {i} " + "m" * (i % 30) for i in range(count)]
    plots.plot_confusion(torch.eye(count, dtype=torch.int64), names, tmp_path / "c.png")
    pixels = np.asarray(Image.open(tmp_path / "c.png").convert("L"))
    assert min(pixels.shape) > 200
    border = np.concatenate([pixels[0], pixels[-1], pixels[:, 0], pixels[:, -1]])
    assert (border == 255).all()
    assert re.match(r".{11}\u2026.{11}$", plots.shorten("m" * 40))
