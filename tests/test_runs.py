"""runs.py: fake run folders for the odd cases, two real runs for the whole way."""

import csv
import itertools
import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from PIL import Image

import runs
from analysis import curves
from analysis import figures as empty_figures
from analysis.run_configs import SECTIONS, differing_keys, short_names, value_text
from analysis.run_files import find_runs, main_metric, read_config, read_metrics, read_run
from analysis.run_table import COLUMNS, printable
from common import metrics
from common.config import all_keys, parse_yaml
from common.errors import UserError
from tests.helpers import ROOT, summary, tiny_config, train
from training.config import RunConfig
from training.free_keys import FREE_AT_RESUME

EVALUATION = {"target.accuracy": 71.25, "criteria.infomax": 0.5, "collapsed": None}
save = curves.save_figure
PICTURES = pytest.mark.skipif(not empty_figures.available(), reason="no matplotlib")


def target(last: float | None, selected: float | None) -> dict:
    """The part `target` of a summary."""
    return {
        "last": {"step": 60, "accuracy": last, "mean_class_accuracy": 1.0},
        "selected": {"step": 40, "accuracy": selected, "mean_class_accuracy": 2.0},
        "oracle": {"step": None if last is None else 20, "accuracy": last and 99.0},
    }


def finished(last: float | None = 80.04, selected: float | None = 79.96, **changes) -> dict:
    return {
        "method": "dann",
        "commit": "0123456789",
        "seconds": 73.4,
        "target": target(last, selected),
        "collapsed": {},
        "selection": {"criterion": "infomax", "value": 0.5},
        **changes,
    }


def fake_run(folder: Path, config: str = "", state: str = "finished", **changes) -> Path:
    """A run folder of hand-made files.

    `changes` are `method`, `summary`, `records` of metrics.jsonl, and entries of status.json.
    """
    method, records = changes.pop("method", "dann"), changes.pop("records", [])
    content = changes.pop("summary", finished(method=method) if state == "finished" else None)
    status = {"method": method, "state": state, "step": 60, "steps": 100, **changes}
    (folder / "checkpoints").mkdir(parents=True)
    (folder / "config.yaml").write_text(f"# python train.py\nselect: infomax\n{config}\n")
    (folder / "status.json").write_text(json.dumps(status))
    if content is not None:
        (folder / "summary.json").write_text(json.dumps(content))
    if records:
        lines = [json.dumps({"step": step, **record}) for step, record in records]
        (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return folder


def cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.split("  ") if cell.strip()]


def listed(capsys, *arguments) -> tuple[dict[str, dict[str, str]], list[str]]:
    """({run: {column: cell}} in the order of the table, the lines below) of a listing."""
    assert runs.main(list(map(str, arguments))) == 0
    head, *lines = capsys.readouterr().out.splitlines()
    end = next(i for i, line in enumerate(lines) if re.match(r"\d+ runs? \(", line))
    rows = [dict(zip(cells(head), cells(line), strict=True)) for line in lines[:end]]
    return {row["run"]: row for row in rows}, lines[end:]


# --- the way of a real run


def test_two_real_runs(tmp_path, capsys, command):
    for name, rate in (("b", 0.02), ("a", 1e-4)):
        lines = {"out_dir": tmp_path / "runs/group" / name, "optim": f"{{lr: {rate}}}"}
        assert train("train_source", tiny_config(tmp_path, **lines)) == 0
    capsys.readouterr()
    rows, note = listed(capsys, "runs")
    assert list(rows) == ["group/a", "group/b"]
    for name, rate in (("b", "0.02"), ("a", "0.0001")):
        facts = summary(tmp_path / "runs/group" / name)
        assert rows[f"group/{name}"] == {
            "run": f"group/{name}",
            "method": "source",
            "config": f"lr={rate}",
            "last": f"{facts['target']['last']['accuracy']:.1f}",
            "selected": f"{facts['target']['selected']['accuracy']:.1f}",
            "criterion": "infomax",
            "state": "finished" + " (collapsed)" * bool(facts["collapsed"]),
            "step": "10/10",
            "seconds": f"{facts['seconds']:.0f}",
            "commit": facts["commit"],
        }
    assert note == ["2 runs (2 finished); last, selected: target accuracy in percent"]

    picture = ["--plot", "out/curves.png"] if empty_figures.available() else []
    words = "--sort", "optim.lr", "--csv", "out/table.csv", *picture
    code, out, err = command("runs", *words)
    assert (code, err) == (0, "")
    assert out.splitlines()[4] == "out/table.csv"
    if picture:
        assert out.splitlines()[5] == "out/curves.png: target.accuracy of 2 of 2 runs"
        assert Image.open(tmp_path / "out/curves.png").format == "PNG"
    table = list(csv.DictReader((tmp_path / "out/table.csv").open()))
    assert [row["run"] for row in table] == ["group/b", "group/a"]
    assert [float(row["optim.lr"]) for row in table] == [0.02, 1e-4]
    assert [row["data.batch"] for row in table] == ["8", "8"]  # a key that does not differ
    last = summary(tmp_path / "runs/group/a")["target"]["last"]["accuracy"]
    assert float(table[1]["last"]) == last  # not rounded
    assert not set(FREE_AT_RESUME) & set(table[0])


