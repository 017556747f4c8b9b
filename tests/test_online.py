"""Test-time adaptation to a stream: its parts against plain versions, and the real command."""

import copy
import dataclasses
import functools
import math
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import data.classification
import data.segmentation
from common.averages import RunningMean
from common.errors import UserError
from common.metrics import accuracies, main_metric
from data import EvaluationSets, StreamDataConfig, open_domains
from data.config import DomainConfig
from losses.online import diversity_weights, reliable_weights, weighted_entropy
from models import build_classifier, eval_mode, load_run
from models.card import card_text
from models.config import ModelConfig
from models.stream_norm import NORMS, StreamNorm, follow_stream
from tests.helpers import (
    TASKS,
    differing,
    metrics,
    online_config,
    stop_after,
    summary,
    tiny_config,
    train,
    weights,
)
from training import collapse
from training.stream import StreamRecord, warn_of_fixed_statistics

LAST = "checkpoints/step_00000010.pt"
CLASSES = ["a", "b", "c"]


def randn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


# --- the loss and its weights


@pytest.mark.parametrize("shape", [(40,), (4, 2, 5)])
def test_weights_against_a_loop(shape):
    log_p = (2 * randn(shape[0], 3, *shape[1:])).log_softmax(1)
    found, expected = reliable_weights(log_p, 0.5), []
    for p in log_p.exp().movedim(1, -1).reshape(-1, 3).tolist():
        entropy, limit = -sum(x * math.log(x) for x in p), 0.5 * math.log(3)
        expected.append(1 / math.exp(entropy - limit) if entropy < limit else 0.0)
    assert found.shape == shape
    torch.testing.assert_close(found.flatten(), torch.tensor(expected))
    assert 0 < sum(weight > 0 for weight in expected) < 40
    assert (reliable_weights(log_p, None) == 1).all()


@pytest.mark.parametrize("shape", [(40,), (4, 2, 5)])
def test_the_loss_against_a_loop(shape):
    logits = randn(shape[0], 3, *shape[1:]).requires_grad_()
    factors = torch.rand(shape, generator=torch.Generator().manual_seed(1))
    loss = weighted_entropy(logits.log_softmax(1), factors)
    rows = logits.detach().softmax(1).movedim(1, -1).reshape(-1, 3)
    terms = [-w * sum(x * x.log() for x in p) for w, p in zip(factors.flatten(), rows, strict=True)]
    torch.testing.assert_close(loss, sum(terms) / len(rows))
    loss.backward()
    assert (logits.grad != 0).any()


@pytest.mark.parametrize("shape", [(40,), (4, 2, 5)])
def test_diversity_weights_against_a_loop(shape):
    log_p = (2 * randn(shape[0], 3, *shape[1:])).log_softmax(1)
    mean = torch.tensor([0.6, 0.3, 0.1])
    expected = []
    for p in log_p.exp().movedim(1, -1).reshape(-1, 3):
        cosine = float(p @ mean) / float(p.norm() * mean.norm())
        expected.append((1 - cosine) / (1 - 1 / math.sqrt(3)))
    weights = diversity_weights(log_p, mean)
    assert weights.shape == shape
    torch.testing.assert_close(weights.flatten(), torch.tensor(expected), rtol=1e-3, atol=1e-4)


def test_diversity_weights_of_certain_predictions():
    """1 where classes are equally frequent, or nothing is known; next to 0 for the only class."""
    log_p = (50 * torch.eye(3)).log_softmax(1)
    for mean in (torch.full((3,), 1 / 3), torch.zeros(3)):
        torch.testing.assert_close(diversity_weights(log_p, mean), torch.ones(3))
    common, *rare = diversity_weights(log_p, torch.tensor([1.0, 0.0, 0.0])).tolist()
    assert common < 1e-3
    assert min(rare) > 2


def test_no_prediction_gives_nothing():
    logits = torch.zeros(0, 3, 4, 4, requires_grad=True)
    log_p = logits.log_softmax(1)
    factors = reliable_weights(log_p, 0.4) * diversity_weights(log_p, torch.zeros(3))
    loss = weighted_entropy(log_p, factors)
    loss.backward()
    assert loss == 0


