"""Few target labels and several sources: what is drawn, what it leaves, and what it trains."""

import numpy as np
import pytest
import torch
from PIL import Image

from common.errors import UserError
from data import open_domains, train_loader
from data.config import DataConfig, DomainConfig
from tests.helpers import (
    SCRIPTS,
    SOURCE_FREE,
    TASKS,
    any_config,
    config_of,
    differing,
    finetune_config,
    metrics,
    others_slow,
    stop_after,
    summary,
    tiny_config,
    train,
    weights,
)

LAST = "checkpoints/step_00000010.pt"
PHOTO, SKETCH = {"cat": 9, "dog": 7, "owl": 8}, {"cat": 6, "dog": 5, "owl": 7}


@pytest.fixture
def folders(pictures, tmp_path):
    """`folders(**keys)`: the config of three classes in two folders, the target transductive."""
    pictures("photo", PHOTO)
    pictures("sketch", SKETCH)

    def make(**keys) -> DataConfig:
        domains = {
            role: DomainConfig(name="folder", path=path)
            for role, path in (("source", "photo"), ("target", "sketch"))
        }
        return DataConfig(
            **{**domains, "size": 16, "batch": 4, "root": str(tmp_path / "images"), **keys}
        )

    return make


@pytest.fixture
def streets_on_disk(tmp_path):
    """Six images with masks for each domain."""
    random = np.random.default_rng(0)
    for domain in ("day", "dusk"):
        for kind in ("images", "masks"):
            (tmp_path / "images" / domain / kind).mkdir(parents=True)
        for i in range(6):
            image = random.integers(0, 255, (24, 32, 3), np.uint8)
            Image.fromarray(image).save(tmp_path / f"images/{domain}/images/{i}.png")
            Image.fromarray((image[..., 0] > 120).astype(np.uint8)).save(
                tmp_path / f"images/{domain}/masks/{i}.png"
            )
    write_list(tmp_path, ["dusk/images/2.png dusk/masks/2.png"])

    def make(**keys) -> DataConfig:
        day, dusk = (
            DomainConfig(
                "folder",
                path=f"{name}/images",
                masks=f"{name}/masks",
                ids=["low", "high"],
                resize=[12, 16],
            )
            for name in ("day", "dusk")
        )
        both = {"source": day, "target": dusk, "root": str(tmp_path / "images")}
        return DataConfig(task="segmentation", batch=1, **{**both, **keys})

    return make


def names(images) -> set[str]:
    return {
        str(images.images.paths[i].relative_to(images.images.paths[i].parents[2]))
        for i in images.indices
    }


def write_list(tmp_path, lines: list[str], name: str = "few.txt") -> str:
    (tmp_path / "images" / name).write_text("\n".join(lines))
    return name


# --- what is drawn


def test_so_many_of_each_class_are_drawn_by_the_seed(folders):
    domains = open_domains(folders(target_labeled=2), 0)
    few = domains.target_labeled
    assert torch.bincount(few.labels[few.indices]).tolist() == [2, 2, 2]
    assert names(open_domains(folders(target_labeled=2), 0).target_labeled) == names(few)
    assert names(open_domains(folders(target_labeled=2), 1).target_labeled) != names(few)
    assert domains.target.labels is None


@pytest.mark.parametrize("seed", range(5))
def test_labeled_images_are_in_no_other_set_of_the_target(folders, tmp_path, seed):
    plain, domains = open_domains(folders(), seed), open_domains(folders(target_labeled=3), seed)
    few = names(domains.target_labeled)
    assert len(few) == 9
    for role in ("target", "target_test", "criteria"):
        assert few & names(getattr(plain, role)), role  # control: there they were
        assert not few & names(getattr(domains, role)), role
        assert few | names(getattr(domains, role)) == names(getattr(plain, role))
    separate = folders(target_labeled=3, target_test=DomainConfig(name="folder", path="sketch"))
    assert not few & names(open_domains(separate, seed).target_test)
    (tmp_path / "images/other").symlink_to(
        tmp_path / "images/sketch"
    )  # the same files by another name
    separate = folders(target_labeled=3, target_test=DomainConfig(name="folder", path="other"))
    assert len(open_domains(separate, seed).target_test) == 18 - 9


