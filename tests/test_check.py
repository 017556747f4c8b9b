"""`python -m data.check`: what it reports of good and bad data, and what is on its sheet."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageFont

from common.drawing import class_colors, drawable, wrapped
from common.errors import UserError
from data import check, contact_sheet, section
from data.config import DataConfig, LabeledDataConfig, StreamDataConfig, TargetDataConfig
from data.contact_sheet import Shown
from data.listing import Listing
from tests.helpers import ROOT
from training.config import head_command

FOLDERS = "{source: {name: folder, path: photo}, target: {name: folder, path: sketch}, size: 16}"


@pytest.fixture
def report(tmp_path, capsys):
    """`report(data, *words)`: (exit code, lines of the report) for a section `data` of yaml."""

    def run(data: str = FOLDERS, *words: str) -> tuple[int, list[str]]:
        (tmp_path / "config.yaml").write_text(f"data: {data}\nsteps: 3\n")
        keys = ["data.root=images", "data.batch=2", *words]
        code = check.main(["--config", "config.yaml", *keys])
        out, err = capsys.readouterr()
        assert err == ""
        lines = out.splitlines()
        count = sum(line.startswith("finding: ") for line in lines)
        assert lines[-1] == {0: "no findings", 1: "1 finding"}.get(count, f"{count} findings")
        assert code == (count > 0)
        return code, lines

    return run


def findings(lines: list[str]) -> list[str]:
    return [line.removeprefix("finding: ") for line in lines if line.startswith("finding: ")]


def notes(lines: list[str]) -> list[str]:
    return [line for line in lines if line.startswith("note: ")]


def rows(lines: list[str]) -> dict[str, list[str]]:
    """{first word: other cells} of the table of images per class."""
    start = next(i for i, line in enumerate(lines) if "source_val" in line)
    cells = [re.split(r"  +", line) for line in lines[start : lines.index("", start)]]
    return {row[0]: row[1:] for row in cells if len(row) == 6}


# --- good data


def test_good_images_have_no_findings(report, pictures, tmp_path):
    pictures("photo", {"cat": 20, "dog": 10})
    pictures("sketch", {"cat": 10, "dog": 5}, side=24)
    code, lines = report(FOLDERS, "data.test_share=0.2", "data.target_labeled=2")
    assert (code, notes(lines)) == (0, [])
    assert "source         folder photo: 30 images, 20x20 px, RGB 30" in lines
    table = rows(lines)
    assert table["class"] == list(check.ROLES)
    assert table["cat"][2:] == ["6", "2", "2"]
    assert table["dog"][2:] == ["2", "2", "1"]
    assert table["all images"] == ["27", "3", "8", "4", "3"]
    assert int(table["cat"][0]) + int(table["cat"][1]) == 20
    assert "target: the labels of its files are counted here; they do not train" in lines
    assert "target_test: 20 % of the target, held out" in lines
    left = {path.name for path in tmp_path.iterdir()}
    assert left == {"config.yaml", "images", "data_check.png"}  # nothing else is written


def test_a_target_without_a_test_set_is_no_leak(report, pictures):
    """Its training images are its test images, by design; and so are those of an upper bound."""
    pictures("photo", {"cat": 20, "dog": 10})
    pictures("sketch", {"cat": 10, "dog": 5})
    code, lines = report()
    assert code == 0
    assert "target_test: the target's training images: transductive" in lines
    assert report(FOLDERS.replace("sketch", "photo"))[0] == 0
    same = FOLDERS.replace("path: sketch}", "path: sketch}, target_test: {name: folder, path: t}")
    Path("images/t").symlink_to("sketch")
    code, lines = report(same)
    assert code == 0
    assert "note: target_test: its images are those of target: transductive" in lines


def test_a_labeled_target_alone(report, pictures):
    pictures("sketch", {"cat": 10, "dog": 5})
    code, lines = report("{target: {name: folder, path: sketch}, val_share: 0.2}")
    assert code == 0
    assert rows(lines)["all images"] == ["-", "-", "-", "12", "3"]
    assert "note: no data.source: read as a labeled target, as finetune.py does" in lines


@pytest.mark.parametrize("name", ["digits", "street"])
def test_the_demo_has_no_findings(name, capsys):
    assert check.main(["--config", str(ROOT / f"configs/demo/{name}.yaml"), "--out", "a.png"]) == 0
    out = capsys.readouterr().out
    shown = {"digits": "drawn_digits: 200 images of 3x28x28", "street": "6 pole"}
    assert shown[name] in out
    assert Image.open("a.png").width > 1000


# --- files


@pytest.fixture
def ugly(pictures) -> Path:
    """Photographs in many modes, of which five cannot be used, and good sketches."""
    folder = pictures("photo", {"cat": 12, "dog": 12}) / "cat"
    pictures("sketch", {"cat": 6, "dog": 6})
    image = Image.open(folder / "000.png")
    image.resize((400, 300)).save(folder / "LARGE one.JPG")
    for mode, name in (("L", "l.png"), ("RGBA", "a.png"), ("CMYK", "c.jpg"), ("P", "p.gif")):
        image.convert(mode).save(folder / name)
    exif = Image.Exif()
    exif[0x112] = 6
    image.resize((30, 10)).save(folder / "turned.jpg", exif=exif)
    Image.fromarray(np.full((20, 20), 40_000, np.uint16)).save(folder / "deep.png")
    (folder / "text.jpg").write_text("I am no image")
    (folder / "empty.jpg").touch()
    for number in (3, 4):
        cut = folder / f"00{number}.png"
        cut.write_bytes(cut.read_bytes()[:-40])
    return folder


BAD = ("deep.png", "text.jpg", "empty.jpg", "003.png", "004.png")


@pytest.mark.parametrize("workers", [0, 2])
def test_every_file_that_cannot_be_used_is_named(ugly, report, workers):
    code, lines = report(FOLDERS, f"data.workers={workers}")
    assert code == 1
    found = findings(lines)
    assert {Path(line.split(": ")[0]).name for line in found} == set(BAD)
    assert all("; repair or remove it" in line or "; save it as 8 bit" in line for line in found)
    described = next(line for line in lines if line.startswith("source "))
    for text in ("smallest 30x10, median 20x20, largest 300x400 px", "unreadable 2", "1 turned by"):
        assert text in described
    assert {"L 1", "RGBA 1", "CMYK 1", "P 1", "I;16 1"} <= set(re.findall(r"\S+ \d+", described))
    # Its splits are not known; the target is seen all the same.
    assert rows(lines)["all images"] == ["33", "?", "12", "-", "?"]
    assert any("1 of 33 images have a channel of transparency" in line for line in notes(lines))
    for name in BAD:
        (ugly / name).unlink()
    assert report()[0] == 0  # control


def test_one_domain_that_cannot_be_opened_hides_no_other(report, pictures):
    pictures("photo", {"cat": 3, "dog": 3, "dog/deeper": 1})
    (pictures("sketch", {"cat": 3, "dog": 3}) / "cat/000.png").write_text("no image")
    data = FOLDERS.replace("path: sketch}", "path: sketch}, target_test: {name: list, path: a.txt}")
    found = findings(report(data)[1])
    assert len(found) == 3
    for text in ("dog/deeper is a folder inside", "a.txt cannot be read", "cat/000.png: cannot be"):
        assert sum(text in line for line in found) == 1


def test_what_only_a_run_refuses(report, pictures):
    pictures("photo", {"cat": 5, "dog": 5})
    pictures("sketch", {"cat": 5, "dog": 5})
    lines = report(FOLDERS, "data.test_share=0.01")[1]
    (found,) = findings(lines)
    assert found == "data.test_share: 0.01 of the 5 images of class cat leaves none to measure on"
    assert notes(lines) == []
    (Path("images/sketch/cat/000.png")).write_text("no image")
    lines = report(FOLDERS, "data.test_share=0.01")[1]
    assert len(findings(lines)) == 1
    assert "could not be split as a run does" in notes(lines)[0]


# --- copies


def test_copies_between_sets_and_with_other_labels(report, pictures):
    photo, sketch = pictures("photo", {"cat": 20, "dog": 20}), pictures("sketch", {"cat": 5})
    test = pictures("test", {"cat": 3, "dog": 3})
    shutil.copy(photo / "cat/000.png", test / "cat/again.png")
    shutil.copy(photo / "cat/001.png", sketch / "cat/again.png")
    shutil.copy(sketch / "cat/002.png", test / "dog/again.png")
    data = FOLDERS.replace("path: sketch}", "path: sketch/cat, labels: false}")[:-1]
    data += ", target_test: {name: folder, path: test}}"
    lines = report(data)[1]
    first, second, third = (line.split(" (first")[0] for line in findings(lines)[1:])
    assert first == (
        "target: 1 of 6 images have copies in source, which train with their labels: "
        "the domains are not apart"
    )
    assert second.startswith("target_test: 1 of 8 images have copies in source, which train with")
    assert third.endswith("1 of 8 images have copies in target, which train without their labels")
    groups = [line for line in lines if " = " in line and line.startswith("  ")]
    assert len(groups) == 3
    shutil.copy(photo / "cat/003.png", photo / "dog/again.png")
    found = findings(report(data)[1])
    both = "images/photo/cat/003.png (cat) and images/photo/dog/again.png (dog)"
    assert [both in line and "different labels" in line for line in found].count(True) == 1


def test_copies_within_a_set(report, pictures):
    """They are noted; held out apart from their copies they measure what trains."""
    photo = pictures("photo", {"cat": 4, "dog": 20})
    sketch = pictures("sketch", {"cat": 5, "dog": 5})
    shutil.copy(sketch / "cat/000.png", sketch / "cat/again.png")
    code, lines = report()
    assert code == 0
    shown = "images/sketch/cat/000.png = images/sketch/cat/again.png"
    assert f"(first: {shown})" in notes(lines)[-1]
    shutil.copy(photo / "cat/000.png", sketch / "cat/other.png")
    (found,) = findings(report()[1])  # and not again of the test set, which is the target
    assert found.startswith("target: 1 of 12 images have copies in source, which train")
    for i in range(20):
        shutil.copy(photo / f"dog/{i:03d}.png", photo / f"dog/again_{i:03d}.png")
    upper_bound = FOLDERS.replace("sketch", "photo")
    lines = report(upper_bound, "data.source_val=0.4")[1]
    assert all(re.match(r"\w+: \d+ of 17 images have", line) for line in findings(lines))
    starts = {line.split(":")[0] for line in findings(lines)}
    assert starts == {"source_val", "target_test"}  # and not target, which is the source


def test_only_files_of_one_size_are_hashed(report, pictures, monkeypatch):
    photo = pictures("photo", {"cat": 4, "dog": 4})
    pictures("sketch", {"cat": 3, "dog": 3})
    sizes = Counter(path.stat().st_size for path in Path("images").rglob("*.png"))
    hashed = []
    hash_of = check.Survey.__init__.__globals__["_hash_of"]
    monkeypatch.setattr("data.survey._hash_of", lambda path: hashed.append(path) or hash_of(path))
    report()
    assert len(hashed) == sum(count for count in sizes.values() if count > 1) < 14
    before = len(hashed)
    shutil.copy(photo / "cat/000.png", photo / "cat/again.png")
    report()
    assert len(hashed) > 2 * before  # control: the copy is


# --- classes and levels


def test_names_that_differ_a_little(report, pictures):
    pictures("photo", {"Cat": 3, "dogs": 3, "bird_nest": 3, "class10": 3})
    pictures("sketch", {"cat": 3, "dog": 3, "birdnest": 3, "class11": 3})
    (found,) = findings(report()[1])
    assert "only here: birdnest, cat, class11, dog; only in the source: Cat, bird_nest" in found
    pairs = "birdnest (the source: bird_nest), cat (the source: Cat), dog (the source: dogs)"
    assert found.endswith(f"; if they are the same classes, rename {pairs}")


@pytest.mark.parametrize(
    ("photo", "target", "says"),
    [
        ({"train": 4, "val": 4}, "path: photo", "names of splits or of folders of all images"),
        ({"cat": 60, "dog": 3}, "path: photo", "the smallest class, dog, has 3 of 63 images"),
        ({"cat": 4, "dog": 4}, "path: photo/cat", "is it a level too low? name images/photo"),
        ({"cat": 4}, "path: photo/cat", "has only the class cat"),
        ({"cat": 4, "dog": 4}, "path: photo, labels: false", None),
        ({"cat": 9, "dog": 4}, "path: photo", None),
    ],
)
def test_levels_that_look_wrong(report, pictures, photo, target, says):
    pictures("photo", photo)
    code, lines = report(FOLDERS.replace("path: sketch", target), "data.source_val=2")
    assert code == (says is not None)
    if says:
        assert says in findings(lines)[0]
    elif "false" in target:
        assert any("its folders cat, dog have the names of classes" in line for line in lines)


# --- masks


@pytest.fixture
def streets(tmp_path):
    """`streets("day", numbers)`: four images of 20x30 px with masks of these numbers."""

    def make(name: str, numbers: list[int]) -> Path:
        folder, random = tmp_path / "images" / name, np.random.default_rng(sum(name.encode()))
        for part in ("images", "masks"):
            (folder / part).mkdir(parents=True, exist_ok=True)
        for i in range(4):
            pixels = random.integers(256, size=(20, 30, 3)).astype(np.uint8)
            mask = np.resize(np.array(numbers, np.uint8), (20, 30))
            Image.fromarray(pixels).save(folder / f"images/{i}.png")
            Image.fromarray(mask).save(folder / f"masks/{i}.png")
        return folder

    return make


STREETS = """{task: segmentation, target: {name: folder, path: dusk/images},
  source: {name: folder, path: day/images, masks: day/masks, ids: {sky: 0, road: [1, 2], car: 7}},
  target_test: {name: folder, path: test/images, masks: test/masks, ids: [sky, road, car]}}"""


def test_the_numbers_in_masks(report, streets):
    for name, numbers in (("day", [0, 1, 2, 7]), ("dusk", [0]), ("test", [0, 0, 0, 1])):
        streets(name, numbers)
    code, lines = report(STREETS)
    assert code == 0
    start = next(i for i, line in enumerate(lines) if "number in masks of source" in line)
    table = [re.split(r"  +", line) for line in lines[start + 1 : start + 5]]
    classes = ("0 sky", "1 road", "2 road", "7 car")
    assert table == [[name, "25.00 %", "4"] for name in classes]
    assert ["0 sky", "75.00 %", "4"] in [re.split(r"  +", line) for line in lines]
    assert notes(lines) == [
        "note: target_test: no mask has a pixel of car, which does not count in the mean IoU"
    ]


def test_mistakes_in_masks(report, streets):
    for name, numbers in (("day", [0, 1, 9, 11]), ("dusk", [0]), ("test", [0, 1, 2])):
        folder = streets(name, numbers)
    mask = Image.open(folder / "masks/1.png")
    mask.crop((0, 0, 30, 10)).save(folder / "masks/1.png")
    mask.convert("RGB").save(folder / "masks/2.png")
    found = findings(report(STREETS)[1])
    assert len(found) == 4
    text = "\n".join(found)
    assert "test/masks/1.png: the mask is 10x30 px, its image images/test/images/1.png 20x3" in text
    assert "test/masks/2.png: a mask has one number per pixel, or a palette" in text
    defined = "data.source.ids: does not define 9, 11, which up to 4 of 4 masks contain (first: "
    assert f"{defined}images/day/masks/0.png); add each" in text
    assert "data.source.ids: no mask has a pixel of car, which cannot be learned" in text
    found = findings(report(STREETS, "data.source.path=none")[1])  # a run would stop before
    assert sum("test/masks/1.png: the mask is 10x30 px" in line for line in found) == 1


def test_images_with_masks_that_do_not_fit_a_run(report, streets):
    for name in ("day", "dusk", "test"):
        folder = streets(name, [0, 1, 2, 7][: 4 if name == "day" else 3])
    shutil.copy(folder / "images/0.png", Path("images/day/images/1.png"))
    mask = Path("images/day/masks/2.png")
    shutil.copy("images/day/images/3.png", "images/day/images/2.png")
    Image.fromarray(np.zeros((20, 30), np.uint8)).save(mask)
    wide = Image.fromarray(np.zeros((20, 40, 3), np.uint8))
    wide.save("images/dusk/images/3.png")
    found = findings(report(STREETS)[1])
    assert len(found) == 3
    assert found[0].startswith("data.target: its images have 2 sizes, and a batch has one; set")
    assert found[1].startswith("target_test: 1 of 4 images have copies in source")
    assert "images/day/images/2.png and images/day/images/3.png have the same content" in found[2]
    assert found[2].endswith("different masks; correct or remove one of them")
    low = STREETS.replace("path: dusk/images", "path: dusk, image_suffix: .png")
    text = "5 of its 8 images lie in a folder masks".replace("5", "4")
    assert text in "\n".join(findings(report(low)[1]))


# --- the config


def test_the_section_of_every_config_is_read_as_by_its_script(monkeypatch):
    monkeypatch.chdir(ROOT)
    kinds = Counter()
    for file in sorted(ROOT.glob("configs/*/*.yaml")):
        words = head_command(file)
        if words and words[1] == "--config":
            files = [word for word in words[2:] if "=" not in word]
            overrides = [word for word in words[2:] if "=" in word]
            config, _ = section.load_section(files, overrides)
            own = re.search(r"^    data: (\w+)$", (ROOT / words[0]).read_text(), re.M)
            name = own[1] if own else "DataConfig"
            name = {"ClassificationTargetDataConfig": "TargetDataConfig"}.get(name, name)
            assert type(config.data).__name__ == name, file
            kinds[type(config.data)] += 1
    assert {DataConfig, LabeledDataConfig, StreamDataConfig, TargetDataConfig} == set(kinds)


def load(tmp_path, text: str, *overrides: str):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    return section.load_section([str(file)], overrides)


DRAWN = "data: {source: {name: drawn_digits}, target: {name: drawn_digits_shifted}"


def test_mistakes_in_the_section(tmp_path):
    with pytest.raises(UserError) as error:
        load(tmp_path, DRAWN + ", sise: 28}\nmine_weight: 3", "seed=-1")
    first, second = str(error.value).splitlines()
    assert first.endswith("config.yaml: unknown key data.sise; did you mean data.size?")
    assert second.endswith("seed=-1: seed must not be negative")
    config, notes = load(tmp_path, DRAWN + "}\nmine_weight: 3", "steps=3", "data.size=14")
    assert (config.data.size, notes) == (14, ["not read here: steps=3"])


def test_keys_that_a_script_adds_to_the_section(tmp_path, monkeypatch):
    text = DRAWN + ", mine: 3}"
    with pytest.raises(UserError, match=r"unknown key data\.mine"):
        load(tmp_path, text)
    own = "class Mine(DataConfig):\n    mine: int = 3\n"
    (tmp_path / "train_mine.py").write_text(f"{own}class Config(RunConfig):\n    data: Mine\n")
    monkeypatch.setattr(section, "ROOT", tmp_path)
    config, notes = load(tmp_path, text)
    assert (type(config.data), notes) == (DataConfig, ["not read, as keys of a method: data.mine"])
    with pytest.raises(UserError, match=r"unknown key data\.mien"):
        load(tmp_path, text.replace("mine", "mien"))


@pytest.mark.parametrize(
    ("lines", "kind"),
    [
        ("", LabeledDataConfig),
        ("init_from: runs/a", TargetDataConfig),
        ("init_from: runs/a\nunfreeze: [layer4]", LabeledDataConfig),
        ("centroid_every: 5", TargetDataConfig),
    ],
)
def test_a_section_without_a_source(tmp_path, lines, kind):
    config, _ = load(tmp_path, f"data: {{target: {{name: drawn_digits}}}}\n{lines}")
    assert type(config.data) is kind
    if kind is TargetDataConfig and "init_from" in lines:
        assert config.data.classes_from == "runs/a"


def test_a_method_without_its_run(report):
    data = "{source: null, target: {name: drawn_digits}, classes_from: nowhere}"
    (found,) = findings(report(data)[1])
    assert found == "init_from or data.classes_from: there is no nowhere"


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["configs/a.yaml"], "--config is missing"),
        (["--config", "a.yaml", "--out", "a.jpg"], "--out: 'a.jpg' is no name of a png file"),
        (["--config", "a.yaml", "--resume"], "unrecognized arguments: --resume"),
        (["--config", "none.yaml"], "none.yaml: cannot be read"),
    ],
)
def test_mistakes_on_the_command_line(words, says):
    with pytest.raises(UserError, match=re.escape(says)):
        check.main(words)


def test_a_sheet_that_cannot_be_written(report, pictures, capsys):
    """The report is printed all the same."""
    pictures("photo", {"cat": 5, "dog": 5})
    Path("taken.png").mkdir()
    with pytest.raises(UserError, match=r"taken\.png: .*name another file by --out") as error:
        report(FOLDERS.replace("sketch", "photo"), "--out", "taken.png")
    assert error.value.code == 5
    assert "all images" in capsys.readouterr().out


def test_the_commands_in_the_pages_are_right(monkeypatch):
    monkeypatch.chdir(ROOT)
    pages = [ROOT / "README.md", ROOT / "docs/data.md"]
    for text in [*(page.read_text() for page in pages), check.__doc__]:
        shown = re.findall(r"^    python -m data\.check (--config .*)$", text, re.M)
        assert shown
        for words in shown:
            args = check.parse_args(shlex.split(words, comments=True))
            section.load_section(args.config, args.overrides)


def test_the_real_command(pictures, tmp_path):
    """It warns of nothing, as it would if `import data` imported it."""
    pictures("photo", {"cat": 3, "dog": 3})
    (tmp_path / "config.yaml").write_text(f"data: {FOLDERS.replace('sketch', 'photo')}\n")
    words = ["-m", "data.check", "--config", "config.yaml", "data.root=images", "data.batch=2"]
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", *words, "--out", "b.png"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.endswith("contact sheet: b.png\nno findings\n")


# --- the contact sheet


def shown_set(classes: list[str], each: int, title: str = "photo") -> Shown:
    """Images of one gray level per class, as tensors."""
    labels = torch.arange(len(classes)).repeat_interleave(each)
    levels = (40 + labels * 2).to(torch.uint8)
    images = levels[:, None, None, None].expand(-1, 3, 8, 8)
    listing = Listing(title, images, labels, classes)
    return Shown(title, title, listing, np.ones(len(labels), bool))


def squares(sheet: Image.Image) -> Counter:
    """How many images of each gray level are on a sheet."""
    pixels = np.asarray(sheet)
    gray = (pixels == pixels[..., :1]).all(2) & (pixels[..., 0] % 2 == 0) & (pixels[..., 0] < 240)
    counts = Counter(pixels[..., 0][gray & (pixels[..., 0] > 0)].tolist())  # not letters
    side = contact_sheet.CELL[0] * contact_sheet.CELL[1]
    return Counter({level: round(n / side) for level, n in counts.items() if n > side / 2})


@pytest.mark.parametrize(("count", "each"), [(3, 8), (7, 3), (65, 1)])
def test_every_class_is_on_the_sheet(count, each):
    classes = [f"class {i}" for i in range(count)]
    sets = [shown_set(classes, 9, "photo"), shown_set(classes, 9, "sketch")]
    sheet = contact_sheet.contact_sheet(sets, 0)
    assert squares(sheet) == {40 + 2 * i: 2 * each for i in range(count)}
    usable = sets[0].usable.copy()
    usable[9:18] = False  # class 1
    sheet = contact_sheet.contact_sheet([sets[0]._replace(usable=usable)], 0)
    assert squares(sheet)[42] == 0
    assert squares(sheet)[40] == each


def test_more_classes_than_a_sheet_can_have_are_told(monkeypatch):
    titles = []
    title = contact_sheet._title
    monkeypatch.setattr(
        contact_sheet, "_title", lambda text, *rest: titles.append(text) or title(text, *rest)
    )
    sheet = contact_sheet.contact_sheet([shown_set([f"class {i}" for i in range(99)], 1)], 0)
    assert titles == ["photo: 96 of 99 classes"]
    assert sum(squares(sheet).values()) == 96


def test_a_sheet_is_drawn_by_the_seed(report, pictures):
    pictures("photo", {"cat": 40, "dog": 40})
    pictures("sketch", 40)
    sheets = []
    for seed in (0, 0, 1):
        report(FOLDERS, f"seed={seed}", "--out", "sheet.png")  # replaces the one before
        sheets.append(Path("sheet.png").read_bytes())
    assert sheets[0] == sheets[1] != sheets[2]


def test_masks_are_laid_over_in_the_colors_of_the_legend(report, streets):
    streets("day", [1])
    for i in range(4):
        Image.fromarray(np.full((20, 30, 3), 100, np.uint8)).save(f"images/day/images/{i}.png")
    data = """{task: segmentation, target: {name: folder, path: day/images}, source: {name: folder,
      path: day/images, masks: day/masks, ids: {sky: 0, "a, road": 1}}}"""
    report(data)
    color = class_colors(["sky", "a, road"])[1].numpy()
    pixels = np.asarray(Image.open("data_check.png")).astype(int)
    mixed = 100 * (1 - contact_sheet.MIX) + color * contact_sheet.MIX
    overlaid = (abs(pixels - mixed) < 2).all(2).sum()
    plain = (pixels == 100).all(2).sum()
    assert overlaid == 4 * 160 * 240  # beside each of the four images of the source
    assert 8 * 160 * 240 <= plain < 8 * 160 * 240 + 50  # and a few pixels of letters
    assert (pixels[-20:] == color).all(2).sum() > 100  # in the legend


def test_names_are_neither_cut_nor_lost():
    font = ImageFont.load_default(12)
    name = "a long_name-with Signs" * 5 + "w" * 60
    lines = wrapped(name, 100, font)
    assert len(lines) > 5
    assert all(font.getlength(line) <= 100 for line in lines)
    assert "".join(lines).replace(" ", "") == name.replace(" ", "")
    assert drawable("caf\u00e9 \u732b\t\udc80 a", font) == r"caf\xe9 \u732b\t\udc80 a"
