"""README.md and docs/: the summary of the results, paths and links, and commands are right."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
import torch
from torchvision.ops import StochasticDepth

import reproduce
import runs
from benchmarks import backbones, selection
from common.config import all_keys, load_config
from common.errors import UserError
from data.augment import OPERATIONS
from models.backbones import BACKBONES, build_backbone
from tests.helpers import ROOT, TRAINING, load_script, page_of
from training.config import load_run_config
from training.free_keys import FREE_AT_RESUME

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FOLDERS = "analysis|benchmarks|common|configs|data|docs|losses|models|tests|training"
PATH = re.compile(rf"(?<![\w/.])(?:{FOLDERS})/[\w./*-]*\.(?:yaml|py|md)\b")
SCRIPT = re.compile(
    r"(?<![\w/.])(?:(?:train|adapt)_\w+|finetune|reproduce|runs|evaluate|predict)\.py\b"
)
EXAMPLES = {"train_mine.py"}  # scripts that a page asks the reader to write
COMMAND = re.compile(r"python (\w+\.py) (?=--config)(.*)")
OPTIONS = {"--resume", "--allow-change", "--dry-run", "--debug"}


def page(file: Path) -> str:
    return file.name


def read(file: Path) -> str:
    return file.read_text(encoding="utf-8")


# --- the summary of docs/results.md

# Rows of the summary that have another name in their table: (suite, method there).
OTHER_NAMES = {"source-only, strong augmentation": ("digits_pseudo", "source-only")}


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def table_rows(text: str) -> dict[tuple[str, str, str], dict[str, str]]:
    """{(suite, task, method): {column: cell}} of the tables between the markers of suites."""
    rows = {}
    for suite, block in re.findall(r"<!-- begin: (\w+) -->(.*?)<!-- end: \1 -->", text, re.S):
        head, _, *lines = (cells(line) for line in block.splitlines() if line.startswith("|"))
        for line in lines:
            row = dict(zip(head, line, strict=True))
            rows[suite, row["task"], row["method"]] = row
    return rows


def summary_cells(text: str) -> dict[tuple[str, str], str]:
    """{(task, method): cell} of the summary, without the marks of footnotes."""
    block = text.partition("<!-- summary -->")[2].partition("<!-- /summary -->")[0]
    head, _, *lines = (cells(line) for line in block.splitlines() if line.startswith("|"))
    tasks = [name.rpartition(", ")[2] for name in head[1:]]  # `PACS, photo -> art painting`
    found = {}
    for method, *figures in lines:
        name = re.sub(r" \([\d, ]+\)$", "", method)
        found |= {(task, name): cell for task, cell in zip(tasks, figures, strict=True)}
    return found


def wrong_cells(text: str) -> list[str]:
    """The cells of the summary that differ from `last` in the table that they repeat.

    That is the first table of three seeds which has the task and the method.
    """
    rows, wrong = table_rows(text), []
    for (task, method), cell in summary_cells(text).items():
        suite, name = OTHER_NAMES.get(method, (None, method))
        last = [
            row["last"]
            for key, row in rows.items()
            if key[1:] == (task, name) and suite in (None, key[0]) and row["seeds"] == "3"
        ]
        if cell != "-" and cell != next(iter(last), None):
            wrong.append(f"{task}, {method}: {cell}, in the table {last[:1]}")
    return wrong


def test_the_summary_repeats_the_tables():
    text = read(ROOT / "docs/results.md")
    figures = summary_cells(text)
    assert sum(cell != "-" for cell in figures.values()) > 30
    assert {task for task, _ in figures} <= {task for _, task, _ in table_rows(text)}
    assert wrong_cells(text) == []


@pytest.mark.parametrize("name", ["negative", "which_method"])
def test_other_pages_repeat_the_results(name):
    """Every mean and spread of the page stands in docs/results.md."""
    figure = r"[+-]?\d+\.\d \+-\s\d+\.\d"
    figures = set(re.findall(figure, read(ROOT / f"docs/{name}.md")))
    assert len(figures) > 5
    assert figures <= set(re.findall(figure, read(ROOT / "docs/results.md")))


RESULTS = """
<!-- summary -->
| method | A | Set, B -> C |
|---|---|---|
| one (1) | 79.0 +- 6.7 | - |
| two (2, 3) | - | 60.5 +- 0.1 |
<!-- /summary -->
<!-- begin: first -->
| task | method | seeds | last | selected |
| --- | --- | --- | --- | --- |
| A | one | 3 | 79.0 +- 6.7 | 82.0 +- 5.0 |
| A | two | 3 | 70.0 +- 1.0 | 70.0 +- 1.0 |
| B -> C | two | 3 | 60.5 +- 0.1 | 61.0 +- 0.1 |
<!-- end: first -->
<!-- begin: second -->
| task | method | seeds | last | selected |
| --- | --- | --- | --- | --- |
| A | one | 3 | 50.0 +- 1.0 | 50.0 +- 1.0 |
| A | three | 1 | 40.0 | 40.0 |
<!-- end: second -->
"""


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("| one (1) | 79.0 +- 6.7", "| one (1) | 79.0 +- 6.8"),
        ("| one (1) | 79.0 +- 6.7", "| one (1) | 82.0 +- 5.0"),  # `selected`
        ("| one (1) | 79.0 +- 6.7", "| one (1) | 50.0 +- 1.0"),  # of the second table
        ("| one (1) | 79.0 +- 6.7", "| three | 40.0"),  # of one seed
        ("| two (2, 3) | - | 60.5 +- 0.1", "| two (2, 3) | 60.5 +- 0.1 | -"),
        ("| A | one | 3 | 79.0", "| A | one | 3 | 79.1"),
    ],
)
def test_control_a_wrong_cell_is_found(old, new):
    assert wrong_cells(RESULTS) == []
    assert RESULTS.count(old) == 1
    assert len(wrong_cells(RESULTS.replace(old, new))) == 1


# --- links and paths


def anchors(text: str) -> set[str]:
    """The anchors of the headings of a page, as GitHub names them."""
    titles = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def missing_targets(text: str, file: Path) -> list[str]:
    """Relative links, paths and scripts in the text of a page that do not exist."""
    missing = []
    for link in re.findall(r"\]\(([^)]+)\)", text):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = file.parent / path if path else file
        if not target.is_file() or (anchor and anchor not in anchors(read(target))):
            missing.append(link)
    prose = re.sub(r"\]\([^)]+\)", "]", text)
    paths = {*PATH.findall(prose), *SCRIPT.findall(prose)} - EXAMPLES
    return missing + [path for path in sorted(paths) if not any(ROOT.glob(path))]


def test_the_table_of_backbones_is_what_the_command_prints():
    text = (ROOT / "docs/backbones.md").read_text(encoding="utf-8")
    table = text.partition("<!-- begin: backbones -->")[2].partition("<!-- end")[0]
    rows = table.strip().splitlines()
    assert "\n".join(rows[:2]) == backbones.HEADER
    assert [re.match(r"\| `(\w+)`", row)[1] for row in rows[2:]] == list(BACKBONES)
    for row in rows[2:]:
        name = re.match(r"\| `(\w+)`", row)[1]
        if name in ("resnet50_caffe", "convnext_tiny", "swin_t", "dinov2_vits14"):
            assert backbones.table_line(name, 224) == row


def test_the_tables_of_the_study_are_those_of_its_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    assert Path("docs/selection.csv").stat().st_size < 200_000
    page = Path("docs/selection.md").read_text()
    written = page.partition("<!-- begin: selection -->\n")[2].partition("<!-- end")[0]
    assert selection.main(["docs/selection.csv"]) == 0
    assert capsys.readouterr().out == written


def test_backbones_have_the_drop_path_that_the_page_names():
    for name, rate in (("convnext_tiny", 0.1), ("swin_t", 0.2), ("swin_b", 0.5), ("vit_b_16", 0)):
        with torch.device("meta"):
            backbone, _ = build_backbone(name)
        assert max(m.p for m in backbone.modules() if isinstance(m, StochasticDepth)) == rate


@pytest.mark.parametrize("file", PAGES, ids=page)
def test_links_and_paths_exist(file):
    assert missing_targets(read(file), file) == []


@pytest.mark.parametrize(
    "text",
    [
        "see [there](sauce.md)",
        "see [there](source.md#metric)",
        "`configs/digits/dann_mnist_usps.yaml`",
        "configs/dem/*.yaml",
        "losses/sauce.py",
        "train_sauce.py",
    ],
)
def test_control_a_missing_target_is_found(text):
    file = ROOT / "docs/dann.md"
    good = "[a](source.md#keys) [b](../README.md) [c](https://a.b/c.md) configs/demo/*.yaml "
    assert missing_targets(good.replace("#keys", "#metrics") + "`losses/mcc.py`", file) == []
    assert len(missing_targets(text, file)) == 1


# --- keys and defaults


def test_each_table_says_what_its_settings_were_chosen_on(monkeypatch):
    monkeypatch.chdir(ROOT)
    text, found = read(ROOT / "docs/results.md"), 0
    for file in (ROOT / "configs/suites").glob("*.yaml"):
        block = text.partition(f"<!-- begin: {file.stem} -->")[2].partition("<!-- end: ")[0]
        if block:
            suite = load_config(reproduce.Suite, str(file))
            assert suite.tuned, file
            assert f"\n\n{suite.tuned.strip()}\n\n" in block, file
            found += 1
    assert found == text.count("<!-- begin: ")


def test_the_pages_name_every_key():
    run = read(ROOT / "docs/run.md")
    keys = [*FREE_AT_RESUME, *all_keys(reproduce.Entry)]
    assert [key for key in keys if f"`{key}`" not in run] == []


def shown(key: str, default) -> str:
    """A parameter as the table of docs/data.md writes it, such as `scale=[0.08, 1]`."""
    if isinstance(default, tuple):
        exact = {3 / 4: "3/4", 4 / 3: "4/3"}
        return f"`{key}=[{', '.join(exact.get(value, f'{value:g}') for value in default)}]`"
    return f"`{key}={default:g}`"


def wrong_augmentation(text: str) -> list[str]:
    """Operations and defaults of data/augment.py that the table in a page does not have."""
    section = text.partition("| operation | parameter = default |")[2].partition("\n\n")[0]
    parts = re.split(r"^\| `(\w+)`", section, flags=re.M)
    table = dict(zip(parts[1::2], parts[2::2], strict=True))
    wrong = []
    operations = OPERATIONS["classification"] | OPERATIONS["segmentation"]
    for name, operation in operations.items():
        for key, parameter in inspect.signature(operation.draw).parameters.items():
            if parameter.default is not parameter.empty:
                text = shown(key, parameter.default)
                wrong += [] if text in table.get(name, "") else [f"{name}: {text}"]
    return wrong


def test_the_table_of_augmentation_is_right():
    text = read(ROOT / "docs/data.md")
    assert wrong_augmentation(text) == []
    for old, new in (("sigma=[0.1, 2]", "sigma=[0.1, 3]"), ("`hue=0`", "`hue`")):  # control
        assert text.count(old) == 1
        assert len(wrong_augmentation(text.replace(old, new))) == 1


def test_the_segmentation_example_loads(tmp_path):
    text = read(ROOT / "docs/data.md")
    example = text[text.index("    data:\n      task: segmentation") :].partition("\n\n")[0]
    file = tmp_path / "streets.yaml"
    file.write_text(example)
    config = load_run_config(load_script(ROOT / "train_advent.py").Config, str(file))
    assert config.data.target_test.masks == "camera/val_masks"
    assert config.model.aux_weight == 0.1


# --- commands


def commands(text: str) -> list[str]:
    """Every `python X.py --config ...` in indented or fenced blocks, and in back-ticks.

    Lines that end in a backslash go on in the next one.
    """
    joined = re.sub(r"\\\n\s*", " ", text)
    lines = re.findall(r"^\s{4,}(?:# )?(\S*python \w+\.py .*)$", joined, re.M)
    for fence in re.findall(r"^```.*?\n(.*?)^```", joined, re.M | re.S):
        lines += fence.splitlines()
    without_fences = re.sub(r"^```.*?^```", "", joined, flags=re.M | re.S)
    spans = re.findall(r"`([^`]+)`", without_fences)
    found = (COMMAND.search(" ".join(text.split())) for text in [*lines, *spans])
    return [match[0] for match in found if match]


def load_command(command: str):
    """The config that a command trains with. Raises for what does not exist or does not load."""
    script, words = COMMAND.fullmatch(command).groups()
    words = shlex.split(words, comments=True)[1:]
    words = [word for word in words if word not in OPTIONS]
    files = [word for word in words if "=" not in word]
    overrides = words[len(files) :]
    assert all("=" in word for word in overrides), f"{command}: overrides follow the files"
    missing = [name for name in (script, *files) if not Path(name).is_file()]
    assert not missing, f"{command}: there is no {missing}"
    return load_run_config(load_script(Path(script)).Config, files, overrides)


def load_commands(text: str) -> list:
    return [load_command(command) for command in commands(text)]


@pytest.mark.parametrize("file", PAGES, ids=page)
def test_commands_load(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    load_commands(read(file))


def test_every_method_page_shows_a_command():
    for script in TRAINING:
        file = page_of(script)
        if not file.is_file():  # a script under work
            continue
        assert any(f"python {script.name} " in command for command in commands(read(file))), file


@pytest.mark.parametrize("file", PAGES, ids=page)
def test_suite_commands_are_right(file, monkeypatch):
    monkeypatch.chdir(ROOT)
    for words in re.findall(r"python reproduce\.py (configs/[^`\n#>|]*)", read(file)):
        args = reproduce.parse_args(shlex.split(words))
        assert Path(args.suite).is_file(), words


@pytest.mark.parametrize("file", [*PAGES, ROOT / "runs.py"], ids=page)
def test_commands_of_runs_are_right(file):
    found = re.findall(r"^    python runs\.py ?(.*)$", read(file), re.M)
    for words in found:
        runs.read_words(shlex.split(words, comments=True))
    assert found or file.name not in ("run.md", "runs.py")
    with pytest.raises(SystemExit):  # control
        runs.read_words(["--sorted", "last"])


PAGE = """Text.

    .venv/bin/python train_source.py --config configs/demo/digits.yaml steps=3 --resume  # why
    python train_dann.py --config configs/demo/digits.yaml \\
        configs/demo/dann.yaml 'data.augment={flip: {}}'

`python finetune.py --config
configs/own/finetune.yaml`, but `python -m pytest --config none.yaml` is no command of a script.
"""


def test_control_commands_are_found(monkeypatch):
    monkeypatch.chdir(ROOT)
    scripts = [command.split()[1] for command in commands(PAGE)]
    assert scripts == ["train_source.py", "train_dann.py", "finetune.py"]
    source, dann, _ = load_commands(PAGE)
    assert source.steps == 3
    assert (dann.disc_hidden, dann.data.augment) == (256, {"flip": {}})


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("train_dann.py", "train_sauce.py", "there is no"),
        ("demo/dann.yaml", "demo/dawn.yaml", "there is no"),
        ("steps=3", "stps=3", "unknown key stps"),
        ("flip: {}", "flp: {}", "no operation 'flp'"),
        ("steps=3", "steps=3 configs/demo/dann.yaml", "overrides follow the files"),
    ],
)
def test_control_a_wrong_command_is_found(old, new, says, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert PAGE.count(old) == 1
    with pytest.raises((AssertionError, UserError), match=says):
        load_commands(PAGE.replace(old, new))
