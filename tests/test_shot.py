"""Source-free adaptation: centroids against a plain version, and the real command."""

import dataclasses
import signal

import pytest
import torch
import torch.nn.functional as F

import data.classification
import data.domains
import data.segmentation
from losses.shot import at_features, at_images, centroid_sums, nearest_centroid, unit_features
from tests.helpers import (
    ROOT,
    TASKS,
    differing,
    load_script,
    metrics,
    others_slow,
    shot_config,
    stop_after,
    stop_within_evaluation,
    summary,
    train,
    weights,
)

LAST = "checkpoints/step_00000010.pt"


def rand(*shape, seed=0):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(seed))


def plain_centroids(features: torch.Tensor, p: torch.Tensor, passes: int) -> torch.Tensor:
    """Equations 4 to 6, row by row, as in the authors' code: (M, D), (M, K) -> (K, D + 1)."""
    rows = [F.normalize(torch.cat([row, torch.ones(1)]), dim=0) for row in features]
    present = [k for k in range(p.shape[1]) if (p.argmax(1) == k).any()]
    assigned = p
    for _ in range(passes):
        centroids = {}
        for k in present:
            if assigned[:, k].sum() > 0:
                mean = (
                    sum(a * row for a, row in zip(assigned[:, k], rows, strict=True))
                    / assigned[:, k].sum()
                )
                centroids[k] = mean / mean.norm()
        labels = [max(centroids, key=lambda k: float(row @ centroids[k])) for row in rows]
        assigned = F.one_hot(torch.tensor(labels), p.shape[1]).float()
    out = torch.zeros(p.shape[1], features.shape[1] + 1)
    for k, centroid in centroids.items():
        out[k] = centroid
    return out


@pytest.mark.parametrize("shape", [(30,), (3, 2, 5)])
def test_sums_and_nearest_against_loops(shape):
    features, p = rand(shape[0], 4, *shape[1:]), rand(shape[0], 3, *shape[1:], seed=1).softmax(1)
    unit = unit_features(features)
    assert unit.shape == (shape[0], 5, *shape[1:])
    rows, weights_of = unit.movedim(1, -1).reshape(-1, 5), p.movedim(1, -1).reshape(-1, 3)
    torch.testing.assert_close(rows.norm(dim=1), torch.ones(30))
    sums = torch.stack(
        [sum(w[k] * r for r, w in zip(rows, weights_of, strict=True)) for k in range(3)]
    )
    torch.testing.assert_close(centroid_sums(unit, p), sums)

    centroids = F.normalize(rand(3, 5, seed=2) - 0.3)
    centroids[1] = 0  # a class that nothing was predicted to be
    nearest = nearest_centroid(unit, centroids)
    assert nearest.shape == shape
    expected = [max((0, 2), key=lambda k: float(row @ centroids[k])) for row in rows]
    assert nearest.flatten().tolist() == expected
    assert set(expected) == {0, 2}
    assert nearest_centroid(-unit, centroids).unique().tolist() != [1]


def test_nothing_gives_nothing():
    assert (centroid_sums(torch.zeros(0, 4), torch.zeros(0, 3)) == 0).all()
    assert nearest_centroid(torch.zeros(0, 4), rand(3, 4)).shape == (0,)


class _Out:
    def __init__(self, logits, features):
        self.logits, self.features = logits, {"pooled": features}


class _Table(torch.nn.Module):
    """A stand-in for the network: looks features and logits of numbered images up."""

    def __init__(self, features, logits):
        super().__init__()
        self.table = features, logits

    def forward(self, index):
        return _Out(*(table[index] for table in reversed(self.table)))


def centroids_after(passes: int, model, batches, autocast) -> torch.Tensor:
    """What the script computes: by the predictions, then by the nearest centroid."""
    compute = load_script(ROOT / "train_shot.py").compute_centroids
    features, logits = model.table
    shape, cpu = (logits.shape[1], features.shape[1] + 1), torch.device("cpu")
    centroids = None
    for _ in range(passes):
        centroids = compute(model, batches, "pooled", shape, centroids, autocast, cpu)
    return centroids


