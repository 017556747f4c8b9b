"""reproduce.py: the runs it starts, skips and resumes, and the table it makes of them.

A small fake script takes the place of the training scripts; one test runs a real one.
"""

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import types
from pathlib import Path

import pytest

import reproduce
from analysis import suite_table
from common.config import dump_value, load_config, parse_yaml
from common.errors import UserError
from common.provenance import code_version
from tests.helpers import tiny_config

ROOT = Path(reproduce.__file__).parent
# Mean 79, sum of squares 81 + 1 + 64 = 146, / 2 = 73: standard deviation 8.544.
FIGURES = {0: 70.0, 1: 80.0, 2: 87.0}
SCRIPT = (
    f"""
import hashlib, json, os, pathlib, sys, time
from dataclasses import dataclass, field
from typing import ClassVar
sys.path.append({str(ROOT)!r})
from common.config import dump, load_config

@dataclass
class Data:
    root: str = "."
    workers: int = 0
    size: int = 1
    augment: dict = field(default_factory=dict)

@dataclass
class Config:
    method: ClassVar[str] = "source"
    out_dir: str | None = None
    steps: int = 4
    optim: dict = field(default_factory=dict)
    seed: int = 0
    init_from: str | None = None
    data: Data = field(default_factory=Data)
"""
    + """
def start_hash(start):
    return start and (pathlib.Path(start) / "model.pt.sha256").read_text().split()[0]

def main():
    words = sys.argv[sys.argv.index("--config") + 1:-1]
    files = [word for word in words if "=" not in word]
    config = load_config(Config, files, [word for word in words if "=" in word])
    seed, folder = config.seed, pathlib.Path(config.out_dir)
    with open("calls.jsonl", "a") as calls:
        threads = os.environ.get("OMP_NUM_THREADS")
        call = {"argv": sys.argv, "omp": threads, "time": time.monotonic()}
        calls.write(json.dumps(call) + "\\n")
    folder.mkdir(parents=True, exist_ok=True)
    print("training")
    if os.environ.get("FAIL_SEED") == str(seed):
        print("warning: soon", file=sys.stderr)
        print("error: no images of seed %d" % seed, file=sys.stderr)
        sys.exit(1)
    meet = int(os.environ.get("MEET", 0))  # wait until so many runs are alive at once
    (folder / "alive").touch()
    end = time.monotonic() + 20
    while len(list(folder.parent.glob("*/alive"))) < meet:
        if time.monotonic() > end:
            sys.exit("alone")
        time.sleep(0.02)
    accuracy = json.loads(os.environ["FIGURES"])[str(seed)]
    target = {}
    for name, more in (("last", 0), ("selected", 1), ("oracle", 2)):
        figures = {"accuracy": accuracy and accuracy + more, "mean_class_accuracy": 1.0}
        target[name] = {"step": 8, **figures}
    (folder / "config.yaml").write_text(dump(config))
    (folder / "model.pt").write_bytes(b"weights")
    digest = hashlib.sha256(b"weights").hexdigest()
    (folder / "model.pt.sha256").write_text(f"{digest}  model.pt\\n")
    (folder / "summary.json").write_text(json.dumps({
        "method": "fake", "seed": seed, "steps": 8, "seconds": 10.0 + seed,
        "machine": "a desk, torch 9", "commit": "abc1234",
        "target": target, "target_test": "its test split",
        "collapse_alarms": [], "collapsed": {},
        "start_sha256": start_hash(config.init_from),
        "selection": {"criterion": "infomax", "part_of_training_loss": False, "value": 0.5,
                      "source_val": 90.0, "infomax": 0.5}}))
    (folder / "status.json").write_text(json.dumps({"state": "finished", "step": 8, "steps": 8}))

if __name__ == "__main__":
    main()
"""
)
EMPTY = """
from dataclasses import dataclass, field
from typing import ClassVar
@dataclass
class Config:
    method: ClassVar[str] = "source"
    out_dir: str
    steps: int
    optim: dict = field(default_factory=dict)
"""
WAITS = (
    EMPTY
    + """
import pathlib, signal, sys, time
if __name__ == "__main__":
    folder = pathlib.Path(next(a for a in sys.argv if a.startswith("out_dir=")).split("=", 1)[1])
    folder.mkdir(parents=True)
    stop, end = [], time.monotonic() + 20
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, frame: stop.append(number))
    (folder / "ready").touch()
    while not stop:
        time.sleep(0.02)
        if time.monotonic() > end:
            sys.exit("no signal")
    time.sleep(0.5 * ("two" in folder.name))  # one ends while the other still saves
    (folder / "saved").touch()
    sys.exit(128 + stop[0])
"""
)
SUITE = """title: A test
note: A note.
runs:
  - {task: A -> B, method: one, script: train.py, config: one.yaml, published: 77.10,
     reference: some paper}
  - {task: A -> B, method: two, script: train.py, config: two.yaml}
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A working directory with a suite of two configs."""
    monkeypatch.chdir(tmp_path)
    for name in ("FAIL_SEED", "MEET", "OMP_NUM_THREADS", "PYTHONUNBUFFERED"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("FIGURES", json.dumps(FIGURES))
    Path("train.py").write_text(SCRIPT)
    reproduce.script_config.cache_clear()  # it knows scripts by their relative path
    Path("waits.py").write_text(WAITS)
    Path("suite.yaml").write_text(SUITE)
    for name in ("one", "two"):
        Path(f"{name}.yaml").write_text(f"out_dir: runs/{name}\nsteps: 8\noptim: {{lr: 0.05}}\n")
    return tmp_path


def calls() -> list[dict]:
    """What the fake script was called with so far; forgotten afterwards."""
    file = Path("calls.jsonl")
    lines = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    file.unlink(missing_ok=True)
    return lines


def cells(text: str, method: str) -> list[str]:
    """The cells of a method's line in a markdown table."""
    (line,) = [
        line for line in text.splitlines() if line.startswith("|") and f"| {method} |" in line
    ]
    return [cell.strip() for cell in line.strip("|").split("|")]


def test_every_config_runs_under_every_seed(folder, capfd):
    assert reproduce.main(["suite.yaml", "--seeds", "0", "2"]) == 0
    expected = [
        [
            "train.py",
            "--config",
            f"{name}.yaml",
            f"seed={seed}",
            f"out_dir=runs/{name}_seed{seed}",
            "--resume",
        ]
        for seed in (0, 2)
        for name in ("one", "two")
    ]
    assert [call["argv"] for call in calls()] == expected
    log = Path("runs/one_seed2.log").read_text().splitlines()
    assert log == ["$ " + shlex.join([sys.executable, *expected[2]]), "training"]
    out = capfd.readouterr().out
    assert out.count(": started (") == out.count(": finished after ") == 4
    assert "training" not in out


def test_finished_runs_are_skipped(folder, capfd):
    reproduce.main(["suite.yaml", "--seeds", "0"])
    calls()
    assert reproduce.main(["suite.yaml", "--seeds", "0", "1"]) == 0
    assert sorted(call["argv"][3] for call in calls()) == ["seed=1", "seed=1"]
    assert "runs/one_seed0: finished already" in capfd.readouterr().out


@pytest.mark.parametrize(
    ("file", "text"),
    [
        ("status.json", '{"state": "running", "step": 4, "steps": 8}'),
        ("status.json", '{"state": "finis'),
        ("summary.json", None),
        ("summary.json", "[]"),
        ("summary.json", "{}"),
        ("model.pt", None),
        ("model.pt", "damaged"),
        ("status.json", "null"),
        # The config was edited since, or a key was taken out of it.
        ("config.yaml", "out_dir: runs/one\nsteps: 8\noptim: {lr: 0.1}\nseed: 0\n"),
        ("config.yaml", "out_dir: runs/one\nsteps: 8\noptim: {lr: 0.05, momentum: 0.5}\n"),
    ],
)
def test_broken_runs_are_resumed(folder, file, text):
    reproduce.main(["suite.yaml", "--seeds", "0"])
    calls()
    path = Path("runs/one_seed0") / file
    path.write_text(text) if text else path.unlink()
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0
    assert [call["argv"][2:] for call in calls()] == [
        ["one.yaml", "seed=0", "out_dir=runs/one_seed0", "--resume"]
    ]


def test_a_run_that_was_changed_is_no_run_of_the_suite(folder, capfd):
    """Its config may be the suite's in the end: --allow-change and back again."""
    reproduce.main(["suite.yaml", "--seeds", "0"])
    calls()
    file = Path("runs/one_seed0/summary.json")
    change = {"step": 4, "key": "optim.lr", "before": 0.1, "now": 0.05}
    file.write_text(json.dumps({**json.loads(file.read_text()), "changed": [change]}))
    assert not reproduce.Job(load_config(reproduce.Suite, "suite.yaml").runs[0], 0).summary()
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0  # the fake script trains anew
    assert [call["argv"][3] for call in calls()] == ["seed=0"]


def test_scripts_are_imported_as_python_would(folder, capfd):
    """Beside their own modules; one that cannot be imported is refused before anything runs."""
    Path("mine").mkdir()
    Path("mine/helper.py").write_text("STEPS = 4\n")
    Path("mine/train.py").write_text(SCRIPT.replace("import json,", "import helper, json,"))
    Path("suite.yaml").write_text(SUITE.replace("script: train.py", "script: mine/train.py"))
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0
    assert cells(capfd.readouterr().out, "one")[2] == "1"
    assert "mine" not in [Path(p).name for p in sys.path]
    calls()
    Path("broken.py").write_text("import nowhere_at_all\n")
    Path("suite.yaml").write_text(SUITE.replace("script: train.py", "script: broken.py"))
    says = r"runs\[0\]\.script: broken\.py: its Config cannot be read \(ModuleNotFoundError: .*nowh"
    with pytest.raises(UserError, match=says):
        reproduce.main(["suite.yaml", "--seeds", "1"])
    Path("broken.py").write_text("class Config:\n    pass\n")
    reproduce.script_config.cache_clear()
    with pytest.raises(UserError, match=r"broken\.py: .*\(TypeError: it is not a RunConfig\)"):
        reproduce.main(["suite.yaml", "--seeds", "1"])
    assert calls() == []


def test_a_run_that_trained_elsewhere_is_still_finished(folder):
    reproduce.main(["suite.yaml", "--seeds", "0"])
    calls()
    with open("one.yaml", "a") as file:
        file.write("data: {workers: 2, root: elsewhere}\n")  # keys of FREE_AT_RESUME
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0
    assert calls() == []


def test_a_failed_run_stops_no_other(folder, capfd, monkeypatch):
    monkeypatch.setenv("FAIL_SEED", "1")
    assert reproduce.main(["suite.yaml", "--seeds", "0", "1", "2"]) == 1
    assert len(calls()) == 6
    out = capfd.readouterr().out
    (line,) = [line for line in out.splitlines() if line.startswith("runs/two_seed1: failed")]
    assert line.endswith(" with exit code 1: error: no images of seed 1 (log: runs/two_seed1.log)")
    assert cells(out, "one")[2:4] == ["2 of 3", "78.5 +- 12.0"]  # 70 and 87
    monkeypatch.delenv("FAIL_SEED")
    assert reproduce.main(["suite.yaml", "--seeds", "0", "1", "2"]) == 0
    assert [call["argv"][-1] for call in calls()] == ["--resume"] * 2


def test_a_run_without_results_has_failed(folder, capfd):
    Path("train.py").write_text(
        EMPTY + "\nif __name__ == '__main__':\n    print('nothing to do')\n"
    )
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 1
    out = capfd.readouterr().out
    assert "runs/one_seed0: failed after 0 s with exit code 0: not started" in out
    assert cells(out, "one")[2:7] == ["0 of 1", "-", "-", "-", "-"]


def test_table_against_hand_computation(folder, capfd):
    reproduce.main(["suite.yaml", "--seeds", "0", "1", "2"])
    out = capfd.readouterr().out
    figures = ["79.0 +- 8.5", "80.0 +- 8.5", "81.0 +- 8.5"]
    assert cells(out, "one") == ["A -> B", "one", "3", *figures, "11", "77.1 (some paper)"]
    assert cells(out, "two")[-1] == "-"
    assert "oracle (chosen on target test labels: no result)" in cells(out, "method")
    written = "`python reproduce.py suite.yaml --seeds 0 1 2`: seeds 0 1 2; steps 8; "
    assert written + "commit abc1234; on a desk, torch 9." in out
    assert "accuracy in percent on its test split" in out
    assert "A note." in out
    reproduce.main(["suite.yaml", "--seeds", "1"])
    assert cells(capfd.readouterr().out, "one")[2:7] == ["1", "80.0", "81.0", "82.0", "11"]


def scale_figures(folder: Path, factor: float) -> None:
    """Multiply `last` of finished runs, named by the pattern `folder`."""
    for file in Path().glob(f"{folder}/summary.json"):
        summary = json.loads(file.read_text())
        summary["target"]["last"]["accuracy"] *= factor
        file.write_text(json.dumps(summary))


def test_differences_are_paired_by_seed(folder, capfd):
    """One is 70, 80 and 87, and two a tenth more: the differences are 7, 8 and 8.7."""
    lines = "  - {task: C -> D, method: two, script: train.py, config: three.yaml}\n"
    Path("three.yaml").write_text("out_dir: runs/three\nsteps: 8\n")
    Path("suite.yaml").write_text(SUITE.replace("note:", "baselines: [one]\nnote:") + lines)
    reproduce.main(["suite.yaml", "--seeds", "0", "1", "2"])
    scale_figures("runs/two_seed*", 1.1)
    capfd.readouterr()
    reproduce.main(["suite.yaml", "--seeds", "0", "1", "2"])
    out = capfd.readouterr().out
    rows = [line.split(" | ") for line in out.splitlines() if line.startswith("| ")]
    column = rows[0].index("minus one")
    # 79 and 86.9 with deviations 8.5 and 9.4: unpaired, the difference would be in doubt.
    assert [line[column] for line in rows[2:]] == ["-", "+7.9 +- 0.9", "-"]
    assert "compare the last step with that of the named row, seed by seed" in out
    suite = load_config(reproduce.Suite, "suite.yaml")
    run = {"target": {"last": {"accuracy": 1.0}}}
    table = suite_table.Table(suite, [{0: run}, {1: run}, {}], [0, 1])
    assert table.difference(suite.runs[1], {1: run}, "one") == "-"  # no run of both


def test_the_metric_of_a_suite(folder, capfd):
    Path("suite.yaml").write_text(SUITE.replace("note:", "metric: mean_class_accuracy\nnote:"))
    reproduce.main(["suite.yaml", "--seeds", "0"])
    out = capfd.readouterr().out
    assert cells(out, "one")[3:6] == ["1.0"] * 3
    assert "Target mean_class_accuracy in percent" in out


def test_unknown_figures_and_mean_iou(folder, capfd, monkeypatch):
    monkeypatch.setenv("FIGURES", '{"0": null}')
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0
    out = capfd.readouterr().out
    head = ["seeds", "source validation", "infomax", "neg_entropy", "collapsed", "seconds"]
    assert cells(out, "method")[2:] == head
    assert cells(out, "one")[2:] == ["1", "90.0", "0.500", "-", "0 of 1", "10"]
    file = Path("runs/one_seed0/summary.json")
    summary = json.loads(file.read_text())
    for entry in summary["target"].values():
        entry["mean_iou"] = 45.34
    summary["selection"]["part_of_training_loss"] = True
    file.write_text(json.dumps(summary))
    reproduce.main(["suite.yaml", "--seeds", "0"])
    out = capfd.readouterr().out
    assert cells(out, "one")[3:6] == ["45.3"] * 3
    assert "Target accuracy, mean_iou in percent" in out
    assert "by infomax, which for one is part of the training loss and no judge." in out


def test_out_replaces_the_marked_block_in_place(folder, capfd):
    begin, end = "<!-- begin: suite -->", "<!-- end: suite -->"
    before = "# Results\r\n\r\ntext | with | bars\n"
    after = "\n\nmore   \n<!-- begin: other -->\nkept\n<!-- end: other -->\nno newline"
    out = Path("results.md")
    out.write_bytes(f"{before}{begin}\nan old table\n{end}{after}".encode())
    assert reproduce.main(["suite.yaml", "--seeds", "0", "--out", "results.md"]) == 0
    text = out.read_bytes().decode()
    assert text.startswith(before + begin + "\n")
    assert text.endswith("\n" + end + after)
    block = text[len(before + begin) + 1 : -len("\n" + end + after)]
    assert cells(block, "one")[3] == "70.0"
    assert "an old table" not in text
    assert capfd.readouterr().out.endswith("\n" + block + "\n")
    assert sorted(p.name for p in folder.iterdir() if "results" in p.name) == ["results.md"]


def test_out_appends_the_block_where_the_file_lacks_it(folder):
    Path("results.md").write_text("# Results\n")
    for _ in range(2):  # the second time it is there
        reproduce.main(["suite.yaml", "--seeds", "0", "--out", "results.md"])
        text = Path("results.md").read_text()
        assert text.startswith("# Results\n\n<!-- begin: suite -->\n**A test**\n")
        assert text.endswith("\n<!-- end: suite -->\n")
        assert text.count("<!-- begin") == 1
    reproduce.main(["suite.yaml", "--seeds", "0", "--out", "new.md"])
    assert Path("new.md").read_text().startswith("<!-- begin: suite -->\n")


@pytest.mark.parametrize(
    "text", ["<!-- begin: suite -->\n", "<!-- end: suite -->\n<!-- begin: suite -->\n"]
)
def test_out_with_torn_markers_is_refused_before_any_run(folder, text):
    Path("results.md").write_text(text)
    with pytest.raises(UserError, match="once each") as raised:
        reproduce.main(["suite.yaml", "--seeds", "0", "--out", "results.md"])
    assert raised.value.code == 2
    assert calls() == []
    assert Path("results.md").read_text() == text


def test_list_runs_nothing(folder, capfd):
    Path("suite.yaml").write_text(SUITE.replace("train.py", "my train.py"))
    Path("train.py").rename("my train.py")
    assert reproduce.main(["suite.yaml", "--seeds", "0", "1", "--list", "--out", "results.md"]) == 0
    lines = capfd.readouterr().out.splitlines()
    command = "'my train.py' --config one.yaml seed=0 out_dir=runs/one_seed0 --resume"
    assert lines[0] == f"{sys.executable} {command}"
    folders = [shlex.split(line)[-2] for line in lines]
    assert folders[1:] == [
        "out_dir=runs/two_seed0",
        "out_dir=runs/one_seed1",
        "out_dir=runs/two_seed1",
    ]
    assert calls() == []
    assert not Path("runs").exists()
    assert not Path("results.md").exists()


def test_jobs_run_at_once_and_share_the_cores(folder, monkeypatch):
    monkeypatch.setattr(os, "cpu_count", lambda: 6)
    monkeypatch.setenv("MEET", "2")  # a run ends once two have started: one at a time would fail
    assert reproduce.main(["suite.yaml", "--seeds", "0", "--jobs", "2"]) == 0
    assert [call["omp"] for call in calls()] == ["3", "3"]
    monkeypatch.setenv("OMP_NUM_THREADS", "5")
    assert reproduce.main(["suite.yaml", "--seeds", "1", "--jobs", "99"]) == 0
    assert [call["omp"] for call in calls()] == ["5", "5"]


def test_jobs_is_a_limit(folder, monkeypatch):
    Path("train.py").write_text(SCRIPT.replace("meet = ", "time.sleep(0.3); meet = "))
    assert reproduce.main(["suite.yaml", "--seeds", "0", "--jobs", "1"]) == 0
    first, second = (call["time"] for call in calls())
    assert second - first > 0.3


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("title: A test\n", "", "title is missing"),
        ("method: two", "methd: two", "unknown key runs[1].methd; did you mean runs[1].method?"),
        ("config: two.yaml", "config: three.yaml", "runs[1].config: there is no file three.yaml"),
        (
            "script: train.py, config: two",
            "script: train_x.py, config: two",
            "runs[1].script: there is no file train_x.py",
        ),
        ("config: two.yaml", "config: one.yaml", "runs[1] has the out_dir runs/one of another"),
        ("method: two", "method: one", "runs[1] has the row A -> B / one of another"),
        (",\n     reference: some paper", "", "runs[0].published and reference go together"),
        (
            "published: 77.10",
            "published: high",
            "runs[0].published must be number | null, not 'high'",
        ),
        ("note: A note.\n", "note: A note.\nnote: B\n", "duplicate key 'note'"),
        ("config: two.yaml", "config: []", "runs[1].config: the list of files is empty"),
        (
            "config: two.yaml",
            "config: [two.yaml, three.yaml]",
            "runs[1].config: there is no file three.yaml",
        ),
        (
            "config: two.yaml",
            "config: two.yaml, set: {stps: 3}",
            "runs[1].config: stps=3: unknown key stps; did you mean steps?",
        ),
        (
            "config: two.yaml",
            "config: two.yaml, set: {steps: many}",
            "runs[1].config: steps=many: steps must be int, not 'many'",
        ),
        ("config: two.yaml", "config: two.yaml, set: [steps]", "runs[1].set must be mapping"),
        (
            "config: two.yaml",
            "config: two.yaml, set: {steps=3: 4}",
            "runs[1].set: 'steps=3' is not a dotted key",
        ),
        (
            "config: two.yaml",
            "config: two.yaml, set: {seed: 3}",
            "runs[1].set: the seed comes from --seeds",
        ),
        (
            "config: two.yaml",
            "config: two.yaml, set: {out_dir: runs//one/}",
            "runs[1] has the out_dir runs/one of another",
        ),
        ("config: two.yaml", "config: two.yaml, expected: high", "runs[1].expected must be number"),
        (
            "title: A test\n",
            "title: A test\nbaselines: [three]\n",
            "baselines: three is the method of no entry",
        ),
        (
            "config: two.yaml",
            "config: two.yaml, baselines: [one]",
            "runs[1].baselines: one is not among the suite's baselines",
        ),
        ("title: A test\n", "title: A test\nmetric: iou\n", "metric must be accuracy | mean_class"),
        (SUITE[SUITE.index("  - ") :], "  []\n", "runs is empty"),
    ],
)
def test_a_bad_suite_is_one_sentence(folder, old, new, says):
    assert old in SUITE
    Path("suite.yaml").write_text(SUITE.replace(old, new))
    with pytest.raises(UserError) as raised:
        reproduce.main(["suite.yaml"])
    assert says in str(raised.value)
    assert raised.value.code == 2
    assert calls() == []


