"""Target labels reach evaluation only."""

import dataclasses

import pytest
import torch

from data import classification, segmentation
from tests.helpers import SCRIPTS, TASKS, config_of, differing, summary, tiny_config, train, weights
from training import evaluation

SETS = {  # of each task: its module, what opens a built-in set there, source and target
    "classification": (classification, "open_drawn", "drawn_digits", "drawn_digits_shifted"),
    "segmentation": (segmentation, "open_street", "drawn_street", "drawn_street_dusk"),
}

LAST = "checkpoints/step_00000004.pt"


@pytest.fixture
def permute(monkeypatch):
    """Permute the labels of one built-in set and split, or the numbers of its masks."""

    def apply(module, opener: str, name: str, train_split: bool):
        plain = getattr(module, opener)

        def permuted(asked, is_train):
            images = plain(asked, is_train)
            if (asked, is_train) != (name, train_split):
                return images
            if images.labels.dim() > 1:  # another meaning for every number of the masks
                return dataclasses.replace(images, labels=(images.labels + 1) % len(images.classes))
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(9))
            return dataclasses.replace(images, labels=images.labels[order])

        monkeypatch.setattr(module, opener, permuted)

    return apply


MAPS = ("train_source", "train_advent", "train_pseudo", "train_mic")  # others: --slow
CASES = [
    pytest.param(script, task, marks=[pytest.mark.slow] * (task != TASKS[0] and script not in MAPS))
    for script in SCRIPTS
    for task in TASKS
]


@pytest.mark.parametrize(("script", "task"), CASES)
def test_target_labels_do_not_train_or_select(tmp_path, monkeypatch, permute, script, task):
    seen, confusion_matrix = [], evaluation.confusion_matrix

    def watched(logits, labels, num_classes):
        seen.append(labels.clone())
        return confusion_matrix(logits, labels, num_classes)

    monkeypatch.setattr(evaluation, "confusion_matrix", watched)
    short = {"steps": 4, "eval_every": 2, "save_every": 4}
    config, (*opener, source, target) = config_of(task, tmp_path, script, **short), SETS[task]
    assert train(script, config, f"out_dir={tmp_path}/plain") == 0
    plain, plain_weights = summary(tmp_path / "plain"), weights(tmp_path / "plain")
    plain_labels = list(seen)

    permute(*opener, target, True)
    assert train(script, config, f"out_dir={tmp_path}/train_permuted") == 0
    permuted = summary(tmp_path / "train_permuted")
    assert differing(plain_weights, weights(tmp_path / "train_permuted")) == 0
    assert permuted["target"] == plain["target"]
    # The choice across runs is made from these.
    both = (weights(tmp_path / run, "predictions.pt") for run in ("plain", "train_permuted"))
    first, second = ({name: x[name] for name in ("last", "selected")} for x in both)
    assert differing(first, second) == 0

    permute(*opener, target, False)
    seen.clear()
    assert train(script, config, f"out_dir={tmp_path}/test_permuted") == 0
    permuted = summary(tmp_path / "test_permuted")
    assert differing(plain_weights, weights(tmp_path / "test_permuted")) == 0
    last = (weights(tmp_path / run, LAST)["model"] for run in ("plain", "test_permuted"))
    assert differing(*last) == 0
    for entry in ("last", "selected"):
        assert permuted["target"][entry]["step"] == plain["target"][entry]["step"]
    # control: the permutation took place
    assert not all(torch.equal(*pair) for pair in zip(seen, plain_labels, strict=True))

    permute(*opener, source, True)
    assert train(script, config, f"out_dir={tmp_path}/control") == 0
    assert differing(plain_weights, weights(tmp_path / "control")) > 1000


@pytest.mark.parametrize("script", SCRIPTS)
def test_labels_of_a_target_without_test_split_do_not_train_or_select(tmp_path, pictures, script):
    """Transductive: the labels of images that are trained on and reported on are permuted."""
    pictures("photo", {"cat": 12, "dog": 12})
    folder = pictures("sketch", {"cat": 6, "dog": 6})
    data = (
        "{source: {name: list, path: photo/list.txt}, target: {name: list, path: sketch/list.txt}, "
    )
    data += f"size: 16, batch: 4, root: {tmp_path}/images, cache: {tmp_path}/cache}}"
    config = tiny_config(tmp_path, data=data, select="infomax")

    def write(name: str, count: int, permuted: bool) -> None:
        lines = [
            f"{c}/{i:03d}.png {(label + permuted * i) % 2}"
            for label, c in enumerate(("cat", "dog"))
            for i in range(count)
        ]
        (folder.parent / name / "list.txt").write_text("\n".join(lines))

    write("photo", 12, False)
    for run in ("plain", "permuted"):
        write("sketch", 6, run == "permuted")
        assert train(script, config, f"out_dir={tmp_path}/{run}") == 0
    plain, permuted = (tmp_path / run for run in ("plain", "permuted"))
    assert differing(weights(plain), weights(permuted)) == 0
    for entry in ("last", "selected"):
        before, after = (summary(folder)["target"][entry] for folder in (plain, permuted))
        assert before["step"] == after["step"]
    write("photo", 12, True)  # control: source labels do train
    assert train(script, config, f"out_dir={tmp_path}/control") == 0
    assert differing(weights(plain), weights(tmp_path / "control")) > 1000


def test_source_only_does_not_see_the_target(tmp_path):
    """Weights and batch-norm statistics stay the same whatever the target is."""
    config = tiny_config(tmp_path, select="source_val")
    changed = {}
    for script in ("train_source", "train_dann"):
        folders = [tmp_path / f"{script}_{target}" for target in ("shifted", "plain")]
        other = "data.target={name: drawn_digits}"
        assert train(script, config, f"out_dir={folders[0]}") == 0
        assert train(script, config, other, f"out_dir={folders[1]}") == 0
        changed[script] = differing(*map(weights, folders))
    assert changed["train_source"] == 0
    assert changed["train_dann"] > 1000  # control