def test_centroids_of_the_whole_set_against_a_loop():
    features, logits = rand(50, 4), 6 * rand(50, 5, seed=1)
    logits[:, 3] = -5  # never predicted
    model, batches = _Table(features, logits), torch.arange(50).split(7)
    autocast = torch.autocast("cpu", enabled=False)
    for passes in (1, 2):
        computed = centroids_after(passes, model, batches, autocast)
        torch.testing.assert_close(computed, plain_centroids(features, logits.softmax(1), passes))
        assert (computed[3] == 0).all()
    by_prediction = plain_centroids(features, logits.softmax(1), 1)
    assert (by_prediction - computed).abs().max() > 0.01  # control: the second pass matters


def test_centroids_of_many_positions_under_autocast():
    """float16 ends at 65504: what is summed over positions and batches is float32."""
    features, logits = torch.ones(2, 4, 250, 250), torch.zeros(2, 3, 250, 250)
    features[1, 0], logits[0, 0], logits[1, 1] = 3, 9, 9
    model, batches = _Table(features, logits), torch.arange(2).split(1)
    low, full = (
        centroids_after(2, model, batches, autocast)
        for autocast in (torch.autocast("cpu", torch.float16), torch.autocast("cpu", enabled=False))
    )
    assert low.dtype == torch.float32
    assert torch.equal(low, full)
    expected = F.normalize(torch.tensor([[1.0, 1, 1, 1, 1], [3, 1, 1, 1, 1], [0, 0, 0, 0, 0]]))
    torch.testing.assert_close(low, expected)


def test_labels_at_another_resolution():
    p, labels = rand(2, 3, 8, 8).softmax(1), torch.tensor([[[0, 1], [2, 1]]])
    assert at_features(p, torch.zeros(2, 5, 4, 4)).shape == (2, 3, 4, 4)
    enlarged = at_images(labels, torch.zeros(1, 3, 4, 6))
    assert enlarged.tolist() == [[[0, 0, 0, 1, 1, 1]] * 2 + [[2, 2, 2, 1, 1, 1]] * 2]
    assert at_features(p[:, :, 0, 0], torch.zeros(2, 5)) is not None
    assert torch.equal(at_images(labels.flatten(), torch.zeros(4, 3)), labels.flatten())


def test_a_forced_collapse_raises_the_alarm(tmp_path):
    config = shot_config(tmp_path, optim="{lr: 0.1, schedule: constant}")
    short = ["steps=100", "log_every=10", "eval_every=1000", "save_every=1000"]
    short += ["data.batch=16", "centroid_every=1000"]
    healthy = ["optim.lr=0.005"]
    assert train("train_shot", config, *short, *healthy, f"out_dir={tmp_path}/healthy") == 0
    assert summary(tmp_path / "healthy")["collapse_alarms"] == []
    collapse = ["ent_weight=10", "div_weight=0", "pseudo_weight=0", "optim.lr=0.05"]
    assert train("train_shot", config, *short, *collapse, f"out_dir={tmp_path}/collapsed") == 0
    assert any(
        "vanished" in alarm["reason"]
        for alarm in summary(tmp_path / "collapsed")["collapse_alarms"]
    )


@pytest.mark.parametrize("task", TASKS)
def test_a_run(tmp_path, capsys, task):
    config = shot_config(tmp_path, task, log_every=1, centroid_every=100)
    assert train("train_shot", config) == 0
    assert "source         none" in capsys.readouterr().out
    result = summary(tmp_path / "run")
    assert result["method"] == "shot"
    assert result["classes"] == summary(tmp_path / "source")["classes"]
    figure = {"classification": "accuracy", "segmentation": "mean_iou"}[task]
    assert result["source_val"][figure] is None
    assert result["target"]["last"][figure] is not None
    assert result["selection"]["part_of_training_loss"]
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    names = [
        "ent_loss",
        "div_loss",
        "pseudo_loss",
        "confidence",
        "agreement",
        "lr",
        "vanished",
        "drift",
    ]
    assert list(lines[0]) == ["step", *names]
    state = weights(tmp_path / "run", LAST)
    assert (state["memory"]["centroids"].norm(dim=1) > 0.99).any()


