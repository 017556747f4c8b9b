"""The laws of the project. Each failure says why the law is there and what to do.

They hold for the project's own scripts, which have a page in docs/, and for its folders. A script
of your own is held to those of tests/test_method.py alone.
"""

import ast
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from common.errors import UserError
from tests.helpers import ROOT, TRAINING, load_script, page_of
from tests.repetition import code_lines, longest_run, repeated_share
from training.config import load_run_config

# Imports go down only: a folder imports from the folders named here, and from itself.
LAYERS = {
    "common": set(),
    "data": {"common"},
    "losses": {"common"},
    "models": {"common"},
    "training": {"common", "data", "losses", "models"},
    "analysis": {"common", "data", "losses", "models", "training"},
}
FOLDERS = [ROOT / name for name in LAYERS]
MODULES = [file for folder in FOLDERS for file in sorted(folder.glob("*.py"))]
SHIPPED = [script for script in TRAINING if page_of(script).is_file()]
READS_RUNS = [ROOT / f"{name}.py" for name in ("runs", "evaluate", "predict")]  # train nothing
SCRIPTS = [*SHIPPED, ROOT / "reproduce.py", *READS_RUNS]
PACKAGES = {"torch", "torchvision", "numpy", "tqdm", "yaml", "PIL"}  # PIL comes with torchvision
FORBIDDEN = {"backward", "zero_grad", "unscale_", "autocast", "GradScaler"}


