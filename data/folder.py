"""Image files: in a folder per class, in a flat folder, with a folder of masks, or in a list file.

Raised errors are `UserError`s that name the folder, or the list file and its line.
"""

import os
from pathlib import Path

from PIL import Image

from common.errors import UserError


def _is_image(path: Path) -> bool:
    Image.init()
    return path.suffix.lower() in Image.EXTENSION and not path.name.startswith(".")


def _inside(path: Path, base: Path, root: Path, where: str) -> Path:
    """`base` / `path`, which must lie below `root`.

    Only its name must: links may lead elsewhere, but `..` is refused.

    Args:
        path: as written in the config or in a list file; it may be absolute.
        base: the folder that a relative path refers to.
        root: the folder of all data sets.
        where: the key, or the file and line, for messages.
    """
    full = base / path
    if ".." in path.parts or not Path(os.path.abspath(full)).is_relative_to(os.path.abspath(root)):
        raise UserError(f"{where}: {path} lies outside {root}; move the data or set data.root")
    return full


def scan_folder(path: str, root: Path) -> tuple[list[Path], list[int] | None, list[str] | None]:
    """The images of a folder.

    Args:
        path: the folder, below `root`; it contains either a folder per class or images.
        root: the folder of all data sets.

    Returns:
        (files, labels, class names); the latter two are None for a folder of images.
    """
    folder = _inside(Path(path), root, root, "folder")
    if not folder.is_dir():
        raise UserError(
            f"folder: there is no folder {folder}; set path, data.root or the variable DA_DATA"
        )
    children = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    classes = [p for p in children if p.is_dir()]
    images = [p for p in children if _is_image(p)]
    if not classes and not images:
        raise UserError(f"folder: {folder} is empty; it must contain a folder of images per class")
    if not classes:
        return images, None, None
    if images:
        raise UserError(
            f"folder: {folder} contains both folders and images ({images[0].name}); "
            "a class is a folder of images"
        )
    files, labels = [], []
    for label, child in enumerate(classes):
        inside = sorted(child.iterdir())
        if deeper := [p for p in inside if p.is_dir()]:
            raise UserError(
                f"folder: {deeper[0]} is a folder inside the class {child.name}: "
                f"is {folder} a level too high?"
            )
        class_files = [p for p in inside if _is_image(p)]
        if not class_files:
            raise UserError(f"folder: the class {child} has no images")
        files += class_files
        labels += [label] * len(class_files)
    if len(classes) == 1:
        raise UserError(
            f"folder: {folder} has only the class {classes[0].name}; "
            "is it a level too high or too low?"
        )
    return files, labels, [p.name for p in classes]


def _class_names(path: str, root: Path) -> list[str]:
    """The class names in a file with one name per line; empty lines are skipped."""
    file = _inside(Path(path), root, root, "classes")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"classes: {file} cannot be read; it must contain one class name per line"
        ) from None
    names = [line.strip() for line in lines if line.strip()]
    if len(set(names)) < max(len(names), 2):
        raise UserError(f"classes: {file} must name at least two classes, each once")
    return names


def _read_lines(
    path: str, root: Path, expected: str, key: str = "list"
) -> tuple[Path, list[tuple[str, str]]]:
    """The lines of a list file that are not empty.

    Args:
        path: the list file, below `root`.
        root: the folder of all data sets.
        expected: what a line contains, for messages.
        key: of the config, for messages.

    Returns:
        (the file, (file:line, text) of each line).
    """
    file = _inside(Path(path), root, root, key)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(
            f"{key}: {file} cannot be read; it must contain a line `{expected}` per image"
        ) from None
    return file, [
        (f"{file}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()
    ]


def _listed(path: str, file: Path, root: Path, where: str) -> Path:
    """A file named in the list `file`, relative to the folder of the list."""
    listed = _inside(Path(path), file.parent, root, where)
    if not listed.is_file():
        raise UserError(f"{where}: there is no file {listed}")
    return listed


def read_labeled(path: str, names: list[str], root: Path) -> tuple[list[Path], list[int]]:
    """The labeled images of a list file in which every line is `path label`.

    Args:
        path: the list file, below `root`; the paths in it are relative to its folder.
        names: the class names; a label is a name, or its number from 0.
        root: the folder of all data sets.

    Returns:
        (files, labels).
    """
    file, lines = _read_lines(path, root, "path label", "data.target_labeled")
    label_of: dict[Path, int] = {}
    for where, line in lines:
        image, *label = _split_label(line, names)
        if not label:
            raise UserError(f"{where}: has no label; a line is `path label`")
        path = _listed(image, file, root, where)
        if path in label_of:
            raise UserError(f"{where}: names {path} again; an image has one label")
        label_of[path] = _label(label[0], names, where, "the source")
    if not label_of:
        raise UserError(f"data.target_labeled: {file} names no image")
    return list(label_of), list(label_of.values())


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
    path: str, classes: str | None, root: Path
) -> tuple[list[Path], list[int] | None, list[str] | None]:
    """The images of a list file with the lines `path label`, or with the lines `path`.

    Args:
        path: the list file, below `root`; the paths in it are relative to its folder.
        classes: a file of class names, below `root`, or None. A label is the number of a class from
            0, or with this file also its name. Without it the names are the numbers.
        root: the folder of all data sets.

    Returns:
        (files, labels, class names); the latter two are None for lines without labels.
    """
    file, lines = _read_lines(path, root, "path label")
    names = _class_names(classes, root) if classes else None
    files, labels = [], []
    for where, line in lines:
        image, *label = _split_label(line, names)
        files.append(_listed(image, file, root, where))
        labels += [_label(label[0], names, where)] if label else []
        if labels and len(labels) < len(files):
            raise UserError(f"{where}: has no label, but other lines have one")
    if not files:
        raise UserError(f"list: {file} names no image")
    if not labels:
        return files, None, None
    present = set(labels)
    absent = next((n for n in range(len(names or present)) if n not in present), None)
    if absent is not None:
        raise UserError(
            f"list: {file} has no image of class {names[absent] if names else absent}"
            + ("" if classes else "; labels count from 0 without gaps")
        )
    names = names or [str(n) for n in range(len(present))]
    if len(names) == 1:
        raise UserError(f"list: {file} has only the class {names[0]}; at least two are needed")
    return files, labels, names