@pytest.mark.parametrize(
    ("task", "model"),
    [
        ("classification", "{bottleneck: 16}"),
        ("classification", "{bottleneck: 16, bottleneck_relu: false, weight_norm: true}"),
        (
            "segmentation",
            "{backbone: mobilenet_v2, head: deeplab_v3, output_stride: 16, aux_weight: 0.1}",
        ),
    ],
)
def test_the_classifier_is_frozen_and_everything_else_moves(tmp_path, task, model):
    config = shot_config(tmp_path, task)
    keys = [f"model={model}", "optim.weight_decay=0"]
    assert (
        train(
            "train_source", tmp_path / "config.yaml", *keys, "steps=4", f"out_dir={tmp_path}/from"
        )
        == 0
    )
    assert train("train_shot", config, *keys, f"init_from={tmp_path}/from", "optim.lr=0.1") == 0
    before, after = weights(tmp_path / "from"), weights(tmp_path / "run", LAST)["model"]
    for name, value in before.items():
        frozen = name.startswith(("head.", "aux_head."))
        linear_before_norm = name == "bottleneck.0.bias"
        if frozen:
            assert torch.equal(value, after[name]), f"{name} moved"
        elif value.is_floating_point() and not linear_before_norm:
            assert not torch.equal(value, after[name]), f"{name} did not move"


@pytest.mark.parametrize("task", others_slow(TASKS, ("classification",)))
def test_the_running_statistics_are_those_of_the_plain_target(tmp_path, task):
    """The strong view is normalized by its own, and leaves them as the weak view makes them."""
    config, state = shot_config(tmp_path, task), {}
    still = ["optim.lr=1e-30", "optim.weight_decay=0", "steps=3", "save_every=3"]
    views = {"strong": "{photometric: {invert: 1, noise: 0.5}}", "none": "{}"}
    for name, view in views.items():
        keys = [*still, f"strong_augment={view}", f"out_dir={tmp_path}/{name}"]
        assert train("train_shot", config, *keys) == 0
        state[name] = weights(tmp_path / name, "checkpoints/step_00000003.pt")["model"]
    before = weights(tmp_path / "source")
    names = [name for name in before if "running" in name and not name.startswith("head.")]
    assert names
    assert all(torch.equal(state["strong"][name], state["none"][name]) for name in names)
    assert not any(torch.equal(before[name], state["none"][name]) for name in names)  # control
    losses = [metrics(tmp_path / name)[0]["ent_loss"] for name in views]
    assert losses[0] != losses[1]  # control: the loss is of the strong view


@pytest.mark.parametrize("task", others_slow(TASKS, ("classification",)))
@pytest.mark.parametrize(
    ("stop", "workers", "workers_after"), [pytest.param(6, 0, 0, marks=pytest.mark.slow), (4, 2, 0)]
)
def test_resume_is_exact(tmp_path, monkeypatch, task, stop, workers, workers_after):
    config = shot_config(tmp_path, task)
    assert train("train_shot", config, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, stop)
        assert train("train_shot", config, f"data.workers={workers}") == 143
    assert train("train_shot", config, f"data.workers={workers_after}", "--resume") == 0
    whole, resumed = (weights(tmp_path / run, LAST) for run in ("whole", "run"))
    del whole["seconds"], resumed["seconds"]
    assert differing(whole, resumed) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


