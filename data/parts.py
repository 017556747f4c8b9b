"""The parts of the data that a run trains and measures on, as files and labels."""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from data.domains import Domains
from data.listing import Listing
from data.read_all import file_sets
from data.survey import Survey

ROLES = ("source", "source_val", "target", "target_labeled", "target_test")


@dataclass
class Part:
    """One set of a run.

    Attributes:
        size: number of images.
        files: the number of each image in the `Survey`, int64 (N,); None if they are no files.
        labels: of each image, the name of its class, or a hash of its mask where copies need it;
            None for a set without labels.
        counts: images per class name; None without such labels.
    """

    size: int
    files: np.ndarray | None
    labels: list[str] | list[bytes] | None
    counts: Counter | None


def _part(listing: Listing, indices: torch.Tensor, files, masks, survey: Survey) -> Part:
    """The images `indices` of a listing.

    Args:
        listing: for its labels and classes.
        indices: int64 (N,).
        files, masks: the numbers of its files and of their masks in the `survey`, or None.
        survey: for the hashes of masks.
    """
    labels = counts = None
    if listing.class_numbers is not None:
        names = np.array(listing.classes, object)
        labels = names[listing.class_numbers[indices].numpy()].tolist()
        counts = Counter(labels)
    elif masks is not None and len(masks):
        labels = [survey.digests.get(mask, b"") for mask in masks[indices.numpy()].tolist()]
    files = files[indices.numpy()] if files is not None and len(files) else None
    return Part(len(indices), files, labels, counts)


def listed_parts(listings: dict[str, Listing], survey: Survey) -> dict[str, Part]:
    """The sets as they are listed, by role; several sources are one."""
    parts: dict[str, Part] = {}
    for role, listing in listings.items():
        everything = torch.arange(len(listing))
        part = _part(listing, everything, survey.images[role], survey.masks[role], survey)
        name = role.partition("[")[0]
        parts[name] = _joined(parts[name], part) if name in parts else part
    return parts


def _joined(first: Part, second: Part) -> Part:
    files = (first.files, second.files)
    labels = None if None in (first.labels, second.labels) else first.labels + second.labels
    counts = None if None in (first.counts, second.counts) else first.counts + second.counts
    both = None if any(x is None for x in files) else np.concatenate(files)
    return Part(first.size + second.size, both, labels, counts)


def opened_parts(domains: Domains, listings: dict[str, Listing], survey: Survey) -> dict[str, Part]:
    """The sets as a run opens them, with the labels that the target's files have."""
    parts, by_pixel = {}, any(listing.by_pixel for listing in listings.values())
    for role in ROLES:
        images = getattr(domains, role)
        if images is None:
            continue
        files, masks = (_numbers(x, survey) for x in (images.images, images.labels))
        listing = Listing(
            images.name, images.images, images.labels, images.classes, by_pixel=by_pixel
        )
        if role == "target":  # its labels are dropped, and counted all the same
            listing, files, masks = listings[role], survey.images[role], survey.masks[role]
        parts[role] = _part(listing, images.indices, files, masks, survey)
    return parts


def _numbers(images: object | None, survey: Survey) -> np.ndarray | None:
    """The numbers of the files in the `images` or `labels` of a set; None if not all are files."""
    sets = file_sets(images)
    paths: list[Path] = [path for decoded in sets for path in decoded.paths]
    if not paths or len(paths) != _length(images):
        return None
    are_masks = [not decoded.decode.channels for decoded in sets]
    return np.array([survey.number_of(path, are_masks[0]) for path in paths], np.int64)


def _length(images: object) -> int:
    images = getattr(images, "masks", images)  # of a `Renumbered`
    return images.starts[-1] if hasattr(images, "parts") else len(images)


def is_subset(small: Part, large: Part) -> bool:
    """Whether all files of a part are files of another part."""
    if small.files is None or large.files is None:
        return False
    return bool(np.isin(small.files, large.files).all())