@pytest.mark.parametrize(
    "options", [["--jobs", "0"], ["--seeds", "1", "1"], ["--seeds", "0", "-1"]]
)
def test_bad_arguments(folder, options):
    with pytest.raises(UserError, match=options[0]):
        reproduce.main(["suite.yaml", *options])
    assert calls() == []


def test_a_bad_suite_on_the_command_line(folder):
    Path("one.yaml").unlink()
    done = subprocess.run(
        [sys.executable, str(ROOT / "reproduce.py"), "suite.yaml"], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr == "error: suite.yaml: runs[0].config: there is no file one.yaml\n"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_reaches_the_runs_and_starts_no_more(folder, number):
    Path("suite.yaml").write_text(SUITE.replace("script: train.py", "script: waits.py"))
    options = ["suite.yaml", "--seeds", "0", "1", "--jobs", "2", "--out", "results.md"]
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "reproduce.py"), *options], stdout=subprocess.PIPE, text=True
    )
    first = [Path("runs/one_seed0"), Path("runs/two_seed0")]
    end = time.monotonic() + 60
    while not all((run / "ready").exists() for run in first) and time.monotonic() < end:
        time.sleep(0.05)
    process.send_signal(number)
    out = process.communicate()[0]  # ends at any rate: the script gives up
    assert process.returncode == 128 + number
    for run in first:
        assert (run / "saved").exists()
        assert f"{run}: stopped after" in out
    assert sorted(Path("runs").glob("*_seed1*")) == []
    assert not Path("results.md").exists()