def parse(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


def names(tree: ast.AST) -> set[str]:
    """Every name and attribute in the code."""
    attributes = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return attributes | {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}


def imports(tree: ast.AST) -> Iterator[str]:
    """The dotted names of all imported modules."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module


def wrong_layers(folder: str, tree: ast.AST) -> list[str]:
    """Imports of a folder's module that do not go down."""
    allowed = LAYERS[folder] | {folder}
    return [name for name in imports(tree) if name.split(".")[0] in LAYERS.keys() - allowed]


def inner_imports(tree: ast.AST) -> list[str]:
    """Imports of the project's folders inside a function."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    inner = [name for function in functions for name in imports(function)]
    return [name for name in inner if name.split(".")[0] in LAYERS]


def test_the_algorithm_stays_on_the_page():
    assert MODULES
    for file in MODULES:
        used = FORBIDDEN & names(parse(file))
        assert not used, (
            f"{file.relative_to(ROOT)} uses {used}: a reader of a script must see every backward "
            "pass, precision and optimizer step; move the line into the script"
        )
    for file in SHIPPED:  # control: the same search finds them in the scripts
        assert {"backward", "zero_grad", "autocast", "GradScaler"} <= names(parse(file)), file.name


def test_no_script_imports_another():
    stems = {file.stem for file in SCRIPTS}
    for file in [*SCRIPTS, *MODULES]:
        shared = stems & {name.split(".")[0] for name in imports(parse(file))}
        assert not shared, (
            f"{file.relative_to(ROOT)} imports {shared}: a script is copied alone; move what both "
            "need into a folder"
        )


def test_imports_are_the_five_packages():
    for file in [*SCRIPTS, *MODULES]:
        found = {name.split(".")[0] for name in imports(parse(file))}
        foreign = found - PACKAGES - LAYERS.keys() - set(sys.stdlib_module_names)
        assert not foreign, (
            f"{file.relative_to(ROOT)} imports {foreign}: torch, torchvision, numpy, tqdm and "
            "pyyaml are all that a user must install"
        )


def test_imports_go_down_only():
    for file in MODULES:
        wrong = wrong_layers(file.parent.name, parse(file))
        assert not wrong, (
            f"{file.relative_to(ROOT)} imports {wrong}: imports go from scripts to analysis, to "
            "training, to data, models and losses, to common; move what both need down"
        )
        inner = inner_imports(parse(file))
        assert not inner, (
            f"{file.relative_to(ROOT)} imports {inner} inside a function: that hides a circle; "
            "move what both modules need into a third"
        )


def test_control_a_wrong_import_is_seen():
    upwards = "from training.run import Run\ndef f():\n    from models import build_model\n"
    assert wrong_layers("data", ast.parse(upwards)) == ["training.run", "models"]
    assert wrong_layers("training", ast.parse(upwards)) == []
    assert wrong_layers("training", ast.parse("import analysis.curves")) == ["analysis.curves"]
    assert inner_imports(ast.parse(upwards)) == ["models"]


def import_graph() -> dict[str, set[str]]:
    """{module: modules that it imports} of the folders; a package is its __init__."""
    stems = {f"{file.parent.name}.{file.stem}": file for file in MODULES}
    graph = {}
    for name, file in stems.items():
        found: set[str] = set()
        for node in ast.walk(parse(file)):
            if isinstance(node, ast.ImportFrom):
                inside = {f"{node.module}.{alias.name}" for alias in node.names} & stems.keys()
                found |= inside or {node.module}
        graph[name.removesuffix(".__init__")] = found
    return graph


def circle(graph: dict[str, set[str]]) -> list[str]:
    """A circle of imports, or nothing."""
    finished: set[str] = set()

    def visit(module: str, path: list[str]) -> list[str]:
        if module in path:
            return [*path[path.index(module) :], module]
        if module in finished:
            return []
        for imported in sorted(graph.get(module, ())):
            if found := visit(imported, [*path, module]):
                return found
        finished.add(module)
        return []

    return next((found for module in graph if (found := visit(module, []))), [])


def test_no_circle_of_imports():
    assert not circle(import_graph())
    assert circle({"a": {"b"}, "b": {"c"}, "c": {"b"}}) == ["b", "c", "b"]  # control


def sections(text: str) -> dict[str, str]:
    """{title: text} of the sections of a script's main."""
    parts = re.split(r"^    # --- (.*)\n", text, flags=re.M)
    return dict(zip(parts[1::2], parts[2::2], strict=True))


def function_lengths(tree: ast.AST) -> list[tuple[str, int]]:
    """(name, lines) of every function."""
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    return [(node.name, node.end_lineno - node.lineno + 1) for node in functions]


@pytest.mark.parametrize("script", SHIPPED, ids=lambda file: file.stem)
def test_a_script_reads_top_to_bottom(script):
    text = script.read_text()
    assert len(text.splitlines()) < 200, "a method that needs more is two scripts"
    long_lines = [line for line in text.splitlines() if len(line) > 100]
    assert not long_lines, f"at most 100 columns: {long_lines[0]}"
    assert dict(function_lengths(ast.parse(text)))["main"] <= 140, "main() has at most 140 lines"
    expected = ["set-up", "model", "data", "train"]
    assert list(sections(text)) == expected, "every script has the same sections in one order"
    set_up = sections((ROOT / "train_source.py").read_text())["set-up"]
    assert sections(text)["set-up"] == set_up, "the set-up is the same text in all scripts"
    assert "task" not in names(ast.parse(text)), (
        "a script is the same code for classification and segmentation: ask for the task in a "
        "folder (models/build.py, data/tasks.py)"
    )


@pytest.mark.parametrize("script", READS_RUNS, ids=lambda file: file.stem)
def test_a_script_that_reads_runs_is_short(script):
    lines = script.read_text().splitlines()
    assert len(lines) < 200, "move what is not the command itself into analysis/"
    assert max(map(len, lines)) <= 100
    assert "task" not in names(ast.parse(script.read_text())), "ask for the task in a folder"
    assert lines[-2:] == ['if __name__ == "__main__":', "    exit_with(main)"]
    assert any(line.startswith(f"    python {script.name}") for line in lines)


def commands(script: Path) -> list[str]:
    """The commands in the docstring of a script."""
    docstring = ast.get_docstring(ast.parse(script.read_text()))
    starts = "    python ", "    torchrun "
    return [line.strip() for line in docstring.splitlines() if line.startswith(starts)]


def load(script: Path, words: list[str]):
    """The config of a command's words behind --config. Raises `UserError` for a mistake."""
    options = [word for word in words if word.startswith("--")]
    overrides = [word for word in words if "=" in word]
    files = [str(ROOT / word) for word in words if word not in (*options, *overrides)]
    return load_run_config(load_script(script).Config, files, overrides)


def test_control_a_wrong_command_is_seen():
    with pytest.raises(UserError, match="unknown key"):
        load(ROOT / "train_dann.py", ["configs/demo/digits.yaml", "configs/demo/adda.yaml"])
    with pytest.raises(UserError, match="cannot be read"):
        load(ROOT / "train_dann.py", ["configs/demo/none.yaml"])


@pytest.mark.parametrize("script", SHIPPED, ids=lambda file: file.stem)
def test_the_commands_of_a_docstring_are_right(script):
    """The configs exist and load; tests/test_torchrun.py runs the command of torchrun."""
    shown = commands(script)
    assert shown, f"the docstring of {script.name} shows no command"
    for command in shown:
        words = shlex.split(command)
        launcher = ["torchrun", "--nproc-per-node", "2"] if words[0] == "torchrun" else ["python"]
        start = [*launcher, script.name, "--config"]
        assert words[: len(start)] == start, command
        load(script, words[len(start) :])


@pytest.mark.parametrize("script", SHIPPED, ids=lambda file: file.stem)
def test_a_method_states_its_criteria(script):
    config = load_script(script).Config
    assert "trained_criteria" in vars(config), (
        f"Config of {script.name} must state trained_criteria() itself: a criterion that the loss "
        "improves does not measure the run independently (docs/selection.md)"
    )


def test_functions_are_short():
    folders = [*FOLDERS, ROOT / "tests", ROOT / "benchmarks"]
    for file in [file for folder in folders for file in sorted(folder.glob("*.py"))]:
        long_ones = [(name, n) for name, n in function_lengths(parse(file)) if n > 70]
        assert not long_ones, f"{file.relative_to(ROOT)}: over 70 lines: {long_ones}"


def test_control_a_long_method_is_seen_behind_a_short_one():
    long_one = "class A:\n    def f(self):\n" + "        x = 1\n" * 80
    lengths = function_lengths(ast.parse(long_one + "class B:\n    def f(self):\n        x = 1\n"))
    assert lengths == [("f", 81), ("f", 2)]


def test_the_scripts_repeat_little():
    texts = [script.read_text() for script in SHIPPED]
    for length, limit in ((10, 16), (6, 32)):
        share = repeated_share(texts, length)
        assert share <= limit, (
            f"{share:.1f} % of the scripts' code stands in identical runs of {length} lines, "
            f"{limit} % may: `python -m tests.repetition` shows the longest, move it into a folder"
        )


def test_control_repetition_is_counted():
    first, second = (
        "".join(f"a{i} = 1\n" for i in range(10)),
        "".join(f"b{i} = 1\n" for i in range(10)),
    )
    assert repeated_share([first, second], 6) == 0
    assert repeated_share([first, '"""Doc."""\n' + first.replace("a5", "# note\n\na5")], 10) == 100
    assert repeated_share([first + second, first], 10) == pytest.approx(100 * 20 / 30)
    assert longest_run([second + first, "c = 1\n" + first]) == first.splitlines()


@pytest.mark.parametrize(("name", "limit"), [("mcc", 4), ("mdd", 9), ("mmd", 5), ("dann", 11)])
def test_scripts_differ_by_the_method_only(name, limit):
    """Every line of code of train_source.py stands in another script, but for its own words."""
    source, other = (
        code_lines((ROOT / f"train_{script}.py").read_text()) for script in ("source", name)
    )
    missing = [line for line in source if line not in other]
    assert len(missing) <= limit, missing


def test_a_new_method_is_a_small_diff():
    """train_mcc.py is train_source.py with its loss and docstring, as the README tells it."""
    texts = ((ROOT / f"train_{name}.py").read_text() for name in ("source", "mcc"))
    source, mcc = (text.split('"""', 2)[2].splitlines() for text in texts)
    added, removed = ([x for x in a if x not in b] for a, b in ((mcc, source), (source, mcc)))
    assert len(added) <= 13
    assert len(removed) <= 4
