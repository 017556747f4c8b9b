"""The choice among runs without target labels: scores, vetoes, the rule, and what it is worth."""

import csv
import io
import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import torch

from analysis.criteria import agreements, of_one_run
from analysis.suite_table import markdown
from common.errors import UserError
from training.evaluation import SOURCE_MARGIN, source_margin
from training.predictions import share_that_differs

SHOWN = 3  # classes of which a table shows the share
# Quantiles of Student's t for an interval of 95 %, by degrees of freedom; the last one beyond.
T95 = (12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)
T95 += (2.20, 2.18, 2.16, 2.14, 2.13, 2.12, 2.11, 2.10, 2.09, 2.09)


@dataclass
class Candidate:
    """One run among those that are chosen from.

    Args:
        task, method: its row in the suite.
        family: the method without the keys of a grid or a draw.
        seed: of the run.
        reference: whether it is the run without adaptation.
        judged: whether infomax is no part of its training loss.
        source_val: accuracy or mean IoU on held-out source images; None without a source.
        source_count: the number of labels that it is measured on.
        source_vetoes: whether it may rule the run out: only if no batch norm has learned, since
            figures with other statistics are not to be compared.
        alarm: the first collapse alarm of the run, or None.
        last, selected: the figure on the target's test images, for reports only; None without
            labels.
        infomax, neg_entropy, nuclear_norm, mano: see `analysis.criteria`.
        agreement: with the mean prediction of the candidates that are not vetoed.
        agreement_all: with that of all candidates.
        between_seeds: share of predictions that are of the same class as those of the same method
            on another seed, in the mean over the other seeds; None if there is no other run of the
            method with predictions on the same images.
        changed: share of predictions that are of another class than those without adaptation.
        shares: how often the most frequent classes are predicted.
        veto: why the run is not to be chosen; "" for a candidate.
        hours: of training.
    """

    task: str
    method: str
    family: str
    seed: int
    reference: bool
    judged: bool
    source_val: float | None
    source_count: int
    source_vetoes: bool
    alarm: str | None
    last: float | None
    selected: float | None
    infomax: float = 0.0
    neg_entropy: float = 0.0
    nuclear_norm: float = 0.0
    mano: float = 0.0
    agreement: float = 0.0
    agreement_all: float = 0.0
    between_seeds: float | None = None
    changed: float = 0.0
    shares: str = ""
    veto: str = ""
    hours: float = 0.0
    parameters: int | None = None


def reasons_against(candidate: Candidate, reference: Candidate, margin: float) -> str:
    """Why a run is not to be chosen, found without a target label; "" if nothing speaks against it.

    The reference is never vetoed. A run without source images has no source validation to lose.
    Where batch norm learns, in this run or in the reference, source validation may differ because
    the statistics do.
    """
    if candidate.reference:
        return ""
    reasons = []
    known = None not in (candidate.source_val, reference.source_val)
    if known and candidate.source_vetoes and reference.source_vetoes:
        least = reference.source_val - source_margin(reference.source_count, margin)
        if candidate.source_val < least:
            reasons.append(f"source validation {candidate.source_val:.1f} < {least:.1f}")
    if candidate.alarm:
        reasons.append(f"alarm: {candidate.alarm}")
    return "; ".join(reasons)


def set_vetoes(candidates: Sequence[Candidate], margin: float = SOURCE_MARGIN) -> None:
    """Fill in the vetoes of the candidates of one task, of all its seeds.

    What speaks against a method on one seed speaks against it on all: a method that is lost on one
    of two seeds is not to be trusted on the other. So does a run that has not finished.

    Args:
        candidates: each seed has its reference.
        margin: see `source_margin`.
    """
    references = {x.seed: x for x in candidates if x.reference}
    against = {
        (x.method, x.seed): reasons_against(x, references[x.seed], margin) for x in candidates
    }
    for candidate in candidates:
        reasons = {
            seed: against.get((candidate.method, seed), "not finished") for seed in references
        }
        own = reasons.pop(candidate.seed)
        others = [f"seed {seed}: {reason}" for seed, reason in reasons.items() if reason]
        if not candidate.reference:
            candidate.veto = "; ".join([own, *others] if own else others)


