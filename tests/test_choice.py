"""The choice among runs without target labels: criteria, vetoes, rules and what they are worth."""

import copy
import itertools
import math
import random
import statistics

import pytest
import torch

from analysis.choice import (
    COMPOSED,
    RULES,
    Candidate,
    candidates_table,
    choose,
    from_csv,
    interval,
    rank_correlation,
    reasons_against,
    score,
    set_vetoes,
    to_csv,
    worth,
    worth_summary,
    worth_table,
)
from analysis.criteria import agreements, mano, nuclear_norm, of_one_run
from benchmarks import selection
from common.errors import UserError

CLASSES = ["a", "b", "c"]


def logits_of(seed: int, count: int = 40, scale: float = 2.0) -> torch.Tensor:
    return scale * torch.randn(count, 3, generator=torch.Generator().manual_seed(seed))


def softmax(row: list[float]) -> list[float]:
    powers = [math.exp(x) for x in row]
    return [x / sum(powers) for x in powers]


# --- criteria


def test_criteria_against_plain_loops():
    logits = logits_of(0)
    rows = [softmax(row) for row in logits.tolist()]
    means = [statistics.fmean(column) for column in zip(*rows, strict=True)]
    unit = math.log(3)
    entropy = statistics.fmean(-sum(p * math.log(p) for p in row) for row in rows) / unit
    diversity = -sum(p * math.log(p) for p in means) / unit
    values = of_one_run(logits)
    assert values["neg_entropy"] == pytest.approx(-entropy, abs=1e-6)
    assert values["infomax"] == pytest.approx(diversity - entropy, abs=1e-6)
    # The nuclear norm is the sum of the square roots of the eigenvalues of P'P.
    matrix = torch.tensor(rows, dtype=torch.float64)
    eigenvalues = torch.linalg.eigvalsh(matrix.T @ matrix)
    norm = sum(math.sqrt(max(x, 0)) for x in eigenvalues.tolist())
    assert values["nuclear_norm"] == pytest.approx(norm / math.sqrt(3 * 40), abs=1e-9)


def test_nuclear_norm_is_one_for_certain_and_balanced_predictions():
    assert nuclear_norm(100 * torch.eye(3).repeat(4, 1)) == pytest.approx(1)
    collapsed = 100 * torch.eye(3)[[0] * 12]
    assert nuclear_norm(collapsed) == pytest.approx(1 / math.sqrt(3))
    assert nuclear_norm(torch.zeros(12, 3)) == pytest.approx(1 / 3)


def test_mano_against_plain_loops():
    def plain(rows: list[list[float]]) -> float:
        logs = [math.log(p) for row in rows for p in softmax(row)]
        confident = -statistics.fmean(logs) > 5
        total = 0.0
        for row in rows:
            taylor = [1 + x + x * x / 2 for x in row]
            shifted = [x - min(taylor) for x in taylor]
            shares = softmax(row) if confident else [x / sum(shifted) for x in shifted]
            total += sum(x**4 for x in shares)
        return (total / (3 * len(rows))) ** 0.25

    for scale in (1.0, 20.0):  # by Taylor's polynomial, and by the softmax
        logits = logits_of(1, scale=scale).double()
        assert mano(logits) == pytest.approx(plain(logits.tolist()), abs=1e-9)
    assert mano(torch.zeros(4, 3)) == 0  # nothing to divide by


def test_agreement_is_with_the_mean_probability_of_the_voters():
    """Two unsure votes for a against one sure vote for b: the mean is b."""
    unsure, sure = torch.tensor([[0.2, 0.0, 0.0]]), torch.tensor([[0.0, 9.0, 0.0]])
    assert agreements([unsure, sure], [[unsure], [unsure], [sure]]) == [0.0, 1.0]
    assert agreements([unsure, sure], [[unsure]] * 20 + [[sure]]) == [1.0, 0.0]  # control
    runs = [logits_of(seed) for seed in range(4)]
    mean = sum(x.softmax(1) for x in runs) / 4
    expected = [float((x.argmax(1) == mean.argmax(1)).float().mean()) for x in runs]
    assert agreements(runs, [[x] for x in runs]) == pytest.approx(expected)
    # A family has one vote, however many runs it has.
    family = [unsure] * 20
    assert agreements([unsure, sure], [family, [sure]]) == [0.0, 1.0]
    assert agreements(runs, []) == [0.0] * 4