def test_a_listing_imports_no_torch():
    code = "import sys, runs; print(*{'torch', 'matplotlib', 'yaml'} & set(sys.modules))"
    words = [sys.executable, "-c", code]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.split() == ["yaml"]


# --- states


def test_a_run_in_progress(tmp_path, capsys):
    records = [(20, {"cls_loss": 1.0}), (20, EVALUATION), (40, {"cls_loss": 0.5})]
    folder = fake_run(tmp_path / "runs/a", state="running", records=records, step=0)
    with open(folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 60, "cls_lo')  # the run is writing
    assert [record["step"] for record in read_metrics(folder)] == [20, 20, 40]
    row = listed(capsys)[0]["a"]
    figures = [row[name] for name in ("state", "step", "last", "selected", "seconds", "commit")]
    assert figures == ["running", "40/100", "71.2", "-", "-", "-"]
    assert row["criterion"] == "infomax"


def test_stopped_failed_and_collapsed(tmp_path, capsys):
    reason = "step 7: cls_loss is nan;\nlower optim.lr, or use amp: float32, and start again"
    fake_run(tmp_path / "runs/failed", state="failed", code=3, reason=reason)
    fake_run(tmp_path / "runs/stopped", state="stopped", records=[(60, EVALUATION)])
    lost = finished(collapsed={"last": "class 3 has 99 % of the target predictions"})
    fake_run(tmp_path / "runs/lost", summary=lost)
    records = [(20, {**EVALUATION, "collapsed": "class 1 has all"})]
    fake_run(tmp_path / "runs/losing", state="running", records=records)
    rows, note = listed(capsys)
    states = {run: row["state"] for run, row in rows.items()}
    assert states == {
        "failed": f"failed: {' '.join(reason.split())}",
        "stopped": "stopped",
        "lost": "finished (collapsed)",
        "losing": "running (collapsed)",
    }
    assert note[0].startswith("4 runs (1 failed, 1 finished, 1 running, 1 stopped); ")


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("status.json", "", "status.json: is damaged (it is empty)"),
        ("status.json", '{"state": "fini', "status.json: is damaged (Unterminated string"),
        ("status.json", "[1]", "status.json: is damaged (it contains no mapping)"),
        ("status.json", '{"state": "odd"}', "status.json: is damaged (it names no state)"),
        ("status.json", None, "status.json: is gone"),
        ("summary.json", '{"target":', "summary.json: is damaged (Expecting value"),
        ("summary.json", "\xff", "summary.json: is damaged ("),
        ("summary.json", None, "summary.json: is gone"),
        ("config.yaml", "a: [1", "config.yaml:2: "),
        ("config.yaml", "text", "config.yaml: is damaged (it contains no mapping)"),
    ],
)
def test_a_damaged_file_is_named_and_the_others_are_listed(tmp_path, capsys, name, content, says):
    fake_run(tmp_path / "runs/good")
    bad = fake_run(tmp_path / "runs/bad", records=[(60, EVALUATION)])
    if content is None:
        (bad / name).unlink()
    else:
        (bad / name).write_bytes(content.encode("latin-1"))
    rows = listed(capsys)[0]
    assert rows["bad"]["state"].startswith(f"damaged: {says}")
    assert rows["good"]["state"] == "finished"
    # What the other files say is there.
    assert rows["bad"]["last"] == ("71.2" if name == "summary.json" else "80.0")