def test_what_selected_is_said():
    def run(criterion: str, part: bool = False) -> dict:
        return {"selection": {"criterion": criterion, "part_of_training_loss": part}}

    free = (
        "Selected without target labels by infomax, neg_entropy, which for b is part of the "
        "training loss and no judge."
    )
    assert suite_table.selection([("a", run("neg_entropy")), ("b", run("infomax", True))]) == free
    labels = (
        "Selected by neg_val_loss, on the labels of the very images that the figures are computed "
        "on: no test figures."
    )
    assert suite_table.selection([("a", run("neg_val_loss"))]) == labels
    last = "The last step is selected for b."
    assert suite_table.selection([("b", run("last"))]) == last
    mixed = "Selected without target labels by infomax. " + last
    assert suite_table.selection([("a", run("infomax")), ("b", run("last"))]) == mixed
    one = [("a", run("last")), ("b", run("last") | {"collapsed": {"last": "one class"}})]
    assert "the predictions of 1 of 2 runs collapsed: b." in suite_table.selection(one)
    both = "Selected without target labels by neg_entropy. " + labels
    assert suite_table.selection([("a", run("neg_val_loss")), ("b", run("neg_entropy"))]) == both


AFTER = """title: A test
runs:
  - {task: A, method: one, script: train.py, config: one.yaml}
  - {task: A, method: two, script: train.py, config: two.yaml, init_from: runs/one}
"""


