"""Grids and draws of a suite, and reproduce.py --choose on real runs."""

import importlib
import json
import re
import statistics
from pathlib import Path

import pytest
import torch

import reproduce
from analysis.candidates import candidates_of, choice_report, unfinished
from analysis.choice import from_csv
from analysis.suites import Suite
from common.config import load_config
from common.errors import UserError
from common.files import load_tensors, save_tensors
from common.metrics import Criteria
from tests.helpers import tiny_config

ROOT = Path(reproduce.__file__).parent
RANGES = "ranges: {optim.lr: [1.0e-3, 0.1, log], reversal_max: [1, 3], disc_hidden: [8, 64]}"


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    tiny_config(tmp_path, out_dir="runs/one")
    reproduce.script_config.cache_clear()
    return tmp_path


def write_suite(*entries: str, head: str = "baselines: [none]\n") -> None:
    lines = [
        f"  - {{task: A -> B, config: config.yaml, method: {entry}}}".replace(
            "script: ", f"script: {ROOT}/"
        )
        for entry in ("none, script: train_source.py", *entries)
    ]
    Path("suite.yaml").write_text("\n".join([f"title: A test\n{head}runs:", *lines, ""]))


def load() -> Suite:
    return load_config(Suite, "suite.yaml")


def dann(rest: str, name: str = "DANN") -> str:
    return f"{name}, script: train_dann.py, set: {{out_dir: runs/{name}}}, {rest}"


def test_a_grid_is_a_run_per_combination(folder):
    write_suite(dann("grid: {reversal_max: [0.3, 1], optim.lr: [0.01, 0.1]}"))
    none, *cells = load().runs
    assert none.out_dir == "runs/one"
    assert [cell.method for cell in cells] == [
        f"DANN, reversal_max={a}, optim.lr={b}" for a in (0.3, 1) for b in (0.01, 0.1)
    ]
    assert cells[1].out_dir == "runs/DANN_reversal_max=0.3_optim.lr=0.1"
    assert cells[1].overrides == ["reversal_max=0.3", "optim.lr=0.1"]
    assert (cells[1].run_config.reversal_max, cells[1].run_config.optim.lr) == (0.3, 0.1)
    assert {cell.family for cell in cells} == {"DANN"}
    assert none.family == "none"
    command = reproduce.Job(cells[3], 5).command()
    assert command[-2:] == ["out_dir=runs/DANN_reversal_max=1_optim.lr=0.1_seed5", "--resume"]


def test_values_that_are_no_plain_words_have_a_folder(folder):
    write_suite(dann("grid: {layer_weights: [[1.0], [0.5]]}"))
    folders = [cell.out_dir for cell in load().runs[1:]]
    assert folders == ["runs/DANN_layer_weights=-1.0-", "runs/DANN_layer_weights=-0.5-"]


def test_draws_are_a_function_of_the_seed(folder):
    def values(seed: int, count: int) -> list[tuple]:
        write_suite(dann(f"draws: {count}, draws_seed: {seed}, {RANGES}"))
        cells = load().runs[1:]
        assert [cell.out_dir for cell in cells] == [
            f"runs/DANN_draw{seed}_{i:02d}" for i in range(count)
        ]
        configs = [cell.run_config for cell in cells]
        return [(c.optim.lr, c.reversal_max, c.disc_hidden) for c in configs]

    drawn = values(0, 40)
    assert values(0, 5) == drawn[:5]  # more draws leave the first ones as they are
    assert values(1, 5) != drawn[:5]
    rates, reversals, widths = zip(*drawn, strict=True)
    assert all(1e-3 <= x <= 0.1 for x in rates)
    assert all(1 <= x <= 3 for x in reversals)
    assert all(isinstance(x, int) and 8 <= x <= 64 for x in widths)
    assert 10 < sum(x < 0.01 for x in rates) < 30  # log-uniform: half of them; uniform: a tenth
    assert 10 < sum(x < 2 for x in reversals) < 30
    assert len(set(reversals)) > 30  # the key takes fractions, though its bounds are whole