def test_values_of_the_wrong_kind_are_unknown(tmp_path, capsys):
    odd = {"target": {"last": 3}, "seconds": "long", "commit": 7, "collapsed": [1], "selection": ""}
    fake_run(tmp_path / "runs/odd", summary=odd, step="x", steps=None, method=5)
    row = listed(capsys)[0]["odd"]
    assert row.pop("criterion") == "infomax"  # that of config.yaml
    assert row.pop("state") == "finished"
    assert set(row.values()) == {"odd", "-", "-/-"}


# --- which folders


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["empty"], "empty: contains no run"),
        (["none"], "none: there is no such folder"),
        ([], "runs: there is no such folder"),
        (["file"], "file: there is no such folder"),
        (["full", "--metric", "cls_loss"], "--metric goes with --plot"),
        (["full", "--plot", "a.svg"], "--plot: a.svg must end with .png"),
        (["full", "--csv", "empty"], "--csv: empty is a folder"),
        (
            ["full", "--sort", "lats"],
            "--sort: there is no column and no key lats; did you mean last?",
        ),
    ],
)
def test_a_mistake_is_one_line(tmp_path, command, arguments, says):
    (tmp_path / "empty/deep").mkdir(parents=True)
    (tmp_path / "file").write_text("")
    fake_run(tmp_path / "full/a")
    code, out, err = command("runs", *arguments)
    assert (code, out) == (2, "")
    assert err.startswith(f"error: {says}")
    assert len(err.splitlines()) == 1


def test_a_folder_that_is_a_run(tmp_path, capsys):
    fake_run(tmp_path / "runs/a")
    rows, note = listed(capsys, "runs/a")
    assert list(rows) == ["."]
    with pytest.raises(UserError, match="no key qqq; columns are run, method"):
        runs.main(["runs/a", "--sort", "qqq"])
    assert note[0].startswith("1 run (1 finished)")


