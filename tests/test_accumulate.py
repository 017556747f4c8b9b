"""`accumulate`: the parts of a batch, one after another, train what the batch does at once."""

import pytest
import torch

from common.errors import UserError
from data import open_domains
from tests.helpers import (
    any_config,
    differing,
    metrics,
    others_slow,
    stop_after,
    tiny_config,
    train,
    weights,
)
from tests.test_data import data_config
from tests.test_ranks import FEW, FROZEN, PLAIN, largest_difference, last_state
from tests.test_ranks import learned as learned  # a fixture

CASES = {
    "source": ("train_source", {}),
    "few_labels": ("train_source", {"data": FEW}),
    "mdd": ("train_mdd", {"reversal_max": 0.01}),
    "dann": ("train_dann", {"disc_norm": "none", "reversal_bound": "null"}),
    "advent": ("train_advent", {"adv_weight": 0.1, "ent_weight": 0.1}),
    "minent": ("train_advent", {"adv_weight": 0, "ent_weight": 0.1}),
    "pseudo": ("train_pseudo", {"threshold": 0.1, "evaluate": "teacher"}),
    "shot": ("train_shot", {"div_weight": 0, "centroid_every": 2}),
    "finetune": ("finetune", {"head_steps": 2}),
}


def both(folder, script: str, task: str = "classification", **lines) -> tuple:
    """The folders of a run and of one with two parts per batch."""
    config = any_config(script, folder, task, **lines)
    for name, parts in (("whole", 1), ("parts", 2)):
        assert train(script, config, f"accumulate={parts}", f"out_dir={folder}/{name}") == 0
    return folder / "whole", folder / "parts"


def values(folder):
    """The last state without the numbers of updates of running means, which parts have more of."""
    return {name: x for name, x in last_state(folder).items() if not name.endswith(".updates")}


@pytest.mark.parametrize("case", CASES)
def test_two_parts_are_one_batch(tmp_path, learned, case):
    """Without batch norm and dropout, of losses that are means over images."""
    script, changes = CASES[case]
    lines = {"model": PLAIN, "steps": 4, "eval_every": 2, "save_every": 4, **changes}
    lines |= {} if script == "train_shot" else {"init_from": learned}
    whole, parts = both(tmp_path, script, **lines)
    assert largest_difference(values(whole), values(parts)) < 1e-5
    for line, other in zip(metrics(whole), metrics(parts), strict=True):
        assert line.keys() == other.keys()
        for name, value in line.items():
            if "loss" in name and name != "div_loss":  # which is no mean over images
                assert other[name] == pytest.approx(value, 1e-3, 1e-5), name


@pytest.mark.parametrize(
    "script", others_slow(("train_source", "train_advent", "train_pseudo"), ("train_pseudo",))
)
def test_two_parts_of_images_with_masks_are_one_batch(tmp_path, script):
    changes = {"train_advent": {"adv_weight": 0.1}, "train_pseudo": {"mix": "none"}}
    lines = {"model": FROZEN, "steps": 4, "eval_every": 4, "save_every": 4, "optim": "{lr: 0.001}"}
    whole, parts = both(tmp_path, script, "segmentation", **lines, **changes.get(script, {}))
    assert largest_difference(values(whole), values(parts)) < 1e-5


def test_control_batch_norm_takes_the_statistics_of_a_part(tmp_path):
    whole, parts = both(tmp_path, "train_source")
    assert largest_difference(last_state(whole), last_state(parts)) > 1e-4


def test_resume_is_exact(tmp_path, monkeypatch):
    config = tiny_config(tmp_path, disc_norm="dropout", accumulate=4)
    assert train("train_dann", config, f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_dann", config) == 143
    assert train("train_dann", config, "--resume") == 0
    assert differing(weights(tmp_path / "whole"), weights(tmp_path / "run")) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


def test_the_parts_are_the_batch():
    augment = {"affine": {"degrees": 20}, "photometric": {"noise": 0.1}}
    batches = []
    for parts in (1, 2):
        domains = open_domains(data_config(batch=6, augment=augment), 0)
        domains.parts = parts
        images = [x for x, _ in domains.batches("source", 2, 4)]
        assert len(images) == 2 * parts
        batches.append(torch.cat(images))
        assert len(domains.positions("source", 2, 4)) == 2 * parts
    assert torch.equal(*batches)


def test_what_has_no_equal_parts_is_refused(tmp_path):
    config = tiny_config(tmp_path)
    with pytest.raises(UserError, match=r"accumulate: data.batch=8 does not have 3 equal parts"):
        train("train_source", config, "accumulate=3")
    with pytest.raises(UserError, match=r"data.target_batch=5 does not have 2 equal parts"):
        train("train_dann", config, "accumulate=2", "data.target_batch=5")
    with pytest.raises(UserError, match=r"accumulate: the discriminator is updated between"):
        train("train_adda", config, "accumulate=2", "source_steps=1")