# --- candidates


def candidate(method: str, **values) -> Candidate:
    plain = {"task": "A -> B", "family": method, "seed": 0, "reference": False, "judged": True}
    plain |= {"source_val": 90.0, "source_count": 1000, "source_vetoes": True, "alarm": None}
    plain |= {"last": 50.0, "selected": 50.0}
    return Candidate(**{**plain, "method": method, **values})


def none(**values) -> Candidate:
    return candidate("none", reference=True, **values)


def test_what_speaks_against_a_run():
    reference = none()

    def against(run: Candidate, other: Candidate = reference, margin: float = 2.0) -> str:
        return reasons_against(run, other, margin)

    assert against(candidate("a", source_val=88.0)) == ""
    low = candidate("a", source_val=87.9)
    assert against(low) == "source validation 87.9 < 88.0"
    assert against(low, margin=3.0) == ""
    few = none(source_count=30)  # two images are 6.7 points
    assert against(candidate("a", source_val=83.4), few) == ""
    assert against(candidate("a", source_val=83.3), few) == "source validation 83.3 < 83.3"
    alarmed = candidate("a", source_val=80.0, alarm="step 3: b vanished")
    both = "source validation 80.0 < 88.0; alarm: step 3: b vanished"
    assert against(alarmed) == both
    assert against(candidate("a", source_val=None)) == ""  # it saw no source
    # Other statistics of batch norm, in the run or in the reference, are not to be compared.
    assert against(candidate("a", source_val=1.0, source_vetoes=False)) == ""
    assert against(low, none(source_vetoes=False)) == ""
    assert against(none(alarm="step 3: b vanished", source_val=1.0)) == ""


def test_what_speaks_against_a_method_on_one_seed_does_so_on_all():
    alarm = "step 3: b vanished"
    runs = [
        *(none(seed=seed) for seed in (0, 1)),
        *(candidate("good", seed=seed) for seed in (0, 1)),
        candidate("unstable", seed=0),
        candidate("unstable", seed=1, alarm=alarm),
        candidate("diverged", seed=1),
    ]
    set_vetoes(runs)
    found = {(x.method, x.seed): x.veto for x in runs if x.veto}
    assert found == {
        ("unstable", 0): f"seed 1: alarm: {alarm}",
        ("unstable", 1): f"alarm: {alarm}",
        ("diverged", 1): "seed 0: not finished",
    }
    alone = [x for x in runs if x.seed == 0]
    set_vetoes(alone)
    assert not any(x.veto for x in alone)


def test_scores_of_a_made_up_history_where_vetoes_bite():
    """A collapsed run is the surest, and one that has lost the source follows: both are vetoed."""
    truth = torch.eye(3)[torch.arange(30) % 3]
    weak = 2 * truth + logits_of(5, 30, 0.9)
    good = 3 * truth + logits_of(6, 30, 0.3)
    collapsed = 50 * torch.eye(3)[[1] * 30]
    shifted = 40 * truth.roll(1, 0)  # certain, balanced and wrong
    candidates = [
        none(),
        candidate("good", selected=90.0),
        candidate("collapsed", alarm="step 9: b has 100 %", selected=33.0),
        candidate("shifted", source_val=40.0, selected=0.0),
    ]
    set_vetoes(candidates)
    score(candidates, [weak, good, collapsed, shifted], CLASSES)
    assert [bool(x.veto) for x in candidates] == [False, False, True, True]
    assert choose(candidates).method == "good"
    assert choose(candidates, "infomax", veto=False).method == "shifted"
    assert choose(candidates, "neg_entropy", veto=False).method == "collapsed"
    assert choose(candidates, "neg_entropy").method == "good"
    assert candidates[2].shares == "b 100 %; never a, c"
    assert candidates[0].changed == 0
    # The ensemble of those that remain has no vote of the vetoed ones.
    remaining = [[weak], [good]]
    assert candidates[1].agreement == agreements([good], remaining)[0]
    everything = [*remaining, [collapsed], [shifted]]
    assert candidates[1].agreement_all == agreements([good], everything)[0]
    candidates[0].family = candidates[1].family = "one"
    score(candidates, [weak, good, collapsed, shifted], CLASSES)
    assert candidates[1].agreement == agreements([good], [[weak, good]])[0]