def test_links_that_loop_and_runs_within_runs(tmp_path):
    fake_run(tmp_path / "runs/a")
    fake_run(tmp_path / "runs/a/inner")
    fake_run(tmp_path / "runs/a/checkpoints/none")  # no place of a run
    fake_run(tmp_path / "runs/.hidden/none")
    fake_run(tmp_path / "elsewhere/b")
    (tmp_path / "runs/A_link").symlink_to("a")
    (tmp_path / "runs/a/up").symlink_to("..")
    (tmp_path / "runs/itself").symlink_to("itself")
    (tmp_path / "runs/more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "runs/gone").symlink_to("nothing")
    folders, faults = find_runs(tmp_path / "runs")
    names = [str(folder.relative_to(tmp_path / "runs")) for folder in folders]
    assert (names, faults) == (["a", "a/inner", "more/b"], [])


def test_a_name_cannot_break_the_table(tmp_path, capsys):
    fake_run(tmp_path / "runs/a\nb\x1b[2J")
    assert list(listed(capsys)[0]) == ["a?b?[2J"]


# --- keys that differ


def test_differing_keys(tmp_path, capsys):
    """Of keys that one method has, those that differ within it; no free keys, no other names."""
    common = "data: {{batch: 8, workers: {}}}\noptim: {{lr: {}}}\nseed: {}\nout_dir: {}"
    fake_run(tmp_path / "runs/a", common.format(0, 0.1, 0, "a") + "\nreversal_max: 1.0")
    fake_run(tmp_path / "runs/b", common.format(2, 0.1, 1, "b") + "\nreversal_max: 0.5")
    mcc = common.format(2, "1e-4", 2, "c") + "\ntemperature: 2.5\nsteps: 7"
    fake_run(tmp_path / "runs/c", mcc, method="mcc")
    rows = listed(capsys)[0]
    assert {run: row["config"] for run, row in rows.items()} == {
        "a": "seed=0 lr=0.1 reversal_max=1",
        "b": "seed=1 lr=0.1 reversal_max=0.5",
        "c": "seed=2 lr=0.0001",
    }


def test_runs_of_earlier_versions(tmp_path, capsys):
    """A key that a run lacks is no difference; it is shown as missing if its method has it."""
    fake_run(tmp_path / "runs/old", "seed: 0")
    fake_run(tmp_path / "runs/new1", "seed: 0\naccumulate: 1\ncompile: false")
    fake_run(tmp_path / "runs/new2", "seed: 0\naccumulate: 2\ncompile: false")
    fake_run(tmp_path / "runs/other", "seed: 0", method="mcc")
    configs = {run: row["config"] for run, row in listed(capsys)[0].items()}
    assert configs == {
        "old": "accumulate=-",
        "new1": "accumulate=1",
        "new2": "accumulate=2",
        "other": "-",
    }


def test_no_column_if_nothing_differs(tmp_path, capsys):
    fake_run(tmp_path / "runs/a", "seed: 0\nout_dir: a")
    fake_run(tmp_path / "runs/b", "seed: 0\nout_dir: b")
    rows, _ = listed(capsys)
    assert list(rows["a"]) == [name for name in COLUMNS if name != "config"]


@pytest.mark.parametrize(
    ("sections", "expected"),
    [
        (["{name: x, path: null}", "{name: y, path: null}"], ["name"]),
        (["[{name: x}, {name: y}]", "{name: x, path: null}"], ["source"]),
        (["null", "{name: x, path: null}"], ["source"]),
        (["null", "{name: x, path: null}", "{name: y}"], ["source"]),
    ],
)
def test_sections_that_are_lists_or_null(tmp_path, capsys, sections, expected):
    for number, text in enumerate(sections):
        fake_run(tmp_path / f"runs/{number}", f"data: {{source: {text}}}")
    rows = listed(capsys)[0]
    shown = {row["config"].partition("=")[0] for row in rows.values()}
    assert list(shown) == expected
    assert not any("null" in row["config"] for row in rows.values() if "{" in row["config"])


def test_a_method_without_a_section_does_not_differ_by_it(tmp_path, capsys):
    fake_run(tmp_path / "runs/a", "data: {source: {name: x}}")
    fake_run(tmp_path / "runs/b", "data: {source: {name: y}}")
    fake_run(tmp_path / "runs/shot", "data: {source: null}", method="shot")
    configs = {run: row["config"] for run, row in listed(capsys)[0].items()}
    assert configs == {"a": "name=x", "b": "name=y", "shot": "-"}


def test_texts_of_values():
    values = [None, True, 1, 0.1, 1e-7, 1 / 3, "1e-4 x", [1, 2.5], {"flip": {}, "a": [None]}]
    assert [value_text(value) for value in values] == [
        *("null", "true", "1", "0.1", "1e-07", "0.3333333333333333", "1e-4 x"),
        *("[1, 2.5]", "{flip: {}, a: [null]}"),
    ]
    assert differing_keys([{"a": 1, "b": 0.1}, {"a": 1.0, "b": 0.1 + 1e-9}, {"c": 1}]) == ["b"]
    orders = [{"augment": {"flip": {}, "crop": {}}}, {"augment": {"crop": {}, "flip": {}}}]
    assert differing_keys(orders) == ["augment"]


def test_short_names_are_unique():
    names = short_names(["seed", "optim.lr", "disc_lr", "data.source.name", "data.target.name"])
    assert list(names.values()) == ["seed", "lr", "disc_lr", "source.name", "target.name"]
    assert list(short_names(["name", "model.name"]).values()) == ["name", "model.name"]


def test_numbers_are_read_as_the_project_reads_them(tmp_path):
    text = "a: 1e-4\nb: 010\nc: off\nd: 1.\ne: .5\nf: +3\ng: 1_000\nh: 12:30\ni: ~\nj: yes\nk: 2E5"
    expected = parse_yaml(text, "")
    assert expected["a"] == 1e-4
    (tmp_path / "config.yaml").write_text(text)
    assert read_config(tmp_path) == expected
    kinds = {key: type(value) for key, value in read_config(tmp_path).items()}
    assert kinds == {key: type(value) for key, value in expected.items()}
    assert yaml.safe_load(text) != expected  # control: yaml's own scalars are others


def test_the_names_of_the_project():
    """The lists that save the import of torch are right."""
    keys = all_keys(RunConfig)
    assert set(SECTIONS) == {key for key in keys if any(x.startswith(f"{key}.") for x in keys)}
    for names in (["accuracy", "mean_class_accuracy"], ["mean_iou", "pixel_accuracy"]):
        assert main_metric(names) == metrics.main_metric(dict.fromkeys(names))


# --- order, width and csv


def test_sorting(tmp_path, capsys):
    for run, last, seconds, rate in (
        ("run9", 70.0, 5, 0.1),
        ("run10", 90.0, 50, 0.01),
        ("run2", None, 7, 1.0),
        ("run1", 80.0, 6, 1e-4),
    ):
        content = finished(last, last, seconds=seconds)
        fake_run(tmp_path / f"runs/{run}", f"optim: {{lr: {rate}}}", summary=content)
    fake_run(tmp_path / "runs/run3", state="stopped")
    orders = {
        "run": "run1 run2 run3 run9 run10",
        "last": "run10 run1 run9 run2 run3",
        "seconds": "run10 run2 run1 run9 run3",
        "optim.lr": "run2 run9 run10 run1 run3",
        "lr": "run2 run9 run10 run1 run3",
        "state": "run1 run2 run9 run10 run3",
        "commit": "run1 run2 run9 run10 run3",
    }
    for column, order in orders.items():
        assert list(listed(capsys, "--sort", column)[0]) == order.split(), column
    assert listed(capsys)[0]["run2"]["last"] == "-"  # without target labels


@pytest.mark.parametrize(("width", "longest"), [(60, 105), (110, 110), (140, 140), (400, 174)])
def test_a_narrow_terminal_cuts_configs_and_no_figure(
    tmp_path, capsys, monkeypatch, width, longest
):
    for number in range(3):
        config = f"seed: {number}\ninit_from: runs/some/very/long/name/of/a/folder/{number}"
        fake_run(tmp_path / f"runs/{number}", config)
    fake_run(tmp_path / "runs/3", state="failed", reason="because " * 30)
    whole = runs.main([]) or capsys.readouterr().out  # no terminal
    assert "folder/2" in whole
    assert "because " * 29 in whole
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", str(width))
    runs.main([])
    *lines, _ = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) == longest
    for line in lines[1:4]:
        run, method, config, *others = cells(line)
        assert (method, config[:7]) == ("dann", f"seed={run} ")
        assert config.endswith("..." if width < 400 else f"/{run}")
        assert others == ["80.0", "80.0", "infomax", "finished", "60/100", "73", "0123456789"]
    assert re.search(r"failed: because .*\.\.\.  60/100 +-  -$", lines[4])