def score(
    candidates: Sequence[Candidate], logits: Sequence[torch.Tensor], classes: Sequence[str]
) -> None:
    """Fill in all scores but `between_seeds`, of the candidates of one task and seed.

    Args:
        candidates: with their vetoes; one of them is the reference.
        logits: (M, K) of each, on the same images.
        classes: the K class names.
    """
    (at,) = [i for i, candidate in enumerate(candidates) if candidate.reference]
    for candidate, x in zip(candidates, logits, strict=True):
        for name, value in of_one_run(x).items():
            setattr(candidate, name, value)
        candidate.changed = share_that_differs(x, logits[at])
        candidate.shares = describe_shares(x, classes)
    everything: dict[str, list[torch.Tensor]] = {}
    remaining: dict[str, list[torch.Tensor]] = {}
    for candidate, x in zip(candidates, logits, strict=True):
        everything.setdefault(candidate.family, []).append(x)
        if not candidate.veto:
            remaining.setdefault(candidate.family, []).append(x)
    both = [agreements(logits, list(x.values())) for x in (remaining, everything)]
    for candidate, agreement, agreement_all in zip(candidates, *both, strict=True):
        candidate.agreement, candidate.agreement_all = agreement, agreement_all


def describe_shares(logits: torch.Tensor, classes: Sequence[str]) -> str:
    """How often the most frequent classes are predicted, and which ones never are.

    Args:
        logits: (M, K).
        classes: the K class names.
    """
    shares = logits.argmax(1).bincount(minlength=len(classes)).double() / len(logits)
    order = shares.argsort(descending=True)[:SHOWN].tolist()
    text = ", ".join(f"{classes[k]} {100 * shares[k]:.0f} %" for k in order if shares[k] > 0)
    never = [name for name, share in zip(classes, shares.tolist(), strict=True) if share == 0]
    if not never:
        return text
    names = ", ".join(never[:SHOWN])
    return f"{text}; never {names}" + (", ..." if len(never) > SHOWN else "")


# --- rules


def highest(name: str) -> Callable[[Sequence[Candidate]], Candidate]:
    """The rule that takes the candidate with the highest score; unknown scores are lowest."""

    def rule(candidates: Sequence[Candidate]) -> Candidate:
        known = [(getattr(candidate, name), candidate) for candidate in candidates]
        return max(known, key=lambda pair: -1e9 if pair[0] is None else pair[0])[1]

    return rule


def of_one_seed(candidates: Sequence[Candidate]) -> Candidate:
    """The best by infomax of those that it judges, against the others by ensemble agreement.

    Infomax is no judge of a run that is trained on it. So the best of the others stands beside
    these, and the one that agrees most with the ensemble of all candidates is taken.
    """
    judged = [candidate for candidate in candidates if candidate.judged]
    best = [highest("infomax")(judged)] if judged else []
    return highest("agreement")([*best, *(c for c in candidates if not c.judged)])


def default_rule(candidates: Sequence[Candidate]) -> Candidate:
    """The one that agrees most between seeds if that is known of all, else `of_one_seed`."""
    return RULES[default_of(candidates)](candidates)


def default_of(candidates: Sequence[Candidate]) -> str:
    """The name of the rule that `default_rule` follows."""
    compared = all(candidate.between_seeds is not None for candidate in candidates)
    return "between_seeds" if compared else "one seed"


COMPOSED = {"default": default_rule, "one seed": of_one_seed}
RULES = {  # the others take the highest score
    **COMPOSED,
    "infomax": highest("infomax"),
    "neg_entropy": highest("neg_entropy"),
    "nuclear_norm": highest("nuclear_norm"),
    "mano": highest("mano"),
    "agreement": highest("agreement"),
    "between_seeds": highest("between_seeds"),
    "source_val": highest("source_val"),
}