@pytest.fixture
def starts_from(folder):
    """The second config starts from the first one's run; the script asks for it."""
    Path("suite.yaml").write_text(AFTER)
    text = SCRIPT.replace(
        '    print("training")',
        '    start = config.init_from\n'
        '    if start and not (pathlib.Path(start) / "summary.json").is_file():\n'
        '        sys.exit("error: there is no " + start)\n'
        '    time.sleep(0.3)\n'
        '    print("training")',
    )  # fmt: skip
    assert text.count("start = config.init_from") == 1
    Path("train.py").write_text(text)
    return folder


def test_a_run_waits_for_the_one_it_starts_from(starts_from, capfd):
    assert reproduce.main(["suite.yaml", "--seeds", "0", "1", "--jobs", "4"]) == 0
    arguments = {tuple(call["argv"][3:]): call["time"] for call in calls()}
    for seed in (0, 1):
        first = (f"seed={seed}", f"out_dir=runs/one_seed{seed}", "--resume")
        second = (
            f"seed={seed}",
            f"init_from=runs/one_seed{seed}",
            f"out_dir=runs/two_seed{seed}",
            "--resume",
        )
        assert arguments[second] > arguments[first] + 0.3
    assert len(arguments) == 4
    assert cells(capfd.readouterr().out, "two")[2] == "2"
    # Finished already, each under its own start.
    assert reproduce.main(["suite.yaml", "--seeds", "0", "1"]) == 0
    assert calls() == []