def test_a_target_with_a_test_split_keeps_it(tmp_path):
    drawn = {
        "source": DomainConfig("drawn_digits"),
        "target": DomainConfig("drawn_digits_shifted"),
        "root": str(tmp_path / "images"),
    }
    plain, domains = (open_domains(DataConfig(**drawn, target_labeled=k), 0) for k in (None, 3))
    assert len(domains.target_labeled) == 30
    assert len(domains.target) == len(plain.target) - 30
    assert not set(domains.target_labeled.indices.tolist()) & set(domains.target.indices.tolist())
    assert torch.equal(domains.target_test.indices, plain.target_test.indices)


def test_a_list_gives_labels_to_an_unlabeled_target(folders, pictures, tmp_path):
    pictures("flat", 6)
    lines = ["flat/000.png owl", "flat/003.png 0", "flat/001.png dog"]
    config = folders(
        target=DomainConfig(name="folder", path="flat"), target_labeled=write_list(tmp_path, lines)
    )
    domains = open_domains(config, 0)
    few = domains.target_labeled
    assert [few.classes[i] for i in few.labels[few.indices]] == ["owl", "cat", "dog"]
    assert [image.name for image in few.images.paths] == ["000.png", "003.png", "001.png"]
    assert len(domains.target) == 3
    assert domains.target_test is None


def test_what_is_a_source_is_no_target_to_label_or_to_test_on(folders):
    photo, sketch = (DomainConfig("folder", path=path) for path in ("photo", "sketch"))
    with pytest.raises(
        UserError,
        match=r"data\.source: one of several is the target, which leaves no test; set data",
    ):
        open_domains(folders(source=[photo, sketch]), 0)
    for source in (sketch, [photo, DomainConfig("folder", path="./sketch/", resize=30)]):
        with pytest.raises(ValueError, match="target_labeled: the target is a source too"):
            folders(source=source, target_labeled=2)


def test_class_names_with_spaces_in_a_list(pictures, tmp_path, folders):
    classes = {"cat": 3, "wild cat": 3}
    pictures("a", classes)
    pictures("b", classes)
    lines = ["b/wild cat/000.png wild cat", "b/cat/001.png cat"]
    both = {
        role: DomainConfig(name="folder", path=path)
        for role, path in (("source", "a"), ("target", "b"))
    }
    few = open_domains(
        folders(**both, target_labeled=write_list(tmp_path, lines)), 0
    ).target_labeled
    assert [few.classes[i] for i in few.labels] == ["wild cat", "cat"]
    write_list(tmp_path, ["cat", "wild cat"], "classes.txt")
    listed = DomainConfig("list", path="few.txt", classes="classes.txt")
    assert open_domains(folders(source=listed, target=both["source"]), 0).source.classes == [
        "cat",
        "wild cat",
    ]


def test_masks_of_a_list_and_drawn_ones(streets_on_disk):
    config = streets_on_disk
    drawn = open_domains(config(target_labeled=2), 0)
    assert len(drawn.target_labeled) == 2
    assert len(drawn.target) == 4
    for domains in (drawn, open_domains(config(target_labeled="few.txt"), 0)):
        few = domains.target_labeled
        x, y = next(iter(train_loader(few, domains.config, 0, "target_labeled", 0, 1)))
        assert x.shape[2:] == y.shape[1:] == (12, 16)  # masks that train go with their images
        assert set(y.unique().tolist()) <= {0, 1, 255}
        assert len(domains.target_test) == 6 - len(few)
        assert domains.target_test.labels.shapes[0] == (24, 32)  # those that measure do not
    assert len(few) == 1


