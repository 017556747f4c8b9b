"""The table of a suite: a row per entry, with mean and standard deviation over the seeds."""

import collections
import shlex
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path

from analysis.suites import Entry, Suite
from common.errors import UserError
from common.metrics import main_metric

ORACLE = "oracle (chosen on target test labels: no result)"
COLUMNS = ("task", "method", "seeds", "last", "selected", ORACLE)
LAST_COLUMNS = ("seconds", "published")
# In place of figures, if the target has no labels.
UNLABELED = ("task", "method", "seeds", "source validation", "infomax", "neg_entropy")
UNLABELED += ("collapsed", "seconds")
UNKNOWN_COMMIT = "an unknown commit"


def figure(values: list[float | None]) -> str:
    """`mean +- sample standard deviation`; one value alone has no deviation.

    `-` if there is no value, or an unknown one among them.
    """
    if not values or None in values:
        return "-"
    spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.1f}{spread}"


def distinct(values: Iterable) -> str:
    return ", ".join(str(value) for value in sorted(set(values))) or "-"


def selection(pairs: list[tuple[str, dict]]) -> str:
    """Sentences on what picked the selected steps, and which methods it cannot judge.

    Args:
        pairs: (method, summary) of each run.
    """
    names = {summary["selection"]["criterion"] for _, summary in pairs}
    part = [method for method, summary in pairs if summary["selection"]["part_of_training_loss"]]
    sentences = []
    if criteria := names - {"neg_val_loss", "last"}:
        no_judge = f", which for {distinct(part)} is part of the training loss and no judge"
        by = f"by {distinct(criteria)}{no_judge if part else ''}"
        sentences.append(f"Selected without target labels {by}.")
    if "last" in names:
        last = [method for method, summary in pairs if summary["selection"]["criterion"] == "last"]
        sentences.append(f"The last step is selected for {distinct(last)}.")
    if lost := [method for method, summary in pairs if "last" in summary.get("collapsed", ())]:
        runs = f"{len(lost)} of {len(pairs)} runs"
        sentences.append(f"At the last step the predictions of {runs} collapsed: {distinct(lost)}.")
    if "neg_val_loss" in names:
        sentences.append(
            "Selected by neg_val_loss, on the labels of the very images that the figures are "
            "computed on: no test figures."
        )
    return " ".join(sentences)


def commits(summaries: list[dict]) -> list[str]:
    """The commits that the runs were trained by."""
    return sorted({summary.get("commit") or UNKNOWN_COMMIT for summary in summaries})


def commit_note(names: list[str]) -> str:
    """`commit abc1234`, `an unknown commit`, or `commits abc1234, def5678 (mixed)`."""
    if len(names) > 1:
        return f"commits {', '.join(names)} (mixed)"
    return UNKNOWN_COMMIT if names == [UNKNOWN_COMMIT] else f"commit {distinct(names)}"


def budget(suite: Suite) -> list[str]:
    """A sentence on how many runs each method has per seed, if one has a grid or draws."""
    counts = collections.Counter((entry.task, entry.family) for entry in suite.runs)
    if max(counts.values()) == 1:
        return []
    per_method: dict[str, set[int]] = {}
    for (_, family), count in counts.items():
        per_method.setdefault(family, set()).add(count)
    parts = [f"{family} {distinct(sizes)}" for family, sizes in per_method.items()]
    return [f"Runs per task and seed: {', '.join(parts)}."]