def test_the_default_rule_lets_infomax_judge_only_what_is_not_trained_on_it():
    trained = candidate("trained", judged=False, infomax=0.99, agreement=0.5)
    best = candidate("best", infomax=0.8, agreement=0.7)
    other = candidate("other", infomax=0.7, agreement=0.9)
    assert choose([none(infomax=0.1), best, other, trained]) is best
    trained.agreement = 0.75
    assert choose([none(infomax=0.1), best, other, trained]) is trained
    assert choose([none(infomax=0.9, agreement=0.1), best]).reference
    assert choose([none(), candidate("a", judged=False, agreement=0.3)]).method == "a"


def test_the_default_rule_takes_what_changes_least_with_the_seed():
    best = candidate("best", judged=False, between_seeds=0.9)
    other = candidate("other", infomax=0.9, agreement=0.9, between_seeds=0.8)
    candidates = [none(between_seeds=0.5), other, best]
    assert choose(candidates) is best
    best.veto = "an alarm"
    assert choose(candidates) is other
    best.veto, candidates[0].between_seeds = "", None  # seeds without a common image
    assert choose(candidates) is other


def test_each_rule_takes_the_highest_known_score():
    names = RULES.keys() - COMPOSED.keys()
    for name in names:
        candidates = [none(), candidate("high"), candidate("unknown")]
        for i, value in enumerate((0.5, 0.9, None)):
            setattr(candidates[i], name, value)
        assert choose(candidates, name).method == "high"


def test_without_vetoes_the_ensemble_is_of_all():
    a, b = candidate("a", agreement=0.9, agreement_all=0.1), candidate("b", agreement_all=0.8)
    b.veto = "an alarm"
    assert choose([a, b], "agreement") is a
    assert choose([a, b], "agreement", veto=False) is b


def test_figures_of_the_target_do_not_choose():
    """Permuted or unknown, they leave the choice as it is. Labels: tests/test_no_leak.py."""
    candidates = [none(), *(candidate(name, selected=float(i)) for i, name in enumerate("abcd"))]
    logits = [logits_of(seed) for seed in range(5)]
    score(candidates, logits, CLASSES)
    for i, x in enumerate(candidates):
        x.between_seeds = (0.1, 0.3, 0.5, 0.4, 0.2)[i]
    assert choose(candidates).method == "b"
    for rule, veto in itertools.product(RULES, (True, False)):
        names = {choose(candidates, rule, veto).method}
        for seed in range(5):
            others = copy.deepcopy(candidates)
            figures = [x.selected for x in candidates]
            random.Random(seed).shuffle(figures)
            for other, value in zip(others, figures, strict=True):
                other.selected, other.last = (None, None) if seed == 0 else (value, -value)
            score(others, logits, CLASSES)
            names.add(choose(others, rule, veto).method)
        assert len(names) == 1


# --- what a choice is worth


def of_seeds() -> list[Candidate]:
    """Two methods beside none; seed 0 chooses `a`, and `b` is the best of the other seeds."""
    figures = {"none": (50.0, 52.0, 54.0), "a": (60.0, 61.0, 62.0), "b": (40.0, 70.0, 71.0)}
    return [
        candidate(
            name,
            seed=seed,
            reference=name == "none",
            selected=values[seed],
            last=values[seed] - 1,
            infomax={"none": 0.1, "a": 0.5, "b": 0.3}[name],
            agreement=0.5,
        )
        for seed in range(3)
        for name, values in figures.items()
    ]


def result_of(candidates: list[Candidate], rule: str = "default", seed: int = 0):
    """What the choice on one seed is worth."""
    return worth(candidates, choose([x for x in candidates if x.seed == seed], rule))


