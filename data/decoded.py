"""Image and mask files that are decoded once and then stored as uint8."""

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.errors import UserError
from data.id_maps import UNKNOWN
from data.order import generator

Size = tuple[int, int]  # height, width


def _open(path: Path, read: Callable[[Image.Image], Image.Image]) -> Image.Image:
    """`read(image)` of an image file. Raises `UserError` with its path."""
    try:
        with Image.open(path) as image:
            return read(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as an image ({reason}); repair or remove it"
        ) from None


def read_rgb(path: Path, size: Size | None = None) -> Image.Image:
    """An image file in RGB, resized with antialiasing if `size` is given.

    Raises:
        UserError: with the path, if the file cannot be read.
    """

    def read(image: Image.Image) -> Image.Image:
        if size is None:
            return image.convert("RGB")
        # The JPEG decoder may skip details that the smaller image does not show.
        image.draft("RGB", size[::-1])
        return image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)

    return _open(path, read)


def image_size(path: Path) -> Size:
    """(height, width) from the header of an image file. Raises `UserError` with its path."""
    return _open(path, lambda image: image.size)[::-1]


def decode(path: Path, size: Size | None = None) -> torch.Tensor:
    """An image file as uint8 (3, H, W). Raises `UserError` with its path."""
    return torch.from_numpy(np.array(read_rgb(path, size))).permute(2, 0, 1)


class ImageDecoder:
    """`decode` with a fixed `size`, as an object that can be sent to the workers of a loader."""

    def __init__(self, size: Size | None):
        self.size = size

    def __call__(self, path: Path) -> torch.Tensor:
        return decode(path, self.size)


class MaskDecoder:
    """Path of a mask file -> class numbers, uint8 (H, W).

    A mask has one channel of numbers, or a palette.

    Args:
        table: class number of each number in a mask, see `id_map`.
        names: the class names, for messages.
        size: (height, width) to which masks are resized, by nearest neighbor; None: not resized.

    Raises:
        UserError: with the path, for a color mask or a number without a class.
    """

    def __init__(self, table: torch.Tensor, names: list[str], size: Size | None = None):
        self.table, self.names, self.size = table.numpy(), names, size

    def __call__(self, path: Path) -> torch.Tensor:
        mask = _open(path, lambda image: image.copy())
        if mask.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
            raise UserError(
                f"{path}: a mask has one number per pixel, or a palette, but this one has colors "
                f"({mask.mode}); convert its colors to numbers"
            )
        numbers = np.asarray(mask).astype(np.int64)
        outside = (numbers < 0) | (numbers >= len(self.table))
        classes = self.table[np.where(outside, 0, numbers)]
        unknown = outside | (classes == UNKNOWN)
        if unknown.any():
            names = ", ".join(self.names[:12]) + (" ..." if len(self.names) > 12 else "")
            raise UserError(
                f"{path}: the mask contains {numbers[unknown].min()}, which ids does not define "
                f"({len(self.names)} classes: {names}); add it to a class or to void"
            )
        if self.size and self.size != classes.shape:
            resized = Image.fromarray(classes).resize(self.size[::-1], Image.Resampling.NEAREST)
            classes = np.array(resized)
        return torch.from_numpy(classes)


def _create(path: Path, count: int) -> None:
    """Create a .npy file of `count` zeros, uint8, unless the file exists.

    If two runs create it at the same time, both use the file of the first.
    """
    if path.is_file():
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(temporary, "w+", np.uint8, (count,)).flush()
        # A full disk is reported here, and not as a bus error when an image is stored.
        if hasattr(os, "posix_fallocate"):
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(
            f"data.cache: {path} cannot be written ({error.strerror}); choose another folder", 5
        ) from None
    finally:
        if temporary.exists():
            temporary.unlink()


def check_sizes(images: list[Path], masks: list[Path]) -> None:
    """Raise `UserError` for the first mask that differs in size from its image.

    Only the headers of the files are read.
    """
    for image, mask in zip(images, masks, strict=True):
        mask_height, mask_width = image_size(mask)
        height, width = image_size(image)
        if (mask_height, mask_width) != (height, width):
            raise UserError(
                f"{mask}: the mask is {mask_height}x{mask_width} px, its image {image} "
                f"{height}x{width}; a mask has the size of its image: correct or remove the two"
            )


