"""The fingerprint of a set: every change of the images is named, and a copy has the same one."""

import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from data.config import DataConfig, DomainConfig
from data.domains import open_domains
from data.fingerprint import difference, fingerprint, short_name
from data.image_set import ImageSet, image_set


def domains_of(root: Path, source="photo", **keys):
    """The fingerprints of the sets of a run on folders of images."""
    domains = (
        [DomainConfig(name="folder", path=path) for path in source.split()],
        DomainConfig(name="folder", path="sketch"),
    )
    return open_domains(DataConfig(*domains, root=str(root), **keys), 0).fingerprints()


@pytest.fixture
def root(pictures, tmp_path) -> Path:
    pictures("photo", {"cat": 12, "dog": 12})
    pictures("sketch", {"cat": 6, "dog": 6})
    return tmp_path / "images"


def test_a_copy_elsewhere_is_the_same(root, tmp_path, monkeypatch):
    before = domains_of(root)
    copy = tmp_path / "other" / "place"
    shutil.copytree(root, copy, copy_function=shutil.copyfile)  # times are those of now
    os.utime(copy / "photo/cat/000.png", (1, 1))
    assert difference(before, domains_of(copy)) is None
    monkeypatch.chdir(tmp_path)
    assert difference(before, domains_of(Path("images"))) is None  # a relative root


CHANGES = {
    "added": (
        lambda root: shutil.copy(root / "sketch/cat/000.png", root / "sketch/cat/a b.png"),
        r"^target: sketch/cat/a b\.png of \d+ bytes is new$",
    ),
    "removed": (
        lambda root: (root / "photo/dog/011.png").unlink(),
        r"^source: photo/dog/011\.png of \d+ bytes in class dog is gone$",
    ),
    "another class": (
        lambda root: (root / "photo/cat/003.png").rename(root / "photo/dog/zzz.png"),
        r"^source: photo/cat/003\.png of \d+ bytes in class cat is gone$",
    ),
    "replaced": (
        lambda root: shutil.copy(root / "photo/cat/000.png", root / "sketch/dog/002.png"),
        r"^target: sketch/dog/002\.png of \d+ bytes is now sketch/dog/002\.png of \d+ bytes$",
    ),
    "class renamed": (
        lambda root: [(root / d / "cat").rename(root / d / "zebra") for d in ("photo", "sketch")],
        r"^source: classes cat, dog is now classes dog, zebra$",
    ),
    "class added": (
        lambda root: [shutil.copytree(root / d / "cat", root / d / "z") for d in os.listdir(root)],
        r"^source: classes cat, dog is now classes cat, dog, z$",
    ),
    "no utf-8": (
        lambda root: shutil.copy(
            root / "sketch/cat/000.png", os.fsencode(root / "sketch/cat") + b"/\xff.png"
        ),
        r"^target: sketch/cat/\udcff\.png of \d+ bytes is new$",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_the_first_difference_is_named(root, change):
    act, match = CHANGES[change]
    (root / "sketch/dog/002.png").write_bytes((root / "sketch/dog/002.png").read_bytes() + b"1")
    before = domains_of(root)
    act(root)
    assert re.search(match, difference(before, domains_of(root)))


def test_pixels_of_the_same_size_are_not_seen(root):
    """Files are not read: docs/run.md says so."""
    before = domains_of(root)
    file = root / "photo/cat/000.png"
    content = file.read_bytes()
    file.write_bytes(content[:60] + content[60:][::-1])  # its header is read
    assert difference(before, domains_of(root)) is None


def test_several_sources(root, pictures):
    pictures("drawing", {"dog": 10, "cat": 10})
    before = domains_of(root, "photo drawing")
    assert difference(before, domains_of(root, "photo drawing")) is None
    file = root / "drawing/dog/004.png"
    file.write_bytes(file.read_bytes() + b"1")
    match = (
        r"drawing/dog/004\.png of \d+ bytes in class dog is now drawing/dog/004\.png of \d+ bytes"
    )
    assert re.search(match, difference(before, domains_of(root, "photo drawing")))


def test_masks_belong_to_an_image(tmp_path):
    for part, end in (("images", "jpg"), ("masks", "png")):
        for domain in ("day", "dusk"):
            (tmp_path / domain / part).mkdir(parents=True)
            for i in range(4):
                pixels = np.full((20, 30) if part == "masks" else (20, 30, 3), i % 2, np.uint8)
                Image.fromarray(pixels).save(tmp_path / domain / part / f"{i}.{end}")

    cache = str(tmp_path.with_name("cache"))

    def opened():
        domains = (
            DomainConfig("folder", f"{name}/images", masks=f"{name}/masks", ids=["road", "sky"])
            for name in ("day", "dusk")
        )
        config = DataConfig(*domains, task="segmentation", root=str(tmp_path), cache=cache)
        return open_domains(config, 0).fingerprints()

    before = opened()
    assert difference(before, opened()) is None
    mask = tmp_path / "dusk/masks/2.png"
    mask.write_bytes(mask.read_bytes() + b"1")
    found = difference(before, opened())
    assert found.startswith("target_test: dusk/images/2.jpg of ")  # the target has no masks
    assert " with the mask dusk/masks/2.png of " in found


def of(images: ImageSet) -> dict:
    return {"source": fingerprint(images, Path("images"))}


def test_a_tensor_has_a_hash():
    random = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 1, 4, 4), dtype=torch.uint8, generator=random)
    labels = torch.arange(20) % 2
    before = image_set("noise", images, labels, ["a", "b"])
    assert difference(of(before), of(image_set("x", images.clone(), labels, ["a", "b"]))) is None
    part = before.subset(torch.arange(19))
    match = "numbers 20 with the hash \\w+ is now numbers 19 with the hash "
    assert re.search(match, difference(of(before), of(part)))
    for tensor in (images, labels):
        earlier = of(before)
        tensor[7] += 1
        shape = "x".join(map(str, tensor.shape))
        assert f" is now {'labels ' * (tensor is labels)}{shape} with the hash " in difference(
            earlier, of(before)
        )
    assert "is gone" in difference(of(before), {})
    assert "is new" in difference({}, of(before))


@pytest.mark.parametrize("name", ["drawn_digits", "drawn_street"])
def test_built_in_sets(name):
    task = "segmentation" if "street" in name else "classification"
    config = DataConfig(DomainConfig(name), DomainConfig(name), task=task, root="images")
    found = open_domains(config, 0).fingerprints()
    assert difference(found, open_domains(config, 0).fingerprints()) is None


def test_the_short_name_of_a_set(root):
    """The same images, whether the target has class names or not, and whatever is held out."""

    def name(classes: bool = True, seed: int = 0, **keys) -> str:
        both = (DomainConfig(name="folder", path=path) for path in ("photo", "sketch"))
        target = open_domains(DataConfig(*both, root=str(root), **keys), seed).target
        target = target if classes else replace(target, classes=None)
        return short_name(fingerprint(target, root))

    before = name()
    assert name() == before
    assert name(classes=False) == before
    assert name(seed=1, test_share=0.2) == before
    (root / "sketch/cat/000.png").rename(root / "sketch/cat/100.png")
    assert name() != before
