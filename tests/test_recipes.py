"""Every config loads, and those whose images are not here pass a dry run on a small stand-in."""

import numpy as np
import pytest
import yaml
from PIL import Image

from common.config import load_config
from tests.helpers import ROOT, load_script, train

CONFIGS = sorted(file for file in (ROOT / "configs").rglob("*.yaml") if file.parent.name != "suites")
RECIPES = [file for file in CONFIGS if file.parent.name in ("office31", "officehome", "visda")]
MAP_RECIPES = [file for file in CONFIGS if file.parent.name == "gta5_cityscapes"]


def _script(config) -> str:
    scripts = dict.fromkeys(("source", "upper"), "train_source")  # upper: trained on the labelled target
    scripts |= dict.fromkeys(("minent", "advent"), "train_advent") | {"pseudo": "train_pseudo", "shot": "train_shot"}
    scripts |= dict.fromkeys(("mmd", "coral"), "train_mmd") | {"adda": "train_adda", "finetune": "finetune"}
    return scripts.get(config.stem.split("_")[0], "train_dann")


@pytest.mark.parametrize("config", CONFIGS, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_every_config_loads(config):
    loaded = load_config(load_script(ROOT / f"{_script(config)}.py").Config, str(config))
    assert loaded.out_dir == str(config.relative_to(ROOT).with_suffix("")).replace("configs", "runs", 1)


def _stand_in(root, domain: dict) -> None:
    """Three images in each of three classes, as a folder per class or as a list with a classes file."""
    names = ["back_pack", "bike", "mug"]
    path = root / domain["path"]
    folder = path.parent if domain["name"] == "list" else path
    for label, name in enumerate(names):
        (folder / name).mkdir(parents=True)
        for i in range(3):
            pixels = np.full((40, 30, 3), 60 * label + 10 * i, np.uint8)
            Image.fromarray(pixels).save(folder / name / f"frame_{i}.png")
    if domain["name"] == "list":
        path.write_text(
            "".join(f"{name}/frame_{i}.png {label}\n" for label, name in enumerate(names) for i in range(3))
        )
        (root / domain["classes"]).write_text("\n".join(names))


@pytest.mark.parametrize("config", RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_recipes_pass_a_dry_run(tmp_path, capsys, config):
    content = yaml.safe_load(config.read_text())
    for role in ("source", "target"):
        _stand_in(tmp_path / "images", content["data"][role])
    small = [f"data.root={tmp_path}/images", "data.size=64", "data.batch=2", "data.workers=0", "model.weights=null"]
    assert train(_script(config), config, "--dry-run", *small, f"out_dir={tmp_path}/run") == 0
    out = capsys.readouterr().out
    assert "3 classes: back_pack, bike, mug" in out
    assert "nothing was written" in out
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize("config", MAP_RECIPES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_recipes_of_maps_pass_a_dry_run(tmp_path, capsys, config):
    """On three small images a folder, in the names of GTA5 and of Cityscapes."""
    for path, end in (
        ("GTA5/images", ".png"),
        ("GTA5/labels", ".png"),
        ("cityscapes/leftImg8bit/train/ulm", "_leftImg8bit.png"),
        ("cityscapes/leftImg8bit/val/bonn", "_leftImg8bit.png"),
        ("cityscapes/gtFine/val/bonn", "_gtFine_labelIds.png"),
    ):
        folder = tmp_path / "images" / path
        folder.mkdir(parents=True)
        for i in range(3):
            labels = path.endswith("labels") or "gtFine" in path
            pixels = np.random.default_rng(i).integers(0, 34, (90, 160, 1 if labels else 3), np.uint8).squeeze()
            Image.fromarray(pixels).save(folder / f"a_{i}{end}")
    content = yaml.safe_load(config.read_text())
    sizes = [f"data.{role}.resize=[{content['data'][role]['resize'][0] // 8}, 128]" for role in ("source", "target")]
    small = [f"data.root={tmp_path}/images", "data.workers=0", "model.weights=null", "model.backbone=resnet18"]
    assert train(_script(config), config, "--dry-run", *small, *sizes, f"out_dir={tmp_path}/run") == 0
    out = capsys.readouterr().out
    assert "19 classes: road, sidewalk, building" in out
    assert "source 3x90x128, target 3x64x128" in out
    assert "nothing was written" in out
    assert not (tmp_path / "run").exists()
    assert not (tmp_path / "cache").exists()
