"""model.yaml and the files of weights: a run folder is all that is needed to use its model."""

import json
import shutil

import pytest
import torch
import yaml

from common import safetensors
from common.errors import UserError
from common.files import load_tensors, save_tensors
from models import build_model, load_card, load_run
from models.backbones import build_backbone
from tests.helpers import (
    ROOT,
    finetune_config,
    load_script,
    stop_after,
    street_config,
    summary,
    tiny_config,
    train,
    weights,
)
from training.config import load_run_config
from training.summary import to_json

TENSORS = {
    "weight": torch.arange(6.0).view(2, 3),
    "half": torch.tensor([1.5, -2.0]).half(),
    "brain": torch.tensor([1.5]).bfloat16(),
    "count": torch.tensor(7),
    "flags": torch.tensor([True, False, True]),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.zeros(0, 4),
    "turned": torch.arange(12.0).view(3, 4).T,
}


def test_safetensors_keep_every_tensor(tmp_path):
    file = tmp_path / "x.safetensors"
    save_tensors(file, TENSORS)
    found = load_tensors(file)
    assert list(found) == list(TENSORS)
    for name, tensor in TENSORS.items():
        assert found[name].dtype == tensor.dtype
        assert found[name].shape == tensor.shape
        assert found[name].equal(tensor)
    save_tensors(file, {})
    assert load_tensors(file) == {}


def test_safetensors_are_those_of_the_package(tmp_path):
    reason = "skipped: pip install safetensors to compare with it"
    package = pytest.importorskip("safetensors.torch", reason=reason)
    ours, theirs = tmp_path / "ours.safetensors", tmp_path / "theirs.safetensors"
    save_tensors(ours, TENSORS)
    for name, tensor in package.load_file(ours).items():
        assert tensor.dtype == TENSORS[name].dtype
        assert tensor.equal(TENSORS[name])
    package.save_file({name: x.contiguous() for name, x in TENSORS.items()}, theirs)
    found = load_tensors(theirs)
    assert all(found[name].equal(x) for name, x in TENSORS.items())


