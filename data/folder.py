"""Images in a folder per class, in one flat folder, or named by a list file."""

import os
from pathlib import Path

from PIL import Image

from common.runtime import UserError


def _is_image(path: Path) -> bool:
    Image.init()
    return path.suffix.lower() in Image.EXTENSION and not path.name.startswith(".")


def _inside(path: Path, base: Path, root: Path, where: str) -> Path:
    """`path` against `base`, which must lie below `root` by its name: links are followed, `..` is not."""
    full = base / path  # the path itself, if absolute
    if ".." in path.parts or not Path(os.path.abspath(full)).is_relative_to(os.path.abspath(root)):
        raise UserError(f"{where}: {path} lies outside {root}; move the data or set data.root")
    return full


def scan_folder(path: str, root: Path) -> tuple[list[Path], list[int] | None, list[str] | None]:
    """(files, labels, class names) of root/path: a folder per class, or images alone (then without labels)."""
    folder = _inside(Path(path), root, root, "folder")
    if not folder.is_dir():
        raise UserError(f"folder: there is no folder {folder}; set path, data.root or the variable DA_DATA")
    children = sorted(p for p in folder.iterdir() if not p.name.startswith("."))
    classes, images = [p for p in children if p.is_dir()], [p for p in children if _is_image(p)]
    if not classes and not images:
        raise UserError(f"folder: {folder} is empty; it should hold a folder of images per class")
    if not classes:
        return images, None, None
    if images:
        raise UserError(
            f"folder: {folder} holds both folders and images ({images[0].name}); a class is a folder of images"
        )
    files, labels = [], []
    for label, child in enumerate(classes):
        inside = sorted(child.iterdir())
        if deeper := [p for p in inside if p.is_dir()]:
            raise UserError(
                f"folder: {deeper[0]} is a folder inside the class {child.name}: is {folder} a level too high?"
            )
        own = [p for p in inside if _is_image(p)]
        if not own:
            raise UserError(f"folder: the class {child} has no images")
        files += own
        labels += [label] * len(own)
    if len(classes) == 1:
        raise UserError(f"folder: {folder} has the one class {classes[0].name}; is it a level too high or low?")
    return files, labels, [p.name for p in classes]


def _class_names(path: str, root: Path) -> list[str]:
    file = _inside(Path(path), root, root, "classes")
    try:
        names = [line.strip() for line in file.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError):
        raise UserError(f"classes: {file} cannot be read; it should hold one class name a line") from None
    if len(set(names)) < max(len(names), 2):
        raise UserError(f"classes: {file} must name at least two classes, each once")
    return names


def read_list(path: str, classes: str | None, root: Path) -> tuple[list[Path], list[int] | None, list[str] | None]:
    """(files, labels, class names) of a list file with `path label` lines, or `path` lines alone.

    Paths are relative to the list file's folder. A label is a class's number from 0; with a `classes` file also its
    name. Without one the classes are named by their numbers. Raises `UserError` with file:line.
    """
    file = _inside(Path(path), root, root, "list")
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"list: {file} cannot be read; it should hold a line `path label` per image") from None
    names = _class_names(classes, root) if classes else None
    files, labels = [], []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where, (image, *label) = f"{file}:{number}", line.strip().rsplit(maxsplit=1)
        if label and _is_image(Path(line.strip())) and not _is_image(Path(image)):
            image, label = line.strip(), []  # an unlabelled path with a space
        image = _inside(Path(image), file.parent, root, where)
        if not image.is_file():
            raise UserError(f"{where}: there is no file {image}")
        files.append(image)
        labels += [_label(label[0], names, where)] if label else []
        if labels and len(labels) < len(files):
            raise UserError(f"{where}: has no label, other lines have")
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
        raise UserError(f"list: {file} has the one class {names[0]}; at least two are needed")
    return files, labels, names


def _label(text: str, names: list[str] | None, where: str) -> int:
    if names and text in names:
        return names.index(text)
    if not text.isascii() or not text.isdecimal():
        raise UserError(
            f"{where}: label {text!r} is no class number"
            + ("" if names is None else " and no name in the classes file")
        )
    if names and int(text) >= len(names):
        raise UserError(f"{where}: label {text} is unknown, the classes file has numbers 0 to {len(names) - 1}")
    return int(text)
