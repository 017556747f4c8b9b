"""Image files that have the content of others, in one set or in two that should share nothing.

An image that is in two sets under one path is there by the config, and no copy.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from data.decoded import SHOWN
from data.parts import Part, is_subset
from data.survey import Survey

NAMES = 5  # files of one group that a line names


class Copies(NamedTuple):
    """What is to be told of copies.

    Attributes:
        findings: sentences about copies that mislead.
        notes: sentences about others.
        groups: a line for each group of files with the same content.
    """

    findings: list[str]
    notes: list[str]
    groups: list[str]


class Leak(NamedTuple):
    """Two parts of the data that should share no image.

    Attributes:
        first, second: the sets, as `source`; several are written `source+source_val`.
        why: what is wrong if the second has images of the first.
        same_file: whether one file in both is wrong, too.
    """

    first: str
    second: str
    why: str
    same_file: bool


TRAINED = "which train with their labels, so that the figure is too good"


def leaks(parts: dict[str, Part], target_is_source: bool) -> Iterator[Leak]:
    """The pairs of sets to compare.

    Args:
        parts: the sets by role.
        target_is_source: whether the target's images are those of a source, by the config.
    """
    test, target = parts.get("target_test"), parts.get("target")
    transductive = test is not None and target is not None and is_subset(test, target)
    yield Leak("source", "source_val", TRAINED, True)
    if target_is_source:  # its held-out images are the target's
        yield Leak("source", "target_test", TRAINED, True)
    else:
        why = "which train with their labels: the domains are not apart"
        yield Leak("source+source_val", "target", why, False)
        if not transductive:
            yield Leak("source+source_val", "target_test", TRAINED, True)
    yield Leak("target_labeled", "target_test", TRAINED, True)
    if not transductive:
        yield Leak("target", "target_test", "which train without their labels", False)


def find_copies(parts: dict[str, Part], survey: Survey, target_is_source: bool) -> Copies:
    """Compare the files of all sets.

    Args:
        parts: the sets by role.
        survey: the files.
        target_is_source: whether the target's images are those of a source, by the config.
    """
    roles: dict[int, dict[str, str | bytes | None]] = {}  # file -> role -> label
    for role, part in parts.items():
        if part.files is not None:
            labels = part.labels or [None] * part.size
            for number, label in zip(part.files.tolist(), labels, strict=True):
                roles.setdefault(number, {})[role] = label
    groups = _groups(survey, roles)
    findings = []
    for leak in leaks(parts, target_is_source):
        findings += _leak(leak, parts, groups, survey)
    conflicts = [text for text in (_conflict(g, roles, survey) for g in groups) if text]
    conflicts += [text for text in (_conflict([n], roles, survey) for n in roles) if text]
    if len(conflicts) > SHOWN:
        conflicts[SHOWN:] = [f"and {len(conflicts) - SHOWN} more contents have different labels"]
    notes = [note for role in parts for note in _within(role, groups, roles, survey)]
    return Copies(findings + conflicts, notes, [_line(g, roles, survey) for g in groups])


def _groups(survey: Survey, roles: dict) -> list[list[int]]:
    """The files that have the same content, for each content of several files."""
    groups: dict[bytes, list[int]] = {}
    for number in roles:
        if digest := survey.digests.get(number):
            groups.setdefault(digest, []).append(number)
    return [group for group in groups.values() if len(group) > 1]


def _files(parts: dict[str, Part], roles: str) -> set[int]:
    numbers = (parts[role].files for role in roles.split("+") if role in parts)
    return set(np.concatenate([x for x in numbers if x is not None] or [[]]).tolist())


def _leak(leak: Leak, parts: dict, groups: list[list[int]], survey: Survey) -> list[str]:
    """Sentences about the images that two sets share."""
    first, second = _files(parts, leak.first), _files(parts, leak.second)
    if not first or not second:
        return []
    shared, name = sorted(first & second), leak.first.partition("+")[0]
    if leak.same_file and shared:
        return [
            f"{leak.second}: {len(shared)} of {len(second)} images are also in {name}, "
            f"{leak.why} (first: {survey.paths[shared[0]]}); name each image in one set"
        ]
    pairs = []
    for group in groups:
        copied = [number for number in group if number in first]
        for number in group:
            others = [other for other in copied[:2] if other != number]
            if number in second and others:
                pairs.append((number, others[0]))
    if not pairs:
        return []
    number, other = pairs[0]
    shown = f"{survey.paths[number]} = {survey.paths[other]}"
    return [
        f"{leak.second}: {len(pairs)} of {len(second)} images have copies in {name}, "
        f"{leak.why} (first: {shown}); remove them from one of the two"
    ]


def _conflict(group: list[int], roles: dict, survey: Survey) -> str:
    """A sentence about two different labels of one content, or an empty text.

    Masks are compared within a domain, since the numbers in those of two may differ in meaning.
    """
    firsts: dict[str, tuple] = {}
    for number in group:
        for role, label in roles[number].items():
            if label in (None, b""):
                continue
            named = isinstance(label, str)
            first = firsts.setdefault("" if named else role.removesuffix("_val"), (number, label))
            if label != first[1]:
                pair = [
                    f"{survey.paths[n]}{f' ({x})' if named else ''}"
                    for n, x in (first, (number, label))
                ]
                what = "labels" if named else "masks"
                return (
                    f"{pair[0]} and {pair[1]} have the same content and different {what}; "
                    "correct or remove one of them"
                )
    return ""


def _within(role: str, groups: list[list[int]], roles: dict, survey: Survey) -> list[str]:
    """A sentence about copies within one set, if there are any."""
    pairs = []
    for group in groups:
        inside = [number for number in group if role in roles[number]]
        pairs += [(inside[0], other) for other in inside[1:]]
    if not pairs:
        return []
    first, other = (survey.paths[number] for number in pairs[0])
    return [
        f"{role}: {len(pairs)} of its images repeat another one, which counts more than once "
        f"(first: {first} = {other})"
    ]


def _line(group: list[int], roles: dict, survey: Survey) -> str:
    def shown(number: int) -> str:
        labels = [label for label in roles[number].values() if isinstance(label, str)]
        return f"{survey.paths[number]} ({', '.join([*roles[number], *labels[:1]])})"

    more = [f"and {len(group) - NAMES} more"] if len(group) > NAMES else []
    return " = ".join([*map(shown, group[:NAMES]), *more])