def test_parts_of_an_update_count_in_proportion():
    parts, plain = RunningMean(torch.zeros(2), 0.9), RunningMean(torch.zeros(2), 0.9)
    for seed in range(8):
        for part in range(4):
            parts.update(randn(2, seed=4 * seed + part), 0.25)
        plain.update(torch.stack([randn(2, seed=4 * seed + part) for part in range(4)]).mean(0))
    torch.testing.assert_close(parts.value, plain.value)
    before = parts.value.clone()
    parts.update(torch.ones(2), 0.0)
    assert torch.equal(parts.value, before)


# --- batch norm of the stream


def norm_layer(prior: float, pooled: bool = False) -> StreamNorm:
    layer = nn.BatchNorm2d(3)
    with torch.no_grad():
        for seed, tensor in enumerate((layer.weight, layer.bias, layer.running_mean)):
            tensor.copy_(randn(3, seed=seed))
        layer.running_var.copy_(randn(3, seed=3).exp())
    return StreamNorm(layer, prior, pooled)


@pytest.mark.parametrize("prior", [0, 5, 1e12])
@pytest.mark.parametrize("pooled", [False, True])
def test_the_mixture_and_its_gradient(prior, pooled):
    norm, x, share = norm_layer(prior, pooled), randn(4, 3, 2, 5), 4 / (prior + 4)
    mean, variance = norm.running_mean.clone(), norm.running_var.clone()
    gradients = []
    for plain in (True, False):
        x.grad, norm.weight.grad = None, None
        x.requires_grad_()
        if plain:
            between = share * (1 - share) * (x.mean((0, 2, 3)) - mean) ** 2 * pooled
            new_mean = (1 - share) * mean + share * x.mean((0, 2, 3))
            new_var = (1 - share) * variance + share * x.var((0, 2, 3), correction=0) + between
            scaled = (x - new_mean.view(1, 3, 1, 1)) / (new_var.view(1, 3, 1, 1) + 1e-5).sqrt()
            out = scaled * norm.weight.view(1, 3, 1, 1) + norm.bias.view(1, 3, 1, 1)
            expected = out
        else:
            out = norm(x)
            torch.testing.assert_close(out, expected)
            torch.testing.assert_close(norm.running_mean, new_mean.detach())
            torch.testing.assert_close(norm.running_var, new_var.detach())
        (out * randn(4, 3, 2, 5, seed=7)).sum().backward()
        gradients.append((x.grad.clone(), norm.weight.grad.clone()))
    torch.testing.assert_close(*gradients, rtol=1e-3, atol=1e-5)
    reference = F.batch_norm(x, mean, variance, norm.weight, norm.bias, prior == 0)
    if prior in (0, 1e12):  # the batch alone, and the prior alone
        torch.testing.assert_close(out, reference, rtol=1e-4, atol=1e-4)


def test_pooled_statistics_are_those_of_all_values():
    """Single images of one value each: their own variance is 0."""
    values = 3 + 2 * randn(50, 3)
    norm, unpooled = (StreamNorm(nn.BatchNorm1d(3), 25.0, pooled) for pooled in (True, False))
    for _ in range(10):
        for value in values:
            norm(value[None])
            unpooled(value[None])
    torch.testing.assert_close(norm.running_mean, values.mean(0), rtol=0.2, atol=0)
    torch.testing.assert_close(norm.running_var, values.var(0), rtol=0.4, atol=0)
    assert (unpooled.running_var < 0.01).all()  # control
    one, other = randn(30, 3), randn(20, 3, seed=1) + 2
    norm = StreamNorm(nn.BatchNorm1d(3), 30.0, True)
    norm.running_mean.copy_(one.mean(0))
    norm.running_var.copy_(one.var(0, correction=0))
    norm(other)
    torch.testing.assert_close(norm.running_mean, torch.cat([one, other]).mean(0))
    torch.testing.assert_close(norm.running_var, torch.cat([one, other]).var(0, correction=0))


def test_eval_mode_and_fixed_statistics_are_those_of_batch_norm():
    model = build_classifier(ModelConfig(bottleneck=8), 3, "")
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_(generator=torch.Generator().manual_seed(0))
    x = torch.randint(0, 256, (4, 3, 28, 28), dtype=torch.uint8)
    plain, before = model.eval()(x).logits, list(model.state_dict())
    follow_stream(model, 8.0, pooled=True)
    assert list(model.state_dict()) == before
    assert torch.equal(model.eval()(x).logits, plain)
    eval_mode(model, batch_statistics=True)
    kept = [buffer.clone() for buffer in model.buffers()]
    with model.running_statistics(fixed=True):
        assert not torch.equal(model(x).logits, plain)
    assert all(map(torch.equal, model.buffers(), kept))
    model(x[:1])  # one image
    assert not all(map(torch.equal, model.buffers(), kept))