def test_csv_is_whole(tmp_path, capsys):
    reason = "a reason, which is longer than the column of a terminal; " * 3
    fake_run(tmp_path / "runs/a", "metric: odd\nb: [1, 2]\nc: null", state="failed", reason=reason)
    lost = finished(collapsed={"last": "x", "selected": "y"})
    fake_run(tmp_path / "runs/b", 'd: "a, \\"b\\""', summary=lost)
    listed(capsys, "--csv", "t.csv")
    first, second = csv.DictReader(Path("t.csv").read_text().splitlines())
    assert (first["reason"], first["state"]) == (" ".join(reason.split()), "failed")
    assert (first["config.metric"], first["b"], first["c"], first["d"]) == (
        "odd",
        "[1, 2]",
        "null",
        "",
    )
    assert second["d"] == 'a, "b"'
    assert (second["last"], second["selected"], second["metric"]) == ("80.04", "79.96", "accuracy")
    assert second["collapsed"] == "last: x; selected: y"
    assert (second["step"], second["seconds"], second["reason"]) == ("60", "73.4", "")


# --- curves


def log_of(count: int, **last) -> list[tuple[int, dict]]:
    """Records with a loss at each step and an evaluation at every fifth."""
    records = []
    for step in range(1, count + 1):
        records.append((step, {"cls_loss": 1 / step, "lr": 0.1}))
        if step % 5 == 0:
            records.append((step, {**EVALUATION, "target.accuracy": 50.0 + step, **last}))
    return records


@pytest.fixture
def figures(monkeypatch):
    """The figures that would be written; `save` writes one."""
    drawn: list = []
    monkeypatch.setattr(curves, "save_figure", lambda figure, file: drawn.append(figure))
    return drawn


def titles(figure) -> list[str]:
    return [axes.get_title(loc="left") for axes in figure.axes]