def test_a_run_whose_start_failed_fails_too(starts_from, monkeypatch, capfd):
    monkeypatch.setenv("FAIL_SEED", "0")
    Path("two.py").write_text(Path("train.py").read_text().replace("FAIL_SEED", "NEVER"))
    Path("suite.yaml").write_text(
        AFTER.replace("method: two, script: train.py", "method: two, script: two.py")
    )
    assert reproduce.main(["suite.yaml", "--seeds", "0", "--jobs", "2"]) == 1
    out = capfd.readouterr().out
    assert "runs/two_seed0: failed: runs/one_seed0, which it starts from, is not finished" in out
    assert not Path("runs/two_seed0").exists()


def test_a_run_is_not_finished_if_its_start_was_edited(starts_from, capfd):
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0
    assert cells(capfd.readouterr().out, "two")[2] == "1"
    with open("one.yaml", "a") as config:
        config.write("data: {size: 3}\n")
    # The fake script trains again, whatever it finds in its folder.
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0
    assert [call["argv"][2] for call in calls()][-2:] == ["one.yaml", "two.yaml"]


def test_a_run_is_not_finished_if_its_start_was_trained_again(starts_from, monkeypatch, capfd):
    """The fake script leaves a finished run alone, as the scripts do."""
    text = Path("train.py").read_text()
    finished = '    if (folder / "summary.json").is_file():\n        return\n'
    text = text.replace('    print("training")', f'{finished}    print("training")')
    text = text.replace('b"weights"', 'os.environ["WEIGHTS"].encode()')
    Path("train.py").write_text(text)
    monkeypatch.setenv("WEIGHTS", "first")
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0
    capfd.readouterr()
    shutil.rmtree("runs/one_seed0")
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0  # the same weights again
    monkeypatch.setenv("WEIGHTS", "second")
    shutil.rmtree("runs/one_seed0")
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 1
    out = capfd.readouterr().out
    assert "runs/two_seed0: failed" in out
    assert "exit code 0: runs/one_seed0 has been trained again since; remove its folder" in out
    shutil.rmtree("runs/two_seed0")
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0


