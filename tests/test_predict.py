"""predict.py: images of any kind, tables, masks, and exported models."""

import csv
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image

from analysis import export, prediction
from analysis.prediction import predict_logits, predict_map
from common.errors import UserError
from common.resize import resize_maps, resized_strips
from data import load_image
from models import load_card, load_run
from tests.helpers import ROOT, load_script, others_slow, street_config, tiny_config, train

predict, evaluate = (load_script(ROOT / f"{name}.py") for name in ("predict", "evaluate"))
STREET = ["road", "car"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A classifier and a segmenter, and images to predict."""
    folder = tmp_path_factory.mktemp("runs")
    assert train("train_source", tiny_config(folder, out_dir=folder / "digits")) == 0
    config = street_config(folder, "train_source", out_dir=folder / "street", steps=4)
    assert train("train_source", config) == 0
    return folder


def noise(height, width, seed=0) -> Image.Image:
    pixels = np.random.RandomState(seed).randint(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def write_images(folder):
    """Images as users have them; the last three cannot be read."""
    (folder / "sub dir").mkdir(parents=True)
    noise(40, 50).save(folder / "a name with spaces.JPG")
    noise(30, 30).convert("L").save(folder / "gray.png")
    noise(31, 33).convert("RGBA").save(folder / "rgba.PNG")
    noise(32, 64).convert("CMYK").save(folder / "cmyk.jpg")
    noise(50, 20).convert("P").save(folder / "palette.gif")
    turned = noise(40, 80)
    exif = turned.getexif()
    exif[0x0112] = 6  # to be turned by 90 degrees
    turned.save(folder / "sub dir/turned.jpg", exif=exif)
    Image.fromarray(np.zeros((20, 20), np.uint16)).save(folder / "sixteen.png")
    (folder / "text.jpg").write_text("no image")
    content = (folder / "cmyk.jpg").read_bytes()
    (folder / "truncated.jpg").write_bytes(content[: len(content) // 2])


def rows_of(file) -> list[dict]:
    with open(file, newline="") as text:
        return list(csv.DictReader(text))


@pytest.mark.parametrize("workers", [0, 2])
def test_images_of_any_kind_are_predicted(runs, tmp_path, capsys, workers):
    write_images(tmp_path / "in")
    words = [str(runs / "digits"), "in", "batch=4", f"workers={workers}"]
    assert predict.main(words) == 1
    printed = capsys.readouterr()
    assert "6 of 9 files predicted" in printed.out
    mistakes = (tmp_path / "predictions/unreadable.txt").read_text().splitlines()
    assert [line.split(":")[0].split("/")[-1] for line in mistakes] == [
        "sixteen.png",
        "text.jpg",
        "truncated.jpg",
    ]
    assert all(line in printed.err for line in mistakes)
    rows = rows_of(tmp_path / "predictions/predictions.csv")
    assert [row["path"] for row in rows] == sorted(row["path"] for row in rows)
    assert rows[-1]["path"] == "sub dir/turned.jpg"
    network, card = load_run(runs / "digits")
    for row in rows:
        image = load_image(tmp_path / "in" / row["path"], card)
        p = network(image[None]).logits.softmax(1)[0].detach()
        assert row["class"] == card.classes[int(p.argmax())]
        assert float(row["confidence"]) == pytest.approx(float(p.max()), abs=1e-5)
        assert float(row["entropy"]) == pytest.approx(-float((p * p.log()).sum()), abs=1e-4)
        second = card.classes[int(p.argsort(descending=True)[1])]
        assert row["class_2"] == second
    with pytest.raises(UserError, match=r"out: predictions has predictions already"):
        predict.main(words)


def test_predict_agrees_with_evaluate(runs, tmp_path):
    """On files: the same class and confidence of every image, and the same masks."""
    for label in range(10):
        (tmp_path / f"set/{label}").mkdir(parents=True)
        for i in range(2):
            noise(28, 36, 10 * label + i).save(tmp_path / f"set/{label}/{i}.png")
    words = ["data.target_test.name=folder", f"data.target_test.path={tmp_path / 'set'}"]
    # Both prepare files as the run's own test set, at 16 px; by themselves they would have 18 px.
    assert load_card(runs / "digits").resize == 16
    opened = evaluate.predict_run(evaluate.open_run(runs / "digits", words))
    other = evaluate.open_run(runs / "digits", [*words, "data.target_test.resize=18"])
    assert not evaluate.predict_run(other).confidence.equal(opened.confidence)  # control
    assert predict.main([str(runs / "digits"), "set"]) == 0
    rows = rows_of(tmp_path / "predictions/predictions.csv")
    of_image = {int(i): opened.classes[int(k)] for i, _, k, _ in opened.rows}
    assert [row["class"] for row in rows] == [of_image[i] for i in range(20)]
    found = [float(row["confidence"]) for row in rows]
    assert found == pytest.approx(opened.confidence.tolist(), abs=1e-6)


def test_maps_are_predicted_at_the_size_of_the_image(runs, tmp_path):
    (tmp_path / "in").mkdir()
    noise(70, 90).save(tmp_path / "in/a.png")
    noise(64, 96, 1).save(tmp_path / "in/b.jpg")
    noise(64, 96, 2).save(tmp_path / "in/b.png")
    words = [str(runs / "street"), "in", "overlays=true", "soft=true", "workers=0", "batch=3"]
    assert predict.main(words) == 0
    network, card = load_run(runs / "street")
    out = tmp_path / "predictions"
    for name, mask in (("a.png", "a"), ("b.jpg", "b.jpg"), ("b.png", "b.png")):
        image = load_image(tmp_path / "in" / name, card)
        with torch.inference_mode():
            logits = network(image[None]).logits[0]
        picture = Image.open(out / f"masks/{mask}.png")
        assert picture.mode == "P"
        assert np.array_equal(np.asarray(picture), logits.argmax(0).numpy())
        soft = np.load(out / f"soft/{mask}.npy")
        assert np.abs(soft - logits.softmax(0).numpy()).max() < 2e-3
        assert Image.open(out / f"overlays/{mask}.png").size == image.shape[:0:-1]


def test_doubt_is_computed_in_float32(runs, tmp_path):
    """Under bfloat16 only the network is: masks, confidences and soft maps are of its logits."""
    (tmp_path / "in").mkdir()
    noise(70, 90).save(tmp_path / "in/a.png")
    words = [str(runs / "street"), "in", "soft=true", "workers=0", "amp=bfloat16"]
    assert predict.main(words) == 0
    network, card = load_run(runs / "street")
    image = load_image(tmp_path / "in/a.png", card)
    with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16):
        logits = network(image[None]).logits[0].float()
    soft = np.load(tmp_path / "predictions/soft/a.npy")
    assert np.abs(soft - logits.softmax(0).numpy()).max() < 1e-3
    (row,) = rows_of(tmp_path / "predictions/predictions.csv")
    confidence = float(logits.softmax(0).amax(0).mean())
    assert float(row["confidence"]) == pytest.approx(confidence, abs=1e-5)


def test_maps_of_resized_images_have_the_size_of_the_file():
    logits = torch.randn(4, 8, 10)
    found = predict_map(logits, (1100, 50), soft=True)
    whole = resize_maps(logits[None], (1100, 50))[0]
    assert (found.classes == whole.argmax(0)).float().mean() > 0.9999
    assert found.confidence == pytest.approx(float(whole.softmax(0).amax(0).mean()), abs=1e-5)
    assert (found.probabilities.float() - whole.softmax(0)).abs().max() < 1e-3


@pytest.mark.parametrize("size", [(8, 10), (30, 10), (8, 31), (37, 41)])
def test_strips_are_the_resized_map(size):
    x = torch.randn(2, 3, 8, 10)
    strips = [strip for _, strip in resized_strips(x, size, 7)]
    assert all(strip.shape[2] <= 7 for strip in strips)
    assert (torch.cat(strips, 2) - resize_maps(x, size)).abs().max() < 1e-6


class Brightness(torch.nn.Module):
    """Logits of each pixel from its own color and from its column."""

    def forward(self, images):
        x = images.float().mean(1, keepdim=True) / 255
        ramp = torch.arange(images.shape[3]) / images.shape[3]
        return type("Output", (), {"logits": torch.cat([x, 1 - x + ramp], 1)})


def test_windows_cover_the_image_and_are_averaged(monkeypatch):
    images = torch.randint(0, 256, (2, 3, 20, 30), dtype=torch.uint8)
    network, calls = Brightness(), []
    forward = network.forward
    monkeypatch.setattr(network, "forward", lambda x: calls.append(x.shape) or forward(x))
    found = predict_logits(network, images, window=[8, 12], stride=[6, 9]).exp()
    assert all(shape[2:] == (8, 12) for shape in calls)
    total, count = torch.zeros(2, 2, 20, 30), torch.zeros(20, 30)
    for y in (0, 6, 12):
        for x in (0, 9, 18):
            part = images[:, :, y : y + 8, x : x + 12]
            total[:, :, y : y + 8, x : x + 12] += forward(part).logits.softmax(1)
            count[y : y + 8, x : x + 12] += 1
    assert count.min() == 1
    assert (found - total / count).abs().max() < 1e-6
    whole = predict_logits(network, images, window=[20, 30])
    assert whole.equal(forward(images).logits)  # nothing slides


def test_flips_are_averaged():
    images = torch.randint(0, 256, (2, 3, 6, 8), dtype=torch.uint8)
    network = Brightness()
    plain, mirrored = (network(x).logits.softmax(1) for x in (images, images.flip(3)))
    found = predict_logits(network, images, flip=True).exp()
    assert (found - (plain + mirrored.flip(3)) / 2).abs().max() < 1e-6
    assert (found - plain).abs().max() > 1e-3  # control: the column counts


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "name images"),
        (["none.jpg"], r"none\.jpg: there is no such file"),
        (["in", "bacth=3"], "unknown key bacth; did you mean batch"),
        (["in", "window=[3,4]"], "window: for a segmenter"),
        (["in", "window=[3]"], "window must be two sizes"),
        (["in", "window=[8,8]", "stride=[8,9]"], "stride must not be larger than window"),
        (["in", "out=in/out"], r"out: in/out lies in in"),
        (["in/a.png", "in/a.png"], "is named twice, or two images have this name"),
        (["in", "device=cuda:77"], "device: cuda:77"),
    ],
)
def test_mistakes_are_one_line(runs, tmp_path, words, message):
    (tmp_path / "in").mkdir()
    noise(8, 8).save(tmp_path / "in/a.png")
    with pytest.raises(UserError, match=message) as error:
        predict.main([str(runs / "digits"), *words])
    assert "\n" not in str(error.value)
    assert not (tmp_path / "predictions").exists()


FRESH = """
import sys, torch
program = torch.export.load("{file}").module()
images = torch.load("images.pt")
torch.save([program(x) for x in images], "logits.pt")
assert not any("models" in name.split(".")[:1] for name in sys.modules)
"""


@pytest.mark.parametrize("task", ["digits", "street"])
def test_an_export_is_loaded_without_the_repository(runs, tmp_path, task, capsys):
    """In a fresh process: one image, three, and images of another size."""
    assert predict.main([str(runs / task), "--export", "model.pt2"]) == 0
    assert "agrees with the network" in capsys.readouterr().out
    network, card = load_run(runs / task)
    images = [export.example(card, *pair) for pair in ((1, 1.0), (3, 1.0), (2, 1.7))]
    images.append(images[2][:, :, :32, :37])
    torch.save(images, "images.pt")
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    command = [sys.executable, "-c", FRESH.format(file="model.pt2")]
    subprocess.run(command, check=True, cwd=tmp_path, env=environment)
    found = torch.load("logits.pt")
    with torch.no_grad():
        for x, logits in zip(images[:2], found, strict=False):
            assert (network(x).logits - logits).abs().max() < export.TOLERANCE
    assert found[2].shape[0] == 2
    if task == "street":
        for x, logits in zip(images[2:], found[2:], strict=True):
            assert (network(x).logits - logits).abs().max() < export.TOLERANCE
            assert logits.shape[2:] == x.shape[2:]


def test_the_preparation_is_in_the_export(runs, tmp_path):
    """A photograph in the exported program, and the file by `load_image`: the same up to rounding.

    The resize of the card is larger than the crop, so that both are tried.
    """
    network, card = load_run(runs / "digits")
    card.resize = 36
    noise(50, 64).resize((640, 500), Image.Resampling.BICUBIC).save(tmp_path / "photo.png")
    pixels = torch.from_numpy(np.array(Image.open(tmp_path / "photo.png"))).permute(2, 0, 1)
    seen = []
    network.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    export.Deployed(network, card)(pixels[None])
    prepared = load_image(tmp_path / "photo.png", card)
    assert seen[0].shape[2:] == prepared.shape[1:] == (16, 16)
    difference = (seen[0][0] - prepared.float()).abs()
    assert difference.max() <= 1
    assert (difference == 0).float().mean() > 0.5
    card.resize = 12  # smaller: padded
    export.Deployed(network, card)(pixels[None])
    assert (seen[1][0] - load_image(tmp_path / "photo.png", card).float()).abs().max() <= 1


@pytest.mark.parametrize("task", others_slow(("digits", "street"), ("digits",)))
def test_onnx(runs, tmp_path, task):
    reason = "skipped: pip install onnx onnxscript onnxruntime to try it"
    pytest.importorskip("onnxscript", reason=reason)
    runtime = pytest.importorskip("onnxruntime", reason=reason)
    assert predict.main([str(runs / task), "--onnx", "model.onnx"]) == 0
    session = runtime.InferenceSession("model.onnx")
    assert "classes" in session.get_modelmeta().custom_metadata_map["model.yaml"]
    network, card = load_run(runs / task)
    for batch in (1, 3):
        x = export.example(card, batch)
        (logits,) = session.run(None, {"images": x.numpy()})
        with torch.no_grad():
            assert np.abs(network(x).logits.numpy() - logits).max() < 1e-3


def test_onnx_without_its_package(runs, monkeypatch):
    monkeypatch.setattr(export, "optional", lambda name: None)
    with pytest.raises(UserError, match="pip install onnx onnxscript"):
        predict.main([str(runs / "digits"), "--onnx", "model.onnx"])


def test_doubt_of_certain_predictions_is_finite():
    p, entropy = prediction.doubt(torch.tensor([[1000.0, -1000.0]]))
    assert p.tolist() == [[1, 0]]
    assert entropy.tolist() == [0]