class Decoded:
    """Files as one indexable set: `decoded[index]` -> uint8 (n, *shape) for an int64 index (n,).

    A file is decoded when it is first requested. A small set is then stored in the memory of this
    process; a set of more than `limit` bytes, or one that several workers read, is stored in a .npy
    file in `folder`, which later runs use too.

    Args:
        paths: the files.
        shapes: the shape of each decoded file; the files of one index must have the same shape.
        decode: path -> uint8 tensor of that shape.
        name: start of the name of the .npy file; it must name everything that `decode` depends on
            besides the files.
        folder: the folder of the .npy file, or None to store nothing (dry run).
        limit: largest size in memory, in bytes.
        shared: whether several workers read the set.
    """

    def __init__(
        self,
        paths: list[Path],
        shapes: list[tuple[int, ...]],
        decode: Callable[[Path], torch.Tensor],
        name: str,
        folder: Path | None,
        limit: float,
        shared: bool,
    ):
        self.paths, self.shapes, self.decode = paths, shapes, decode
        self.starts = [0, *itertools.accumulate(math.prod(shape) for shape in shapes)]
        self.bytes = self.starts[-1]
        self.store = self.filled = self.file = None
        if folder is None:
            return
        if self.bytes <= limit and not shared:
            self.store = torch.empty(self.bytes, dtype=torch.uint8)
            self.filled = torch.zeros(len(paths), dtype=torch.bool)
            return
        stats = (f"{p}:{s.st_size}:{s.st_mtime_ns}" for p in paths for s in [p.stat()])
        self.file = folder / f"{name}_{generator(*stats).initial_seed():016x}.npy"
        if self._flags().is_file() and not self.file.is_file():
            self._flags().unlink()  # the images were removed, and their flags were not
        _create(self.file, self.bytes)
        _create(self._flags(), len(paths))

    def _flags(self) -> Path:
        """The file that marks which images are stored."""
        return self.file.with_suffix(".done.npy")

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if self.file is not None:
            state["store"] = state["filled"] = None  # a worker maps the file itself
        return state

    def _open(self) -> None:
        if self.store is None and self.file is not None:
            try:
                self.store = torch.from_numpy(np.load(self.file, mmap_mode="r+"))
                self.filled = torch.from_numpy(np.load(self._flags(), mmap_mode="r+"))
            except (OSError, ValueError, EOFError):
                raise UserError(
                    f"data.cache: {self.file} cannot be read; remove it and {self._flags().name}"
                ) from None

    def __len__(self) -> int:
        return len(self.paths)

    def _item(self, i: int) -> torch.Tensor:
        if self.store is None:
            return self.decode(self.paths[i])
        stored = self.store[self.starts[i] : self.starts[i + 1]].view(self.shapes[i])
        if not self.filled[i]:
            stored.copy_(self.decode(self.paths[i]))
            self.filled[i] = 1  # set after the image, so that a flag always has its image
        return stored

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        self._open()
        return torch.stack([self._item(i) for i in index.tolist()])

    def describe(self) -> str:
        """The size of the decoded set and where it is stored."""
        if self.file is not None:
            where = f"in {self.file}"
        else:
            where = "not stored" if self.store is None else "in memory"
        return f"{self.bytes / 2**20:.0f} MiB decoded, {where}"


def decoded_images(
    paths: list[Path], size: Size | None, folder: Path | None, limit: float, shared: bool
) -> Decoded:
    """Image files as uint8 (3, H, W).

    Args:
        paths: the files.
        size: (height, width) of all images, or None for their own sizes.
        folder, limit, shared: see `Decoded`.
    """
    shapes = [(3, *(size or image_size(path))) for path in paths]
    name = "decoded_" + ("x".join(map(str, size)) if size else "whole")
    return Decoded(paths, shapes, ImageDecoder(size), name, folder, limit, shared)


def decoded_masks(
    paths: list[Path], decoder: MaskDecoder, folder: Path | None, limit: float, shared: bool
) -> Decoded:
    """Mask files as class numbers, uint8 (H, W).

    Args:
        paths: the files.
        decoder: the meaning of the numbers in a mask, and the size of all masks if it has one.
        folder, limit, shared: see `Decoded`.
    """
    size = decoder.size
    shapes = [size or image_size(path) for path in paths]
    meaning = f"{generator(*decoder.table.tolist()).initial_seed():016x}"[:8]
    name = f"masks_{'x'.join(map(str, size)) if size else 'whole'}_{meaning}"
    return Decoded(paths, shapes, decoder, name, folder, limit, shared)