def header(**entries) -> bytes:
    text = json.dumps(entries).encode()
    return len(text).to_bytes(8, "little") + text


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"abc",
        (2**62).to_bytes(8, "little"),
        header()[:-1],
        (5).to_bytes(8, "little") + b"[1,2]",
        header(x={"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}),  # no bytes follow
        header(x={"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}) + bytes(8),
        header(x={"dtype": "F32", "shape": [-2], "data_offsets": [0, 8]}) + bytes(8),
        header(x={"dtype": "F32", "shape": [2], "data_offsets": [-8, 0]}) + bytes(8),
        header(x={"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}) + bytes(8),
        header(x={"dtype": "F32", "shape": [2**40, 2**40], "data_offsets": [0, 8]}) + bytes(8),
        header(x={"dtype": "F32", "shape": "22", "data_offsets": [0, 8]}) + bytes(8),
        header(x=[]) + bytes(8),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path, content):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"x\.safetensors: is not a readable safetensors file"):
        safetensors.read(file)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    config = tiny_config(folder, out_dir=folder / "digits", weights_format="safetensors")
    assert train("train_source", config) == 0
    return folder


def outputs(network) -> torch.Tensor:
    images = torch.arange(2 * 3 * 64 * 64).view(2, 3, 64, 64).remainder(251).byte()
    with torch.no_grad():
        return network(images).logits


def test_a_run_is_loaded_from_two_files(runs, tmp_path):
    network, card = load_run(runs / "digits", "cpu")
    assert not network.training
    assert card.classes == [str(digit) for digit in range(10)]
    assert (card.method, card.task, card.size, card.resize) == ("source", "classification", 16, 16)
    state = weights(runs / "digits")
    assert all(network.state_dict()[name].equal(tensor) for name, tensor in state.items())
    for name in ("model.yaml", "model.safetensors"):
        shutil.copy(runs / "digits" / name, tmp_path)
    other, _ = load_run(tmp_path)
    assert outputs(other).equal(outputs(network))
    named, _ = load_run(tmp_path / "model.safetensors")
    assert outputs(named).equal(outputs(network))


def test_the_card_decides_the_normalization(runs, tmp_path):
    for name in ("model.yaml", "model.pt"):
        shutil.copy(runs / "digits" / name, tmp_path)
    tree = yaml.safe_load((tmp_path / "model.yaml").read_text())
    tree["mean"] = [0.0, 0.0, 0.0]
    (tmp_path / "model.yaml").write_text(yaml.safe_dump(tree))
    changed, _ = load_run(tmp_path)
    assert changed.mean.abs().max() == 0
    assert not outputs(changed).equal(outputs(load_run(runs / "digits")[0]))


def test_a_segmenter_and_the_first_stage_of_fine_tuning(tmp_path):
    config = street_config(tmp_path, "train_source", steps=2, eval_every=2)
    assert train("train_source", config) == 0
    network, card = load_run(tmp_path / "run")
    assert (card.task, card.size, card.resize) == ("segmentation", None, None)
    assert outputs(network).shape == (2, len(card.classes), 64, 64)
    assert network.aux_head is not None
    folder = tmp_path / "fine"
    folder.mkdir()
    assert train("finetune", finetune_config(folder)) == 0
    first, _ = load_run(folder / "run/stage1.pt")
    last, _ = load_run(folder / "run")
    assert not outputs(first).equal(outputs(last))


def test_a_run_starts_from_safetensors(runs, tmp_path):
    file = runs / "digits/model.safetensors"
    config = tiny_config(tmp_path, init_from=file, steps=1)
    loaded = load_run_config(load_script(ROOT / "train_source.py").Config, str(config))
    started = build_model(loaded, [str(digit) for digit in range(10)])
    assert all(x.equal(started.state_dict()[n]) for n, x in load_tensors(file).items())


def test_the_other_format_does_not_stay_behind(tmp_path):
    """A resumed run without the key has no file of older weights beside model.pt."""
    config = tiny_config(tmp_path, steps=5)
    assert train("train_source", config, "weights_format=safetensors") == 0
    assert (tmp_path / "run/model.safetensors").is_file()
    config = tiny_config(tmp_path, steps=10)
    assert train("train_source", config, "--resume", "--allow-change") == 0
    assert not list((tmp_path / "run").glob("model.safetensors*"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda folder: (folder / "model.yaml").unlink(), r"has no model\.yaml"),
        (lambda folder: (folder / "model.pt").unlink(), r"has neither model\.pt nor"),
        (lambda folder: shutil.rmtree(folder), "there is no run"),
        (
            lambda folder: edit(folder, "classes", ["a", "b"]),
            r"model\.pt does not fit .*model\.yaml",
        ),
        (lambda folder: edit(folder, "size", None), "size is for classification"),
        (lambda folder: edit(folder, "clases", []), "unknown key clases; did you mean classes"),
        (lambda folder: edit(folder, "std", [0, 1, 1]), "std must be positive"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, change, message):
    folder = tmp_path / "shared"
    folder.mkdir()
    for name in ("model.yaml", "model.pt"):
        shutil.copy(runs / "digits" / name, folder)
    change(folder)
    with pytest.raises(UserError, match=message) as error:
        load_run(folder)
    assert "\n" not in str(error.value)


def edit(folder, key, value) -> None:
    tree = yaml.safe_load((folder / "model.yaml").read_text())
    tree[key] = value
    (folder / "model.yaml").write_text(yaml.safe_dump(tree))


def test_the_card_is_there_before_the_model(tmp_path, monkeypatch):
    """A run that is stopped before its first evaluation is described already."""
    stop_after(monkeypatch, 2)
    assert train("train_source", tiny_config(tmp_path)) == 143
    assert load_card(tmp_path / "run").classes == [str(digit) for digit in range(10)]
    with pytest.raises(UserError, match="writes it at its first evaluation"):
        load_run(tmp_path / "run")


def test_a_resumed_run_has_the_same_card(tmp_path):
    """Its weights are read no more, but where they came from stays in the card."""
    backbone, _ = build_backbone("lenet", True)
    torch.save(backbone.state_dict(), tmp_path / "w.pth")
    model = f"{{backbone: lenet, weights: {tmp_path}/w.pth}}"
    assert train("train_source", tiny_config(tmp_path, model=model, steps=5)) == 0
    card = (tmp_path / "run/model.yaml").read_text()
    assert "w.pth" in card
    config = tiny_config(tmp_path, model=model, steps=10)
    assert train("train_source", config, "--resume", "--allow-change") == 0
    assert (tmp_path / "run/model.yaml").read_text() == card


def test_a_checkpoint_of_an_earlier_version_goes_on(tmp_path):
    """Its evaluations have no confusion matrix; the figures are there all the same."""
    assert train("train_source", tiny_config(tmp_path)) == 0
    file = tmp_path / "run/checkpoints/step_00000010.pt"
    state = load_tensors(file)
    for entry in state["history"]:
        entry.pop("confusion", None)
    save_tensors(file, state)
    (tmp_path / "run/summary.json").unlink()
    assert train("train_source", tiny_config(tmp_path), "--resume") == 0
    result = summary(tmp_path / "run")
    assert result["confusion"] == {"last": None, "selected": None}
    assert result["target"]["last"]["accuracy"] is not None


def test_a_class_named_as_a_row_of_numbers(tmp_path):
    result = {"classes": ["[ 1 ]", "b"], "confusion": {"last": [[1, 2], [3, 4]], "selected": None}}
    assert json.loads(to_json(result)) == result
    assert "[1, 2],\n" in to_json(result)