@pytest.mark.parametrize(
    ("config", "learning"),
    [
        ({}, {"StreamNorm"}),
        ({"backbone": "resnet18", "bottleneck": 8}, {"StreamNorm"}),
        ({"backbone": "resnet18", "bottleneck": 8, "bn_affine": "frozen"}, {"StreamNorm"}),
        ({"backbone": "convnext_tiny"}, {"LayerNorm2d", "LayerNorm"}),
        ({"backbone": "swin_t"}, {"LayerNorm"}),
    ],
)
def test_normalization_layers_alone_learn(config, learning):
    with torch.device("meta"):
        model = build_classifier(ModelConfig(**config), 3, "")
        follow_stream(model, 8.0, pooled=True)
    kinds = {
        type(model.get_submodule(name.rpartition(".")[0])).__name__
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }
    assert kinds == learning
    backbone_norms = [
        p.requires_grad
        for module in model.backbone.modules()
        if isinstance(module, NORMS)
        for p in module.parameters()
    ]
    assert set(backbone_norms) == {config.get("bn_affine") != "frozen"}


def test_a_network_without_normalization_is_refused():
    model = build_classifier(ModelConfig(batch_norm=False), 3, "")
    with pytest.raises(UserError, match="no normalization layer"):
        follow_stream(model, 8.0, pooled=True)


# --- the record


def record_of(alarms: list, classes: list[str] = CLASSES) -> StreamRecord:
    measure = functools.partial(accuracies, classes=classes)
    sets = EvaluationSets(None, None, None, classes, measure)
    return StreamRecord(sets, lambda step, reason: alarms.append(reason))


def one_hot(predictions: torch.Tensor, scale: float = 9.0) -> torch.Tensor:
    return scale * F.one_hot(predictions, 3).movedim(-1, 1).float()


@pytest.mark.parametrize("shape", [(64,), (2, 8, 4)])
def test_the_figures_of_a_record(shape):
    record, random = record_of([]), torch.Generator().manual_seed(0)
    rows = []
    for _ in range(3):
        adapted, unadapted, labels = (
            torch.randint(0, 3, shape, generator=random) for _ in range(3)
        )
        record.add(one_hot(adapted), one_hot(unadapted, 1.0), labels)
        rows.append((adapted, unadapted, labels))
    adapted, unadapted, labels = (torch.cat(part) for part in zip(*rows, strict=True))
    facts, line = record.facts(), record.report()
    for name, predictions in (("adapted", adapted), ("unadapted", unadapted)):
        share = 100 * float((predictions == labels).float().mean())
        assert facts[name]["accuracy"] == pytest.approx(share)
        counts = torch.bincount(predictions.flatten(), minlength=3).tolist()
        assert list(facts["predicted"][name].values()) == counts
    assert facts["agreement"] == pytest.approx(float((adapted == unadapted).float().mean()))
    assert facts["confident_agreement"] is None  # scores of 1 are not confident
    assert facts["images"] == 3 * shape[0]
    assert line["stream.accuracy"] == facts["adapted"]["accuracy"]
    assert line["stream.unadapted_accuracy"] == facts["unadapted"]["accuracy"]


def test_contradicting_what_the_unadapted_model_is_sure_of_raises_one_alarm():
    for wrong, expected in ((0.0, 0), (0.05, 0), (0.2, 1)):  # the first two are controls
        alarms = []
        record, random = record_of(alarms), torch.Generator().manual_seed(0)
        for step in range(20):
            unadapted = torch.randint(0, 3, (64,), generator=random)
            moved = torch.rand(64, generator=random) < wrong
            record.add(one_hot((unadapted + moved) % 3), one_hot(unadapted), None)
            record.look_for_harm(step)
        assert len(alarms) == expected
        assert record.report()["stream.accuracy"] is None


def test_few_confident_predictions_raise_no_alarm():
    """Three in a hundred images are confident, and contradicted."""
    for confident, expected in ((3, 0), (30, 1)):  # the second is a control
        alarms = []
        record, unadapted = record_of(alarms), torch.zeros(100, dtype=torch.int64)
        scores = one_hot(unadapted, 1.0)
        scores[:confident] *= 9
        for step in range(40):
            record.add(one_hot(unadapted + 1), scores, None)
            record.look_for_harm(step)
        assert len(alarms) == expected