def test_a_start_that_no_earlier_entry_makes(folder):
    for name in ("runs/two", "runs/elsewhere"):
        Path("suite.yaml").write_text(AFTER.replace("runs/one}", f"{name}}}"))
        with pytest.raises(
            UserError, match=rf"runs\[1\]\.init_from: {name} is the out_dir of no earlier entry"
        ):
            reproduce.main(["suite.yaml"])


def write_suite(*entries: str) -> None:
    lines = "".join(f"  - {{task: A, {entry}}}\n" for entry in entries)
    Path("suite.yaml").write_text(f"title: A test\nruns:\n{lines}")


GAIN = "{photometric: {gain: [0.5, 1.5], noise: 0.1}, affine: {degrees: 15}}"


def test_several_files_and_set_reach_the_run(folder, capfd):
    """Later files win over earlier ones, `set` wins over the files, and a finished run is known."""
    Path("pair.yaml").write_text("steps: 3\noptim: {lr: 0.05}\ndata: {size: 7}\n")
    Path("method.yaml").write_text("steps: 9\n")
    write_suite(
        "method: plain, script: train.py, config: pair.yaml, expected: 12.5",
        "method: both, script: train.py, config: [pair.yaml, method.yaml]",
        "method: more, script: train.py, config: [pair.yaml, method.yaml], "
        f"set: {{data.size: 5, data.augment: {GAIN}, init_from: null, out_dir: runs/more}}",
    )
    assert reproduce.main(["suite.yaml", "--seeds", "1"]) == 0
    files, end = ["--config", "pair.yaml", "method.yaml"], ["seed=1", "--resume"]
    augment = f"data.augment={GAIN}"
    assert [call["argv"][1:] for call in calls()] == [
        ["--config", "pair.yaml", end[0], "out_dir=runs/pair_seed1", end[1]],
        [*files, end[0], "out_dir=runs/pair_method_seed1", end[1]],
        [
            *files,
            "data.size=5",
            augment,
            "init_from=null",
            end[0],
            "out_dir=runs/more_seed1",
            end[1],
        ],
    ]
    trained = parse_yaml(Path("runs/more_seed1/config.yaml").read_text(), "")
    assert trained["steps"] == 9
    assert trained["optim"] == {"lr": 0.05}
    assert trained["data"]["size"] == 5
    assert trained["data"]["augment"] == parse_yaml(GAIN, "")
    assert list(trained["data"]["augment"]) == ["photometric", "affine"]  # the order matters
    assert "12.5" not in capfd.readouterr().out  # `expected` is for a test, not for the table
    assert reproduce.main(["suite.yaml", "--seeds", "1"]) == 0
    assert calls() == []
    Path("method.yaml").write_text("steps: 8\n")  # a later file counts as well
    assert reproduce.main(["suite.yaml", "--seeds", "1"]) == 0
    assert [call["argv"][-2] for call in calls()] == [
        "out_dir=runs/pair_method_seed1",
        "out_dir=runs/more_seed1",
    ]


def test_another_value_in_set_is_another_run(folder):
    entry = "method: one, script: train.py, config: one.yaml, set: {data.size: 5}"
    write_suite(entry)
    reproduce.main(["suite.yaml", "--seeds", "0"])
    calls()
    write_suite(entry.replace("5", "6"))
    assert reproduce.main(["suite.yaml", "--seeds", "0"]) == 0
    assert [call["argv"][3] for call in calls()] == ["data.size=6"]


