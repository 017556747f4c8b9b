"""One pass over all files of the sets of a config: what each of them is."""

import hashlib
import os
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from common.errors import UserError
from data.config import DataConfig
from data.decoded import ImageDecoder, MaskDecoder, image_header, mask_numbers, size_mistake
from data.listing import Listing
from data.read_all import read_each

BLOCK = 2**20  # bytes that are hashed at once
NUMBERS, OUTSIDE = 2**16, -1  # a mask may have the numbers below; stands for all others


class Job(NamedTuple):
    """A file to read.

    Attributes:
        path: the file.
        decode: what a run reads it with.
        hashed: whether its content may be that of another file.
    """

    path: Path
    decode: ImageDecoder | MaskDecoder
    hashed: bool


class Look(NamedTuple):
    """What was found in a file.

    Attributes:
        mistake: what is wrong with it, or an empty text.
        mode: PIL's name of its channels; "" if its header cannot be read, and for masks.
        size: (height, width) once it is turned; (0, 0) if its header cannot be read.
        turned: whether it is turned by its EXIF orientation.
        digest: a hash of its bytes, of a mask of its numbers; empty where it is not needed.
        pixels: of a mask, the number of pixels with each number.
    """

    mistake: str = ""
    mode: str = ""
    size: tuple[int, int] = (0, 0)
    turned: bool = False
    digest: bytes = b""
    pixels: dict[int, int] = {}


def look(job: Job) -> Look:
    """Read a file as a run would."""
    try:
        is_mask = isinstance(job.decode, MaskDecoder)
        return _look_at_mask(job) if is_mask else _look_at_image(job)
    except UserError as error:
        return Look(mistake=str(error))


def _look_at_image(job: Job) -> Look:
    mode, size, turned = image_header(job.path, job.decode.exif)
    mistake = ""
    try:
        job.decode(job.path)
    except UserError as error:
        mistake = str(error)
    digest = _hash_of(job.path) if job.hashed else b""
    return Look(mistake, mode, size, turned, digest)


def _look_at_mask(job: Job) -> Look:
    numbers = mask_numbers(job.path)
    digest = hashlib.blake2b(np.ascontiguousarray(numbers), digest_size=16) if job.hashed else None
    return Look(
        size=numbers.shape,
        digest=digest.digest() if digest else b"",
        pixels=_count(numbers.ravel()),
    )


def _count(numbers: np.ndarray) -> dict[int, int]:
    """How often each number occurs in a flat array; numbers that no mask has are `OUTSIDE`."""
    inside = (numbers >= 0) & (numbers < NUMBERS)
    counts = np.bincount(numbers[inside])
    present = counts.nonzero()[0]
    outside = {OUTSIDE: int((~inside).sum())} if not inside.all() else {}
    return {**dict(zip(present.tolist(), counts[present].tolist(), strict=True)), **outside}


def _hash_of(path: Path) -> bytes:
    digest = hashlib.blake2b(digest_size=16)
    try:
        with open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
    except OSError:
        return b""  # that the file cannot be read is told by its decoder
    return digest.digest()


class Ids:
    """The numbers in the masks of a set.

    Attributes:
        pixels: number in a mask -> pixels that have it.
        masks: number -> masks in which it occurs.
        first: number -> the first such mask.
        count: of masks that were read.
    """

    def __init__(self):
        self.pixels, self.masks = Counter(), Counter()
        self.first: dict[int, str] = {}
        self.count = 0

    def add(self, pixels: dict[int, int], name: str) -> None:
        self.count += 1
        for number, count in pixels.items():
            self.pixels[number] += count
            self.masks[number] += 1
            self.first.setdefault(number, name)