def test_classes_count_alike_in_the_alarm():
    """Of 99 pixels in 100, of one class, all agree; of the rest, of two classes, none does."""
    for moved, expected in ((1, 1), (0, 0)):  # the second is a control
        alarms = []
        record = record_of(alarms)
        unadapted = torch.zeros(1, 40, 100, dtype=torch.int64)
        unadapted[0, :20, 0], unadapted[0, 20:, 0] = 1, 2
        adapted = torch.where(unadapted > 0, (unadapted + moved) % 3, unadapted)
        for step in range(3):
            record.add(one_hot(adapted), one_hot(unadapted), None)
            record.look_for_harm(step)
        assert len(alarms) == expected
        agreement = record.report()["confident_agreement"]
        assert agreement == pytest.approx(1 / 3 if moved else 1.0)
        assert record.facts()["confident_agreement"] == pytest.approx(agreement)


def test_many_classes_of_few_predictions_are_judged_together():
    """Each of 65 classes has 15 confident predictions, all contradicted."""
    for moved, expected in ((1, 1), (0, 0)):  # the second is a control
        alarms = []
        record = record_of(alarms, [str(number) for number in range(65)])
        unadapted = torch.arange(960) % 65
        for step, part in enumerate(unadapted.split(64)):
            one, other = (9.0 * F.one_hot(x % 65, 65).float() for x in (part + moved, part))
            record.add(one, other, None)
            record.look_for_harm(step)
        assert len(alarms) == expected


def test_one_image_of_a_class_long_past_raises_no_alarm():
    alarms = []
    record = record_of(alarms)
    for step in range(122):
        unadapted = torch.arange(64) % 2 + (step == 0)  # the class 2 in the first step
        adapted = unadapted.clone()
        if step == 121:
            unadapted[0], adapted[0] = 2, 0
        record.add(one_hot(adapted), one_hot(unadapted), None)
        record.look_for_harm(step)
    assert not alarms
    unadapted = torch.full((64,), 2)
    record.add(one_hot(unadapted - 1), one_hot(unadapted), None)  # control
    record.look_for_harm(123)
    assert len(alarms) == 1


def test_a_model_of_frozen_statistics_is_warned_of(tmp_path, capsys):
    class Written:
        method = "source"

    def printed(bn: str, prior: float | None) -> str:
        folder = tmp_path / bn
        data = types.SimpleNamespace(task="classification", size=28, exif=False)
        config = Written()
        config.data, config.amp = data, "float32"
        folder.mkdir(exist_ok=True)
        text = card_text(config, ModelConfig(bn=bn), CLASSES, None)
        (folder / "model.yaml").write_text(text)
        warn_of_fixed_statistics(str(folder), prior)
        return capsys.readouterr().out

    assert "was trained with model.bn: frozen" in printed("frozen", 64.0)
    assert printed("frozen", None) == ""
    assert printed("concat", 64.0) == ""
    warn_of_fixed_statistics(None, 64.0)
    warn_of_fixed_statistics(str(tmp_path / "gone"), 64.0)
    assert capsys.readouterr().out == ""


def test_collapse_is_judged_beside_the_unadapted_model():
    mixed, one = torch.arange(64) % 3, torch.zeros(64, dtype=torch.int64)
    for adapted, unadapted, expected in ((one, mixed, True), (mixed, mixed, False)):
        record = record_of([])
        record.add(one_hot(adapted), one_hot(unadapted), None)
        assert record.has_collapsed(0.5) == expected
        assert not record.has_collapsed(0.0)
        record.reset()
        assert not record.has_collapsed(0.5)
        assert record.facts()["resets"] == 1
    for scale in (5.0, 9.0):  # a stream of one class is no collapse, also of a model more certain
        record = record_of([])
        record.add(one_hot(one, scale), one_hot(one, 5.0), None)
        assert not record.has_collapsed(0.5)


def alarms_of_single_images(count: int) -> int:
    monitor = collapse.CollapseMonitor([str(k) for k in range(10)], tell=lambda text: None)
    for step, k in enumerate(torch.randint(0, 10, (count,)).tolist()):
        monitor.add(9 * F.one_hot(torch.tensor([k]), 10).float())
        if step % 50 == 0:
            monitor.report(step)
    return len(monitor.alarms)