@pytest.mark.parametrize(
    ("files", "changes", "expected"),
    [
        (["configs/a/pair.yaml"], "{}", "runs/a/pair"),
        (["configs/a/pair.yaml", "configs/b/method.yaml"], "{}", "runs/a/pair_method"),
        (["configs/a/pair.yaml", "configs/b/named.yaml"], "{}", "runs/named"),
        (["configs/b/named.yaml", "configs/a/pair.yaml"], "{}", "runs/named"),
        (["configs/b/named.yaml"], "{out_dir: elsewhere/x}", "elsewhere/x"),
        (["configs/b/named.yaml"], "{out_dir: null}", "runs/b/named"),
        (["configs/a/pair.yaml"], '{out_dir: "runs/a: b"}', "runs/a: b"),
    ],
)
def test_the_folder_of_an_entry(folder, files, changes, expected):
    """out_dir of `set`, else of the files, else the names of the files."""
    for name in ("a/pair", "b/method", "b/named"):
        file = Path(f"configs/{name}.yaml")
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("out_dir: runs/named\n" if "named" in name else "steps: 2\n")
    write_suite(f"method: one, script: train.py, config: [{', '.join(files)}], set: {changes}")
    (entry,) = load_config(reproduce.Suite, "suite.yaml").runs
    assert entry.out_dir == expected
    job = reproduce.Job(entry, 3)
    assert job.folder == Path(f"{expected}_seed3")
    (out_dir,) = [word for word in job.command() if word.startswith("out_dir=")]
    assert parse_yaml(out_dir.partition("=")[2], "") == f"{expected}_seed3"


@pytest.mark.parametrize(
    "value",
    [
        *(None, True, 0, -3, 1.0, 1e-3, 5e-5, 1e22),
        *("", "null", "true", "1", "1e-4", "010", "off", "a: b", "a #b", "- a", "[x", "{", "x, y"),
        *("it's", '"', "*a", "&a", "!a", "%", "@", "a\nb", " a ", "tête", "a=b", "~", "x" * 300),
        *([], {}, [1, [2.5, "a, b"]], {"b": {"gain": [0.5, 1.5]}, "a": {}}, {"x": None}),
    ],
    ids=repr,
)
def test_values_survive_the_command_line(value):
    text = dump_value(value)
    again = parse_yaml(text, "")
    assert repr(again) == repr(value)  # types and the order of keys, too
    assert "\n" not in text or "\n" in str(value)


def test_the_config_of_a_run_is_no_suite(folder):
    Path("pair.yaml").write_text("# python train_dann.py --config pair.yaml seed=1\nsteps: 3\n")
    Path("method.yaml").write_text("disc_hidden: 3\n")  # a key of a method, without a command
    for file, command in (
        ("pair.yaml", "python train_dann.py --config pair.yaml seed=1"),
        ("method.yaml", "python SCRIPT --config method.yaml"),
    ):
        with pytest.raises(UserError) as raised:
            reproduce.main([file])
        assert str(raised.value) == (
            f"{file}: is the config of a run, not a suite (see configs/suites/); "
            f"run it by: {command}"
        )
    Path("other.yaml").write_text("titel: 3\n")  # control: a suite with a mistake
    with pytest.raises(UserError, match=r"unknown key titel; did you mean title\?"):
        reproduce.main(["other.yaml"])


def test_every_mistake_is_told_at_once(folder):
    write_suite(
        "method: one, script: train.py, config: [one.yaml, three.yaml], published: 3",
        "method: two, script: train.py, config: two.yaml, set: {stps: 3, data.sise: 4}, sed: 1",
    )
    with pytest.raises(UserError) as raised:
        reproduce.main(["suite.yaml"])
    lines = [line.strip() for line in str(raised.value).splitlines()]
    assert lines == [
        "suite.yaml: runs[0].config: there is no file three.yaml",
        "suite.yaml: runs[0].published and reference go together",
        "suite.yaml: unknown key runs[1].sed; did you mean runs[1].set?",
        "suite.yaml: runs[1].config: stps=3: unknown key stps; did you mean steps?",
        "suite.yaml: runs[1].config: data.sise=4: unknown key data.sise; did you mean data.size?",
    ]
    write_suite(  # rules across entries
        "method: one, script: train.py, config: one.yaml, init_from: runs/two",
        "method: one, script: train.py, config: [two.yaml, one.yaml]",
    )
    with pytest.raises(UserError) as raised:
        reproduce.main(["suite.yaml"])
    assert [line.strip() for line in str(raised.value).splitlines()] == [
        "suite.yaml: runs[0].init_from: runs/two is the out_dir of no earlier entry",
        "suite.yaml: runs[1] has the out_dir runs/one of another",
        "suite.yaml: runs[1] has the row A / one of another",
    ]
    assert calls() == []


def set_commit(run: str, commit: str | None, drop: bool = False) -> None:
    file = Path("runs") / run / "summary.json"
    summary = {**json.loads(file.read_text()), "commit": commit}
    if drop:
        del summary["commit"]
    file.write_text(json.dumps(summary))


def footer(out: str) -> str:
    (line,) = [line for line in out.splitlines() if line.startswith("Written by ")]
    return line


