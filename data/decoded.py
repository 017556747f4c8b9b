"""Image files decoded once and kept as uint8 squares."""

import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from common.runtime import UserError
from data.order import generator


def read_rgb(path: Path, side: int | None = None) -> Image.Image:
    """An image file, resized to a square with antialiasing if `side` is given. Raises `UserError` with its path."""
    try:
        with Image.open(path) as image:
            if side is None:
                return image.convert("RGB")
            image.draft("RGB", (side, side))  # lets the JPEG decoder skip what a smaller image does not need
            return image.convert("RGB").resize((side, side), Image.Resampling.BILINEAR)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise UserError(f"{path}: cannot be read as an image ({reason}); mend or remove it") from None


def decode(path: Path, side: int) -> torch.Tensor:
    """An image file as uint8 (3, side, side). Raises `UserError` with its path."""
    return torch.from_numpy(np.array(read_rgb(path, side))).permute(2, 0, 1)


def _create(path: Path, shape: tuple[int, ...]) -> None:
    """A sparse uint8 array of zeros, unless the file is there; of two runs that create it at once, the first wins."""
    if path.is_file():
        return
    temporary = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        np.lib.format.open_memmap(temporary, "w+", np.uint8, shape).flush()
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


class DecodedImages:
    """`images[index]` -> uint8 (n, 3, side, side); each file is decoded when it is first asked for.

    Up to `limit` bytes the squares are kept in this process's memory; larger sets, and sets read by several
    workers, in a .npy file in `folder` that later runs find again. `folder` None keeps nothing (dry run).
    """

    def __init__(self, paths: list[Path], side: int, folder: Path | None, limit: float, shared: bool):
        self.paths, self.side = paths, side
        self.bytes = len(paths) * 3 * side * side
        self.store = self.filled = self.file = None
        if folder is None:
            return
        if self.bytes <= limit and not shared:
            self.store = torch.empty((len(paths), 3, side, side), dtype=torch.uint8)
            self.filled = torch.zeros(len(paths), dtype=torch.bool)
            return
        stats = (f"{p}:{s.st_size}:{s.st_mtime_ns}" for p in paths for s in [p.stat()])
        self.file = folder / f"decoded_{side}_{generator(*stats).initial_seed():016x}.npy"
        if self._flags().is_file() and not self.file.is_file():
            self._flags().unlink()  # flags without their images: these were removed
        _create(self.file, (len(paths), 3, side, side))
        _create(self._flags(), (len(paths),))

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

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        self._open()
        if self.store is None:
            return torch.stack([decode(self.paths[i], self.side) for i in index.tolist()])
        for i in index[~self.filled[index].bool()].tolist():
            self.store[i] = decode(self.paths[i], self.side)
            self.filled[i] = 1  # after the image: whoever sees the flag finds the image
        return self.store.index_select(0, index)

    def describe(self) -> str:
        where = (
            "not kept" if self.store is None and self.file is None else f"in {self.file}" if self.file else "in memory"
        )
        return f"{self.bytes / 2**20:.0f} MiB decoded, {where}"