def test_single_images_raise_no_alarm_by_chance(monkeypatch):
    torch.manual_seed(0)
    assert alarms_of_single_images(2000) == 0
    monkeypatch.setattr(collapse, "WHOLE", 1)  # control
    assert alarms_of_single_images(2000) > 0


# --- the stream


def stream_of(**keys):
    target, test = (DomainConfig(name="drawn_digits_shifted") for _ in range(2))
    config = StreamDataConfig(target=target, target_test=test, **keys)
    return open_domains(config, 3, trained=[str(k) for k in range(10)])


def test_every_image_comes_once():
    sizes, positions = {}, {}
    for order in ("shuffled", "listed", "sorted"):
        domains = stream_of(order=order, batch=64)
        batches = list(domains.stream_batches(0, domains.stream_length()))
        sizes[order] = [len(x) for x, _ in batches]
        assert sizes[order] == [64, 64, 64, 8]
        labels = torch.cat([y for _, y in batches])
        positions[order] = domains.stream.indices
        assert sorted(positions[order].tolist()) == list(range(200))
        assert (labels.diff() >= 0).all() == (order == "sorted")
        rest = list(domains.stream_batches(2, 4))
        assert [len(x) for x, _ in rest] == [64, 8]
        assert torch.equal(rest[0][0], batches[2][0])
        assert domains.target.labels is None
    assert torch.equal(positions["listed"], torch.arange(200))
    assert torch.equal(positions["shuffled"], stream_of().stream.indices)
    assert not torch.equal(positions["shuffled"], positions["listed"])
    assert [len(x) for x, _ in stream_of(batch=1).stream_batches(0, 3)] == [1, 1, 1]


# --- runs


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> dict:
    """The folder of a source run for each task."""
    folders = {task: tmp_path_factory.mktemp(task) for task in TASKS}
    for task, folder in folders.items():
        online_config(folder, task)
    return {task: folder / "source" for task, folder in folders.items()}


@pytest.fixture(scope="module")
def learned(tmp_path_factory):
    """A source model that is certain of many predictions."""
    folder = tmp_path_factory.mktemp("learned")
    keys = "steps=80", "eval_every=80", "save_every=80", "data.batch=32", "optim.lr=0.1"
    assert train("train_source", tiny_config(folder), *keys) == 0
    return folder / "run"


def config_for(folder, source: dict, task: str = "classification", **changes):
    return online_config(folder, task, init_from=source[task], **changes)


def refused(config, *keys) -> str:
    with pytest.raises(UserError) as error:
        train("adapt_online", config, *keys)
    return str(error.value)


def test_what_does_not_fit_is_refused(tmp_path, source, monkeypatch):
    config = config_for(tmp_path, source)
    assert "the stream has 25 batches of 8; set steps: null" in refused(config, "steps=26")
    assert "accumulate: " in refused(config, "accumulate=2")
    assert "model.bn: frozen keeps" in refused(config, "model.bn=frozen")
    assert "adapt nothing" in refused(config, "prior=null", "updates=0")
    assert "init_from is missing" in refused(
        config, "init_from=null", f"data.classes_from={tmp_path}"
    )
    assert "target_batch: " in refused(config, "data.target_batch=4")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("common.ranks.start", lambda: None)
    assert "in one process; start it by python" in refused(config)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("task", TASKS)
def test_a_run(tmp_path, source, capsys, task):
    config = config_for(tmp_path, source, task, log_every=1)
    assert train("adapt_online", config) == 0
    assert "by the unadapted model" in capsys.readouterr().out
    result = summary(tmp_path / "run")
    stream, name = result["stream"], main_metric(result["target"]["last"])
    assert stream["images"] == {"classification": 80, "segmentation": 10}[task]
    assert (
        set(stream["adapted"])
        == set(stream["unadapted"])
        == {key for key in result["target"]["last"] if key != "step"}
    )
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    assert lines[-1][f"stream.{name}"] == stream["adapted"][name]
    assert lines[-1][f"stream.unadapted_{name}"] == stream["unadapted"][name]
    assert len(lines) == 10
    names = ["ent_loss", "learned", "agreement", "lr", f"stream.{name}"]
    names += [f"stream.unadapted_{name}", "confident_agreement", "vanished", "drift"]
    assert list(lines[0]) == ["step", *names]
    assert 0 < lines[0]["learned"] <= 1
    before, after = weights(source[task]), weights(tmp_path / "run")
    moved = [key for key, value in before.items() if not torch.equal(value, after[key])]
    norms = [key.rpartition(".")[0] + "." for key in before if "running_mean" in key]
    assert moved
    assert all(key.startswith(tuple(norms)) for key in moved)


