"""Image files: in a folder per class, in a flat folder, with a folder of masks, or in a list file.

Raised errors are `UserError`s that name the key of the config and the path, or the list file and
its line.
"""

import contextlib
import csv
import os
from collections import Counter
from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from common.errors import UserError

LABELS_OFF = "data.target.labels: false"
LOSSY = (".jpg", ".jpeg", ".jpe", ".jfif")  # endings of files that do not keep a mask's numbers


class Files(NamedTuple):
    """The files of a set.

    Attributes:
        images: the image files.
        labels: the class number of each, or None for unlabeled images.
        classes: the class names by number, or None for unlabeled images.
        skipped: how many other files were left aside, with their endings; "" for none.
    """

    images: list[Path]
    labels: list[int] | None
    classes: list[str] | None
    skipped: str = ""


class Pairs(NamedTuple):
    """Image files and the mask of each.

    Attributes:
        images: the image files.
        masks: their masks, or None for unlabeled images.
        skipped: as in `Files`.
    """

    images: list[Path]
    masks: list[Path] | None
    skipped: str = ""


def _is_image(path: Path) -> bool:
    Image.init()
    return path.suffix.lower() in Image.EXTENSION and not path.name.startswith(".")


def _shown(path: Path | str) -> str:
    """A path for a message, shortened if it is very long."""
    text = str(path)
    return text if len(text) <= 300 else f"{text[:80]}...({len(text)} characters)"


@contextlib.contextmanager
def _readable(where: str) -> Iterator[None]:
    """Raise an error of the file system, such as a missing permission, as a `UserError`."""
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{where}: {_shown(error.filename)} cannot be read ({error.strerror}); "
            "correct its name or its permissions"
        ) from None


def _locate(path: str, base: Path, where: str) -> Path:
    """`base` / `path`, or `path` alone if it is absolute.

    Links may lead elsewhere, but `..` is refused in a relative path.

    Args:
        path: as written in the config or in a list file.
        base: the folder that a relative path refers to.
        where: the key, or the file and line, for messages.
    """
    relative = Path(path)
    if not relative.is_absolute() and ".." in relative.parts:
        raise UserError(
            f"{where}: {_shown(path)} lies outside {base}; write an absolute path instead"
        )
    return base / relative


def _folder(path: str, root: Path, where: str) -> Path:
    """The folder `path`, which must be there."""
    folder = _locate(path, root, where)
    with _readable(where):
        if folder.is_dir():
            return folder
    raise UserError(
        f"{where}: there is no folder {folder}; correct it, data.root or the variable DA_DATA"
    )


def _entries(folder: Path, where: str) -> tuple[list[Path], list[Path], Counter]:
    """(folders, images, number of other files by ending) directly in a folder, sorted by name.

    Hidden files and folders are not listed. A link counts as what it leads to.
    """
    folders, images, others = [], [], Counter()
    with _readable(where), os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            path = folder / entry.name
            if entry.name.startswith("."):
                continue
            if entry.is_dir():
                folders.append(path)
            elif not _is_image(path):
                others[path.suffix.lower() or "without ending"] += 1
            elif entry.is_file():
                images.append(path)
            else:
                raise UserError(
                    f"{where}: {path} is no regular file (a link that leads nowhere, or a pipe); "
                    "remove it"
                )
    return folders, images, others


def _tree(folder: Path, where: str) -> tuple[list[Path], Counter]:
    """(images, number of other files by ending) in a folder and in the folders below it."""
    images, others, seen = [], Counter(), set()
    folders = [folder]
    while folders:
        current = folders.pop()
        real = os.path.realpath(current)
        if real in seen:
            raise UserError(
                f"{where}: {current} is a link to a folder that is read already; remove the link"
            )
        seen.add(real)
        below, found, skipped = _entries(current, where)
        folders += below
        images += found
        others += skipped
    return sorted(images), others


def _skipped(others: Counter) -> str:
    """How many files of which endings were left aside; "" for none."""
    if not others:
        return ""
    shown = ", ".join(f"{count} {ending}" for ending, count in others.most_common(5))
    more = " ..." if len(others) > 5 else ""
    return f"{sum(others.values())} files that are no images were skipped ({shown}{more})"


