"""Image and mask files decoded once and kept as uint8."""

import itertools
import math
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.runtime import UserError
from data.id_maps import UNKNOWN
from data.order import generator

Size = tuple[int, int]  # height, width


def _open(path: Path, read: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        with Image.open(path) as image:
            return read(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as an image ({reason}); mend or remove it") from None


def read_rgb(path: Path, size: Size | None = None) -> Image.Image:
    """An image file, resized with antialiasing if `size` is given. Raises `UserError` with its path."""

    def read(image: Image.Image) -> Image.Image:
        if size is None:
            return image.convert("RGB")
        image.draft("RGB", size[::-1])  # lets the JPEG decoder skip what a smaller image does not need
        return image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)

    return _open(path, read)


def image_size(path: Path) -> Size:
    """(height, width) from the file's head. Raises `UserError` with its path."""
    return _open(path, lambda image: image.size)[::-1]


def decode(path: Path, size: Size | None = None) -> torch.Tensor:
    """An image file as uint8 (3, H, W). Raises `UserError` with its path."""
    return torch.from_numpy(np.array(read_rgb(path, size))).permute(2, 0, 1)


class ImageDecoder:
    """`decode` to `size`, as an object that travels to a loader's workers."""

    def __init__(self, size: Size | None):
        self.size = size

    def __call__(self, path: Path) -> torch.Tensor:
        return decode(path, self.size)


class MaskDecoder:
    """A mask file of single-channel or palette numbers -> class numbers by `table`, uint8 (H, W).

    Resized by the nearest pixel if `size` is given.

    Raises:
        UserError: with the path, for a colour mask or a number the table has not.
    """

    def __init__(self, table: torch.Tensor, names: list[str], size: Size | None = None):
        self.table, self.names, self.size = table.numpy(), names, size

    def __call__(self, path: Path) -> torch.Tensor:
        mask = _open(path, lambda image: image.copy())
        if mask.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
            raise UserError(
                f"{path}: a mask has one number a pixel, or a palette, and this one has colours ({mask.mode}); "
                "turn its colours into numbers"
            )
        numbers = np.asarray(mask).astype(np.int64)
        outside = (numbers < 0) | (numbers >= len(self.table))
        classes = self.table[np.where(outside, 0, numbers)]
        unknown = outside | (classes == UNKNOWN)
        if unknown.any():
            raise UserError(
                f"{path}: the mask holds {numbers[unknown].min()}, which ids has not ({len(self.names)} classes: "
                f"{', '.join(self.names[:12])}{' ...' if len(self.names) > 12 else ''}); add it to a class or to void"
            )
        if self.size and self.size != classes.shape:
            classes = np.array(Image.fromarray(classes).resize(self.size[::-1], Image.Resampling.NEAREST))
        return torch.from_numpy(classes)


def _create(path: Path, count: int) -> None:
    """A sparse uint8 array of zeros, unless the file is there; of two runs that create it at once, the first wins."""
    if path.is_file():
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(temporary, "w+", np.uint8, (count,)).flush()
        if hasattr(os, "posix_fallocate"):  # a full disk is an error here, not a bus error at some later image
            with open(temporary, "r+b") as file:
                os.posix_fallocate(file.fileno(), 0, os.fstat(file.fileno()).st_size)
        os.link(temporary, path)
    except FileExistsError:
        pass
    except OSError as error:
        raise UserError(f"data.cache: {path} cannot be written ({error.strerror}); choose another folder", 5) from None
    finally:
        if temporary.exists():
            temporary.unlink()


def check_sizes(images: list[Path], masks: list[Path]) -> None:
    """Raise `UserError` for the first mask that has not its image's size; reads the heads of the files alone."""
    for image, mask in zip(images, masks, strict=True):
        if (own := image_size(mask)) != (of := image_size(image)):
            raise UserError(
                f"{mask}: the mask is {own[0]}x{own[1]} px, its image {image} {of[0]}x{of[1]}; a mask has its image's "
                "size: mend or remove the two"
            )


class Decoded:
    """`decoded[index]` -> uint8 (n, *shape); each file is decoded when it is first asked for.

    Up to `limit` bytes the arrays are kept in this process's memory; larger sets, and sets read by several
    workers, in a .npy file in `folder` that later runs find again. `folder` None keeps nothing (dry run).

    Args:
        paths: the files.
        shapes: the shape of each decoded file; those asked for at once must be equal.
        decode: path -> uint8 tensor of its shape.
        name: of the file in `folder`, with all that `decode` depends on beside the files themselves.
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
            self._flags().unlink()  # flags without their images: these were removed
        _create(self.file, self.bytes)
        _create(self._flags(), len(paths))

    def _flags(self) -> Path:
        return self.file.with_suffix(".done.npy")

    def __getstate__(self) -> dict:
        state = self.__dict__.copy()
        if self.file is not None:
            state["store"] = state["filled"] = None  # a worker maps the file anew
        return state

    def _open(self) -> None:
        if self.store is None and self.file is not None:
            try:
                self.store = torch.from_numpy(np.load(self.file, mmap_mode="r+"))
                self.filled = torch.from_numpy(np.load(self._flags(), mmap_mode="r+"))
            except (OSError, ValueError, EOFError):
                raise UserError(f"data.cache: {self.file} cannot be read; remove it and {self._flags().name}") from None

    def __len__(self) -> int:
        return len(self.paths)

    def _item(self, i: int) -> torch.Tensor:
        if self.store is None:
            return self.decode(self.paths[i])
        kept = self.store[self.starts[i] : self.starts[i + 1]].view(self.shapes[i])
        if not self.filled[i]:
            kept.copy_(self.decode(self.paths[i]))
            self.filled[i] = 1  # after the image: whoever sees the flag finds the image
        return kept

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        self._open()
        return torch.stack([self._item(i) for i in index.tolist()])

    def describe(self) -> str:
        where = (
            "not kept" if self.store is None and self.file is None else f"in {self.file}" if self.file else "in memory"
        )
        return f"{self.bytes / 2**20:.0f} MiB decoded, {where}"


def decoded_images(paths: list[Path], size: Size | None, folder: Path | None, limit: float, shared: bool) -> Decoded:
    """Image files as uint8 (3, H, W), of `size` or of their own."""
    shapes = [(3, *(size or image_size(path))) for path in paths]
    name = "decoded_" + ("x".join(map(str, size)) if size else "whole")
    return Decoded(paths, shapes, ImageDecoder(size), name, folder, limit, shared)


def decoded_masks(paths: list[Path], decoder: MaskDecoder, folder: Path | None, limit: float, shared: bool) -> Decoded:
    """The decoder's masks as uint8 (H, W) class numbers, of its size or of their own."""
    size = decoder.size
    shapes = [size or image_size(path) for path in paths]
    meaning = f"{generator(*decoder.table.tolist()).initial_seed():016x}"[:8]
    name = f"masks_{'x'.join(map(str, size)) if size else 'whole'}_{meaning}"
    return Decoded(paths, shapes, decoder, name, folder, limit, shared)