def choose(candidates: Sequence[Candidate], rule: str = "default", veto: bool = True) -> Candidate:
    """The chosen run of one task and seed.

    Args:
        candidates: with their scores.
        rule: a name in `RULES`.
        veto: whether vetoed runs are left out. Without vetoes the ensemble is of all candidates.
    """
    if veto:
        return RULES[rule]([candidate for candidate in candidates if not candidate.veto])
    copies = [replace(candidate, agreement=candidate.agreement_all) for candidate in candidates]
    chosen = RULES[rule](copies)
    return next(c for c, copy in zip(candidates, copies, strict=True) if copy is chosen)


# --- what a choice is worth


@dataclass
class Worth:
    """What a choice is worth on one task, in points; None without target labels.

    Args:
        task: the task.
        method: the chosen one.
        seed: that of the choice.
        seeds: those that the figures are of.
        last, selected: means over the seeds of the chosen method's last and selected step.
        reference: mean of the selected step without adaptation.
        oracle: mean of the method that is best by target labels.
        oracle_method: its name.
        gains: `selected` minus that without adaptation, by seed.
    """

    task: str
    method: str
    seed: int
    seeds: list[int]
    last: float | None
    selected: float | None
    reference: float | None
    oracle: float | None
    oracle_method: str | None
    gains: list[float]

    @property
    def regret(self) -> float | None:
        return None if self.oracle is None else self.oracle - self.selected


def worth(candidates: Sequence[Candidate], chosen: Candidate) -> Worth:
    """What a choice among the runs of one seed of a task is worth on the other seeds.

    It is measured on the seeds of which the chosen method and the reference have a figure. With one
    seed it is that of the same runs. Predictions of the other seeds may have entered the
    choice, by `between_seeds`; their figures have not.

    Args:
        candidates: all runs of one task, of all seeds.
        chosen: one of them.
    """
    by_method: dict[str, dict[int, Candidate]] = {}
    for candidate in candidates:
        if candidate.selected is not None:
            by_method.setdefault(candidate.method, {})[candidate.seed] = candidate
    (name,) = {candidate.method for candidate in candidates if candidate.reference}
    known = by_method.get(chosen.method, {}).keys() & by_method.get(name, {}).keys()
    reported = sorted(known - {chosen.seed} or known)
    if not reported:
        return Worth(chosen.task, chosen.method, chosen.seed, [], *[None] * 5, [])
    complete = {
        method: [runs[seed] for seed in reported]
        for method, runs in by_method.items()
        if runs.keys() >= set(reported)
    }
    means = {
        method: statistics.fmean(run.selected for run in runs) for method, runs in complete.items()
    }
    best = max(means, key=means.get)
    runs, others = complete[chosen.method], complete[name]
    return Worth(
        task=chosen.task,
        method=chosen.method,
        seed=chosen.seed,
        seeds=reported,
        last=statistics.fmean(run.last for run in runs),
        selected=means[chosen.method],
        reference=means[name],
        oracle=means[best],
        oracle_method=best,
        gains=[run.selected - other.selected for run, other in zip(runs, others, strict=True)],
    )


def rank_correlation(first: Sequence[float], second: Sequence[float]) -> float:
    """Spearman's: the correlation of the ranks, where equal values share their mean rank.

    nan if all values of one are equal, or if there are fewer than two.
    """
    if len(first) < 2:
        return math.nan
    ranks = []
    for values in (first, second):
        x = torch.tensor(values, dtype=torch.float64)
        less, equal = (x[None] < x[:, None]).sum(1), (x[None] == x[:, None]).sum(1)
        ranks.append(less + (equal - 1) / 2)
    return float(torch.corrcoef(torch.stack(ranks).double())[0, 1])


def interval(values: Sequence[float]) -> str:
    """The mean and its interval of 95 % by Student's t, such as `+3.1 [+1.0, +5.2]`."""
    if not values:
        return "-"
    mean = statistics.fmean(values)
    if len(values) == 1:
        return f"{mean:+.1f}"
    freedom = len(values) - 1
    quantile = T95[min(freedom, len(T95)) - 1]
    half = quantile * statistics.stdev(values) / len(values) ** 0.5
    return f"{mean:+.1f} [{mean - half:+.1f}, {mean + half:+.1f}]"


# --- tables