def scan_folder(path: str, root: Path, key: str, absent: Collection[str] | None = None) -> Files:
    """The images of a folder, which contains either a folder per class or images.

    Args:
        path: the folder, absolute or below `root`.
        root: the folder of all data sets.
        key: of the config, for messages.
        absent: classes that the set lacks, and whose folders may be empty; None if the set may not
            lack any.
    """
    folder = _folder(path, root, key)
    classes, images, others = _entries(folder, key)
    if not classes and not images:
        raise UserError(
            f"{key}: {folder} is empty; it must contain a folder of images per class"
            + (f" ({_skipped(others)})" if others else "")
        )
    if not classes:
        return Files(images, None, None, _skipped(others))
    if images:
        raise UserError(
            f"{key}: {folder} contains both folders and images ({images[0].name}); "
            f"a class is a folder of images{_unlabeled_hint(key, absent)}"
        )
    files, labels, names = [], [], []
    for child in classes:
        _check_class_name(child, key)
        deeper, class_files, skipped = _entries(child, key)
        others += skipped
        if deeper:
            raise UserError(
                f"{key}: {deeper[0]} is a folder inside the class {child.name}: "
                f"is {folder} a level too high?{_unlabeled_hint(key, absent)}"
            )
        if child.name in (absent or ()):
            if class_files:
                raise UserError(
                    f"data.absent_classes: {child} has images ({class_files[0].name}); "
                    f"take {child.name} out of the list"
                )
            continue
        if not class_files:
            raise UserError(
                f"{key}: the class {child} has no images"
                + (f" ({_skipped(skipped)})" if skipped else "")
                + (_absent_hint(absent) or "; add some, or remove the folder")
            )
        labels += [len(names)] * len(class_files)
        names.append(child.name)
        files += class_files
    if not names or len(names) + len(absent or ()) < 2:
        raise UserError(
            f"{key}: {folder} has only the class {classes[0].name}; is it a level too high or too "
            f"low?{_unlabeled_hint(key, absent)}{_absent_hint(absent)}"
        )
    return Files(files, labels, names, _skipped(others))


def _unlabeled_hint(key: str, absent: Collection[str] | None) -> str:
    """How the target's folders are read if they are no classes."""
    unlabeled = key == "data.target.path" and absent is not None
    return f"; for unlabeled images in any folders set {LABELS_OFF}" if unlabeled else ""


def _absent_hint(absent: Collection[str] | None) -> str:
    """How the target may lack a class."""
    return "" if absent is None else "; name classes that the target lacks in data.absent_classes"


def _check_class_name(folder: Path, key: str) -> None:
    """Raise `UserError` if the name is not one line of UTF-8 text, as the run's files need."""
    name = folder.name
    if name.splitlines() != [name] or name != name.encode(errors="replace").decode():
        raise UserError(
            f"{key}: the name of the class folder {str(folder)!r} is not one line of utf-8 text; "
            "rename it"
        )


def scan_unlabeled(path: str, root: Path, key: str) -> Files:
    """All images of a folder and of the folders below it, without labels.

    Args:
        path: the folder, absolute or below `root`.
        root: the folder of all data sets.
        key: of the config, for messages.
    """
    folder = _folder(path, root, key)
    images, others = _tree(folder, key)
    if not images:
        raise UserError(
            f"{key}: {folder} has no images" + (f" ({_skipped(others)})" if others else "")
        )
    return Files(images, None, None, _skipped(others))


def _read_text(path: str, root: Path, key: str, expected: str) -> tuple[Path, list[str]]:
    """(the file, its lines) of a list or of class names.

    Args:
        path: the file, absolute or below `root`.
        root: the folder of all data sets.
        key: of the config, for messages.
        expected: what the file must contain, for messages.
    """
    file = _locate(path, root, key)
    try:
        if file.exists() and not file.is_file():  # to read a pipe is to wait for ever
            raise ValueError
        return file, file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is not a file of utf-8 text"
        raise UserError(
            f"{key}: {_shown(file)} cannot be read ({reason}); it must contain {expected}"
        ) from None


