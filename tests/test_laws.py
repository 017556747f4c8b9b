"""The laws of the house, where they can be checked."""

import ast
import re
import subprocess
import sys

import pytest

from tests.helpers import ROOT, metrics, tiny_config, train, weights

PACKAGES = [ROOT / folder for folder in ("common", "data", "losses", "models")]
MODULES = [file for folder in PACKAGES for file in sorted(folder.glob("*.py"))]
TRAINING = [*sorted(ROOT.glob("train_*.py")), ROOT / "finetune.py"]
ALLOWED = {"torch", "torchvision", "numpy", "tqdm", "yaml", "PIL"}  # PIL comes with torchvision


def _names(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Name):
            yield node.id


def _imports(tree: ast.AST):
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module.split(".")[0]


FORBIDDEN = {"backward", "zero_grad", "unscale_", "autocast", "GradScaler"}


def test_the_algorithm_stays_on_the_page():
    assert MODULES
    for file in MODULES:
        used = FORBIDDEN & set(_names(ast.parse(file.read_text())))
        assert not used, f"{file.name} uses {used}"
    for file in TRAINING:  # control: the same search finds them in the scripts
        assert {"backward", "zero_grad", "autocast", "GradScaler"} <= set(_names(ast.parse(file.read_text())))


def test_no_script_imports_another():
    scripts = {file.stem for file in ROOT.glob("*.py")}
    for file in [*ROOT.glob("*.py"), *MODULES]:
        assert not scripts & set(_imports(ast.parse(file.read_text()))), file.name


def test_imports_are_the_five_packages():
    own = {folder.name for folder in PACKAGES}
    for file in [*ROOT.glob("*.py"), *MODULES]:
        foreign = set(_imports(ast.parse(file.read_text()))) - ALLOWED - own - set(sys.stdlib_module_names)
        assert not foreign, f"{file.name} imports {foreign}"


def _sections(text: str) -> dict[str, str]:
    parts = re.split(r"^    # --- (.*)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


@pytest.mark.parametrize("script", TRAINING, ids=lambda file: file.stem)
def test_a_script_reads_top_to_bottom(script):
    text = script.read_text()
    assert len(text.splitlines()) < 200
    sections = _sections(text)
    assert list(sections) == ["set-up", "model", "data", "train"]
    assert sections["set-up"] == _sections((ROOT / "train_source.py").read_text())["set-up"]
    assert not re.search(r"\btask\b", text)
    docstring = ast.get_docstring(ast.parse(text))
    assert f"python {script.name} --config" in docstring
    assert "torchrun" in docstring


@pytest.mark.parametrize(("name", "own"), [("dann", 8), ("pseudo", 11), ("mmd", 4)])
def test_the_scripts_differ_by_the_method_only(name, own):
    """Every line of train_source.py stands in another script, but for its own words."""
    source, other = (
        (ROOT / f"train_{script}.py").read_text().split("import torch\n", 1)[1].splitlines()
        for script in ("source", name)
    )
    missing = [line for line in source if line not in other]
    assert len(missing) <= own, missing


METHOD = [  # a copy of train_dann.py that matches the domains' mean features instead
    ("from losses.domain import discriminator_accuracy, domain_loss", "from losses_new import mean_distance"),
    ('method: ClassVar[str] = "dann"', 'method: ClassVar[str] = "mean_distance"'),
    (
        "loss = cls_loss + config.adv_weight * adv_loss",
        'adv_loss = mean_distance(out_s.features["pooled"], out_t.features["pooled"])\n'
        "            loss = cls_loss + config.adv_weight * adv_loss",
    ),
    (
        'losses = {"cls_loss": cls_loss, "adv_loss": adv_loss, "domain_accuracy": domain_accuracy}',
        'losses = {"cls_loss": cls_loss, "adv_loss": adv_loss}',
    ),
]


def test_a_new_method_is_one_copied_script_and_one_loss(tmp_path):
    text = (ROOT / "train_dann.py").read_text()
    for old, new in METHOD:
        assert old in text
        text = text.replace(old, new)
    start, end = (
        text.index("            adv_loss, domain_accuracy, weight_s"),
        text.index("            adv_loss = mean_distance"),
    )
    (tmp_path / "train_mine.py").write_text(text[:start] + text[end:])
    (tmp_path / "losses_new.py").write_text(
        "def mean_distance(features_s, features_t):\n"
        "    return (features_s.mean(0) - features_t.mean(0)).square().sum()\n"
    )
    command = [sys.executable, tmp_path / "train_mine.py", "--config", tiny_config(tmp_path)]
    done = subprocess.run(
        command, cwd=ROOT, env={"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert all("adv_loss" in line for line in metrics(tmp_path / "run") if "lr" in line)
    assert train("train_dann", tmp_path / "config.yaml", f"out_dir={tmp_path}/dann") == 0
    mine, dann = weights(tmp_path / "run"), weights(tmp_path / "dann")
    assert (mine["head.weight"] != dann["head.weight"]).any()  # it is another method