def test_a_draw_of_a_key_that_may_be_null_is_a_fraction(folder):
    write_suite(dann("draws: 5, ranges: {reversal_bound: [1, 2]}"))
    drawn = {cell.run_config.reversal_bound for cell in load().runs[1:]}
    assert len(drawn) == 5


@pytest.mark.parametrize(
    ("entry", "says"),
    [
        ("grid: {reversal_max: 3}", "grid: reversal_max needs a list of values"),
        ("grid: {reversal_max: []}", "grid: reversal_max needs a list of values"),
        ("grid: {out_dir: [a, b]}", "grid: each cell has an out_dir of its own"),
        (f"grid: {{feature_layers: [[{'layer3, ' * 20}pooled]]}}", r"runs\[1\]\.grid: .* too long"),
        ("draws: 3", "draws and ranges go together"),
        (RANGES, "draws and ranges go together"),
        ("draws: 0, ranges: {optim.lr: [0.1, 1.0]}", "draws must be positive"),
        ("draws: 3, ranges: {optim.lr: [1.0, 0.1]}", r"ranges: optim.lr needs \[low, high\]"),
        ("draws: 3, ranges: {optim.lr: [0, 1, log]}", r"ranges: optim.lr needs \[low, high\]"),
        ("draws: 3, ranges: {optim.lr: [0.1, 1, ln]}", r"ranges: optim.lr needs \[low, high\]"),
        (f"draws: 3, {RANGES}, grid: {{steps: [1]}}", "grid and draws exclude each other"),
        ("grid: {steps: [1]}, expected: 3.0", "expected and published are figures of one run"),
        ("grid: {reversal: [1]}", r"runs\[1\]\.config: .*reversal"),
        ("grid: {seed: [1]}", "set: the seed comes from --seeds"),
    ],
)
def test_wrong_grids_are_refused(folder, entry, says):
    write_suite(dann(entry))
    with pytest.raises(UserError, match=says):
        load()


def test_runs_that_see_target_labels_are_no_candidates(folder):
    few = "few, script: train_source.py, set: {data.target_labeled: 1, out_dir: runs/few}"
    upper = "upper, script: train_source.py, set: {data.source: {name: drawn_digits_shifted}, "
    # Labels are inherited, and those of the test set are labels, too.
    more = "more, script: train_source.py, init_from: runs/few, set: {out_dir: runs/more}"
    test = "test, script: train_source.py, set: {data.target_test: {name: drawn_digits}, "
    spelled = "spelled, script: train_source.py, set: {data.source: {name: folder, path: b}, "
    spelled += "data.target: {name: folder, path: a}, "
    spelled += "data.target_test: {name: folder, path: ./b}, out_dir: runs/spelled}"
    write_suite(
        few,
        f"{upper}out_dir: runs/upper}}",
        more,
        f"{test}out_dir: runs/test}}",
        spelled,
        dann("grid: {steps: [1]}"),
    )
    labels = [entry.sees_target_labels() for entry in load().runs]
    assert labels == [False, True, True, True, True, True, False]
    Path("suite.yaml").write_text(Path("suite.yaml").read_text().replace("./b", "c"))
    assert not load().runs[5].sees_target_labels()  # control


@pytest.fixture(scope="module")
def chosen(tmp_path_factory):
    """A suite with a grid and --choose, run once: (folder, output, candidates)."""
    folder = tmp_path_factory.mktemp("choose")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("OMP_NUM_THREADS", "1")
        tiny_config(folder, out_dir="runs/one")
        keys = "{out_dir: runs/mcc, steps: 4, model.bn: frozen}"
        mcc = f"MCC, script: train_mcc.py, set: {keys}"
        write_suite(dann("grid: {reversal_max: [1]}"), mcc)
        reproduce.script_config.cache_clear()
        for entry in load().runs:
            for seed in (0, 1):  # trained here: a start of Python per run takes long
                script, *words = reproduce.Job(entry, seed).command()[1:]
                assert importlib.import_module(Path(script).stem).main(words) == 0
        argv = ["suite.yaml", "--seeds", "0", "1", "--choose", "--csv", "runs.csv"]
        assert reproduce.main([*argv, "--out", "results.md"]) == 0
    text = (folder / "results.md").read_text()
    return folder, text, from_csv(folder / "runs.csv")