def test_worth_against_hand_computation():
    result = result_of(of_seeds())
    assert (result.method, result.seeds, result.oracle_method) == ("a", [1, 2], "b")
    assert (result.last, result.selected, result.reference) == (60.5, 61.5, 53.0)
    assert (result.oracle, result.regret) == (70.5, 9.0)
    assert result.gains == [9.0, 8.0]
    row = worth_table([result]).splitlines()[-1]
    # Mean 8.5, deviation 0.7071, over the root of 2: 0.5; times 12.71: 6.4.
    cells = "| A -> B | a | 0 | 1 2 | 60.5 | 61.5 | 53.0 | 70.5 (b) | 9.0 | +8.5 [+2.1, +14.9] |"
    assert row == cells
    one = result_of([x for x in of_seeds() if x.seed == 0])
    assert (one.seeds, one.selected, one.oracle) == ([0], 60.0, 60.0)


def test_worth_without_labels_and_with_a_run_that_is_missing():
    unlabeled = [Candidate(**{**vars(x), "selected": None, "last": None}) for x in of_seeds()]
    result = result_of(unlabeled)
    assert (result.method, result.selected, result.regret, result.gains) == ("a", None, None, [])
    row = "| A -> B | a | 0 | - | - | - | - | - | - | - |"
    assert worth_table([result]).splitlines()[-1] == row
    gone = [x for x in of_seeds() if (x.method, x.seed) != ("b", 2)]
    assert result_of(gone).oracle_method == "a"  # what is not complete is no oracle
    gone = [x for x in of_seeds() if (x.method, x.seed) != ("a", 2)]
    result = result_of(gone)  # the seed that has a figure of it is left
    assert (result.seeds, result.selected, result.oracle, result.gains) == ([1], 61.0, 70.0, [9.0])


def test_the_summary_of_choices_counts_each_task_once():
    first = result_of(of_seeds())  # gains 9 and 8, regret 9
    others = [copy.copy(x) for x in of_seeds()]
    for x in others:
        x.task, x.selected = "B -> C", {"none": 50.0, "a": 49.5, "b": 40.0}[x.method]
    second = result_of(others)  # gains -0.5, regret 0.5
    # Means 8.5 and -0.5: 4, deviation 6.364, over the root of 2: 4.5; times 12.71: 57.2.
    expected = (
        "Mean gain over the tasks +4.0 [-53.2, +61.2]; mean regret 4.8, at most 9.0; "
        "1 of 2 tasks end below the run without adaptation."
    )
    assert worth_summary([first, second]) == expected
    assert worth_summary([first, first, second]) == expected
    assert worth_summary([]) == ""


def test_each_seed_can_choose():
    assert result_of(of_seeds(), seed=2).seeds == [0, 1]
    result = result_of(of_seeds(), "source_val", seed=1)
    assert result.method == "none"  # of equal values the first


def test_rank_correlation_against_a_plain_computation():
    first, second = [0.1, 0.5, 0.5, 0.9, 0.2], [10.0, 30.0, 20.0, 50.0, 40.0]
    ranks = [0.0, 2.5, 2.5, 4.0, 1.0], [0.0, 2.0, 1.0, 4.0, 3.0]
    assert rank_correlation(first, second) == pytest.approx(statistics.correlation(*ranks))
    assert rank_correlation(first, [-x for x in first]) == pytest.approx(-1)
    assert math.isnan(rank_correlation(first, [1.0] * 5))
    assert math.isnan(rank_correlation([1.0], [1.0]))


def test_intervals():
    assert interval([]) == "-"
    assert interval([-0.5]) == "-0.5"
    assert interval([1.0, 1.0, 1.0]) == "+1.0 [+1.0, +1.0]"
    values = [float(x % 5) for x in range(20)]  # mean 2, deviation 1.451, over 4.472: 0.3244
    assert interval(values) == "+2.0 [+1.3, +2.7]"  # times 2.09
    assert interval(values * 2) == "+2.0 [+1.5, +2.5]"  # 1.432 over 6.325: 0.2264