def test_control_lost_centroids_are_seen(tmp_path, monkeypatch):
    config = shot_config(tmp_path)
    assert train("train_shot", config, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_shot", config) == 143
    file = tmp_path / "run/checkpoints/step_00000006.pt"
    state = weights(tmp_path / "run", "checkpoints/step_00000006.pt")
    state["memory"]["centroids"].copy_(state["memory"]["centroids"].roll(1, 0))
    file.with_name(file.name + ".sha256").unlink()
    torch.save(state, file)
    assert train("train_shot", config, "--resume") == 0
    assert differing(*(weights(tmp_path / run, LAST)["model"] for run in ("whole", "run"))) > 1000


def test_a_signal_while_centroids_are_computed_saves_and_leaves(tmp_path, monkeypatch):
    config, key = shot_config(tmp_path), "data.eval_batch=40"
    assert train("train_shot", config, key, f"out_dir={tmp_path}/whole") == 0
    target_pass = data.domains.Domains.target_pass

    def interrupted(self):
        for number, batch in enumerate(target_pass(self)):
            passes.append(number)
            # In the second of two passes over five batches, the third time, before step 9.
            if len(passes) == 22:
                signal.raise_signal(signal.SIGTERM)
            yield batch

    class Pass:
        def __init__(self, domains):
            self.domains = domains

        def __len__(self):
            return len(target_pass(self.domains))

        def __iter__(self):
            return interrupted(self.domains)

    passes = []
    with monkeypatch.context() as patch:
        patch.setattr(data.domains.Domains, "target_pass", lambda self: Pass(self))
        assert train("train_shot", config, key) == 143
    assert len(passes) == 22  # the rest of the pass is not waited for
    assert (tmp_path / "run/checkpoints/step_00000008.pt").is_file()
    assert train("train_shot", config, key, "--resume") == 0
    whole, resumed = (weights(tmp_path / run, LAST) for run in ("whole", "run"))
    assert differing(whole["model"], resumed["model"]) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


@pytest.mark.parametrize(
    ("task", "every", "number"),
    [("classification", 3, 3), pytest.param("segmentation", 4, 2, marks=pytest.mark.slow)],
)
def test_stopped_within_an_evaluation_and_resumed_is_exact(
    tmp_path, monkeypatch, task, every, number
):
    """Of step 9, whose repetition computes centroids; that of step 8 does not."""
    config, keys = shot_config(tmp_path, task), [f"eval_every={every}"]
    assert train("train_shot", config, *keys, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        batches = stop_within_evaluation(patch, number)
        assert train("train_shot", config, *keys) == 143
    assert len(batches) == 1
    step = every * number
    assert weights(tmp_path / "run", f"checkpoints/step_{step:08d}.pt")["evaluation_due"]
    assert train("train_shot", config, *keys, "--resume") == 0
    whole, resumed = (weights(tmp_path / run, LAST) for run in ("whole", "run"))
    del whole["seconds"], resumed["seconds"]
    assert differing(whole, resumed) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


@pytest.mark.parametrize("task", others_slow(TASKS, ("classification",)))
def test_target_labels_do_not_train_or_select(tmp_path, monkeypatch, task):
    config = shot_config(tmp_path, task, steps=2, eval_every=1, centroid_every=1)
    assert train("train_shot", config, f"out_dir={tmp_path}/plain") == 0
    module, opener = {
        "classification": (data.classification, "open_drawn"),
        "segmentation": (data.segmentation, "open_street"),
    }[task]
    figure = {"classification": "accuracy", "segmentation": "mean_iou"}[task]
    plain_opener = getattr(module, opener)

    def permuted(name, train_split):
        images = plain_opener(name, train_split)
        labels = (
            images.labels.roll(1, 0)
            if task == "classification"
            else (images.labels + 1) % len(images.classes)
        )
        return dataclasses.replace(images, labels=labels)

    monkeypatch.setattr(module, opener, permuted)
    assert train("train_shot", config, f"out_dir={tmp_path}/permuted") == 0
    assert differing(weights(tmp_path / "plain"), weights(tmp_path / "permuted")) == 0
    plain, other = (summary(tmp_path / run)["target"] for run in ("plain", "permuted"))
    assert plain["selected"]["step"] == other["selected"]["step"]
    assert plain["last"][figure] != other["last"][figure]  # control
    other_start = ["seed=5", f"out_dir={tmp_path}/source5"]
    assert (
        train("train_source", tmp_path / "config.yaml", *other_start) == 0
    )  # control: the source model does matter
    assert (
        train("train_shot", config, f"init_from={tmp_path}/source5", f"out_dir={tmp_path}/control")
        == 0
    )
    assert differing(weights(tmp_path / "plain"), weights(tmp_path / "control")) > 1000


def test_a_dry_run_writes_nothing(tmp_path, capsys):
    config = shot_config(tmp_path)
    assert train("train_shot", config, "--dry-run") == 0
    assert "nothing was written" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


@pytest.mark.slow  # the conformance kit has bfloat16 of all scripts
@pytest.mark.parametrize("amp", ["float16", "bfloat16"])
def test_mixed_precision(tmp_path, amp):
    config = shot_config(tmp_path, log_every=1)
    for precision in (amp, "float32"):
        keys = [f"amp={precision}", "eval_every=1000", f"out_dir={tmp_path}/{precision}", "steps=2"]
        assert train("train_shot", config, *keys, "data.eval_batch=20") == 0
    low, full = ([m for m in metrics(tmp_path / p) if "lr" in m] for p in (amp, "float32"))
    assert low != full
    for name in ("ent_loss", "div_loss"):
        assert low[0][name] == pytest.approx(full[0][name], rel=0.05)