def test_choose_reports_what_is_chosen_and_what_it_is_worth(chosen):
    folder, text, candidates = chosen
    assert "**A -> B: chosen without target labels, seed 0**" in text
    assert text.count("| yes |") == 1
    assert " | 0 | 1 | " in text  # chosen on seed 0, measured on seed 1
    assert [x.method for x in candidates] == ["none", "DANN, reversal_max=1", "MCC"] * 2
    assert [x.reference for x in candidates] == [True, False, False] * 2
    assert [x.judged for x in candidates] == [True, True, False] * 2
    assert [x.seed for x in candidates] == [0] * 3 + [1] * 3
    # The batch norm of LeNet trains, but that of the run of MCC is frozen.
    assert [x.source_vetoes for x in candidates] == [False, False, True] * 2
    summary = json.loads((folder / "runs/mcc_seed1/summary.json").read_text())
    assert candidates[5].selected == pytest.approx(
        summary["target"]["selected"]["accuracy"], abs=0.01
    )
    assert candidates[5].source_val == pytest.approx(summary["selection"]["source_val"], abs=0.01)
    for name, pair in {"one": (0, 3), "mcc": (2, 5)}.items():
        files = [load_tensors(folder / f"runs/{name}_seed{seed}/predictions.pt") for seed in (0, 1)]
        classes = [file["selected"].argmax(1).tolist() for file in files]
        expected = statistics.fmean(x == y for x, y in zip(*classes, strict=True))
        for number in pair:
            assert candidates[number].between_seeds == pytest.approx(expected, abs=1e-4)
    # Their infomax is the criterion that the run has selected by.
    assert candidates[5].infomax == pytest.approx(summary["selection"]["value"], abs=1e-3)


def test_runs_that_do_not_fit_together_are_refused(chosen, monkeypatch):
    folder, _, _ = chosen
    monkeypatch.chdir(folder)
    file = folder / "runs/mcc_seed1/predictions.pt"
    before = load_tensors(file)
    save_tensors(file, {**before, "set": "others"})
    argv = ["suite.yaml", "--seeds", "0", "1", "--choose"]
    with pytest.raises(UserError, match="runs/mcc_seed1 have other target images or classes"):
        reproduce.main(argv)
    save_tensors(file, before)
    text = Path("runs/mcc_seed1/summary.json").read_text()
    old = re.sub(r'"parameters": \d+,\s*', "", text)
    assert old != text
    Path("runs/mcc_seed1/summary.json").write_text(old)
    with pytest.raises(UserError, match=r"A -> B, MCC, seed 1 is a run of an earlier version"):
        reproduce.main(argv)
    Path("runs/mcc_seed1/summary.json").write_text(text)
    files = {path: load_tensors(path) for path in Path("runs").glob("*_seed1/predictions.pt")}
    for path, saved in files.items():
        save_tensors(path, {**saved, "set": "others"})
    with pytest.raises(UserError, match="seeds 0 and 1 have other target images or classes"):
        reproduce.main(argv)
    for path, saved in files.items():
        save_tensors(path, saved)
    file.unlink()
    with pytest.raises(UserError, match=r"mcc_seed1/predictions\.pt is missing"):
        reproduce.main(argv)
    save_tensors(file, before)
    assert reproduce.main(argv) == 0  # control
    text = Path("suite.yaml").read_text()
    Path("suite.yaml").write_text(text.replace("baselines: [none]\n", ""))
    with pytest.raises(UserError, match="name the method without adaptation first"):
        reproduce.main(argv)
    of_c = re.sub(r"task: A -> B(?=.*method: MCC)", "task: C", text)
    Path("suite.yaml").write_text(of_c)
    with pytest.raises(UserError, match="--choose: C: has no run of none that sees no target"):
        reproduce.main(argv)
    elsewhere = text.replace("out_dir: runs/mcc,", "out_dir: runs/mcc, init_from: runs/one_seed0,")
    Path("suite.yaml").write_text(elsewhere)
    with pytest.raises(UserError, match="MCC: starts from runs/one_seed0, which may have seen"):
        reproduce.main(argv)
    Path("suite.yaml").write_text(text)
    with pytest.raises(UserError, match="--csv goes with --choose"):
        reproduce.main(["suite.yaml", "--csv", "x.csv"])


