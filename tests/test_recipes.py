"""Every yaml below configs/ names the command that runs it, and that command loads.

Recipes whose images are not among the test data pass a dry run on small stand-ins.
"""

import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import reproduce
from common.config import load_config
from common.errors import UserError
from data.augment import Augment
from data.order import Draws
from tests.helpers import ROOT, TRAINING, load_script, train
from training.config import default_out_dir, load_run_config
from training.optim import learning_rate

SUITES = sorted((ROOT / "configs/suites").glob("*.yaml"))
CONFIGS = sorted(set((ROOT / "configs").rglob("*.yaml")) - set(SUITES))
RECIPES = [file for file in CONFIGS if file.parent.name == "tll"]
MAP_RECIPES = [file for file in CONFIGS if file.parent.name == "gta5"]
MOST_FILES = 93
# The recipe whose run a recipe starts from.
START_OF = {"tll/shot": "tll/shot_source", "tll/aad": "tll/shot_source"}
FIGURES = re.compile(r"\bexpected\b|\bpublished:", re.I)  # figures belong in the suites


def name(file: Path) -> str:
    return f"{file.parent.name}/{file.stem}"


def first_command(file: Path) -> list[str]:
    """The words behind `# python` in the first line of a yaml."""
    words = shlex.split(file.read_text(encoding="utf-8").partition("\n")[0])
    assert words[:2] == ["#", "python"], f"the first line of {file} is no command"
    return words[2:]


def recipe(file: Path) -> tuple[str, list[str], list[str]]:
    """(script, files, overrides) of a config's first line, relative to the working directory.

    The line must name a script, the config itself, and nothing that does not exist.
    """
    script, option, *words = [*first_command(file), "", ""]
    words = [word for word in words if word]
    assert option == "--config", f"the first line of {file} has no --config behind the script"
    files = [word for word in words if "=" not in word]
    overrides = words[len(files) :]
    assert all("=" in word for word in overrides), f"{file}: overrides follow the files"
    missing = [path for path in (script, *files) if not Path(path).is_file()]
    assert not missing, f"the first line of {file} names {missing}, which do not exist"
    itself = file.resolve().relative_to(Path.cwd().resolve()).as_posix()
    assert itself in files, f"the first line of {file} names {files}, not itself"
    return script, files, overrides


def load_recipe(file: Path):
    """The config that the first line of a yaml trains with."""
    script, files, overrides = recipe(file)
    return load_run_config(load_script(Path(script)).Config, files, overrides)


def load_suite(file: Path) -> reproduce.Suite:
    """The suite that the first line of a yaml runs."""
    script, *words = first_command(file)
    assert script == "reproduce.py", f"the first line of {file} is no command of reproduce.py"
    itself = file.resolve().relative_to(Path.cwd().resolve()).as_posix()
    named = reproduce.parse_args(words).suite
    assert named == itself, f"the first line of {file} names {named}, not itself"
    return load_config(reproduce.Suite, named)


# --- configs