def legend(owner) -> list[str]:
    (box,) = owner.legends if hasattr(owner, "legends") else [owner.get_legend()]
    return [text.get_text() for text in box.get_texts()]


def assert_nothing_is_cut(figure) -> None:
    """The margin of its picture is white."""
    save(figure, Path("picture.png"))
    picture = Image.open("picture.png").convert("L")
    width, height = picture.size
    for box in ((0, 0, width, 3), (0, height - 3, width, height), (0, 0, 3, height)):
        assert picture.crop(box).getextrema() == (255, 255)
    assert picture.crop((width - 3, 0, width, height)).getextrema() == (255, 255)
    assert picture.getextrema()[0] < 50  # control: something is drawn


@PICTURES
@pytest.mark.parametrize("count", [3, 20])
def test_curves_of_several_runs(tmp_path, capsys, figures, count):
    for number in range(count):
        name = f"a rather long name of a group of runs/of one method/seed{number}"
        fake_run(tmp_path / "runs" / name, f"seed: {number}", records=log_of(10 + number))
    fake_run(tmp_path / "runs/without")
    *_, note = listed(capsys, "--plot", "c.png", "--metric", "target.accuracy", "cls_loss")
    assert note[-1] == f"c.png: target.accuracy, cls_loss of {count} of {count + 1} runs"
    (figure,) = figures
    assert titles(figure) == ["target.accuracy", "cls_loss"]
    names = [f"a rather long name of a group of runs/of one method/seed{i}" for i in range(count)]
    assert legend(figure) == names
    lines = figure.axes[1].get_lines()
    assert list(lines[2].get_xdata()) == list(range(1, 13))
    assert list(lines[2].get_ydata()) == [1 / step for step in range(1, 13)]
    styles = {(line.get_color(), line.get_linestyle()) for line in lines}
    assert len(styles) == count
    assert_nothing_is_cut(figure)


@PICTURES
def test_every_curve_has_a_style_of_its_own():
    styles = [curves._style(index) for index in range(curves.MOST)]
    looks = {(style["color"], style["linestyle"], style.get("marker")) for style in styles}
    assert len(looks) == curves.MOST == 56
    for first, second in itertools.pairwise(styles):
        assert first["color"] != second["color"]
        assert first["linestyle"] != second["linestyle"]


@PICTURES
def test_the_metric_by_default(tmp_path, capsys, figures):
    """Of each run its target's main metric; without target labels its criterion."""
    fake_run(tmp_path / "runs/a", records=log_of(10))
    street = {"target.accuracy": None, "target.mean_iou": 30.0}
    content = finished(target={"last": {"mean_iou": 30.0}})
    fake_run(tmp_path / "runs/b", records=log_of(10, **street), summary=content)
    unlabeled = log_of(10, **{"target.accuracy": None})
    fake_run(tmp_path / "runs/c", records=unlabeled, summary=finished(None, None))
    listed(capsys, "--plot", "c.png")
    assert titles(figures[0]) == ["target.accuracy", "target.mean_iou", "criteria.infomax"]
    first, second, third = (axes.get_lines() for axes in figures[0].axes)
    assert list(first[0].get_ydata()) == [55, 60]
    assert list(second[0].get_ydata()) == [30, 30]
    assert len(third) == 3  # the other runs have the criterion, too


@PICTURES
def test_the_listed_folder_itself_has_its_name_in_the_legend(tmp_path, capsys, figures):
    for name in ("outer", "outer/0"):
        fake_run(tmp_path / name, records=log_of(10))
    listed(capsys, "outer", "--plot", "c.png", "--sort", "state")
    assert sorted(legend(figures[0])) == ["0", "outer"]


@PICTURES
def test_mistakes_of_a_plot(tmp_path, capsys, monkeypatch):
    fake_run(tmp_path / "runs/a", records=[(1, {"cls_loss": 1.0})])
    fake_run(tmp_path / "runs/b", records=[(1, {"cls_loss": 1.0})])
    with pytest.raises(UserError, match=r"no run has cls_los; did you mean cls_loss\?"):
        runs.main(["--plot", "c.png", "--metric", "cls_los"])
    with pytest.raises(UserError, match="no run has q; there are: cls_loss"):
        runs.main(["--plot", "c.png", "--metric", "q"])
    with pytest.raises(UserError, match="no run has been evaluated yet"):
        runs.main(["--plot", "c.png"])
    monkeypatch.setattr(runs, "MOST", 1)
    with pytest.raises(UserError, match="2 curves cannot be told apart, 1 can"):
        runs.main(["--plot", "c.png", "--metric", "cls_loss"])
    assert not Path("c.png").exists()