def test_names_with_spaces_beside_masks(streets_on_disk, tmp_path):
    """A drawn list reads back the same: a tab separates a mask from its image then."""
    for kind in ("images", "masks"):
        for i in range(4):
            file = tmp_path / f"images/dusk/{kind}/{i}.png"
            file.rename(file.with_name(f"frame {i}.png"))
    write_list(tmp_path, ["dusk/images/5.png dusk/masks/5.png"])
    drawn = open_domains(streets_on_disk(target_labeled=4), 0)
    text = drawn.lists["target_labeled.txt"]
    assert "frame " in text
    write_list(tmp_path, [text], "again.txt")
    again = open_domains(streets_on_disk(target_labeled="again.txt"), 0)
    assert names(again.target_labeled) == names(drawn.target_labeled)
    masks = again.target_labeled.labels.paths
    assert [m.name for m in masks] == [p.name for p in again.target_labeled.images.paths]
    rows = [line.split("\t") for line in text.splitlines()]
    write_list(tmp_path, ["image,mask", *(f'"{x}","{y}"' for x, y in rows)], "again.csv")
    table = open_domains(streets_on_disk(target_labeled="again.csv"), 0)
    assert names(table.target_labeled) == names(drawn.target_labeled)


@pytest.mark.parametrize("name", ["a\nb", "a\x85b", "a\tb", "\udcff"])
def test_a_name_that_no_list_can_hold_is_refused(folders, tmp_path, name):
    for file in (tmp_path / "images/sketch/cat").iterdir():
        file.rename(file.with_name(f"{name}{file.name}"))
    with pytest.raises(UserError, match="is not one line of utf-8 text; rename the file") as caught:
        open_domains(folders(target_labeled=5), 0)
    assert len(str(caught.value).splitlines()) == 1


# --- what goes wrong


@pytest.mark.parametrize(
    ("asked", "match"),
    [
        (
            6,
            "data.target_labeled: 6 are .*folder sketch has 5 of class dog",
        ),
        ("none.txt", "data.target_labeled: .*none.txt cannot be read"),
        ("bad.txt", "bad.txt:1: label 'horse' is .* class number and .* name in the source"),
        ("many.txt", "many.txt:1: label 3 is unknown, the source has numbers 0 to 2"),
        ("twice.txt", "twice.txt:2: names .*sketch/cat/000.png again; name each image once"),
        ("away.txt", "away.txt:1: there is no file .*nowhere.png"),
        ("bare.txt", "bare.txt:1: has no label; a line is `path label`"),
        ("empty.txt", "data.target_labeled: .*empty.txt names no image"),
        ("all.txt", "data.target_labeled: all.txt leaves no unlabeled image; give fewer labels"),
    ],
)
def test_labels_that_cannot_be_had(folders, tmp_path, asked, match):
    every = [
        f"sketch/{name}/{i:03d}.png {name}" for name, count in SKETCH.items() for i in range(count)
    ]
    for name, lines in (
        ("bad.txt", ["sketch/cat/000.png horse"]),
        ("away.txt", ["nowhere.png cat"]),
        ("many.txt", ["sketch/cat/000.png 3"]),
        ("twice.txt", ["sketch/cat/000.png cat", "sketch/cat/000.png dog"]),
        ("bare.txt", ["sketch/cat/000.png"]),
        ("empty.txt", []),
        ("all.txt", every),
    ):
        write_list(tmp_path, lines, name)
    with pytest.raises(UserError, match=match):
        open_domains(folders(target_labeled=asked), 0)


def test_labels_of_a_target_without_any(folders, pictures):
    pictures("flat", 6)
    with pytest.raises(
        UserError, match="2 images cannot be drawn: folder flat has no labels; name a list file"
    ):
        open_domains(folders(target=DomainConfig(name="folder", path="flat"), target_labeled=2), 0)


def test_a_list_for_a_set_without_files(folders, tmp_path):
    write_list(tmp_path, ["sketch/cat/000.png 0"])
    drawn = {
        role: DomainConfig(name)
        for role, name in (("source", "drawn_digits"), ("target", "drawn_digits_shifted"))
    }
    with pytest.raises(
        UserError, match=r"few\.txt names files, drawn_digits_shifted has none; give a number"
    ):
        open_domains(folders(**drawn, target_labeled="few.txt"), 0)


# --- several sources


