"""A look at the data of a config, before a run is lost on them: a report and a contact sheet.

    python -m data.check --config configs/own/images.yaml
    python -m data.check --config configs/own/images.yaml data.root=/disk/images --out sheet.png

Every image and every mask is read, in `data.workers` processes. The report has the images of each
class, their sizes, files that cannot be used, files with the same content, classes that differ
between the domains, the numbers in the masks, and names and numbers that look wrong. A line
`finding:` is about what would stop or mislead a run; the last line counts them. Of the config
the section `data` and `seed` are read, so that it may be one of any method. docs/data.md explains
the report. Exit code 0: nothing found; 1: findings; 2: the config is wrong.
"""

import argparse
import re
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from common.config import shorten
from common.errors import UserError, exit_with
from common.files import write_atomically
from data import suspicions
from data.config import DataConfig, DomainConfig, LabeledDataConfig, TargetDataConfig
from data.contact_sheet import Shown, contact_sheet
from data.copies import find_copies
from data.decoded import UnusableFiles
from data.domains import Domains, classes_of_run, open_domains
from data.listing import Listing
from data.parts import ROLES, Part, is_subset, listed_parts, opened_parts
from data.section import load_section
from data.survey import Survey
from data.tasks import task_module

MOST_GROUPS, MOST_IDS = 50, 60  # groups of copies, and numbers in masks, that are listed
TRANSPARENT = ("LA", "La", "PA", "RGBA", "RGBa")  # modes of PIL


@dataclass
class Report:
    """What is printed.

    Attributes:
        findings: sentences about what would stop or mislead a run, each once.
        notes: sentences about what is good to know.
    """

    findings: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def find(self, sentences: Sequence[str], hint: str = "") -> None:
        """Add findings. A run would stop with the sentence; the `hint` is added to it here."""
        for sentence in sentences:
            self.findings.setdefault(sentence, hint)

    def found_all(self, error: UserError) -> bool:
        """Whether all that an error of a run says is found already."""
        mistakes = error.mistakes if isinstance(error, UnusableFiles) else [str(error)]
        return all(mistake in self.findings for mistake in mistakes)

    def lines(self) -> list[str]:
        findings = [sentence + hint for sentence, hint in self.findings.items()]
        return [
            *(f"note: {_one_line(note)}" for note in self.notes),
            *(f"finding: {_one_line(finding)}" for finding in findings),
        ]


def _one_line(text: str) -> str:
    return "; ".join(line.strip() for line in text.splitlines())


def roles_of(config: DataConfig) -> dict[str, DomainConfig]:
    """The domains that a config names, by their places in it."""
    several = len(config.sources) > 1
    roles = {f"source[{i}]" if several else "source": x for i, x in enumerate(config.sources)}
    roles |= {"target": config.target, "target_test": config.target_test}
    return {role: domain for role, domain in roles.items() if domain is not None}


def list_domains(config: DataConfig, report: Report) -> dict[str, Listing]:
    """The files of each domain that can be listed; for others the report has a finding."""
    opener, listings = task_module(config), {}
    for role, domain in roles_of(config).items():
        try:
            listing = None
            if role == "target_test":  # its own test split, if it has one
                listing = opener.list_set(domain, role, config, False)
            listings[role] = listing or opener.list_set(domain, role, config, True)
        except UserError as error:
            report.find([str(error)])
    return listings


def list_labeled(
    config: DataConfig, listings: dict[str, Listing], classes: list[str] | None, report: Report
) -> None:
    """Add the images of a list file `data.target_labeled` to the listings."""
    are_files = "target" in listings and listings["target"].files
    if isinstance(config.target_labeled, str) and classes and are_files:
        try:
            opener = task_module(config)
            listings["target_labeled"] = opener.list_listed(config.target_labeled, config, classes)
        except UserError as error:
            report.find([str(error)])


