"""Weights from files: ImageNet weights of a backbone, and the model of an earlier run."""

import re
import warnings

import pytest
import torch
import torchvision
from torch import nn

from common.errors import UserError
from models import build_classifier, build_segmenter, init_from
from models.config import ModelConfig
from models.weights import compare


def build(num_classes: int = 5, root: str = ".", **keys):
    torch.manual_seed(0)
    return build_classifier(ModelConfig(**keys), num_classes, root).train()


def images(n: int) -> torch.Tensor:
    random = torch.Generator().manual_seed(0)
    return torch.randint(256, (n, 3, 28, 28), dtype=torch.uint8, generator=random)


def tensors(backbone: nn.Module) -> list[str]:
    """Names of what weights files contain: all but batch counters, missing in older files."""
    return [name for name in backbone.state_dict() if not name.endswith("num_batches_tracked")]


@pytest.fixture(scope="module")
def resnet18_file(tmp_path_factory):
    """A torchvision state dict, classifier included, some tensors float16 as in released files."""
    torch.manual_seed(3)
    state = torchvision.models.resnet18(weights=None).state_dict()
    state = {
        k: v.half() if k.startswith("layer4") and v.is_floating_point() else v
        for k, v in state.items()
    }
    file = tmp_path_factory.mktemp("root") / "weights.pth"
    torch.save(state, file)
    return file


def _rewritten(file, folder, change):
    state = torch.load(file, weights_only=True)
    change(state)
    torch.save(state, folder / "changed.pth")
    return {"backbone": "resnet18", "weights": "changed.pth", "root": str(folder)}


def test_weights_from_a_file(resnet18_file, capsys):
    model = build(backbone="resnet18", weights="weights.pth", root=str(resnet18_file.parent))
    total = len(tensors(model.backbone))
    assert capsys.readouterr().out == f"weights weights.pth: loaded {total} of {total} tensors\n"
    state = torch.load(resnet18_file, weights_only=True)
    for name, value in model.backbone.state_dict().items():
        assert torch.equal(value, state[name].to(value.dtype)), name
        assert value.dtype in (torch.float32, torch.int64)
    assert (
        total == len([name for name in state if "num_batches" not in name]) - 2
    )  # all but the classifier


def test_a_missing_tensor_is_an_error_unless_it_is_named(resnet18_file, tmp_path, capsys):
    keys = _rewritten(resnet18_file, tmp_path, lambda state: state.pop("layer1.0.conv1.weight"))
    match = r"changed\.pth .*: 1 tensors? \w+ missing \(first: layer1\.0\.conv1\.weight\)"
    for missing in ([], ["layer2"]):
        with pytest.raises(UserError, match=match):
            build(**keys, weights_missing=missing)
        assert "loaded 99 of 100 tensors" in capsys.readouterr().out
    capsys.readouterr()
    build(**keys, weights_missing=["layer1.0.conv1"])
    assert "loaded 99 of 100 tensors" in capsys.readouterr().out


def test_a_tensor_of_another_shape_is_missing(resnet18_file, tmp_path):
    def change(state: dict) -> None:
        state["conv1.weight"] = torch.zeros(64, 1, 7, 7)

    keys = _rewritten(resnet18_file, tmp_path, change)
    with pytest.raises(UserError, match=r"of another shape \(first: conv1\.weight\)"):
        build(**keys)
    build(**keys, weights_missing=["conv1"])  # it stays as it is


def test_weights_of_another_backbone(resnet18_file, tmp_path):
    for name in ("mobilenet_v2", "resnet50", "lenet"):
        match = rf"does not fit {name}: \d+ tensors are .*first: .*weights of another backbone"
        with pytest.raises(UserError, match=match) as caught:
            build(backbone=name, weights="weights.pth", root=str(resnet18_file.parent))
        assert len(str(caught.value).splitlines()) == 1


def test_weights_of_a_deeper_sibling(resnet18_file, tmp_path):
    """It has every tensor, and more."""

    def change(state: dict) -> None:
        state["layer1.2.conv1.weight"] = torch.zeros(1)

    keys = _rewritten(resnet18_file, tmp_path, change)
    match = r"fit resnet18: 1 tensors? \w+ unknown \(first: layer1\.2\.conv1\.weight\)"
    with pytest.raises(UserError, match=match):
        build(**keys)


def test_weights_that_are_not_there(tmp_path):
    with pytest.raises(UserError, match=r"model\.weights: there is no file .*absent\.pth"):
        build(backbone="resnet18", weights="absent.pth", root=str(tmp_path))
    with pytest.raises(UserError, match=r"no weights 'IMAGENET1K_V7'; there are .*IMAGENET1K_V1"):
        build(backbone="resnet18", weights="IMAGENET1K_V7", root=str(tmp_path))
    (tmp_path / "text.pth").write_text("no weights")
    (tmp_path / "cut.pth").write_bytes(b"\x80\x09" + bytes(99))  # another pickle protocol
    for file in ("text.pth", "cut.pth"):
        with warnings.catch_warnings(record=True) as caught, pytest.raises(UserError) as error:
            build(backbone="resnet18", weights=file, root=str(tmp_path))
        assert caught == []
        assert str(error.value).startswith(f"model.weights: {tmp_path / file}: is not a readable ")
        assert error.value.code == 2
    with pytest.raises(UserError, match=r"text\.pth: .*readable checkpoint"):
        build(backbone="resnet18", weights="text.pth", root=str(tmp_path))