def test_several_sources_are_one_set(folders, pictures):
    pictures("clipart", {"dog": 4, "owl": 4, "cat": 5})
    sources = [DomainConfig("folder", path="photo"), DomainConfig("folder", path="clipart")]
    domains = open_domains(folders(source=sources), 0)
    parts = [open_domains(folders(source=source), 0) for source in sources]
    assert domains.source.name == "folder photo + folder clipart"
    assert domains.classes == ["cat", "dog", "owl"]
    for role in ("source", "source_val"):
        whole, own = getattr(domains, role), [getattr(part, role) for part in parts]
        assert len(whole) == sum(map(len, own))
        expected = [(part.images[i[None]][0], part.labels[i]) for part in own for i in part.indices]
        for index, (image, label) in zip(whole.indices, expected, strict=True):
            assert torch.equal(whole.images[index[None]][0], image)
            assert whole.labels[index] == label
    counts = torch.bincount(domains.source.labels, minlength=3)
    assert counts.tolist() == [9 + 5, 7 + 4, 8 + 4]


def test_sources_must_agree(folders, pictures):
    pictures("letters", {"a": 3, "b": 3})
    for other, match in (
        (DomainConfig("folder", path="letters"), "folder letters: its classes differ"),
        (
            DomainConfig("folder", path="photo", resize=30),
            "folder photo 18 px, folder photo 30 px.*resize",
        ),
    ):
        with pytest.raises(UserError, match=match):
            open_domains(folders(source=[DomainConfig("folder", path="photo"), other]), 0)
    with pytest.raises(ValueError, match="give all the same crop and augment"):
        folders(
            source=[
                DomainConfig("folder", path="photo"),
                DomainConfig("folder", path="photo", augment={"flip": {}}),
            ]
        )
    with pytest.raises(ValueError, match="source is an empty list"):
        folders(source=[])


def test_sources_of_one_and_of_three_channels(tmp_path):
    digits = [DomainConfig("drawn_digits"), DomainConfig("drawn_digits_shifted")]
    config = DataConfig(
        source=digits,
        target=DomainConfig("drawn_digits_shifted"),
        root=str(tmp_path / "images"),
        batch=16,
    )
    domains = open_domains(config, 0)
    x, y = next(iter(train_loader(domains.source, config, 0, "source", 0, 1)))
    assert (x.shape, x.dtype, y.shape) == ((16, 3, 28, 28), torch.uint8, (16,))
    assert len(domains.source) == 400


@pytest.mark.parametrize("task", TASKS)
def test_a_run_on_several_sources(tmp_path, task):
    config = config_of(task, tmp_path, "train_dann")
    names, crop = {
        "classification": (("drawn_digits", "drawn_digits_shifted"), ""),
        "segmentation": (("drawn_street", "drawn_street_dusk"), ", crop: [64, 64]"),
    }[task]
    day, dusk = (f"{{name: {name}{crop}}}" for name in names)
    assert train("train_dann", config, f"data.source=[{day}, {dusk}]", "eval_every=10") == 0
    assert train("train_dann", config, f"out_dir={tmp_path}/one", "eval_every=10") == 0
    assert differing(weights(tmp_path / "run"), weights(tmp_path / "one")) > 1000
    assert (
        train("train_dann", tmp_path / "run/config.yaml", f"out_dir={tmp_path}/again") == 0
    )  # it reads its own config
    assert differing(weights(tmp_path / "run"), weights(tmp_path / "again")) == 0


def test_a_mistake_in_one_of_several_sources_is_named(tmp_path, capsys):
    with pytest.raises(
        UserError, match=r"unknown key data\.source\[1\]\.pth; did you mean data\.source\.path"
    ):
        train(
            "train_dann",
            tiny_config(tmp_path),
            "data.source=[{name: drawn_digits}, {name: folder, pth: a, path: b}]",
        )


# --- what they train


@pytest.mark.parametrize("script", [*SCRIPTS, *SOURCE_FREE])
def test_labels_enter_the_loss_of_every_script(tmp_path, script):
    config = any_config(script, tmp_path)
    few = ["data.target_labeled=1", "data.eval_batch=60"]
    short = ["steps=4", "eval_every=4", "save_every=4", "log_every=4"]
    assert train(script, config, *few, *short) == 0
    assert train(script, config, *short, f"out_dir={tmp_path}/without") == 0
    last = "checkpoints/step_00000004.pt"
    assert differing(*(weights(tmp_path / run, last)["model"] for run in ("run", "without"))) > 1000
    assert summary(tmp_path / "run")["target_labeled"] == 10
    assert "target_labeled" not in summary(tmp_path / "without")
    assert not (tmp_path / "without/target_labeled.txt").exists()
    lines = [line for line in metrics(tmp_path / "run") if "lr" in line]
    assert all("target_cls_loss" in line for line in lines[-1:])
    saved = (tmp_path / "run/target_labeled.txt").read_text().splitlines()
    assert sorted(line.split()[1] for line in saved) == [str(k) for k in range(10)]