@pytest.mark.parametrize("task", TASKS)
def test_the_unadapted_figure_is_that_of_the_source_model(tmp_path, source, task):
    config = config_for(tmp_path, source, task)
    keys = ["steps=null", "updates=1", "prior=null", "optim.lr=1e-30", "source_pull=0"]
    keys += ["data.size=28"] * (task == "classification")  # that of the images below
    assert train("adapt_online", config, *keys, "eval_every=100") == 0
    stream = summary(tmp_path / "run")["stream"]
    network, card = load_run(source[task])
    module, opener = {
        "classification": (data.classification, "open_drawn"),
        "segmentation": (data.segmentation, "open_street"),
    }[task]
    target = {"classification": "drawn_digits_shifted", "segmentation": "drawn_street_dusk"}[task]
    images = getattr(module, opener)(target, True)
    with torch.no_grad():
        logits = torch.cat([network(x).logits for x in images.images.split(8)])
    counts = torch.bincount(logits.argmax(1).flatten(), minlength=len(card.classes)).tolist()
    assert list(stream["predicted"]["unadapted"].values()) == counts
    share = "accuracy" if task == "classification" else "pixel_accuracy"
    expected = 100 * float((logits.argmax(1) == images.labels).float().mean())
    assert stream["unadapted"][share] == pytest.approx(expected, abs=1e-4)
    assert stream["adapted"] == stream["unadapted"]  # nothing has adapted
    assert stream["agreement"] == 1


def test_a_batch_is_predicted_before_it_is_learned_from(tmp_path, source):
    config = config_for(tmp_path, source)
    keys = ["prior=null", "source_pull=0", "optim.lr=1000", "reset_below=0"]
    agreement = {}
    for steps in (1, 2):
        words = [*keys, f"steps={steps}", f"out_dir={tmp_path}/{steps}"]
        assert train("adapt_online", config, *words) == 0
        agreement[steps] = summary(tmp_path / str(steps))["stream"]["agreement"]
    assert agreement[1] == 1
    assert agreement[2] < 1  # control
    assert differing(weights(source["classification"]), weights(tmp_path / "1")) > 0


@pytest.mark.parametrize("task", TASKS)
def test_labels_change_no_prediction(tmp_path, source, monkeypatch, task):
    config = config_for(tmp_path, source, task)
    assert train("adapt_online", config, f"out_dir={tmp_path}/plain") == 0
    module, opener = {
        "classification": (data.classification, "open_drawn"),
        "segmentation": (data.segmentation, "open_street"),
    }[task]
    plain_opener = getattr(module, opener)

    def permuted(name, train_split):
        images = plain_opener(name, train_split)
        return dataclasses.replace(images, labels=(images.labels + 1) % len(images.classes))

    monkeypatch.setattr(module, opener, permuted)
    assert train("adapt_online", config, f"out_dir={tmp_path}/permuted") == 0
    plain, other = (summary(tmp_path / name)["stream"] for name in ("plain", "permuted"))
    for name in ("predicted", "agreement", "confident_agreement", "resets"):
        assert plain[name] == other[name]
    alarms = [summary(tmp_path / name)["collapse_alarms"] for name in ("plain", "permuted")]
    assert alarms[0] == alarms[1]
    assert differing(weights(tmp_path / "plain"), weights(tmp_path / "permuted")) == 0
    for name in ("adapted", "unadapted"):
        assert plain[name] != other[name]  # control: the labels are others


def test_a_stream_without_labels(tmp_path, source, monkeypatch, capsys):
    config = config_for(tmp_path, source)
    assert train("adapt_online", config, f"out_dir={tmp_path}/labeled") == 0
    plain_opener = data.classification.open_drawn
    unlabeled = lambda name, split: plain_opener(name, split).unlabeled()  # noqa: E731
    monkeypatch.setattr(data.classification, "open_drawn", unlabeled)
    assert "data.order: sorted needs labels" in refused(config, "data.order=sorted")
    monkeypatch.setattr(data.domains, "_open_target_test", lambda *rest: (None, "none"))
    assert train("adapt_online", config) == 0
    assert "no labels to score with" in capsys.readouterr().out
    streams = [summary(tmp_path / name)["stream"] for name in ("labeled", "run")]
    assert streams[1]["adapted"]["accuracy"] is None
    assert streams[1]["predicted"] == streams[0]["predicted"]
    assert differing(*(weights(tmp_path / name) for name in ("labeled", "run"))) == 0


