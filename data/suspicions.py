"""What looks wrong in the names and numbers of a set, though each of its files can be used."""

import difflib
import os
import re
from collections import Counter
from pathlib import Path

import torch

from common.errors import UserError
from data.config import DataConfig, DomainConfig
from data.id_maps import UNKNOWN
from data.image_set import ImageSet
from data.listing import Listing
from data.survey import OUTSIDE, Ids

LIKE = 0.85  # ratio of difflib from which two names are near
UNEQUAL = 20  # images of the largest class per image of the smallest from which they are told
SHOWN = 20  # numbers that one sentence names
MASK_FOLDERS = {
    "mask", "masks", "label", "labels", "annotation", "annotations", "gt", "gtfine", "gtcoarse",
    "segmentation",
}  # fmt: skip
NOT_CLASSES = MASK_FOLDERS | {  # names of splits, and of folders of all images
    "train", "training", "val", "valid", "validation", "test", "testing", "image", "images", "img",
    "imgs", "jpegimages", "data", "dataset", "source", "target",
}  # fmt: skip


def normal(name: str) -> str:
    """A class name in lower case, without signs, and in the singular."""
    letters = re.sub(r"[\W_]+", "", name.casefold())
    return re.sub(r"(?<=\w\w)(ies|es|s)$", lambda end: "y" if end[0] == "ies" else "", letters)


def near_names(here: list[str], there: list[str]) -> list[tuple[str, str]]:
    """Pairs of names that differ in case, signs, number or a few letters, but not in digits."""
    pairs, by_normal = [], {normal(name): name for name in there}
    for name in here:
        for near in difflib.get_close_matches(normal(name), by_normal, 3, LIKE):
            if re.findall(r"\d+", name) == re.findall(r"\d+", by_normal[near]):
                pairs.append((name, by_normal[near]))
                break
    return pairs


def class_difference(
    listing: Listing, classes: list[str], of: str, absent: list[str], remedy: str
) -> tuple[str, str]:
    """How the classes of a set differ from those of another, as a run refuses them.

    Args:
        listing: the set.
        classes: the class names of the other set.
        of: the role of the other set.
        absent: classes that the set may lack.
        remedy: what to do.

    Returns:
        (the message of a run, a hint at near names to append); empty texts where nothing differs.
    """
    contents = listing.name, listing.images, listing.labels, listing.classes
    try:
        ImageSet(*contents, torch.arange(len(listing))).relabeled(classes, of, absent, remedy)
    except UserError as error:
        here = [name for name in listing.classes if name not in classes]
        there = [name for name in classes if name not in listing.classes]
        pairs = ", ".join(f"{a} (the {of}: {b})" for a, b in near_names(here, there))
        return str(error), f"; if they are the same classes, rename {pairs}" if pairs else ""
    return "", ""


def of_classes(role: str, domain: DomainConfig, listing: Listing) -> list[str]:
    """Findings about the classes of a set of images with one class each."""
    if listing.class_numbers is None:
        return []
    findings, where = [], f"data.{role}.path: {domain.path}" if domain.path else f"data.{role}"
    odd = [name for name in listing.classes if name.casefold() in NOT_CLASSES]
    if odd and domain.name == "folder":
        findings.append(
            f"{where}: among its classes are names of splits or of folders of all images "
            f"({_list(odd)}): is the path a level too high or too low? name the folder that "
            "contains the folders of the classes"
        )
    counts = Counter(listing.class_numbers.tolist())
    (largest, most), (smallest, least) = counts.most_common()[0], counts.most_common()[-1]
    if most >= UNEQUAL * least:
        names = listing.classes
        findings.append(
            f"{where}: the smallest class, {names[smallest]}, has {least} of {len(listing)} "
            f"images, the largest, {names[largest]}, {most}: is the folder a stray one? remove it, "
            "add images, or read the accuracy of each class"
        )
    return findings


def near_classes(role: str, listing: Listing) -> list[str]:
    """Notes about names within one set that may stand for one class."""
    by_normal: dict[str, list[str]] = {}
    for name in listing.classes or ():
        by_normal.setdefault(normal(name), []).append(name)
    return [
        f"{role}: {_list(names)} are classes of their own, with nearly the same name"
        for names in by_normal.values()
        if len(names) > 1
    ]