@pytest.mark.parametrize("script", others_slow(("train_advent", "train_adda"), ("train_adda",)))
def test_masks_enter_the_loss(tmp_path, script):
    config = config_of("segmentation", tmp_path, script, eval_every=10)
    assert train(script, config, "data.target_labeled=2") == 0
    assert train(script, config, f"out_dir={tmp_path}/without") == 0
    assert differing(weights(tmp_path / "run"), weights(tmp_path / "without")) > 1000
    assert "target_cls_loss" in [line for line in metrics(tmp_path / "run") if "lr" in line][-1]


@pytest.mark.parametrize("few", [True, False])
def test_labels_teach_what_the_source_does_not(tmp_path, pictures, few):
    """The source's labels are random; two labeled target images per class tell the colors apart.

    Without them, a source whose labels are swapped teaches the opposite.
    """
    pictures("photo", {"cat": 16, "dog": 16})
    pictures("sketch", {"cat": 12, "dog": 12})
    lot = torch.randperm(32, generator=torch.Generator().manual_seed(0)) % 2
    images = [(c, k, i) for k, c in enumerate(("cat", "dog")) for i in range(16)]
    given = [lot[16 * k + i] if few else 1 - k for _, k, i in images]
    write_list(
        tmp_path,
        [f"{c}/{i:03d}.png {y}" for (c, _, i), y in zip(images, given, strict=True)],
        "photo/list.txt",
    )
    write_list(
        tmp_path, [f"{c}/{i:03d}.png {k}" for c, k, i in images if i < 12], "sketch/list.txt"
    )
    domains = (
        "source: {name: list, path: photo/list.txt}, target: {name: list, path: sketch/list.txt}"
    )
    labels = 2 if few else "null"
    data = f"{{{domains}, size: 16, batch: 8, target_labeled: {labels}, root: {tmp_path}/images}}"
    config = tiny_config(tmp_path, data=data, steps=120, eval_every=120, optim="{lr: 0.05}")
    assert train("train_source", config) == 0
    accuracy = summary(tmp_path / "run")["target"]["last"]["accuracy"]
    assert accuracy >= 75 if few else accuracy < 40


@pytest.mark.parametrize(
    "script", others_slow(("train_dann", "train_pseudo", "train_adda"), ("train_dann",))
)
def test_resume_is_exact(tmp_path, monkeypatch, script):
    config = tiny_config(tmp_path)
    assert train(script, config, "data.target_labeled=1", f"out_dir={tmp_path}/whole") == 0
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train(script, config, "data.target_labeled=1", "data.workers=2") == 143
    assert train(script, config, "data.target_labeled=1", "--resume") == 0
    assert differing(*(weights(tmp_path / run, LAST)["model"] for run in ("whole", "run"))) == 0
    assert metrics(tmp_path / "whole") == metrics(tmp_path / "run")