def test_one_image_at_a_time(tmp_path, source):
    config = config_for(tmp_path, source)
    for prior_from, prior in (("stream", 64), ("source", 64), ("source", 0)):
        folder = tmp_path / f"{prior_from}_{prior}"
        keys = ["data.batch=1", "steps=30", f"prior_from={prior_from}", f"prior={prior}"]
        assert train("adapt_online", config, *keys, f"out_dir={folder}") == 0
        assert summary(folder)["stream"]["images"] == 30
    state = {path.name: weights(path) for path in tmp_path.glob("s*_*")}
    assert len(state) == 3
    assert differing(state["stream_64"], state["source_64"]) > 0
    assert differing(state["source_64"], state["source_0"]) > 0


def test_one_value_per_channel_is_normalized_by_the_running_statistics():
    """It has no variance: the features of a single image."""
    torch.manual_seed(0)
    plain = nn.BatchNorm1d(4)
    plain(3 + 2 * torch.randn(50, 4))
    for prior in (0.0, 8.0):
        norm = StreamNorm(copy.deepcopy(plain), prior, pooled=False).train()
        x, before = torch.randn(1, 4), plain.running_var.clone()
        expected = plain.eval()(x)
        assert torch.equal(norm(x), expected) == (prior == 0)  # with a prior it counts
        assert torch.equal(norm.running_var, before) == (prior == 0)


def test_a_rate_is_per_image(tmp_path, source):
    """Also what does not come from the loss: with a gradient of 0 the weights decay."""
    config, distance = config_for(tmp_path, source), {}
    for batch, images in ((8, 64), (8, 16), (4, 64)):
        keys = ["ent_margin=1e-9", "source_pull=0", "optim.weight_decay=1", "optim.momentum=0"]
        keys += [f"data.batch={batch}", f"lr_images={images}", "steps=1", "optim.lr=0.1"]
        folder = tmp_path / f"{batch}_{images}"
        assert train("adapt_online", config, *keys, f"out_dir={folder}") == 0
        before, after = weights(source["classification"]), weights(folder)
        gaps = [
            (before[name] - after[name]).flatten()
            for name in before
            if "running" not in name and "num_" not in name
        ]
        distance[batch, images] = float(torch.cat(gaps).norm())
    assert distance[8, 64] > 0
    assert distance[8, 16] == pytest.approx(4 * distance[8, 64], rel=1e-3)
    assert distance[4, 64] == pytest.approx(distance[8, 64] / 2, rel=1e-3)


def test_diversity_changes_what_is_learned(tmp_path, source):
    config = config_for(tmp_path, source)
    assert train("adapt_online", config, "diversity=false") == 0
    assert train("adapt_online", config, f"out_dir={tmp_path}/diverse") == 0
    assert differing(weights(tmp_path / "run"), weights(tmp_path / "diverse")) > 0


def test_harm_is_told(tmp_path, learned, capsys):
    """A rate at which the predictions go wrong raises alarms; a small one is a control."""
    for name, keys in {
        "harmful": ["optim.lr=30", "source_pull=0", "diversity=false", "ent_margin=null"],
        "harmless": ["optim.lr=0.0001", "prior=null"],
    }.items():
        words = [
            *keys,
            "check_every=2",
            "reset_below=0",
            "steps=null",
            f"out_dir={tmp_path}/{name}",
        ]
        assert train("adapt_online", online_config(tmp_path, init_from=learned), *words) == 0
        result = summary(tmp_path / name)
        stream = result["stream"]
        loss = stream["unadapted"]["accuracy"] - stream["adapted"]["accuracy"]
        alarms = result["collapse_alarms"]
        assert (loss > 1) == bool(alarms) == (name == "harmful"), (name, loss, alarms)
        assert ("the adaptation has hurt" in capsys.readouterr().out) == (name == "harmful")


