"""Image files: in a folder per class, in one flat folder, beside a folder of masks, or named by a list file."""

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


def _read_lines(path: str, root: Path, expected: str, key: str = "list") -> tuple[Path, list[tuple[str, str]]]:
    """(the list file, its lines that are not empty as (file:line, text))."""
    file = _inside(Path(path), root, root, key)
    try:
        lines = file.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError):
        raise UserError(f"{key}: {file} cannot be read; it should hold a line `{expected}` per image") from None
    return file, [(f"{file}:{number}", line.strip()) for number, line in enumerate(lines, 1) if line.strip()]


def _listed(path: str, file: Path, root: Path, where: str) -> Path:
    found = _inside(Path(path), file.parent, root, where)
    if not found.is_file():
        raise UserError(f"{where}: there is no file {found}")
    return found


def read_labeled(path: str, names: list[str], root: Path) -> tuple[list[Path], list[int]]:
    """(files, labels) of a list file whose every line is `path label`, a label being a class of `names` or its number.

    Paths are relative to the list file's folder. Raises `UserError` with file:line.
    """
    file, lines = _read_lines(path, root, "path label", "data.target_labeled")
    found: dict[Path, int] = {}
    for where, line in lines:
        image, *label = _split_label(line, names)
        if not label:
            raise UserError(f"{where}: has no label; a line is `path label`")
        path = _listed(image, file, root, where)
        if path in found:
            raise UserError(f"{where}: names {path} again; an image has one label")
        found[path] = _label(label[0], names, where, "the source")
    if not found:
        raise UserError(f"data.target_labeled: {file} names no image")
    return list(found), list(found.values())


def _split_label(line: str, names: list[str] | None) -> list[str]:
    """[path, label] of a list's line, or [path]; a class name may hold spaces, and end in another one."""
    for name in sorted(names or [], key=len, reverse=True):
        if line.endswith((f" {name}", f"\t{name}")):
            return [line.removesuffix(name).rstrip(), name]
    image, *label = line.rsplit(maxsplit=1)
    if label and _is_image(Path(line)) and not _is_image(Path(image)):
        return [line]  # an unlabelled path with a space
    return [image, *label]


def read_list(path: str, classes: str | None, root: Path) -> tuple[list[Path], list[int] | None, list[str] | None]:
    """(files, labels, class names) of a list file with `path label` lines, or `path` lines alone.

    Paths are relative to the list file's folder. A label is a class's number from 0; with a `classes` file also its
    name. Without one the classes are named by their numbers. Raises `UserError` with file:line.
    """
    file, lines = _read_lines(path, root, "path label")
    names = _class_names(classes, root) if classes else None
    files, labels = [], []
    for where, line in lines:
        image, *label = _split_label(line, names)
        files.append(_listed(image, file, root, where))
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


def _label(text: str, names: list[str] | None, where: str, named_by: str = "the classes file") -> int:
    if names and text in names:
        return names.index(text)
    if not text.isascii() or not text.isdecimal():
        raise UserError(
            f"{where}: label {text!r} is no class number" + ("" if names is None else f" and no name in {named_by}")
        )
    if names and int(text) >= len(names):
        raise UserError(f"{where}: label {text} is unknown, {named_by} has numbers 0 to {len(names) - 1}")
    return int(text)


def _names(folder: Path, suffix: str | None) -> dict[str, Path]:
    """{path below `folder` without its suffix: file} of a folder's images, those of its own folders too.

    Without a suffix no two may share a name: they would be images and masks under one roof.
    """
    if not folder.is_dir():
        raise UserError(f"folder: there is no folder {folder}; set path, masks, data.root or the variable DA_DATA")
    found, stems = {}, {}
    for file in sorted(p for p in folder.rglob("*") if p.is_file() and _is_image(p)):
        name = file.relative_to(folder)
        if any(part.startswith(".") for part in name.parts) or not name.name.endswith(suffix or ""):
            continue
        if suffix is None and file.stem in stems:
            raise UserError(
                f"folder: {stems[file.stem]} and {file} share a name: is {folder} a level too high, with masks in it? "
                "If both are what you want, set the suffix they end in (image_suffix, mask_suffix)"
            )
        stems[file.stem] = file
        found[name.as_posix().removesuffix(file.suffix if suffix is None else suffix)] = file
    return found


def scan_masks(
    path: str, masks: str | None, suffixes: tuple[str | None, str | None], root: Path
) -> tuple[list[Path], list[Path] | None]:
    """(images, their masks) of root/path and root/masks, in the order of their names; None for `masks` None.

    An image and its mask have the same path below their folders, up to the suffixes (null: the extension). A mask
    without an image is left aside.
    """
    folder = _inside(Path(path), root, root, "folder")
    images = _names(folder, suffixes[0])
    if not images:
        raise UserError(f"folder: {folder} has no images" + (f" that end in {suffixes[0]}" if suffixes[0] else ""))
    if masks is None:
        return list(images.values()), None
    mask_folder = _inside(Path(masks), root, root, "masks")
    found = _names(mask_folder, suffixes[1])
    lacking = [file for name, file in images.items() if name not in found]
    if lacking:
        expected = f"{lacking[0].relative_to(folder).as_posix().removesuffix(suffixes[0] or lacking[0].suffix)}"
        raise UserError(
            f"masks: {lacking[0]} has no mask {mask_folder / expected}{suffixes[1] or '.png'} "
            f"({len(lacking)} of {len(images)} images have none); add it, or remove the image"
        )
    return list(images.values()), [found[name] for name in images]


def read_mask_list(path: str, root: Path) -> tuple[list[Path], list[Path] | None]:
    """(images, their masks) of a list file with `image mask` lines, or `image` lines alone (then without masks).

    Paths are relative to the list file's folder. Raises `UserError` with file:line.
    """
    file, lines = _read_lines(path, root, "image mask")
    images, masks = [], []
    for where, line in lines:
        image, *mask = line.split()
        if len(mask) > 1:
            raise UserError(f"{where}: has {1 + len(mask)} words; a line is `image mask`, without spaces in the paths")
        images.append(_listed(image, file, root, where))
        masks += [_listed(mask[0], file, root, where)] if mask else []
        if masks and len(masks) < len(images):
            raise UserError(f"{where}: has no mask, other lines have")
    if not images:
        raise UserError(f"list: {file} names no image")
    return images, masks or None