def _class_names(path: str, root: Path, key: str) -> list[str]:
    """The class names in a file with one name per line; empty lines are skipped."""
    file, lines = _read_text(path, root, key, "one class name per line")
    names = [line.strip() for line in lines if line.strip()]
    if len(set(names)) < max(len(names), 2):
        raise UserError(f"{key}: {file} must name at least two classes, each once")
    return names


def _read_rows(
    path: str, root: Path, key: str, form: str, split: Callable[[str], list[str]]
) -> tuple[Path, list[tuple[str, list[str]]]]:
    """The lines of a list file that are not empty, in one or two parts.

    The lines of a .csv file are split at commas; a first line that names no file is its header.

    Args:
        path: the list file, absolute or below `root`.
        root: the folder of all data sets.
        key: of the config, for messages.
        form: what a line contains, for messages.
        split: a line of another file -> its parts.

    Returns:
        (the file, (file:line, parts) of each line).
    """
    table = path.lower().endswith(".csv")
    form = form.replace(" ", ",") if table else form
    file, lines = _read_text(path, root, key, f"a line `{form}` per image")
    if table:
        reader = csv.reader(lines, strict=True)
        try:
            rows = [
                (reader.line_num, [cell.strip() for cell in cells])
                for cells in reader
                if any(cells)
            ]
        except csv.Error as error:
            raise UserError(
                f"{file}:{reader.line_num}: is no csv ({error}); a line is `{form}`"
            ) from None
        if rows and _is_header(rows[0][1][0], file):
            rows = rows[1:]
    else:
        rows = [(i, split(line.strip())) for i, line in enumerate(lines, 1) if line.strip()]
    for number, parts in rows:
        if len(parts) > 2:
            unit = "columns" if table else "words"
            raise UserError(
                f"{file}:{number}: has {len(parts)} {unit}; a line is `{form}`"
                + ("" if table else "; if a path has spaces, separate the two by a tab")
            )
    return file, [(f"{file}:{number}", parts) for number, parts in rows]


def _is_header(cell: str, file: Path) -> bool:
    """Whether the first cell of a csv file is a column's name: a word, and no file."""
    word = cell != "" and "." not in cell and "/" not in cell
    return word and not _is_file(file.parent / cell)


def _is_file(path: Path) -> bool:
    try:
        return path.is_file()
    except OSError:  # such as a name that is too long
        return False


def _listed(path: str, file: Path, where: str) -> Path:
    """A file named in the list `file`, relative to the folder of the list."""
    listed = _locate(path, file.parent, where)
    if not _is_file(listed):
        raise UserError(f"{where}: there is no file {_shown(listed)}")
    return listed


def _check_once(images: list[Path], rows: list[tuple[str, list[str]]]) -> None:
    """Raise `UserError` for the first image of a list that an earlier line names too."""
    seen: set[Path] = set()
    for image, (where, _) in zip(images, rows, strict=True):
        if image in seen:
            raise UserError(f"{where}: names {image} again; name each image once")
        seen.add(image)


def read_labeled(
    path: str, names: list[str], root: Path, absent: Collection[str] | None = None
) -> tuple[list[Path], list[int]]:
    """The labeled images of a list file in which every line is `path label`.

    Args:
        path: the list file, absolute or below `root`; the paths in it are relative to its folder.
        names: the class names; a label is a name, or its number from 0.
        root: the folder of all data sets.
        absent: classes that the set lacks.

    Returns:
        (files, labels).
    """
    key = "data.target_labeled"
    file, rows = _read_rows(path, root, key, "path label", lambda line: _split_label(line, names))
    images, labels = [], []
    for where, (image, *label) in rows:
        if not label:
            raise UserError(f"{where}: has no label; a line is `path label`")
        images.append(_listed(image, file, where))
        labels.append(_label(label[0], names, where, "the source"))
        _check_absent(names[labels[-1]], absent, where)
    if not images:
        raise UserError(f"{key}: {file} names no image")
    _check_once(images, rows)
    return images, labels