def test_a_batch_enters_the_statistics_once(tmp_path, source):
    config, state = config_for(tmp_path, source), {}
    for updates in (0, 1, 3):
        keys = [f"updates={updates}", "optim.lr=1e-30", f"out_dir={tmp_path}/{updates}"]
        assert train("adapt_online", config, *keys) == 0
        state[updates] = weights(tmp_path / str(updates))
    assert differing(state[0], state[1]) == differing(state[0], state[3]) == 0
    assert differing(state[0], weights(source["classification"])) > 0  # control


def test_the_way_back_to_the_source(tmp_path, source):
    config, distance = config_for(tmp_path, source), {}
    for share in (0, 0.5, 1):
        keys = [f"source_pull={share}", "data.batch=64", "steps=3", "optim.lr=0.1"]
        assert train("adapt_online", config, *keys, f"out_dir={tmp_path}/{share}") == 0
        before, after = weights(source["classification"]), weights(tmp_path / str(share))
        names = [name for name in before if "running" not in name and "num_" not in name]
        gaps = [(before[name] - after[name]).flatten() for name in names]
        distance[share] = float(torch.cat(gaps).norm())
    assert distance[1] == 0
    assert 0 < distance[0.5] < distance[0]


def test_a_collapse_is_reset_and_told(tmp_path, source, monkeypatch, capsys):
    config = config_for(tmp_path, source)
    for name in ("reset", "control"):
        answers = iter([name == "reset", False])  # of steps 5 and 10
        told = lambda self, share, answers=answers: next(answers)  # noqa: E731
        monkeypatch.setattr(StreamRecord, "has_collapsed", told)
        words = ["check_every=5", "optim.lr=0.1", "save_every=5", f"out_dir={tmp_path}/{name}"]
        assert train("adapt_online", config, *words) == 0
    reset, control = (summary(tmp_path / name) for name in ("reset", "control"))
    assert (reset["stream"]["resets"], control["stream"]["resets"]) == (1, 0)
    assert reset["collapse_alarms"][0] == {
        "step": 5,
        "reason": "the predictions have collapsed: back to init_from's model",
    }
    assert "warning: an alarm at step 5 (0 more later)" in capsys.readouterr().out
    states = {
        name: weights(tmp_path / name, "checkpoints/step_00000005.pt")
        for name in ("reset", "control")
    }
    before = weights(source["classification"])
    assert differing(before, states["reset"]["model"]) == 0
    assert differing(before, states["control"]["model"]) > 0
    moments = {
        name: [float(x["momentum_buffer"].norm()) for x in state["optimizer"]["state"].values()]
        for name, state in states.items()
    }
    assert max(moments["reset"]) == 0 < max(moments["control"])


@pytest.mark.parametrize(
    ("task", "keys"),
    [
        ("classification", []),
        ("classification", ["data.batch=1", "ent_margin=1", "updates=2", "prior_from=source"]),
        pytest.param("segmentation", ["updates=2", "prior_from=source"], marks=pytest.mark.slow),
    ],
)
def test_resume_is_exact(tmp_path, source, monkeypatch, task, keys):
    config, keys = config_for(tmp_path, source, task), [*keys, "check_every=4", "reset_below=0.95"]
    assert train("adapt_online", config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("adapt_online", config, *keys) == 143
    assert train("adapt_online", config, *keys, "--resume") == 0
    whole, resumed = (weights(tmp_path / run, LAST) for run in ("whole", "run"))
    del whole["seconds"], resumed["seconds"]
    assert differing(whole, resumed) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")
    streams = [summary(tmp_path / run)["stream"] for run in ("whole", "run")]
    assert streams[0] == streams[1]


def test_a_home_folder_is_found(tmp_path, source, monkeypatch):
    monkeypatch.setenv("HOME", str(source["classification"].parent))
    config = online_config(tmp_path, init_from="~/source")
    assert train("adapt_online", config, "--dry-run") == 0


def test_a_longer_stream_goes_on_with_a_finished_run(tmp_path, source):
    config = config_for(tmp_path, source)
    assert train("adapt_online", config, "steps=null", f"out_dir={tmp_path}/whole") == 0
    assert train("adapt_online", config) == 0
    assert train("adapt_online", config, "steps=null", "--resume", "--allow-change") == 0
    streams = [summary(tmp_path / run)["stream"] for run in ("whole", "run")]
    assert streams[0] == streams[1]
    assert streams[0]["images"] == 200
