"""The fingerprint of the sets of a run: whether a resumed run sees the same images."""

import hashlib
import os
import zlib
from itertools import zip_longest
from pathlib import Path

import torch

from data.decoded import Decoded
from data.image_set import ImageSet, Joined, Renumbered


def fingerprint(images: ImageSet, root: Path, files: bool = True) -> torch.Tensor:
    """What a set consists of, as the bytes (uint8) of a compressed text.

    Its lines are the class names; each image file that the set is a part of, with its path below
    `root`, its size in bytes, and its class or its mask; and which of them are in the set. A tensor
    of images has one line, with its shape and a hash. Neither the content of files nor their time
    is read, so that copies of a data set have its fingerprint.

    Args:
        images: the set.
        root: the folder of all data sets, which may differ between two runs.
        files: whether to list the files; not if another set of the same files lists them.
    """
    roots = f"{root}{os.sep}", f"{os.path.abspath(root)}{os.sep}"
    classes = ", ".join(images.classes) if images.classes else "none"
    lines = _lines(images.images, images.labels, images.classes, roots) if files else []
    lines = [f"classes {classes}", *lines, f"numbers {_describe(images.indices)}"]
    text = "\n".join(lines).encode(errors="surrogateescape")  # a file name may be any bytes
    return torch.frombuffer(bytearray(zlib.compress(text, 1)), dtype=torch.uint8)


def short_name(packed: torch.Tensor) -> str:
    """A short text that differs if the images of two sets do.

    The names of the classes do not matter, which a target without labels does not have, nor which
    of the images the seed has left in the set.

    Args:
        packed: what `fingerprint` returns.
    """
    # The compressed bytes depend on the library, so the text itself is hashed.
    lines = zlib.decompress(packed.numpy()).split(b"\n")
    return hashlib.sha256(b"\n".join(lines[1:-1])).hexdigest()[:16]


def _lines(images, labels, classes: list[str] | None, roots: tuple[str, str]) -> list[str]:
    """The lines of `images` with their `labels`.

    Args:
        images, labels, classes: as in `ImageSet`.
        roots: what is taken off the paths.
    """
    if isinstance(labels, Renumbered):
        labels = labels.masks
    if isinstance(images, Joined):
        lines = []
        for number, part in enumerate(images.parts):
            start, end = images.starts[number : number + 2]
            of_part = labels.parts[number] if isinstance(labels, Joined) else labels[start:end]
            lines += _lines(part, of_part, classes, roots)
        return lines
    if not isinstance(images, Decoded):
        return [_describe(images)] + ([] if labels is None else [f"labels {_describe(labels)}"])

    def of_file(path: Path) -> str:
        text = os.fspath(path)
        for prefix in roots:
            text = text.removeprefix(prefix)
        return f"{text} of {os.stat(path).st_size} bytes"

    if labels is None:
        return list(map(of_file, images.paths))
    if isinstance(labels, Decoded):
        pairs = zip(images.paths, labels.paths, strict=True)
        return [f"{of_file(image)} with the mask {of_file(mask)}" for image, mask in pairs]
    numbered = zip(images.paths, labels.tolist(), strict=True)
    return [f"{of_file(path)} in class {classes[number]}" for path, number in numbered]


def _describe(tensor: torch.Tensor) -> str:
    shape = "x".join(map(str, tensor.shape))
    return f"{shape} with the hash {hashlib.sha256(tensor.contiguous().numpy()).hexdigest()[:16]}"


def _text(saved: torch.Tensor) -> list[str]:
    return zlib.decompress(saved.numpy()).decode(errors="surrogateescape").split("\n")


def difference(before: dict[str, torch.Tensor], now: dict[str, torch.Tensor]) -> str | None:
    """The first difference between the fingerprints of two runs' sets, by role; None if equal.

    It is part of a sentence: "source: photo/cat/7.jpg of 812 bytes in class cat is gone".
    """
    for role in dict.fromkeys([*before, *now]):
        if role not in before or role not in now:
            return f"{role}: the set is {'new' if role in now else 'gone'}"
        *old, old_numbers = _text(before[role])
        *new, new_numbers = _text(now[role])
        for a, b in [*zip_longest(old, new), (old_numbers, new_numbers)]:
            if a == b:
                continue
            if a not in new and (b is None or b in old):
                return f"{role}: {a} is gone"
            if b not in old and (a is None or a in new):
                return f"{role}: {b} is new"
            return f"{role}: {a} is now {b}"
    return None