def _check_absent(name: str, absent: Collection[str] | None, where: str) -> None:
    if name in (absent or ()):
        raise UserError(
            f"{where}: is of class {name}, which data.absent_classes says the target lacks; "
            f"take {name} out of data.absent_classes"
        )


def _split_label(line: str, names: list[str] | None) -> list[str]:
    """[path, label] of a line, or [path] without a label.

    Paths and class names may contain spaces, and a class name may end with another class name.
    """
    for name in sorted(names or [], key=len, reverse=True):
        if line.endswith((f" {name}", f"\t{name}")):
            return [line.removesuffix(name).rstrip(), name]
    image, *label = line.rsplit(maxsplit=1)
    if label and _is_image(Path(line)) and not _is_image(Path(image)):
        return [line]  # a path with a space, without a label
    return [image, *label]


def read_list(
    path: str, classes: str | None, root: Path, role: str, absent: Collection[str] | None = None
) -> Files:
    """The images of a list file with the lines `path label`, or with the lines `path`.

    Args:
        path: the list file, absolute or below `root`; the paths in it are relative to its folder.
        classes: a file of class names, absolute or below `root`, or None. A label is the number of
            a class from 0, or with this file also its name. Without it the names are the numbers.
        root: the folder of all data sets.
        role: the place of the set in the config, for messages.
        absent: classes that the set lacks, which are left out of the result; None if it may not
            lack any.
    """
    key = f"data.{role}.path"
    names = _class_names(classes, root, f"data.{role}.classes") if classes else None
    file, rows = _read_rows(path, root, key, "path label", lambda line: _split_label(line, names))
    named_by = "the classes file" if classes else None
    images, labels = [], []
    for where, (image, *label) in rows:
        images.append(_listed(image, file, where))
        labels += [_label(label[0], names, where, named_by, role)] if label else []
        if labels and len(labels) < len(images):
            raise UserError(f"{where}: has no label, but other lines have one")
    if not images:
        raise UserError(f"{key}: {file} names no image")
    _check_once(images, rows)
    if not labels:
        return Files(images, None, None)
    names = _present_classes(names, labels, file, role, absent)
    for (where, _), label in zip(rows, labels, strict=True):
        _check_absent(names[label], absent, where)
    present = [name for name in names if name not in (absent or ())]
    return Files(images, [present.index(names[label]) for label in labels], present)


def _present_classes(
    names: list[str] | None,
    labels: list[int],
    file: Path,
    role: str,
    absent: Collection[str] | None,
) -> list[str]:
    """The class names of a list, each of which has an image or is absent.

    Args:
        names: those of the classes file, or None for the numbers.
        labels: all labels of the list.
        file: the list, for messages.
        role: the place of the set in the config, for messages.
        absent: classes that the set lacks.
    """
    present = set(labels)
    expected = present | {int(name) for name in absent or () if name.isdecimal()}
    all_names = names or [str(number) for number in range(len(expected))]
    for number, name in enumerate(all_names):
        if number not in present and name not in (absent or ()):
            raise UserError(
                f"data.{role}.path: {file} has no image of class {name}"
                + ("" if names else "; labels count from 0 without gaps")
                + _absent_hint(absent)
            )
    if len(all_names) == 1:
        raise UserError(
            f"data.{role}.path: {file} has only the class {all_names[0]}; "
            "at least two are needed" + _absent_hint(absent)
        )
    return all_names


def _label(
    text: str, names: list[str] | None, where: str, named_by: str | None, role: str = ""
) -> int:
    """The class number of a label.

    Args:
        text: the label.
        names: the class names, if there are any.
        where: file and line, for messages.
        named_by: where the names come from, for messages; None without names.
        role: the place of the set in the config, for messages.
    """
    if names and text in names:
        return names.index(text)
    if not text.isascii() or not text.isdecimal():
        raise UserError(
            f"{where}: label {_shown(text)!r} is not a class number"
            + (
                f" and not a name in {named_by}"
                if named_by
                else f"; for names set data.{role}.classes, a file with one name per line"
            )
        )
    if names and int(text) >= len(names):
        raise UserError(
            f"{where}: label {text} is unknown, {named_by} has numbers 0 to {len(names) - 1}"
        )
    return int(text)


