"""train_mic.py: hidden blocks, the distance to features, and the script."""

import itertools

import pytest
import torch
import torchvision

from common.errors import UserError
from data.masking import hide_blocks, usual_block
from losses.feature_distance import class_locations, feature_distance
from tests.helpers import (
    config_of,
    differing,
    metrics,
    stop_after,
    street_config,
    summary,
    train,
    weights,
)

COLOR = torch.tensor([10.4, 20.6, 30.0]).view(3, 1, 1)


def generator(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


# --- hidden blocks


@pytest.mark.parametrize(("height", "width", "block"), [(16, 24, 8), (17, 30, 8), (5, 6, 64)])
def test_hidden_blocks_pixel_by_pixel(height, width, block):
    images = torch.randint(40, 256, (3, 3, height, width), dtype=torch.uint8)
    hidden = hide_blocks(images, 0.6, block, COLOR, generator(1))
    rows, columns = -(-height // block), -(-width // block)
    numbers = torch.rand(3, 1, rows, columns, generator=generator(1))
    for n in range(3):
        for i in range(height):
            for j in range(width):
                expected = images[n, :, i, j].tolist()
                if numbers[n, 0, i // block, j // block] < 0.6:
                    expected = [10, 21, 30]
                assert hidden[n, :, i, j].tolist() == expected


def test_the_ratio_is_the_hidden_share():
    images = torch.full((50, 3, 64, 64), 255, dtype=torch.uint8)
    for ratio in (0.0, 0.3, 0.7, 1.0):
        hidden = (hide_blocks(images, ratio, 4, COLOR, generator(0)) != 255).float().mean()
        assert abs(hidden - ratio) < 0.01
    assert hide_blocks(images[:0], 0.7, 4, COLOR, generator(0)).shape == (0, 3, 64, 64)


# --- distance to features


def test_locations_of_classes():
    """A location needs three quarters of one class, not of two together."""
    labels = torch.tensor([[1, 1, 1, 2], [1, 0, 2, 2], [255, 1, 0, 0], [1, 1, 0, 0]])[None]
    assert class_locations(labels, (2, 2), [1]).tolist() == [[[1, 0], [1, 0]]]
    assert class_locations(labels, (2, 2), [1, 2]).tolist() == [[[1, 1], [1, 0]]]
    assert class_locations(labels, (2, 2), [0]).tolist() == [[[0, 0], [0, 1]]]
    assert class_locations(labels, (1, 1), [1]).tolist() == [[[0]]]
    assert class_locations(torch.tensor([1, 0]), (2, 1), [1]).tolist() == [[[1], [1]], [[0], [0]]]


def test_distance_by_a_loop():
    features, reference = torch.randn(2, 2, 5, 3, 4, generator=generator(0)).unbind(0)
    labels = torch.randint(3, (2, 6, 8), generator=generator(1))
    labels[0, :4, :4] = 1
    locations = class_locations(labels, (3, 4), [1, 2])
    assert 0 < locations.sum() < locations.numel()
    for classes, chosen in (([1, 2], locations), ([], torch.ones(2, 3, 4))):
        distances = [
            (features[n, :, i, j] - reference[n, :, i, j]).square().sum().sqrt()
            for n, i, j in chosen.nonzero().tolist()
        ]
        expected = torch.stack(distances).mean()
        torch.testing.assert_close(feature_distance(features, reference, labels, classes), expected)


def test_distance_without_locations_and_of_equal_features():
    features = torch.randn(2, 5, 3, 4, requires_grad=True)
    labels = torch.zeros(2, 6, 8, dtype=torch.int64)
    for reference, rows, classes in ((torch.zeros(2, 5, 3, 4), 2, [1]), (features, 2, [])):
        loss = feature_distance(features[:rows], reference[:rows], labels[:rows], classes)
        assert loss == 0
        assert torch.autograd.grad(loss, features)[0].abs().max() == 0
    empty = feature_distance(features[:0], features[:0], labels[:0], [])
    assert empty == 0
    assert torch.autograd.grad(empty, features)[0].abs().max() == 0


# --- the script


def weights_file(folder) -> str:
    torch.manual_seed(1)
    torch.save(torchvision.models.mobilenet_v2(weights=None).state_dict(), folder / "net.pth")
    return f"{folder}/net.pth"


@pytest.fixture
def street(tmp_path):
    """Four steps on the street scenes, with all that the script has to offer."""
    model = "{backbone: mobilenet_v2, output_stride: 16, aux_weight: 0.1, bn: frozen, "
    return street_config(
        tmp_path,
        "train_mic",
        model=f"{model}weights: {weights_file(tmp_path)}}}",
        mix="classmix",
        mask_block=16,
        fd_weight=0.1,
        fd_classes="[road, vehicle]",
        strong_augment="{jitter: {gamma: [0.7, 1.5]}}",
        steps=4,
        log_every=1,
        threshold=0.1,
    )


def test_all_losses_are_logged_and_a_stopped_run_is_exact(street, tmp_path, monkeypatch):
    assert train("train_mic", street, f"out_dir={tmp_path}/whole") == 0
    lines = [line for line in metrics(tmp_path / "whole") if "lr" in line]
    names = {
        "cls_loss",
        "aux_cls_loss",
        "pseudo_loss",
        "mask_loss",
        "fd_loss",
        "confidence",
        "mask_weight",
    }
    assert all(names <= line.keys() for line in lines)
    assert lines[0]["fd_loss"] == 0  # it starts from the reference
    assert lines[-1]["fd_loss"] > 0
    with monkeypatch.context() as patch:
        stop_after(patch, 2)
        assert train("train_mic", street) == 143
    assert train("train_mic", street, "--resume") == 0
    last = "checkpoints/step_00000004.pt"
    states = [weights(tmp_path / folder, last) for folder in ("run", "whole")]
    assert all(differing(states[0][name], states[1][name]) == 0 for name in ("model", "teacher"))
    assert differing(states[0]["reference"], states[0]["model"]) > 1000


def test_the_feature_distance_holds_the_features(street, tmp_path):
    distance = {}
    for weight in ("1e-9", "10"):
        assert (
            train("train_mic", street, f"fd_weight={weight}", f"out_dir={tmp_path}/{weight}") == 0
        )
        distance[weight] = metrics(tmp_path / weight)[-2]["fd_loss"]
    assert distance["10"] < 0.5 * distance["1e-9"]


def test_keys_that_change_the_training(tmp_path):
    config = config_of(
        "classification", tmp_path, "train_mic", mask_block=7, weighting="confidence"
    )
    cases = ["mask_ratio=0.7", "mask_ratio=0", "mask_weight=0", "mask_block=4", "weighting=mask"]
    states = []
    for case in cases:
        keys = ["threshold=0.1", "steps=2", case, f"out_dir={tmp_path}/{case}"]
        assert train("train_mic", config, *keys) == 0
        states.append(weights(tmp_path / case))
    assert all(differing(a, b) > 1000 for a, b in itertools.combinations(states, 2))


@pytest.mark.parametrize("task", ["classification", "segmentation"])
def test_without_hidden_blocks_it_is_self_training(tmp_path, task):
    keys = ["threshold=0.1", "ema_decay=0.9", "pseudo_warmup=0.5", "steps=4"]
    if task == "segmentation":  # an auxiliary head learns from the target in train_pseudo alone
        keys += ["mix=classmix", "model.aux_weight=0"]
    runs = {
        "pseudo": ("train_pseudo", ["weighting=confident_fraction"]),
        "mic": ("train_mic", ["mask_weight=0"]),
        "control": ("train_mic", ["mask_weight=0.1"]),
    }
    config = config_of(task, tmp_path, "train_source")
    for name, (script, more) in runs.items():
        assert train(script, config, *keys, *more, f"out_dir={tmp_path}/{name}") == 0
    states = {name: weights(tmp_path / name) for name in runs}
    assert differing(states["pseudo"], states["mic"]) == 0
    assert differing(states["pseudo"], states["control"]) > 1000


def test_blocks_are_at_most_half_as_wide_as_the_image(tmp_path):
    config = config_of("classification", tmp_path, "train_mic")  # images of 16 px
    with pytest.raises(UserError, match="mask_block: 9 px is more than half of an image's"):
        train("train_mic", config, "--dry-run", "mask_block=9")
    assert train("train_mic", config, "--dry-run", "mask_block=8") == 0
    street = config_of("segmentation", tmp_path, "train_mic")
    with pytest.raises(UserError, match="mask_block: 16 px is more than half of an image's"):
        train("train_mic", street, "--dry-run", "mask_block=16", "data.target.crop=[16,32]")


def test_the_usual_block():
    images = torch.zeros(2, 3, 224, 256)
    assert usual_block(images, torch.zeros(2)) == 56  # of the paper
    assert usual_block(torch.zeros(2, 3, 512, 1024), torch.zeros(2, 512, 1024)) == 32
    assert usual_block(torch.zeros(2, 3, 8, 8), torch.zeros(2, 8, 8)) == 1


def test_hidden_blocks_leave_no_trace_in_the_running_statistics(tmp_path):
    """Weights that learn nothing, so that statistics alone change."""
    config = config_of("classification", tmp_path, "train_mic", model="{bn: separate}")
    for ratio in ("0", "1"):
        keys = [f"mask_ratio={ratio}", "optim.lr=1e-30", "steps=3", f"out_dir={tmp_path}/{ratio}"]
        assert train("train_mic", config, *keys) == 0
    states = [weights(tmp_path / ratio) for ratio in ("0", "1")]
    means = [name for name in states[0] if name.endswith("running_mean")]
    assert means
    for name in means:
        torch.testing.assert_close(states[0][name], states[1][name])
        assert states[0][name].abs().max() > 0


def test_self_training_is_no_judge_of_itself(tmp_path):
    config = config_of("classification", tmp_path, "train_mic")
    for weight, part in (("1", True), ("0", False)):
        keys = [f"pseudo_weight={weight}", f"mask_weight={weight}", f"out_dir={tmp_path}/{weight}"]
        assert train("train_mic", config, "steps=1", *keys) == 0
        assert summary(tmp_path / weight)["selection"]["part_of_training_loss"] == part


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        (["mask_ratio=1.5"], "mask_ratio must lie in"),
        (["pseudo_warmup=-1"], "pseudo_warmup must lie in"),
        (["ema_decay=1"], "ema_decay must lie in"),
        (["fd_weight=1"], "fd_weight needs model.weights"),
        (["fd_classes=[a]"], "fd_classes goes with fd_weight"),
        (["mix=classmix"], "mix: classmix is for data.task: segmentation"),
    ],
)
def test_what_is_refused(tmp_path, keys, match):
    config = config_of("classification", tmp_path, "train_mic")
    with pytest.raises(UserError, match=match):
        train("train_mic", config, *keys)


def test_a_class_that_is_none_is_refused(street):
    with pytest.raises(UserError, match="fd_classes: no class 'zebra'; there are sky, road"):
        train("train_mic", street, "fd_classes=[zebra]")