def class_names(
    config: DataConfig, listings: dict[str, Listing], report: Report
) -> list[str] | None:
    """The classes of a run, by number; None if they are not known."""
    if isinstance(config, TargetDataConfig):
        if config.classes_from is None:
            report.find(["init_from is missing: the run to start from, which names the classes"])
            return None
        try:
            return classes_of_run(config.classes_from)
        except UserError as error:
            report.find([str(error)])
            return None
    role = "target" if isinstance(config, LabeledDataConfig) else next(iter(roles_of(config)))
    return listings[role].classes if role in listings else None


def compare_classes(
    config: DataConfig, listings: dict[str, Listing], classes: list[str] | None, report: Report
) -> None:
    """Report classes that differ from those of the run, and sets that lack labels."""
    for role, listing in listings.items():
        labels = task_module(config).LABELS
        if listing.labels is None and role.startswith("source"):
            report.find([f"{listing.name}: the source needs labels: {labels}"])
        elif listing.labels is None and isinstance(config, LabeledDataConfig) and role == "target":
            report.find([f"{listing.name}: fine-tuning needs labels: {labels}"])
        elif listing.labels is None and role == "target_test":
            report.find([f"{listing.name}: target_test needs labels"])
        elif listing.labels is not None and classes is not None:
            labeled_target = isinstance(config, LabeledDataConfig)
            to_source = labeled_target or role.startswith("source")
            remedy = "" if to_source else task_module(config).CLASSES_DIFFER
            absent = [] if to_source else config.absent_of(role) or []
            of = "target" if labeled_target else "source"
            message, hint = suspicions.class_difference(listing, classes, of, absent, remedy)
            report.find([message] if message else [], hint)
        report.notes += suspicions.near_classes(role, listing)


def suspect(
    config: DataConfig,
    listings: dict[str, Listing],
    classes: list[str] | None,
    survey: Survey,
    report: Report,
) -> None:
    """Report names and numbers that look wrong."""
    for role, domain in roles_of(config).items():
        if role not in listings:
            continue
        listing, sizes = listings[role], survey.sizes[survey.images[role]]
        report.find(suspicions.of_classes(role, domain, listing))
        report.find(suspicions.of_levels(role, domain, config, listing, classes or []))
        report.notes += suspicions.unused_labels(role, domain, listing, classes or [])
        if role != "target_test":
            different = set(map(tuple, sizes[sizes.all(1)].tolist()))
            report.find(suspicions.of_sizes(role, domain, config, listing, different))
        if role in survey.ids:
            findings, notes = suspicions.of_ids(role, listing, survey.ids[role])
            report.find(findings)
            report.notes += notes


def try_to_open(config: DataConfig, seed: int, report: Report) -> Domains | None:
    """The sets as a run opens them; None if it would refuse them, which is reported."""
    if isinstance(config, TargetDataConfig) and config.classes_from is None:
        return None
    try:
        return open_domains(config, seed, dry_run=True)
    except UserError as error:
        if report.found_all(error):
            report.notes.append(
                "the sets could not be split as a run does, because of the findings; "
                "correct them and look again"
            )
        report.find(error.mistakes if isinstance(error, UnusableFiles) else [str(error)])
        return None