@pytest.mark.parametrize("file", CONFIGS, ids=name)
def test_the_first_line_of_a_config_runs_it(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    script, files, _ = recipe(file)
    assert ROOT / script in TRAINING
    config = load_recipe(file)
    assert config.out_dir == default_out_dir(files, config.method)  # none names a folder itself


def test_no_two_configs_share_a_folder(monkeypatch):
    monkeypatch.chdir(ROOT)
    folders = [load_recipe(file).out_dir for file in CONFIGS]
    assert len(folders) > 30
    assert len(set(folders)) == len(folders)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A working directory with a script, a config of a pair of domains, and one of a method."""
    monkeypatch.chdir(tmp_path)
    shutil.copy(ROOT / "train_source.py", tmp_path)
    folder = tmp_path / "configs/mine"
    folder.mkdir(parents=True)
    data = "data: {source: {name: drawn_digits}, target: {name: drawn_digits_shifted}}\n"
    line = "# python train_source.py --config configs/mine/pair.yaml\n"
    (folder / "pair.yaml").write_text(line + data)
    return folder


GOOD = "# python train_source.py --config configs/mine/pair.yaml configs/mine/new.yaml steps=3"


def test_a_good_first_line_passes(checkout):
    assert load_recipe(checkout / "pair.yaml").out_dir == "runs/mine/pair"
    line = f"{GOOD} 'data.augment={{photometric: {{noise: 1}}}}'"
    (checkout / "new.yaml").write_text(f"{line}\nsteps: 2\n")
    config = load_recipe(checkout / "new.yaml")
    assert config.steps == 3
    assert config.data.augment == {"photometric": {"noise": 1}}


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        (GOOD, f"# A heading.\n{GOOD}", "is no command"),
        (GOOD, f"\n{GOOD}", "is no command"),
        (GOOD, "steps: 3", "is no command"),
        ("train_source.py", "train_sauce.py", r"names \['train_sauce.py'\], which do not exist"),
        ("mine/pair.yaml", "mine/pear.yaml", r"names \['configs/mine/pear.yaml'\], which do not"),
        (" configs/mine/new.yaml", "", r"names \['configs/mine/pair.yaml'\], not itself"),
        (" --config", "", "has no --config"),
        ("--config configs/mine/pair.yaml", "--config steps=2", "overrides follow the files"),
    ],
)
def test_a_wrong_first_line_is_found(checkout, old, new, says):
    assert old in GOOD
    (checkout / "new.yaml").write_text(GOOD.replace(old, new) + "\nsteps: 2\n")
    with pytest.raises(AssertionError, match=says):
        load_recipe(checkout / "new.yaml")


@pytest.mark.parametrize(
    ("override", "text", "says"),
    [
        ("stps=3", "steps: 2\n", "unknown key stps"),
        ("steps=3", "disc_hidden: 2\n", "unknown key disc_hidden"),  # it is another script's key
    ],
)
def test_a_first_line_that_does_not_load_is_found(checkout, override, text, says):
    (checkout / "new.yaml").write_text(GOOD.replace("steps=3", override) + "\n" + text)
    with pytest.raises(UserError, match=says):
        load_recipe(checkout / "new.yaml")


def test_the_configs_are_few():
    assert 30 < len(CONFIGS) + len(SUITES) <= MOST_FILES


def test_figures_are_in_the_suites_only():
    assert [file for file in CONFIGS if FIGURES.search(file.read_text())] == []
    for line in ("# Expected: 83.4 +- 1.2", "# Published: 75.2", "expected: 80.0"):  # control
        assert FIGURES.search(line)
    assert not FIGURES.search("# No published number of this setting is known.")


# --- suites


@pytest.mark.parametrize("file", SUITES, ids=name)
def test_the_first_line_of_a_suite_runs_it(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    suite = load_suite(file)
    assert len({entry.out_dir for entry in suite.runs}) == len(suite.runs)
    for entry in suite.runs:
        assert ROOT / entry.script in TRAINING
        assert all(ROOT / path in CONFIGS for path in entry.files)
        start = [f"init_from={entry.init_from}"] if entry.init_from else []
        config_class = load_script(Path(entry.script)).Config
        config = load_run_config(config_class, entry.files, [*entry.overrides, *start])
        assert config.seed == 0  # the seeds are the command's


def test_there_are_suites():
    assert {file.stem for file in SUITES} >= {"demo", "digits", "digits_paper", "pacs"}


SUITE = """# python reproduce.py configs/mine/suite.yaml --seeds 0 1
title: A test
runs:
  - {task: A, method: one, script: train_source.py, config: configs/mine/pair.yaml}
"""


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("# python", "# A heading.\n# python", "is no command"),
        ("reproduce.py", "train_source.py", "is no command of reproduce.py"),
        ("mine/suite.yaml", "mine/other.yaml", "names configs/mine/other.yaml, not itself"),
        ("pair.yaml}", "pear.yaml}", r"runs\[0\]\.config: there is no file .*pear\.yaml"),
        ("pair.yaml}", "pair.yaml, set: {stps: 3}}", r"runs\[0\]\.config: .*unknown key stps"),
        ("--seeds 0 1", "--seeds 1 1", "--seeds must be distinct"),
    ],
)
def test_a_wrong_suite_is_found(checkout, old, new, says):
    (checkout / "suite.yaml").write_text(SUITE)
    assert load_suite(checkout / "suite.yaml").runs[0].out_dir == "runs/mine/pair"
    assert SUITE.count(old) == 1
    (checkout / "suite.yaml").write_text(SUITE.replace(old, new))
    with pytest.raises((AssertionError, UserError), match=says):
        load_suite(checkout / "suite.yaml")


def recorded(text: str, suite: str) -> dict[tuple[str, str], float]:
    """{(task, method): mean of column `last`} of the rows with a figure in a suite's table."""
    begin, end = f"<!-- begin: {suite} -->", f"<!-- end: {suite} -->"
    if begin not in text:
        return {}
    lines = text[text.index(begin) : text.index(end)].splitlines()
    table = [line.strip("| ").split(" | ") for line in lines if line.startswith("|")]
    column = table[0].index("last")
    figures = {(cells[0], cells[1]): cells[column].split(" +- ")[0] for cells in table[2:]}
    return {row: float(figure) for row, figure in figures.items() if figure != "-"}


def expected(suite: reproduce.Suite) -> dict[tuple[str, str], float]:
    rows = {(entry.task, entry.method): entry.expected for entry in suite.runs}
    return {row: figure for row, figure in rows.items() if figure is not None}


def test_source_only_has_the_augmentation_of_self_training(monkeypatch):
    monkeypatch.chdir(ROOT)
    augment = {}
    for entry in load_config(reproduce.Suite, str(ROOT / "configs/suites/pacs.yaml")).runs:
        if entry.init_from:  # without source images
            continue
        config_class = load_script(Path(entry.script)).Config
        config = load_run_config(config_class, entry.files, entry.overrides)
        source = next(iter(config.data.sources), None)
        of_source = (source and source.augment) or config.data.augment
        augment[entry.task, entry.method] = of_source | getattr(config, "strong_augment", {})
    for task in ("photo -> art painting", "art painting -> photo"):
        strong = augment[task, "source-only, augmented as self-training"]
        assert strong == augment[task, "self-training"]
        assert strong != augment[task, "source-only"]  # control


@pytest.mark.parametrize("file", SUITES, ids=name)
def test_expected_is_what_the_results_record(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs/results.md").read_text(encoding="utf-8")
    assert expected(load_config(reproduce.Suite, str(file))) == recorded(text, file.stem)


RESULTS = """# Results
<!-- begin: other -->
| task | method | seeds | last |
| --- | --- | --- | --- |
| A | one | 3 | 1.0 |
<!-- end: other -->

<!-- begin: suite -->
| task | method | seeds | last | selected |
| --- | --- | --- | --- | --- |
| A | one | 3 | 79.0 +- 6.7 | 82.0 +- 5.0 |
| A | two | 1 | 60.5 | 64.4 |
| A | three | 0 of 3 | - | - |
<!-- end: suite -->
"""


def test_a_wrong_or_missing_expected_is_found(checkout):
    def read(first: str, second: str) -> dict:
        entry = "  - {task: A, method: %s, script: train_source.py, config: %s%s}\n"
        pair = "configs/mine/pair.yaml"
        second = f", set: {{out_dir: runs/two}}{second}"
        runs = entry % ("one", pair, first) + entry % ("two", pair, second)
        (checkout / "suite.yaml").write_text(f"title: A test\nruns:\n{runs}")
        return expected(load_config(reproduce.Suite, str(checkout / "suite.yaml")))

    figures = recorded(RESULTS, "suite")
    assert figures == {("A", "one"): 79.0, ("A", "two"): 60.5}
    assert recorded(RESULTS, "elsewhere") == {}
    assert read(", expected: 79.0", ", expected: 60.5") == figures
    assert read(", expected: 79.1", ", expected: 60.5") != figures
    assert read(", expected: 79.0", "") != figures
    assert read(", expected: 79.0", ", expected: null") != figures
    assert read(", expected: 79.0", ", expected: 60.5") != recorded(RESULTS, "elsewhere")


# --- recipes on stand-ins


def make_classes(root: Path, domain) -> None:
    """Three images in each of three classes: a folder per class, or a list and a classes file."""
    names = ["back_pack", "bike", "mug"]
    path = root / domain.path
    folder = path.parent if domain.name == "list" else path
    lines = []
    for label, class_name in enumerate(names):
        (folder / class_name).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((40, 30, 3), 60 * label + 10 * i, np.uint8)
            Image.fromarray(pixels).save(folder / class_name / f"frame_{i}.png")
            lines.append(f"{class_name}/frame_{i}.png {label}\n")
    if domain.name == "list":
        path.write_text("".join(lines))
        (root / domain.classes).write_text("\n".join(names))


def on_stand_ins(file: Path, tmp_path: Path, monkeypatch, *words: str) -> int:
    """The first line of a config, on the images of tmp_path/images, with other words behind it.

    All but two recipes run in float32: half precision is emulated on many processors, and slow.
    """
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        script, files, overrides = recipe(file)
    paths = [str(ROOT / path) for path in files]
    small = [f"data.root={tmp_path}/images", "data.workers=0", "model.weights=null"]
    small += [] if name(file) in ("gta5/cityscapes", "tll/erm") else ["amp=float32"]
    words = [*paths[1:], *overrides, *small, f"out_dir={tmp_path}/run", *words]
    return train(Path(script).stem, Path(paths[0]), *words)


def dry_run(file: Path, tmp_path: Path, monkeypatch, *overrides: str) -> int:
    """`--dry-run` of the first line of a config, on the images of tmp_path/images."""
    return on_stand_ins(file, tmp_path, monkeypatch, *overrides, "--dry-run")


def loaded(file: Path, monkeypatch):
    with monkeypatch.context() as patch:
        patch.chdir(ROOT)
        return load_recipe(file)


@pytest.mark.parametrize("file", RECIPES, ids=name)
def test_recipes_pass_a_dry_run(tmp_path, capsys, monkeypatch, file):
    small, start = ["data.size=64", "data.batch=2"], START_OF.get(name(file))
    start = start and ROOT / f"configs/{start}.yaml"
    data = loaded(start or file, monkeypatch).data
    for domain in (data.source, data.target):
        make_classes(tmp_path / "images", domain)
    if start:
        small += ["model.backbone=resnet18"]
        one_step = ["steps=1", f"out_dir={tmp_path}/start"]
        assert on_stand_ins(start, tmp_path, monkeypatch, *small, *one_step) == 0
        small += [f"init_from={tmp_path}/start"]
    assert dry_run(file, tmp_path, monkeypatch, *small) == 0
    out = capsys.readouterr().out
    assert "3 classes: back_pack, bike, mug" in out
    assert "nothing was written" in out
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_source_only_is_what_the_library_runs(monkeypatch):
    """lr 0.001 (1 + 0.0003 step)^-0.75, weight decay 0.0005, no bottleneck, 2,500 steps."""
    config = loaded(ROOT / "configs/tll/erm.yaml", monkeypatch)
    for step in (0, 500, 2499):
        rate = learning_rate(config.optim, step, config.steps)
        assert rate == pytest.approx(0.001 * (1 + 0.0003 * step) ** -0.75, rel=1e-4)
    assert (config.optim.weight_decay, config.optim.backbone_lr_scale) == (0.0005, 0.1)
    assert (config.model.bottleneck, config.steps, config.data.batch) == (None, 2500, 32)


def test_the_recipes_of_shot_fit_each_other(monkeypatch):
    """One model and one view in both, and a crop of 224 of the 256 px that is not resized."""
    files = [ROOT / f"configs/tll/{stem}.yaml" for stem in ("shot_source", "shot")]
    source, shot = (loaded(file, monkeypatch) for file in files)
    assert replace(source.model, label_smoothing=0.0) == shot.model
    assert (shot.model.bottleneck_relu, shot.model.weight_norm) == (False, True)
    assert (source.model.label_smoothing, shot.pseudo_weight, shot.strong_augment) == (0.1, 0.3, {})
    assert source.data.augment == shot.data.augment
    assert source.out_dir == shot.init_from
    images = torch.arange(3 * 256 * 256).view(1, 3, 256, 256).remainder(251).to(torch.uint8)
    crops = {"crop": shot.data.augment["crop"]}
    for seed in range(3):
        augment = Augment(crops, 224)
        (x,) = augment.apply(images, augment.draw(Draws(torch.tensor([seed]), "crop")))
        places = [(x[0, 0, 0] == images[0, 0, :33, :33]).nonzero()]
        same = [torch.equal(x, images[0, :, i : i + 224, j : j + 224]) for i, j in places[0]]
        assert x.shape == (3, 224, 224)
        assert any(same)


def test_the_heads_quote_their_own_pair(monkeypatch):
    """Office-Home's Art to Clipart, not the mean of its twelve pairs."""
    monkeypatch.chdir(ROOT)
    runs = load_suite(ROOT / "configs/suites/published.yaml").runs
    figures = {(run.task, run.method): run.published for run in runs}
    assert [figures["Art -> Clipart", method] for method in ("source-only", "DANN", "CDAN")] == [
        41.1,
        53.8,
        55.2,
    ]
    assert figures["Amazon -> Webcam", "SHOT"] == 90.1  # 88.6 is the mean of six pairs
    assert load_suite(ROOT / "configs/suites/visda.yaml").metric == "mean_class_accuracy"


def test_the_recipes_of_gta5_have_plain_momentum(monkeypatch):
    optims = [loaded(file, monkeypatch).optim for file in MAP_RECIPES]
    assert {optim.name for optim in optims} == {"sgd", "adamw"}
    assert all(optim.nesterov is (optim.name != "sgd") for optim in optims)


@pytest.mark.parametrize("file", MAP_RECIPES, ids=name)
def test_recipes_of_maps_pass_a_dry_run(tmp_path, capsys, monkeypatch, file):
    """On three small images per folder, with the file names of GTA5, SYNTHIA and Cityscapes."""
    for path, end in (
        ("GTA5/images", ".png"),
        ("GTA5/labels", ".png"),
        ("SYNTHIA/RGB", ".png"),
        ("SYNTHIA/labels", ".png"),
        ("cityscapes/leftImg8bit/train/ulm", "_leftImg8bit.png"),
        ("cityscapes/leftImg8bit/val/bonn", "_leftImg8bit.png"),
        ("cityscapes/gtFine/val/bonn", "_gtFine_labelIds.png"),
    ):
        folder = tmp_path / "images" / path
        folder.mkdir(parents=True)
        masks = path.endswith("labels") or "gtFine" in path
        shape = (90, 160) if masks else (90, 160, 3)
        for i in range(3):
            most = 23 if path.startswith("SYNTHIA") else 34
            pixels = np.random.default_rng(i).integers(0, most, shape, np.uint8)
            Image.fromarray(pixels).save(folder / f"a_{i}{end}")
    config = loaded(file, monkeypatch)
    data, sizes, shapes = config.data, ["data.target_test.resize=[64, 128]"], []
    for role in ("source", "target"):
        domain = getattr(data, role)
        height, width = domain.resize[0] // 8, 128
        sizes.append(f"data.{role}.resize=[{height}, {width}]")
        if domain.crop is not None:
            height, width = (side // 8 for side in domain.crop)
            sizes.append(f"data.{role}.crop=[{height}, {width}]")
        shapes.append(f"{role} 3x{height}x{width}")
    smallest = {"resnet101": "resnet18", "dinov2_vitb14": "dinov2_vits14"}
    smallest["resnet101_caffe"] = "resnet50_caffe"
    backbone = smallest.get(config.model.backbone, config.model.backbone)
    keys = [f"model.backbone={backbone}", *sizes]
    if hasattr(config, "fd_weight"):
        keys += ["fd_weight=0", "fd_classes=[]"]  # it needs pretrained weights
    assert dry_run(file, tmp_path, monkeypatch, *keys) == 0
    out = capsys.readouterr().out
    count = 16 if data.source.path.startswith("SYNTHIA") else 19
    assert f"{count} classes: road, sidewalk, building" in out
    assert ", ".join(shapes) in out
    assert "nothing was written" in out
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


def test_every_recipe_without_data_is_tried():
    pairs = {"office31_a_w", "officehome_ar_cl", "visda"}
    assert {file.stem for file in RECIPES} >= {*pairs, "dann", "erm", "shot", "shot_source"}
    assert {file.stem for file in MAP_RECIPES} >= {
        "cityscapes",
        "synthia",
        "advent",
        "fda",
        "pseudo",
    }