def test_the_table_of_candidates_has_no_target_figure():
    candidates = [none(selected=12.345), candidate("a|b", selected=67.89, judged=False)]
    score(candidates, [logits_of(0), logits_of(1)], CLASSES)
    text = candidates_table(candidates, candidates[1])
    assert "12.3" not in text
    assert "67.9" not in text
    assert r"| a\|b | yes | 90.0 | " in text
    assert "(trained on)" in text.splitlines()[-1]
    assert "(trained on)" not in text.splitlines()[-2]


def test_candidates_survive_a_csv(tmp_path):
    candidates = [none(), candidate("a, b", source_val=None, selected=None, judged=False)]
    candidates[1].veto, candidates[1].parameters = 'an "alarm"', 12345
    file = tmp_path / "runs.csv"
    file.write_text(to_csv(candidates))
    assert from_csv(file) == candidates
    file.write_text("task,method\na,b\n")
    with pytest.raises(UserError, match=r"runs\.csv: is no file of candidates"):
        from_csv(file)
    with pytest.raises(UserError, match="is no file of candidates"):
        from_csv(tmp_path / "gone.csv")


def test_the_benchmark_against_hand_computation(tmp_path, capsys):
    file = tmp_path / "runs.csv"
    file.write_text(to_csv(of_seeds()))
    assert selection.main([str(file)]) == 0
    out = capsys.readouterr().out
    command = f"`python benchmarks/selection.py {file}`"
    assert out.startswith(f"{command}: 9 runs of 3 methods on 1 tasks, 0.0 hours.\n")
    rows = {}
    for line in out.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        rows[tuple(cells[:2])] = cells[2:]
    # By infomax each seed chooses a. On the others it has 61.5, 61 and 60.5, where b has 70.5, 55.5
    # and 55: there a is the best, so the regrets are 9, 0 and 0. The gains are 8.5, 9 and 9.5.
    expected = ["3.0", "9.0", "+9.0", "+8.5", "0 of 3"]
    assert rows["infomax", "yes"][:5] == rows["default", "no"][:5] == expected
    # The ranks by infomax are none, b, a; by the figure b, none, a and then none, a, b twice.
    assert rows["infomax", "yes"][5] == "0.50"
    # None has 53, 52 and 51 there, beside bests of 70.5, 61 and 60.5.
    assert rows["no adaptation", "-"][:5] == ["12.0", "17.5", "+0.0", "+0.0", "0 of 3"]
    # The last step of a has 60.5, 60 and 59.5, that of b 69.5, 54.5 and 54: a loses 10, 1 and 1, b
    # 1, 6.5 and 6.5; a gains 7.5, 8 and 8.5, b 16.5, 2.5 and 3.
    last = rows["any adapted run, last step", "-"]
    assert last[:5] == ["4.3", "10.0", "+7.7", "+2.5", "0 of 6"]
    assert rows["always a, last step", "-"][:5] == ["4.0", "10.0", "+8.0", "+7.5", "0 of 3"]
    assert ("always none, last step", "-") not in rows
    page = tmp_path / "page.md"
    page.write_text("text\n")
    assert selection.main([str(file), "--out", str(page)]) == 0
    begin, end = "<!-- begin: selection -->", "<!-- end: selection -->"
    assert page.read_text() == f"text\n\n{begin}\n{out.strip()}\n{end}\n"
    with pytest.raises(UserError, match="--without: no task 'x'; there are A -> B"):
        selection.main([str(file), "--without", "x"])
    unlabeled = [Candidate(**{**vars(x), "selected": None}) for x in of_seeds()]
    file.write_text(to_csv(unlabeled))
    with pytest.raises(UserError, match="A -> B, none has no figure on the target with seed 0"):
        selection.main([str(file)])
    file.write_text(to_csv(of_seeds()[:-1]))
    with pytest.raises(UserError, match="A -> B, b has no figure on the target with seed 2"):
        selection.main([str(file)])
    file.write_text(to_csv([]))
    with pytest.raises(UserError, match="there is no run to measure"):
        selection.main([str(file)])
