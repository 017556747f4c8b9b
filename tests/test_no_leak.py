"""Target labels reach evaluation only."""

import dataclasses

import pytest
import torch

import data.domains
from tests.helpers import SCRIPTS, TASKS, config_of, differing, summary, tiny_config, train, weights

SETS = {
    "classification": ("open_drawn", "drawn_digits", "drawn_digits_shifted"),
    "segmentation": ("open_street", "drawn_street", "drawn_street_dusk"),
}


@pytest.fixture
def permute(monkeypatch):
    """Permute the labels of one built-in set and split, or the numbers of its masks."""

    def apply(opener: str, name: str, train_split: bool):
        plain = getattr(data.domains, opener)

        def permuted(asked, is_train):
            images = plain(asked, is_train)
            if (asked, is_train) != (name, train_split):
                return images
            if images.labels.dim() > 1:  # another meaning for every number of the masks
                return dataclasses.replace(images, labels=(images.labels + 1) % len(images.classes))
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(9))
            return dataclasses.replace(images, labels=images.labels[order])

        monkeypatch.setattr(data.domains, opener, permuted)

    return apply


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("script", SCRIPTS)
def test_target_labels_do_not_train_or_select(tmp_path, permute, script, task):
    config, (opener, source, target) = config_of(task, tmp_path, script), SETS[task]
    figure = {"classification": "accuracy", "segmentation": "mean_iou"}[task]
    assert train(script, config, f"out_dir={tmp_path}/plain") == 0
    plain, plain_weights = summary(tmp_path / "plain"), weights(tmp_path / "plain")

    permute(opener, target, True)
    assert train(script, config, f"out_dir={tmp_path}/train_permuted") == 0
    permuted = summary(tmp_path / "train_permuted")
    assert differing(plain_weights, weights(tmp_path / "train_permuted")) == 0
    assert permuted["target"] == plain["target"]

    permute(opener, target, False)
    assert train(script, config, f"out_dir={tmp_path}/test_permuted") == 0
    permuted = summary(tmp_path / "test_permuted")
    last = "checkpoints/step_00000010.pt"
    assert differing(plain_weights, weights(tmp_path / "test_permuted")) == 0
    assert (
        differing(weights(tmp_path / "plain", last)["model"], weights(tmp_path / "test_permuted", last)["model"]) == 0
    )
    for entry in ("last", "selected"):
        assert permuted["target"][entry]["step"] == plain["target"][entry]["step"]
    assert permuted["target"]["last"][figure] != plain["target"]["last"][figure]  # control: the permutation took place

    permute(opener, source, True)
    assert train(script, config, f"out_dir={tmp_path}/control") == 0
    assert differing(plain_weights, weights(tmp_path / "control")) > 1000


@pytest.mark.parametrize("script", SCRIPTS)
def test_labels_of_a_target_without_test_split_do_not_train_or_select(tmp_path, pictures, script):
    """The same images are trained on and reported on (transductive): their labels in the list are permuted."""
    pictures("photo", {"cat": 12, "dog": 12})
    folder = pictures("sketch", {"cat": 6, "dog": 6})
    data = "{source: {name: list, path: photo/list.txt}, target: {name: list, path: sketch/list.txt}, "
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
    results = {}
    for run in ("plain", "permuted"):
        write("sketch", 6, run == "permuted")
        assert train(script, config, f"out_dir={tmp_path}/{run}") == 0
        results[run] = summary(tmp_path / run)["target"], weights(tmp_path / run)
    assert differing(results["plain"][1], results["permuted"][1]) == 0
    assert [e["step"] for e in results["plain"][0].values()][:2] == [
        e["step"] for e in results["permuted"][0].values()
    ][:2]
    write("photo", 12, True)  # control: source labels do train
    assert train(script, config, f"out_dir={tmp_path}/control") == 0
    assert differing(results["plain"][1], weights(tmp_path / "control")) > 1000


def test_source_only_does_not_see_the_target(tmp_path):
    """Weights and statistics stay the same whatever the target is (METHODS: target images through batch norm)."""
    config = tiny_config(tmp_path, select="source_val")
    assert train("train_source", config) == 0
    assert train("train_source", config, "data.target={name: drawn_digits}", f"out_dir={tmp_path}/other") == 0
    assert differing(weights(tmp_path / "run"), weights(tmp_path / "other")) == 0
    assert train("train_dann", config, f"out_dir={tmp_path}/dann") == 0
    assert train("train_dann", config, "data.target={name: drawn_digits}", f"out_dir={tmp_path}/dann_other") == 0
    assert differing(weights(tmp_path / "dann"), weights(tmp_path / "dann_other")) > 1000  # control