def of_levels(
    role: str, domain: DomainConfig, config: DataConfig, listing: Listing, classes: list[str]
) -> list[str]:
    """Findings about the level of the folder of a set without labels, or with masks.

    Args:
        role: its place in the config.
        domain: its section of the config.
        config: the section `data`.
        listing: the set.
        classes: the class names of the source, or none.
    """
    if domain.name != "folder" or listing.class_numbers is not None:
        return []  # a folder per class shows its level
    folder = Path(config.root, domain.path)
    where, known = f"data.{role}.path: {domain.path}", {normal(name) for name in classes}
    if listing.by_pixel:
        below = Counter(
            part
            for path in listing.files
            for part in {part.casefold() for part in path.relative_to(folder).parts[:-1]}
        )
        odd = sorted(below.keys() & MASK_FOLDERS)
        return [
            f"{where}: {below[name]} of its {len(listing)} images lie in a folder {name}: is the "
            "path a level too high, with masks in it? name the folder of the images"
            for name in odd
        ]
    if normal(os.path.basename(os.path.normpath(folder))) in known:
        return [
            f"{where}: has the name of a class of the source, and only images of one class: is it "
            f"a level too low? name {folder.parent}"
        ]
    return []


def unused_labels(
    role: str, domain: DomainConfig, listing: Listing, classes: list[str]
) -> list[str]:
    """Notes about folders that have the names of classes, in a set that is read as unlabeled.

    Args:
        role: its place in the config.
        domain: its section of the config.
        listing: the set.
        classes: the class names of the source, or none.
    """
    if domain.labels or not classes:
        return []
    known = set(map(normal, classes))
    named = sorted(name for name in {x.parent.name for x in listing.files} if normal(name) in known)
    if len(named) * 2 <= len(classes):
        return []
    return [
        f"{role}: is read as unlabeled (labels: false), but its folders {_list(named)} have the "
        "names of classes of the source; to measure on them, name the folder right above them and "
        "leave labels out"
    ]


def of_sizes(
    role: str,
    domain: DomainConfig,
    config: DataConfig,
    listing: Listing,
    sizes: set[tuple[int, int]],
) -> list[str]:
    """Findings about a training set of entire images that cannot share a batch.

    Args:
        role: its place in the config.
        domain: its section of the config.
        config: the section `data`.
        listing: the set.
        sizes: (height, width) of its images.
    """
    fixed = not listing.by_pixel or domain.crop or domain.resize
    if fixed or len(sizes) < 2 or config.batch_of(role.partition("[")[0]) == 1:
        return []
    return [
        f"data.{role}: its images have {len(sizes)} sizes, and a batch has one; "
        f"set data.{role}.crop or resize, or data.batch: 1"
    ]


def of_ids(role: str, listing: Listing, ids: Ids) -> tuple[list[str], list[str]]:
    """(findings, notes) about the numbers in the masks of a set."""
    findings, classes = [], listing.classes
    meanings = {number: meaning(listing, number) for number in ids.pixels}
    undefined = sorted(number for number, name in meanings.items() if name is None)
    if undefined:
        masks = max(ids.masks[number] for number in undefined)
        shown = ", ".join(map(shown_number, undefined[:SHOWN])) + " ..." * (len(undefined) > SHOWN)
        findings.append(
            f"data.{role}.ids: does not define {shown}, which up to {masks} of {ids.count} masks "
            f"contain (first: {ids.first[undefined[0]]}); add each to a class or to void"
        )
    missing = [name for name in classes if name not in meanings.values()]
    if missing and ids.count:
        text = f"no mask has a pixel of {_list(missing)}"
        if role.startswith("source"):
            findings.append(
                f"data.{role}.ids: {text}, which cannot be learned; correct its numbers, "
                "or take it out of the ids of all domains"
            )
        else:
            return findings, [f"{role}: {text}, which does not count in the mean IoU"]
    return findings, []


def meaning(listing: Listing, number: int) -> str | None:
    """The class of a number in a mask, "void", or None for a number that is not defined."""
    if listing.decode_mask is None:  # drawn masks contain class numbers
        return listing.classes[number] if number < len(listing.classes) else "void"
    table = listing.decode_mask.table
    value = int(table[number]) if 0 <= number < len(table) else UNKNOWN
    if value == UNKNOWN:
        return None
    return listing.classes[value] if value < len(listing.classes) else "void"


def shown_number(number: int) -> str:
    return "numbers that are negative or above 65535" if number == OUTSIDE else str(number)


def _list(names: list[str]) -> str:
    return ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if names[SHOWN:] else "")