class Survey:
    """What is found in the files of all sets; a file that is in several is read once.

    Files are known by numbers. Two paths that lead to one file, by a link, have one number.

    Args:
        listings: the sets by role.
        config: the section `data`.

    Attributes:
        images, masks: role -> the number of each file of its listing, int64 (N,); none for tensors.
        paths: the path of each file, as the first listing has it.
        usable: whether each file can be used, bool.
        sizes: (height, width) of each file, int32; 0 if its header cannot be read.
        modes, turned, digests: of each file; see `Look`.
        mistakes: a sentence for each file that cannot be used.
        ids: role -> the numbers in its masks, for sets with masks.
    """

    def __init__(self, listings: dict[str, Listing], config: DataConfig):
        self.images: dict[str, np.ndarray] = {}
        self.masks: dict[str, np.ndarray] = {}
        self.ids = {role: Ids() for role, x in listings.items() if x.masks is not None}
        self._numbers: dict[tuple[str, bool], int] = {}  # by the real path
        self._known: dict[tuple[Path, bool], int] = {}  # by the path
        self._decoders: list = []
        self._mask_roles: dict[int, list[str]] = {}
        self.paths: list[Path] = []
        for role, listing in listings.items():
            self.images[role] = self._add(listing.files, listing.decode)
            masks = listing.masks if isinstance(listing.masks, list) else []
            self.masks[role] = self._add(masks, listing.decode_mask)
            for number in self.masks[role].tolist():
                self._mask_roles.setdefault(number, []).append(role)
            if isinstance(listing.masks, torch.Tensor):
                for i, mask in enumerate(listing.masks):
                    self.ids[role].add(_count(mask.numpy().ravel()), f"mask {i}")
        self._read(config)

    def _add(self, paths: Iterable[Path], decode) -> np.ndarray:
        """The numbers of files, which are new or known."""
        is_mask, numbers = isinstance(decode, MaskDecoder), []
        for path in paths:
            if (path, is_mask) not in self._known:
                key = os.path.realpath(path), is_mask
                if key not in self._numbers:
                    self._numbers[key] = len(self.paths)
                    self.paths.append(path)
                    self._decoders.append(decode)
                self._known[path, is_mask] = self._numbers[key]
            numbers.append(self._known[path, is_mask])
        return np.array(numbers, np.int64)

    def number_of(self, path: Path, is_mask: bool = False) -> int:
        """The number of a file that one of the listings has. Raises `UserError` for another."""
        if (path, is_mask) not in self._known:
            raise UserError(f"{path}: is new since the files were listed; look again")
        return self._known[path, is_mask]

    def _read(self, config: DataConfig) -> None:
        hashed = self._same_size()
        jobs = list(map(Job, self.paths, self._decoders, hashed))
        self.usable = np.ones(len(jobs), bool)
        self.sizes = np.zeros((len(jobs), 2), np.int32)
        self.turned = np.zeros(len(jobs), bool)
        self.modes, self.digests, self.mistakes = [], {}, []
        for number, facts in enumerate(read_each(jobs, look, config, "data.check")):
            self.modes.append(facts.mode)
            self.sizes[number], self.turned[number] = facts.size, facts.turned
            if facts.digest:
                self.digests[number] = facts.digest
            if facts.mistake:
                self.usable[number] = False
                self.mistakes.append(facts.mistake)
                continue
            for role in self._mask_roles.get(number, ()):
                self.ids[role].add(facts.pixels, str(self.paths[number]))
        self._compare_sizes()

    def _same_size(self) -> list[bool]:
        """Which images have as many bytes as another one, and the masks of such images."""
        sizes = [_bytes_of(path) for path in self.paths]
        are_images = [isinstance(decode, ImageDecoder) for decode in self._decoders]
        counts = Counter(size for size, is_image in zip(sizes, are_images, strict=True) if is_image)
        hashed = [
            is_image and counts[size] > 1 for size, is_image in zip(sizes, are_images, strict=True)
        ]
        for image, mask in self._pairs():
            hashed[mask] |= hashed[image]
        return hashed

    def _pairs(self) -> set[tuple[int, int]]:
        """(number of an image, number of its mask) of all sets with masks."""
        return {
            pair
            for role, masks in self.masks.items()
            if len(masks)
            for pair in zip(self.images[role].tolist(), masks.tolist(), strict=True)
        }

    def _compare_sizes(self) -> None:
        """Add a mistake for every mask that differs in size from its image."""
        for image, mask in sorted(self._pairs()):
            if self.sizes[[image, mask]].all():
                sizes = [tuple(self.sizes[number].tolist()) for number in (image, mask)]
                mistake = size_mistake(self.paths[mask], sizes[1], self.paths[image], sizes[0])
                if mistake:
                    self.usable[mask] = False
                    self.mistakes.append(mistake)


def _bytes_of(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return -1