def test_a_method_that_is_lost_on_one_seed_is_not_chosen_on_another(chosen, monkeypatch):
    folder, _, _ = chosen
    monkeypatch.chdir(folder)
    suite, name = load(), "DANN, reversal_max=1"

    def folder_of(entry, seed: int) -> Path:
        return reproduce.Job(entry, seed).folder

    complete = [{seed: reproduce.Job(x, seed).summary() for seed in (0, 1)} for x in suite.runs]
    lost = [
        {0: summaries[0]} if entry.method == name else summaries
        for entry, summaries in zip(suite.runs, complete, strict=True)
    ]

    def chosen_of(results: list[dict]) -> str:
        candidates = candidates_of(suite, results, folder_of)
        for x in candidates:
            if x.method == name:
                x.between_seeds = 1.0
        return choice_report(suite, candidates, lambda *row, seed: Path("run"))

    assert f"Chosen by agreement between seeds: {name}" in chosen_of(complete)
    text = chosen_of(lost)
    assert "Chosen by agreement between seeds: none" in text
    assert "| seed 1: not finished |" in text
    # Without the reference there is no choice on a seed.
    gone = [{} if x.method == "none" else y for x, y in zip(suite.runs, complete, strict=True)]
    assert candidates_of(suite, gone, folder_of) == []
    assert choice_report(suite, [], folder_of).startswith("There is nothing to choose from")


def test_runs_that_have_not_finished_are_named_with_the_reason(chosen, monkeypatch):
    folder, _, _ = chosen
    monkeypatch.chdir(folder)
    suite = load()
    status = Path("runs/mcc_seed1/status.json")

    def line_of(results: list[dict]) -> str:
        (line,) = unfinished(suite, results, (0, 1), lambda x, s: reproduce.Job(x, s).result()[1])
        return line

    known = {0: {}, 1: {}}
    results = [known, known, {0: {}}]
    start = "A -> B, MCC, seed 1: not finished"
    before = status.read_text()
    status.write_text('{"state": "failed", "reason": "step 3: cls_loss is nan"}')
    assert line_of(results) == f"{start} (step 3: cls_loss is nan)"
    status.unlink()
    assert line_of(results) == f"{start} (not started)"
    status.write_text(before)
    model = Path("runs/mcc_seed1/model.pt")
    weights = model.read_bytes()
    model.write_bytes(weights[:-1])
    assert line_of(results) == f"{start} (summary.json or model.pt is gone or damaged)"
    model.write_bytes(weights)
    text = Path("suite.yaml").read_text()
    Path("suite.yaml").write_text(text.replace("model.bn: frozen", "model.bn: concat"))
    suite = load()
    assert line_of(results).startswith(f"{start} (it was trained by another config; remove its")
    Path("suite.yaml").write_text(text)
    suite = load()
    assert reproduce.Job(suite.runs[2], 1).result()[1] == ""  # control
    assert line_of([{0: {}}, known, known]).endswith("without it there is no choice on this seed")


def test_predictions_of_a_run_are_those_of_its_model(chosen):
    """A run of the suite again, evaluated by hand on the images of the criteria."""
    folder, _, _ = chosen
    saved = load_tensors(folder / "runs/one_seed0/predictions.pt")
    assert saved["last"].shape == saved["selected"].shape == (30, 10)
    assert saved["last"].dtype == torch.float16
    summary = json.loads((folder / "runs/one_seed0/summary.json").read_text())
    lines = (folder / "runs/one_seed0/metrics.jsonl").read_text().splitlines()
    records = {r["step"]: r for r in map(json.loads, lines) if "criteria.infomax" in r}
    for name in ("last", "selected"):
        criteria = Criteria(10)
        criteria.add(saved[name])
        step = summary["target"][name]["step"]
        expected = records[step]["criteria.infomax"]
        assert criteria.values()["infomax"] == pytest.approx(expected, abs=1e-3)