def test_the_table_names_the_commit(folder, capfd):
    reproduce.main(["suite.yaml", "--seeds", "0", "1"])
    out = capfd.readouterr().out
    assert "; steps 8; commit abc1234; on a desk, torch 9." in footer(out)
    assert "warning" not in out

    set_commit("two_seed1", "def5678-dirty")
    reproduce.main(["suite.yaml", "--seeds", "0", "1", "--out", "results.md"])
    out = capfd.readouterr().out
    assert "; commits abc1234, def5678-dirty (mixed); on " in footer(out)
    (warning,) = [line for line in out.splitlines() if line.startswith("warning: ")]
    assert warning.startswith("warning: the table mixes runs of commits abc1234, def5678-dirty; ")
    assert footer(out) in Path("results.md").read_text()
    assert "warning" not in Path("results.md").read_text()

    reproduce.main(["suite.yaml", "--seeds", "0"])  # the runs of one seed only
    out = capfd.readouterr().out
    assert "; commit abc1234; on " in footer(out)
    assert "warning" not in out


@pytest.mark.parametrize("drop", [False, True], ids=["null", "older run"])
def test_an_unknown_commit(folder, capfd, drop):
    """A run outside git has null; the summary of an older version lacks the key."""
    reproduce.main(["suite.yaml", "--seeds", "0"])
    set_commit("one_seed0", None, drop)
    capfd.readouterr()
    reproduce.main(["suite.yaml", "--seeds", "0"])
    out = capfd.readouterr().out
    assert "; commits abc1234, an unknown commit (mixed); on " in footer(out)
    assert out.count("warning: the table mixes runs of commits abc1234, an unknown commit; ") == 1
    set_commit("two_seed0", None)
    reproduce.main(["suite.yaml", "--seeds", "0"])
    out = capfd.readouterr().out
    assert "; steps 8; an unknown commit; on " in footer(out)
    assert "warning" not in out


def test_a_real_run(tmp_path, capfd, monkeypatch):
    """train_source.py, of two files and `set`: trained once, known as finished after that."""
    tiny_config(tmp_path, out_dir="null")
    Path("method.yaml").write_text("steps: 4\n")
    write_suite(
        f"method: source, script: {ROOT}/train_source.py, config: [config.yaml, method.yaml], "
        "set: {steps: 2, data.augment: {photometric: {gain: [0.5, 1.5]}}}"
    )
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    reproduce.script_config.cache_clear()
    assert reproduce.main(["suite.yaml", "--seeds", "3"]) == 0
    out = capfd.readouterr().out
    assert "runs/config_method_seed3: finished after " in out
    assert cells(out, "source")[2] == "1"
    commit = suite_table.commit_note([code_version() or suite_table.UNKNOWN_COMMIT])
    assert f"; steps 2; {commit}; on " in footer(out)
    assert reproduce.main(["suite.yaml", "--seeds", "3"]) == 0
    assert "runs/config_method_seed3: finished already" in capfd.readouterr().out


def test_several_processes_name_their_own_error(folder, capfd):
    """Not the last line of the launcher that started them."""
    entry = load_config(reproduce.Suite, "suite.yaml").runs[0]
    for processes, reason in ((1, "torchrun ends"), (2, "error: no image")):
        job = reproduce.Job(entry, 4, processes)
        job.log.parent.mkdir(exist_ok=True)
        job.log.write_text("error: no image\ntorchrun ends\n")
        assert reproduce.report_end(job, 1, 2.0, stopping=False)
        assert f"failed after 2 s with exit code 1: {reason}" in capfd.readouterr().out
    with pytest.raises(UserError, match="--nproc must be positive, not 0"):
        reproduce.main(["suite.yaml", "--nproc", "0"])


@pytest.mark.slow
def test_a_real_run_of_several_processes(tmp_path, capfd, monkeypatch):
    tiny_config(tmp_path, out_dir="null", steps=2)
    write_suite(f"method: source, script: {ROOT}/train_source.py, config: config.yaml")
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    reproduce.script_config.cache_clear()
    assert reproduce.main(["suite.yaml", "--seeds", "3", "--nproc", "2"]) == 0
    out = capfd.readouterr().out
    assert cells(out, "source")[2] == "1"
    assert "; on 2 processes, each on 1 of 2 cores" in footer(out)


def test_the_caption_of_targets_without_labels():
    def of(accuracy: float | None, test: str) -> dict:
        return {"target": {"last": {"accuracy": accuracy}}, "target_test": test}

    suite = types.SimpleNamespace(runs=[], metric=None, baselines=[])
    caption = suite_table.Table(suite, [], []).caption
    labeled, unlabeled = of(70.0, "its test split"), of(None, "none: no target labels")
    assert caption([unlabeled]).startswith("The target has no labels, so there are no figures of")
    plain = "Target accuracy in percent on its test split: mean +- sample standard deviation over "
    plain += "the seeds."
    assert caption([labeled]) == plain
    assert caption([labeled, unlabeled]) == plain + " `-`: the target has no labels."
    assert "on -:" in caption([])


def test_the_reason_is_that_of_the_last_start(tmp_path, capsys):
    log = tmp_path / "run.log"
    log.write_text("$ torchrun x\nerror: the first\n$ torchrun x\nValueError: the second\n")
    job = types.SimpleNamespace(folder="run", log=log, processes=2, summary=lambda: None)
    assert reproduce.report_end(job, 1, 3.0, False)
    assert (
        "failed after 3 s with exit code 1: ValueError: the second (log" in capsys.readouterr().out
    )
    log.write_text("$ torchrun x\nerror: the first\nRootCause\n")  # control
    reproduce.report_end(job, 1, 3.0, False)
    assert "exit code 1: error: the first (log" in capsys.readouterr().out