def test_without_matplotlib(tmp_path, command, monkeypatch):
    fake_run(tmp_path / "runs/a", records=log_of(10))
    block = tmp_path / "block"
    block.mkdir()
    (block / "matplotlib.py").write_text(
        "raise ModuleNotFoundError(\"No module named 'matplotlib'\", name='matplotlib')"
    )
    monkeypatch.setenv("PYTHONPATH", str(block))
    code, out, err = command("runs", "--plot", "c.png")
    assert (code, out) == (2, "")
    assert err == f"error: {empty_figures.HINT}\n"
    code, out, _ = command("runs")  # the table needs none
    assert code == 0
    assert "80.0" in out


# --- the curves of one run


def drawn(figures, records: list[tuple[int, dict]], content: dict) -> dict[str, list[str]]:
    """{title: entries of its legend} of the panels of a run."""
    lines = [{"step": step, **record} for step, record in records]
    curves.learning_curves(lines, content, Path("one.png"))
    return {axes.get_title(loc="left"): legend(axes) for axes in figures[-1].axes}


CHOICES = ["last: 80.0 at step 60", "selected: 80.0 at step 40", "oracle: 99.0 at step 20"]


@PICTURES
def test_panels_of_what_the_log_has(figures):
    assert drawn(figures, log_of(10), finished()) == {
        "losses": ["cls_loss"],
        "target.accuracy, percent": ["target.accuracy", *CHOICES],
    }
    assert list(figures[-1].axes[1].get_lines()[1].get_xdata()) == [60]
    more = {"adv_loss": 0.7, "domain_accuracy": 60.0, "reversal_coeff": 0.5, "vanished": 0}
    more |= {"accepted": 0.4, "accepted.a_$b$": 0.1, "accepted._x": None, "aux_cls_loss": 2.0}
    records = [(step, {**record, **more}) for step, record in log_of(10)]
    records += [(11, {"accepted._x": 0.5})]
    assert drawn(figures, records, {}) == {
        "losses": ["cls_loss", "adv_loss", "aux_cls_loss"],
        "domain_accuracy, percent": ["domain_accuracy", "50: confused"],
        "reversal_coeff (lambda)": ["reversal_coeff"],
        "accepted share of the pseudo-labels": ["accepted", r"class a_\$b\$", "class _x"],
        "target.accuracy, percent": ["target.accuracy"],
    }
    assert_nothing_is_cut(figures[-1])
    gaps = figures[-1].axes[3].get_lines()[2].get_ydata()
    assert math.isnan(gaps[0])
    assert gaps[-1] == 0.5


@PICTURES
def test_a_run_without_target_labels(figures):
    records = log_of(10, **{"target.accuracy": None})
    panels = drawn(figures, records, finished(None, None))
    assert panels["criteria.infomax"] == ["criteria.infomax", "selected: 0.500 at step 40"]
    assert list(panels) == ["losses", "criteria.infomax"]


@PICTURES
def test_many_classes_are_one_entry(figures):
    shares = {"accepted": 0.5, **{f"accepted.class{i}": i / 60 for i in range(60)}}
    panels = drawn(figures, [(1, shares), (2, shares)], {})
    assert panels == {"accepted share of the pseudo-labels": ["one class each", "accepted"]}
    assert len(figures[-1].axes[0].get_lines()) == 61


def test_an_empty_log_is_an_error():
    with pytest.raises(UserError, match="no curve to draw"):
        curves.learning_curves([], {}, Path("one.png"))


def test_printable_keeps_letters():
    assert printable("ü-漢 x") == "ü-漢 x"


def test_nothing_is_opened_that_the_table_does_not_need(tmp_path):
    folder = fake_run(tmp_path / "runs/a")
    (folder / "metrics.jsonl").mkdir()  # cannot be read
    assert read_run(folder).state == "finished"
    (folder / "summary.json").unlink()
    assert "metrics.jsonl: cannot be read" in read_run(folder).reason  # control