def describe_files(role: str, listing: Listing, survey: Survey) -> str:
    """A line about the images of a set: their number, sizes and modes."""
    text = f"{role:14} {listing.name}: {len(listing)} images"
    if not listing.files:
        channels, height, width = listing.images.shape[1:]
        return f"{text} of {channels}x{height}x{width}, which are not one file each"
    numbers = survey.images[role]
    sizes = survey.sizes[numbers]
    sizes = sizes[sizes.all(1)]
    if len(sizes):
        order = np.argsort(sizes.astype(np.int64).prod(1), kind="stable")
        shown = ["x".join(map(str, sizes[order[i]])) for i in (0, (len(order) - 1) // 2, -1)]
        text += (
            f", {shown[0]} px"
            if len(np.unique(sizes, axis=0)) == 1
            else (f", smallest {shown[0]}, median {shown[1]}, largest {shown[2]} px")
        )
    modes = Counter(survey.modes[number] or "unreadable" for number in numbers.tolist())
    text += f", {', '.join(f'{mode} {count}' for mode, count in modes.most_common())}"
    if turned := int(survey.turned[numbers].sum()):
        text += f", {turned} turned by EXIF"
    return text + (f"; {listing.skipped}" if listing.skipped else "")


def note_modes(listings: dict[str, Listing], survey: Survey, report: Report) -> None:
    for role in listings:
        count = sum(survey.modes[n] in TRANSPARENT for n in survey.images[role].tolist())
        if count:
            report.notes.append(
                f"{role}: {count} of {len(listings[role])} images have a channel of transparency, "
                "which is dropped: the network sees the colors below it"
            )


def note_parts(config: DataConfig, parts: dict[str, Part], report: Report) -> None:
    """Tell of sets that are smaller than a batch, and of a test set that is seen in training."""
    test, target = parts.get("target_test"), parts.get("target")
    if config.target_test and target and test and is_subset(test, target):
        report.notes.append("target_test: its images are those of target: transductive")
    for role in ("source", "target", "target_labeled"):
        if role in parts and parts[role].size < (batch := config.batch_of(role)):
            report.notes.append(
                f"a batch of {role} has {batch} images and the set {parts[role].size}: they repeat"
            )


def table(head: list[str], rows: list[list[str]]) -> list[str]:
    """Lines of a table; the first column is aligned to the left."""
    widths = [max(len(row[k]) for row in [head, *rows]) for k in range(len(head))]
    return [
        "  ".join(
            cell.ljust(width) if k == 0 else cell.rjust(width)
            for k, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in [head, *rows]
    ]


def count_table(
    parts: dict[str, Part], classes: list[str] | None, config: DataConfig, opened: bool
) -> list[str]:
    """Images per class and set; without classes, images per set.

    Args:
        parts: the sets by role.
        classes: the class names of a run, whose order the rows have.
        config: the section `data`.
        opened: whether the sets are split as a run does; otherwise some are not known.
    """
    counted = [part.counts for part in parts.values() if part.counts is not None]
    names = list(classes or []) if counted else []
    names += sorted({name for counts in counted for name in counts} - set(names))
    empty = dict.fromkeys(ROLES, "-" if opened else "?")
    if config.target_labeled is None:
        empty["target_labeled"] = "-"
    if not config.sources:
        empty["source"] = empty["source_val"] = "-"

    def cell(role: str, name: str) -> str:
        if role not in parts:
            return empty[role]
        return "-" if parts[role].counts is None else str(parts[role].counts[name])

    rows = [[name, *(cell(role, name) for role in ROLES)] for name in names]
    totals = [str(parts[role].size) if role in parts else empty[role] for role in ROLES]
    return table(["class" if names else "", *ROLES], [*rows, ["all images", *totals]])


def id_tables(listings: dict[str, Listing], survey: Survey) -> list[str]:
    """The numbers in the masks of each set: their classes and shares."""
    lines = []
    for role, ids in survey.ids.items():
        listing, pixels = listings[role], max(sum(ids.pixels.values()), 1)
        rows = []
        for number, count in sorted(ids.pixels.items()):
            name = suspicions.meaning(listing, number) or "NOT DEFINED"
            share = f"{100 * count / pixels:.2f} %"
            number_of_masks = str(ids.masks[number])
            rows.append([f"{suspicions.shown_number(number)} {name}", share, number_of_masks])
        head = [f"number in masks of {role}", "pixels", f"masks (of {ids.count}, all read)"]
        more = [f"and {len(rows) - MOST_IDS} more numbers"] if len(rows) > MOST_IDS else []
        lines += ["", *table(head, rows[:MOST_IDS]), *more]
    return lines


def shown_sets(listings: dict[str, Listing], config: DataConfig, survey: Survey) -> list[Shown]:
    """The sets of the contact sheet, from top to bottom."""
    sets = []
    for role, listing in listings.items():
        usable = np.ones(len(listing), bool)
        if listing.files:
            usable = survey.usable[survey.images[role]].copy()
        if isinstance(listing.masks, list):
            usable &= survey.usable[survey.masks[role]]
        title = f"{role}: {listing.name}, {len(listing)} images"
        trains = role != "target" or isinstance(config, LabeledDataConfig)
        if listing.labels is not None and not trains:
            title += " (labels do not train)"
        sets.append(Shown(title, role, listing, usable))
    return sets


def check(config: DataConfig, seed: int, sheet: Path, report: Report) -> None:
    """Print the report on the data, and write the contact sheet.

    Args:
        config: the section `data`.
        seed: of the splits, and of the images on the sheet.
        sheet: the file of the contact sheet.
        report: to which findings and notes are added.
    """
    listings = list_domains(config, report)
    classes = class_names(config, listings, report)
    list_labeled(config, listings, classes, report)
    compare_classes(config, listings, classes, report)
    survey = Survey(listings, config)
    report.find(survey.mistakes)
    suspect(config, listings, classes, survey, report)
    note_modes(listings, survey, report)
    domains = try_to_open(config, seed, report)
    opened = domains is not None
    parts = opened_parts(domains, listings, survey) if opened else listed_parts(listings, survey)
    note_parts(config, parts, report)
    copies = find_copies(parts, survey, config.target_is_source())
    report.find(copies.findings)
    report.notes += copies.notes

    print(f"seed {seed}, data.root: {config.root}; sizes: height x width")
    for role, listing in listings.items():
        print(describe_files(role, listing, survey))
    if parts:
        print("", *count_table(parts, classes, config, opened), sep="\n")
    if "target" in parts and parts["target"].counts is not None:
        print("target: the labels of its files are counted here; they do not train")
    if opened:
        print(f"target_test: {domains.target_test_note}")
    for line in id_tables(listings, survey):
        print(line)
    if copies.groups:
        print("\nfiles with the same content", *copies.groups[:MOST_GROUPS], sep="\n  ")
        if len(copies.groups) > MOST_GROUPS:
            print(f"  and {len(copies.groups) - MOST_GROUPS} more groups")
    print("", *report.lines(), sep="\n")
    if not listings:
        print("no contact sheet, since no set could be listed")
        return
    picture = contact_sheet(shown_sets(listings, config, survey), seed)
    try:
        write_atomically(sheet, lambda file: picture.save(file, format="png"))
    except UserError as error:
        remedy = "name another file by --out"
        raise UserError(str(error).replace("choose another out_dir", remedy), error.code) from None
    print(f"contact sheet: {sheet}")


class _Parser(argparse.ArgumentParser):
    def error(self, message: str):
        raise UserError(f"{message}; --help lists the options")


def parse_args(argv: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(
        prog="python -m data.check",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    files_help = "yaml files, of which later ones win; see configs/"
    parser.add_argument("--config", nargs="+", action="extend", metavar="FILE", help=files_help)
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="override a key")
    out_help = "the contact sheet, a png, which replaces an existing file (default %(default)s)"
    parser.add_argument("--out", default="data_check.png", metavar="FILE", help=out_help)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    # argparse gives all words that follow --config to it, so the overrides go first.
    overrides = [word for word in argv if re.match(r"\w[\w.-]*=", word)]
    others = [word for word in argv if word not in overrides]
    args = parser.parse_intermixed_args([*overrides, *others])
    if not args.config:
        raise UserError("--config is missing; name yaml files, as --config configs/own/images.yaml")
    if not args.out.lower().endswith(".png"):
        raise UserError(f"--out: {shorten(args.out)} is no name of a png file; end it in .png")
    return args


def main(argv: Sequence[str] | None = None) -> int:
    args = parse_args(sys.argv[1:] if argv is None else argv)
    config, notes = load_section(args.config, args.overrides)
    report = Report(notes=notes)
    check(config.data, config.seed, Path(args.out), report)
    count = len(report.findings)
    print("no findings" if count == 0 else f"{count} finding{'s' * (count > 1)}")
    return 1 if count else 0


if __name__ == "__main__":
    exit_with(main)