def test_init_from_a_run(tmp_path):
    model = build(3)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    for path in (tmp_path, tmp_path / "model.pt"):
        other = build(3)
        nn.init.zeros_(other.head.weight)
        init_from(other, str(path), ["a", "b", "c"])
        assert torch.equal(other.head.weight, model.head.weight)
    match = r"does not fit this model: 2 tensors are of another shape \(first: head\.weight\)"
    with pytest.raises(UserError, match=match) as caught:
        init_from(build(4), str(tmp_path), ["a", "b", "c"])
    assert len(str(caught.value).splitlines()) == 1
    with pytest.raises(UserError, match=r"init_from: there is no .*elsewhere"):
        init_from(model, str(tmp_path / "elsewhere"), ["a", "b", "c"])
    (tmp_path / "summary.json").write_text('{"classes": ["a", "c", "b"]}')
    match = "on other classes, or in another order: its class 1 is 'c', here it is 'b'"
    with pytest.raises(UserError, match=match):
        init_from(model, str(tmp_path), ["a", "b", "c"])


def test_the_state_dict_is_plain_and_survives_a_file(tmp_path):
    model = build(bottleneck=8)
    model(images(4))  # moves the statistics
    torch.save(model.state_dict(), tmp_path / "model.pt")
    state, other = torch.load(tmp_path / "model.pt", weights_only=True), build(bottleneck=8)
    assert other.load_state_dict(state) == nn.modules.module._IncompatibleKeys([], [])
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(state[k], v) for k, v in other.state_dict().items())
    assert {name.split(".")[0] for name in state} == {"backbone", "bottleneck", "head"}
    assert torch.equal(other.eval()(images(3)).logits, model.eval()(images(3)).logits)


def test_mobilenet_weights_fit_the_segmenter(tmp_path, capsys):
    state = torchvision.models.mobilenet_v2(weights=None).state_dict()
    torch.save(state, tmp_path / "mobilenet.pth")
    config = ModelConfig(backbone="mobilenet_v2", weights="mobilenet.pth", output_stride=16)
    model = build_segmenter(config, 4, str(tmp_path))
    widths = {"layer1": 24, "layer2": 32, "layer3": 96, "layer4": 320}
    assert model.channels == {**widths, "logits": 4}
    assert torch.equal(
        model.backbone.state_dict()["17.conv.2.weight"], state["features.17.conv.2.weight"]
    )
    assert "loaded 255 of 255 tensors" in capsys.readouterr().out


# --- comparing a state with a module


class Three(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second, self.head = nn.Linear(2, 3), nn.Linear(3, 3), nn.Linear(3, 4)


def test_compare_names_what_does_not_fit():
    module = Three()
    assert not compare(module, module.state_dict())
    assert str(compare(module, module.state_dict())) == ""
    state = module.state_dict()
    del state["first.weight"], state["first.bias"]
    state |= {"other.bias": torch.zeros(3), "second.bias": torch.zeros(4), "head.bias": 3}
    mismatch = compare(module, state)
    assert mismatch
    assert mismatch.missing == ["first.weight", "first.bias"]
    assert mismatch.extra == ["other.bias"]
    assert mismatch.shape == ["second.bias", "head.bias"]  # a number has no shape
    assert re.fullmatch(
        r"2 tensors are missing \(first: first\.weight\), 1 tensors? \w+ unknown "
        r"\(first: other\.bias\), 2 tensors are of another shape \(first: second\.bias\)",
        str(mismatch),
    )


def test_optional_tensors_may_be_missing_or_of_another_shape():
    module = Three()
    state = module.state_dict() | {"second.bias": torch.zeros(4)}
    del state["first.weight"], state["head.bias"]
    mismatch = compare(module, state, ["first.", "second.bias"])
    assert (mismatch.missing, mismatch.extra, mismatch.shape) == (["head.bias"], [], [])
    assert not compare(module, state, ["first.", "second.", "head.bias"])
    assert compare(module, {**state, "head.other": torch.zeros(1)}, ["first", "second", "head"])
    assert compare(module, state)  # control


def test_a_new_head_takes_other_classes(tmp_path, capsys):
    old = build(3)
    torch.save(old.state_dict(), tmp_path / "model.pt")
    (tmp_path / "summary.json").write_text('{"classes": ["a", "b", "c"]}')
    for classes in (["a", "b", "c", "d"], ["c", "b", "a"]):
        model = build(len(classes))
        nn.init.constant_(model.head.weight, 7.0)
        init_from(model, str(tmp_path), classes, new_head=True)
        assert (model.head.weight == 7).all()
        for name, value in model.backbone.state_dict().items():
            assert torch.equal(value, old.state_dict()[f"backbone.{name}"])
        assert f"with a new head for {len(classes)} classes" in capsys.readouterr().out
    model = build(3)
    init_from(model, str(tmp_path), ["a", "b", "c"], new_head=True)
    assert torch.equal(model.head.weight, old.head.weight)  # the same classes: nothing is new
    assert "new head" not in capsys.readouterr().out
    with pytest.raises(UserError, match="does not fit this model"):
        init_from(build(4, bottleneck=8), str(tmp_path), list("abcd"), new_head=True)


@pytest.mark.data
def test_real_weights(real_data, capsys):
    model = build(
        backbone="mobilenet_v2",
        weights="weights/mobilenet_v2_imagenet.pth",
        root=str(real_data("weights")),
    )
    total = len(tensors(model.backbone))
    assert f"loaded {total} of {total} tensors" in capsys.readouterr().out


def test_home_is_expanded_in_the_path_of_weights(resnet18_file, monkeypatch):
    monkeypatch.setenv("HOME", str(resnet18_file.parent))
    model = build(backbone="resnet18", weights=f"~/{resnet18_file.name}", root="elsewhere")
    state = torch.load(resnet18_file, weights_only=True)
    assert torch.equal(model.state_dict()["backbone.conv1.weight"], state["conv1.weight"])