def markdown(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[cell.replace("|", r"\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


class Table:
    """The finished runs of a suite, as the rows of a markdown table.

    Args:
        suite: whose entries are the rows.
        results: {seed: summary} of the finished runs, one dict per entry.
        seeds: all that were asked for.
    """

    def __init__(self, suite: Suite, results: list[dict[int, dict]], seeds: list[int]):
        self.suite, self.seeds = suite, seeds
        self.results = results
        self.by_name = {
            (entry.task, entry.method): summaries
            for entry, summaries in zip(suite.runs, results, strict=True)
        }
        summaries = [summary for of_entry in results for summary in of_entry.values()]
        labeled = [self._is_labeled(summary) for summary in summaries]
        self.unlabeled = bool(summaries) and not any(labeled)

    def _is_labeled(self, summary: dict) -> bool:
        """Whether the target has labels to measure with."""
        return summary["target"]["last"].get(main_metric(summary["target"]["last"])) is not None

    def metric(self, summary: dict) -> str:
        """The name of the metric that the figures are of."""
        return self.suite.metric or main_metric(summary["target"]["last"])

    def value(self, summary: dict, name: str) -> float | None:
        """The figure of an evaluation: `last`, `selected` or `oracle`."""
        return summary["target"][name].get(self.metric(summary))

    def difference(self, entry: Entry, summaries: dict[int, dict], baseline: str) -> str:
        """Mean and deviation of `last` minus that of the baseline's run of the same seed.

        `-` for the baseline itself, for an entry that is not compared with it, and where a seed has
        no run of both.
        """
        others = self.by_name.get((entry.task, baseline), {})
        if baseline not in entry.baselines or entry.method == baseline or not others:
            return "-"
        if summaries.keys() != others.keys():
            return "-"
        pairs = [
            (self.value(summary, "last"), self.value(others[seed], "last"))
            for seed, summary in summaries.items()
        ]
        if any(None in pair for pair in pairs):
            return "-"
        text = figure([value - other for value, other in pairs])
        return text if text.startswith(("-", "0.0")) else f"+{text}"

    def row(self, entry: Entry, summaries: dict[int, dict]) -> tuple[str, ...]:
        """The cells of an entry, in the order of `columns`."""
        complete = len(summaries) == len(self.seeds)
        count = str(len(self.seeds)) if complete else f"{len(summaries)} of {len(self.seeds)}"
        seconds = [summary["seconds"] for summary in summaries.values()]
        mean_seconds = f"{statistics.fmean(seconds):.0f}" if seconds else "-"
        if self.unlabeled:
            labels_free = self._without_labels(list(summaries.values()))
            return (entry.task, entry.method, count, *labels_free, mean_seconds)
        figures = [
            figure([self.value(summary, name) for summary in summaries.values()])
            for name in ("last", "selected", "oracle")
        ]
        differences = [self.difference(entry, summaries, name) for name in self.suite.baselines]
        published = "-" if entry.published is None else f"{entry.published} ({entry.reference})"
        cells = entry.task, entry.method, count, *figures, *differences
        return (*cells, mean_seconds, published)

    def _without_labels(self, summaries: list[dict]) -> tuple[str, ...]:
        """What runs on an unlabeled target have in place of figures, of the selected step."""
        # A run of an earlier version does not say it.
        source_val, *criteria = (
            [summary["selection"].get(name) for summary in summaries]
            for name in ("source_val", "infomax", "neg_entropy")
        )
        means = (
            "-" if not values or None in values else f"{statistics.fmean(values):.3f}"
            for values in criteria
        )
        alarmed = sum(bool(s["collapse_alarms"] or s["collapsed"]) for s in summaries)
        return figure(source_val), *means, f"{alarmed} of {len(summaries)}"

    def caption(self, summaries: list[dict]) -> str:
        """What the figures are, and on which images they are measured."""
        labeled = [summary for summary in summaries if self.value(summary, "last") is not None]
        if summaries and not labeled:
            return (
                "The target has no labels, so there are no figures of it. Source validation, "
                "infomax and neg_entropy are those of the selected step; collapsed: runs with a "
                "collapse alarm (docs/selection.md)."
            )
        tests = distinct(summary["target_test"] for summary in labeled)
        unlabeled = " `-`: the target has no labels." if len(labeled) < len(summaries) else ""
        return (
            f"Target {distinct(map(self.metric, summaries))} in percent on {tests}: "
            f"mean +- sample standard deviation over the seeds.{unlabeled}"
        )

    def columns(self) -> tuple[str, ...]:
        if self.unlabeled:
            return UNLABELED
        differences = [f"minus {name}" for name in self.suite.baselines]
        return (*COLUMNS, *differences, *LAST_COLUMNS)

    def markdown(self) -> str:
        """The header and one line per entry."""
        rows = [self.row(*pair) for pair in zip(self.suite.runs, self.results, strict=True)]
        return markdown(self.columns(), rows)


def report(suite: Suite, results: list[dict[int, dict]], seeds: list[int], argv: list[str]) -> str:
    """The results as a markdown table, with what it takes to get them again.

    Args:
        suite, results, seeds: see `Table`.
        argv: the command line, for the last paragraph.
    """
    table = Table(suite, results, seeds)
    pairs = [
        (entry.method, summary)
        for entry, summaries in zip(suite.runs, results, strict=True)
        for summary in summaries.values()
    ]
    summaries = [summary for _, summary in pairs]
    machines = distinct(summary.get("machine", "an unknown machine") for summary in summaries)
    paired = (
        "The columns `minus` compare the last step with that of the named row, seed by seed. "
        if suite.baselines and not table.unlabeled
        else ""
    )
    parts = [
        f"**{suite.title}**",
        *budget(suite),
        table.markdown(),
        f"{table.caption(summaries)} {paired}{selection(pairs)} Seconds are the mean over the runs."
        if summaries
        else "No run has finished.",
        *(text.strip() for text in (suite.tuned, suite.note) if text),
        f"Written by `{shlex.join(['python', 'reproduce.py', *argv])}`: "
        f"seeds {' '.join(map(str, seeds))}; "
        f"steps {distinct(summary['steps'] for summary in summaries)}; "
        f"{commit_note(commits(summaries))}; on {machines}.",
    ]
    return "\n\n".join(parts)


def place(path: Path, name: str, block: str) -> str:
    """The text of `path` with `block` between the markers of `name`.

    If the file has no such markers, they are appended with the block.

    Raises:
        UserError: the file cannot be read, or its markers are not one pair.
    """
    try:
        text = path.read_bytes().decode() if path.exists() else ""
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not utf-8 text"
        raise UserError(f"--out: {path} cannot be read ({reason})") from None
    begin, end = f"<!-- begin: {name} -->", f"<!-- end: {name} -->"
    marked = f"{begin}\n{block}\n{end}"
    if begin not in text and end not in text:
        return f"{text}\n{marked}\n" if text else f"{marked}\n"
    if text.count(begin) != 1 or text.count(end) != 1 or text.index(begin) > text.index(end):
        raise UserError(f"--out: {path} must contain {begin} and {end} once each, in this order")
    return text[: text.index(begin)] + marked + text[text.index(end) + len(end) :]