def _cell(value: float | None, digits: int = 1) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def candidates_table(candidates: Sequence[Candidate], chosen: Candidate) -> str:
    """The candidates of one task and seed with what the choice is made from: no target figure."""
    head = ("method", "chosen", "source validation", "infomax", "neg_entropy", "nuclear norm")
    head = (*head, "MaNo", "agreement", "between seeds", "changed", "most predicted")
    head = (*head, "hours", "parameters", "veto")
    rows = [
        (
            candidate.method,
            "yes" if candidate is chosen else "",
            _cell(candidate.source_val),
            _cell(candidate.infomax, 3) + ("" if candidate.judged else " (trained on)"),
            _cell(candidate.neg_entropy, 3),
            _cell(candidate.nuclear_norm, 3),
            _cell(candidate.mano, 3),
            _cell(100 * candidate.agreement),
            "-" if candidate.between_seeds is None else _cell(100 * candidate.between_seeds),
            _cell(100 * candidate.changed),
            candidate.shares,
            _cell(candidate.hours, 2),
            "-" if candidate.parameters is None else f"{candidate.parameters / 1e6:.2f} M",
            candidate.veto or "-",
        )
        for candidate in candidates
    ]
    return markdown(head, rows)


def worth_table(worths: Sequence[Worth]) -> str:
    """One row per task: the chosen method, and what it is worth on the target's test labels."""
    head = ("task", "chosen", "on seed", "figures of", "last", "selected in the run")
    head = (
        *head,
        "no adaptation",
        "best method by target test labels (no result)",
        "regret",
        "gain and its interval",
    )
    rows = [
        (
            x.task,
            x.method,
            str(x.seed),
            " ".join(map(str, x.seeds)) or "-",
            _cell(x.last),
            _cell(x.selected),
            _cell(x.reference),
            "-" if x.oracle is None else f"{x.oracle:.1f} ({x.oracle_method})",
            _cell(x.regret),
            interval(x.gains),
        )
        for x in worths
    ]
    return markdown(head, rows)


def worth_summary(worths: Sequence[Worth]) -> str:
    """A sentence on the choices of all tasks with figures; "" without such a task.

    Each task counts once, with the mean over its choices.
    """
    by_task: dict[str, list[Worth]] = {}
    for x in worths:
        if x.selected is not None:
            by_task.setdefault(x.task, []).append(x)
    if not by_task:
        return ""
    gains = [statistics.fmean(statistics.fmean(x.gains) for x in y) for y in by_task.values()]
    regrets = [statistics.fmean(x.regret for x in y) for y in by_task.values()]
    worst = max(x.regret for of_task in by_task.values() for x in of_task)
    below = sum(gain < 0 for gain in gains)
    return (
        f"Mean gain over the tasks {interval(gains)}; mean regret {statistics.fmean(regrets):.1f}, "
        f"at most {worst:.1f}; {below} of {len(gains)} tasks end below the run without "
        "adaptation."
    )


# --- a file of candidates


def to_csv(candidates: Iterable[Candidate]) -> str:
    """A csv file with a row per candidate."""
    buffer = io.StringIO()
    names = [spec.name for spec in fields(Candidate)]
    writer = csv.DictWriter(buffer, names, lineterminator="\n")
    writer.writeheader()
    for candidate in candidates:
        row = asdict(candidate)
        shortened = {k: f"{v:.5g}" if isinstance(v, float) else v for k, v in row.items()}
        writer.writerow({k: "" if v is None else v for k, v in shortened.items()})
    return buffer.getvalue()


def from_csv(file: Path) -> list[Candidate]:
    """The candidates of a file that `to_csv` has written.

    Raises:
        UserError: it is not such a file.
    """
    kinds = {spec.name: spec.type for spec in fields(Candidate)}

    def read(name: str, text: str):
        kind = kinds[name]
        if text == "" and "None" in str(kind):
            return None
        if kind is bool:
            return text == "True"
        if kind in (int, int | None):
            return int(text)
        return float(text) if "float" in str(kind) else text

    try:
        rows = list(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))
        return [Candidate(**{k: read(k, v) for k, v in row.items()}) for row in rows]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: is no file of candidates ({error})") from None