def _names(folder: Path, suffix: str | None, key: str) -> tuple[dict[str, Path], Counter]:
    """The images in a folder and in the folders below it, by their paths without the suffix.

    Args:
        folder: of the images.
        suffix: end of the file names; files with another end are skipped. None: the extension;
            then no two files may share a name, as images and masks in one folder would.
        key: of the config, for messages.

    Returns:
        (the images by name, number of other files by ending).
    """
    files, stems = {}, {}
    images, others = _tree(folder, key)
    for file in images:
        if not file.name.endswith(suffix or ""):
            continue
        if suffix is None and file.stem in stems:
            raise UserError(
                f"{key}: {stems[file.stem]} and {file} share a name: "
                f"is {folder} a level too high, with masks in it? If it is right, "
                "set the suffixes of images and of masks (image_suffix, mask_suffix)"
            )
        stems[file.stem] = file
        name = file.relative_to(folder).as_posix()
        files[name.removesuffix(file.suffix if suffix is None else suffix)] = file
    return files, others


def _check_lossless(masks: list[Path]) -> None:
    """Raise `UserError` for the first mask in a format that changes its numbers."""
    lossy = [mask for mask in masks if mask.suffix.lower() in LOSSY]
    if lossy:
        raise UserError(
            f"{lossy[0]}: is a JPEG ({len(lossy)} of {len(masks)} masks are), whose compression "
            "changes the class numbers; save masks as png, from the original numbers"
        )


def scan_masks(
    path: str,
    masks: str | None,
    suffixes: tuple[str | None, str | None],
    root: Path,
    role: str,
) -> Pairs:
    """The images of a folder and their masks in another folder, in the order of their names.

    An image and its mask have the same path below their folders, except for the suffixes. Masks
    without an image are not used.

    Args:
        path: the folder of images, absolute or below `root`.
        masks: the folder of masks, likewise, or None.
        suffixes: of images and of masks; None is the file extension.
        root: the folder of all data sets.
        role: the place of the set in the config, for messages.
    """
    key = f"data.{role}.path"
    folder = _folder(path, root, key)
    images, others = _names(folder, suffixes[0], key)
    if not images:
        raise UserError(
            f"{key}: {folder} has no images"
            + (f" that end in {suffixes[0]}" if suffixes[0] else "")
            + (f" ({_skipped(others)})" if others else "")
        )
    if masks is None:
        return Pairs(list(images.values()), None, _skipped(others))
    mask_folder = _folder(masks, root, f"data.{role}.masks")
    mask_files, _ = _names(mask_folder, suffixes[1], f"data.{role}.masks")
    missing = [name for name in images if name not in mask_files]
    if missing:
        expected = f"{mask_folder / missing[0]}{suffixes[1] or '.png'}"
        raise UserError(
            f"data.{role}.masks: {images[missing[0]]} has no mask {expected} "
            f"({len(missing)} of {len(images)} images have none); add it, or remove the image"
        )
    found = [mask_files[name] for name in images]
    _check_lossless(found)
    return Pairs(list(images.values()), found, _skipped(others))


def read_mask_list(path: str, root: Path, key: str) -> Pairs:
    """The images of a list file with the lines `image mask`, or with the lines `image`.

    The two are separated by a tab, or by spaces if the paths have none.

    Args:
        path: the list file, absolute or below `root`; the paths in it are relative to its folder.
        root: the folder of all data sets.
        key: of the config, for messages.
    """

    def split(line: str) -> list[str]:
        return [part.strip() for part in line.split("\t")] if "\t" in line else line.split()

    file, rows = _read_rows(path, root, key, "image mask", split)
    images, masks = [], []
    for where, (image, *mask) in rows:
        images.append(_listed(image, file, where))
        masks += [_listed(mask[0], file, where)] if mask else []
        if masks and len(masks) < len(images):
            raise UserError(f"{where}: has no mask, but other lines have one")
    if not images:
        raise UserError(f"{key}: {file} names no image")
    _check_once(images, rows)
    _check_lossless(masks)
    return Pairs(images, masks or None)