def _label(
    text: str, names: list[str] | None, where: str, named_by: str = "the classes file"
) -> int:
    """The class number of a label.

    Args:
        text: the label.
        names: the class names, if there are any.
        where: file and line, for messages.
        named_by: where the names come from, for messages.
    """
    if names and text in names:
        return names.index(text)
    if not text.isascii() or not text.isdecimal():
        raise UserError(
            f"{where}: label {text!r} is not a class number"
            + ("" if names is None else f" and not a name in {named_by}")
        )
    if names and int(text) >= len(names):
        raise UserError(
            f"{where}: label {text} is unknown, {named_by} has numbers 0 to {len(names) - 1}"
        )
    return int(text)


def _names(folder: Path, suffix: str | None) -> dict[str, Path]:
    """The images in a folder and in the folders below it, by their paths without the suffix.

    Args:
        folder: of the images.
        suffix: end of the file names; files with another end are skipped. None: the extension;
            then no two files may share a name, as images and masks in one folder would.
    """
    if not folder.is_dir():
        raise UserError(
            f"folder: there is no folder {folder}; "
            "set path, masks, data.root or the variable DA_DATA"
        )
    files, stems = {}, {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and _is_image(p)):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not name.name.endswith(suffix or ""):
            continue
        if suffix is None and file.stem in stems:
            raise UserError(
                f"folder: {stems[file.stem]} and {file} share a name: "
                f"is {folder} a level too high, with masks in it? If it is right, "
                "set the suffixes of images and of masks (image_suffix, mask_suffix)"
            )
        stems[file.stem] = file
        files[name.as_posix().removesuffix(file.suffix if suffix is None else suffix)] = file
    return files


def scan_masks(
    path: str, masks: str | None, suffixes: tuple[str | None, str | None], root: Path
) -> tuple[list[Path], list[Path] | None]:
    """The images of a folder and their masks in another folder.

    An image and its mask have the same path below their folders, except for the suffixes. Masks
    without an image are not used.

    Args:
        path: the folder of images, below `root`.
        masks: the folder of masks, below `root`, or None.
        suffixes: of images and of masks; None is the file extension.
        root: the folder of all data sets.

    Returns:
        (images, masks) in the order of the names; masks is None if `masks` is None.
    """
    folder = _inside(Path(path), root, root, "folder")
    images = _names(folder, suffixes[0])
    if not images:
        raise UserError(
            f"folder: {folder} has no images"
            + (f" that end in {suffixes[0]}" if suffixes[0] else "")
        )
    if masks is None:
        return list(images.values()), None
    mask_folder = _inside(Path(masks), root, root, "masks")
    mask_files = _names(mask_folder, suffixes[1])
    missing = [name for name in images if name not in mask_files]
    if missing:
        expected = f"{mask_folder / missing[0]}{suffixes[1] or '.png'}"
        raise UserError(
            f"masks: {images[missing[0]]} has no mask {expected} "
            f"({len(missing)} of {len(images)} images have none); add it, or remove the image"
        )
    return list(images.values()), [mask_files[name] for name in images]


def read_mask_list(path: str, root: Path) -> tuple[list[Path], list[Path] | None]:
    """The images of a list file with the lines `image mask`, or with the lines `image`.

    Args:
        path: the list file, below `root`; the paths in it are relative to its folder.
        root: the folder of all data sets.

    Returns:
        (images, masks); masks is None for lines without masks.
    """
    file, lines = _read_lines(path, root, "image mask")
    images, masks = [], []
    for where, line in lines:
        image, *mask = line.split()
        if len(mask) > 1:
            raise UserError(
                f"{where}: has {1 + len(mask)} words; "
                "a line is `image mask`, without spaces in the paths"
            )
        images.append(_listed(image, file, root, where))
        masks += [_listed(mask[0], file, root, where)] if mask else []
        if masks and len(masks) < len(images):
            raise UserError(f"{where}: has no mask, but other lines have one")
    if not images:
        raise UserError(f"list: {file} names no image")
    return images, masks or None