@pytest.mark.parametrize("script", [*SCRIPTS, *SOURCE_FREE])
def test_no_other_target_label_trains(tmp_path, pictures, script):
    """Two lists name the same labeled images; the labels of all others differ."""
    pictures("photo", {"cat": 12, "dog": 12})
    folder = pictures("sketch", {"cat": 8, "dog": 8})
    data = (
        "{source: {name: list, path: photo/list.txt}, target: {name: list, path: sketch/list.txt}, "
    )
    data += "target_labeled: few.txt, size: 16, batch: 4, "
    data += f"root: {tmp_path}/images, cache: {tmp_path}/cache}}"
    few = [f"sketch/{name}/{i:03d}.png" for name in ("cat", "dog") for i in range(2)]

    def write(permuted: bool, wrong: bool = False) -> None:
        for domain, count in (("photo", 12), ("sketch", 8)):
            lines = [
                f"{c}/{i:03d}.png {(k + (permuted and domain == 'sketch' and i >= 2)) % 2}"
                for k, c in enumerate(("cat", "dog"))
                for i in range(count)
            ]
            (folder.parent / domain / "list.txt").write_text("\n".join(lines))
        write_list(tmp_path, [f"{path} {('dog' in path) != wrong:d}" for path in few])

    write(False)
    short = {"select": "infomax", "steps": 4, "eval_every": 2, "save_every": 4}
    config = tiny_config(tmp_path, data=data, **short)
    if script in SOURCE_FREE:
        assert (
            train("train_source", config, "data.target_labeled=null", f"out_dir={tmp_path}/source")
            == 0
        )
        config = tiny_config(
            tmp_path,
            init_from=tmp_path / "source",
            data=data.replace("source: {name: list, path: photo/list.txt}, ", ""),
            **short,
        )
    states = {}
    for run, keys in {"plain": (False,), "permuted": (True,), "wrong": (False, True)}.items():
        write(*keys)
        assert train(script, config, f"out_dir={tmp_path}/{run}") == 0
        states[run] = weights(tmp_path / run)
    assert differing(states["plain"], states["permuted"]) == 0
    assert differing(states["plain"], states["wrong"]) > 1000  # control: those of the list do
    plain, permuted = (summary(tmp_path / run)["target"] for run in ("plain", "permuted"))
    assert plain["selected"]["step"] == permuted["selected"]["step"]
    assert plain["last"]["accuracy"] == pytest.approx(
        100 - permuted["last"]["accuracy"]
    )  # control: they were swapped


def test_a_saved_draw_is_a_list_file(tmp_path, pictures):
    """Placed below data.root, the list of a run gives the same labels to another."""
    pictures("photo", PHOTO)
    pictures("sketch", SKETCH)
    data = "{source: {name: folder, path: photo}, target: {name: folder, path: sketch}, "
    data += "size: 16, batch: 4, "
    config = tiny_config(tmp_path, data=data + f"root: {tmp_path}/images}}")
    assert train("train_dann", config, "data.target_labeled=2", "seed=3") == 0
    text = (tmp_path / "run/target_labeled.txt").read_text()
    (tmp_path / "images/few.txt").write_text(text)
    assert (
        train("train_dann", config, "data.target_labeled=few.txt", f"out_dir={tmp_path}/listed")
        == 0
    )
    assert summary(tmp_path / "listed")["target_labeled"] == 6
    assert not (tmp_path / "listed/target_labeled.txt").exists()  # it was not drawn
    photo, sketch = (DomainConfig("folder", path=path) for path in ("photo", "sketch"))
    root = str(tmp_path / "images")
    listed = open_domains(
        DataConfig(source=photo, target=sketch, target_labeled="few.txt", size=16, root=root), 0
    )
    few = listed.target_labeled
    lines = [
        f"{p.relative_to(tmp_path / 'images')} {few.classes[k]}"
        for p, k in zip(few.images.paths, few.labels, strict=True)
    ]
    assert "\n".join(lines) + "\n" == text


def test_a_draw_from_other_images_is_refused_at_resume(tmp_path, monkeypatch, pictures):
    pictures("photo", PHOTO)
    folder = pictures("sketch", SKETCH)
    data = "{source: {name: folder, path: photo}, target: {name: folder, path: sketch}, "
    data += "size: 16, batch: 4, "
    config = tiny_config(tmp_path, data=data + f"root: {tmp_path}/images, target_labeled: 2}}")
    with monkeypatch.context() as patch:
        stop_after(patch, 6)
        assert train("train_dann", config) == 143
    drawn = (tmp_path / "run/target_labeled.txt").read_text().split()[0]
    moved = folder.parent / drawn.replace(".png", "_moved.png")
    (folder.parent / drawn).rename(moved)
    with pytest.raises(UserError, match="was trained on other data"):
        train("train_dann", config, "--resume")
    moved.rename(folder.parent / drawn)
    (tmp_path / "run/target_labeled.txt").write_bytes(bytes(range(256)))
    with pytest.raises(UserError, match=r"target_labeled\.txt is gone, or was drawn"):
        train("train_dann", config, "--resume")


def test_fine_tuning_takes_no_list(tmp_path):
    with pytest.raises(UserError, match=r"data\.target_labeled must be null"):
        train("finetune", finetune_config(tmp_path), "data.target_labeled=3")
