"""Image and mask files that are decoded once and then stored as uint8."""

import errno
import itertools
import math
import os
import sys
import weakref
import zlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import ExifTags, Image, ImageOps
from torch.utils.data import get_worker_info
from tqdm import tqdm

from common import ranks
from common.errors import UserError
from data.id_maps import UNKNOWN
from data.memory import empty_batch
from data.order import generator

Size = tuple[int, int]  # height, width

# Of the cache files: raise it if the same files become other pixels, or are stored in another way.
VERSION = 3
CHECKSUM = 4  # bytes before each image of a cache file
SHOWN = 20  # files or numbers that one message names


class UnusableFiles(UserError):
    """Files that cannot be used: `mistakes` has a sentence for each, the message for the first."""

    def __init__(self, mistakes: Sequence[str]):
        more = [f"and {len(mistakes) - SHOWN} more"] if len(mistakes) > SHOWN else []
        lines = [f"{len(mistakes)} files cannot be used:", *mistakes[:SHOWN], *more]
        super().__init__(mistakes[0] if len(mistakes) == 1 else "\n       ".join(lines))
        self.mistakes = list(mistakes)


def raise_all(mistakes: Sequence[str]) -> None:
    """Raise one `UnusableFiles` for all files that cannot be used; do nothing without mistakes."""
    if mistakes:
        raise UnusableFiles(mistakes)


def for_each(paths: Sequence[Path], read: Callable[[Path], object], doing: str) -> list:
    """`read(path)` of every file. A terminal shows the progress if it takes longer than a second.

    Raises:
        UserError: `read` raised one for some files; it names all of them.
    """
    results, mistakes = [], []
    quiet = None if ranks.is_first() else True
    for path in tqdm(paths, doing, unit="file", leave=False, disable=quiet, delay=1):
        try:
            results.append(read(path))
        except UserError as error:
            mistakes.append(str(error))
    raise_all(mistakes)
    return results


def _open(path: Path, read: Callable[[Image.Image], object]):
    """`read(image)` of an image file. Raises `UserError` with its path."""
    try:
        if path.exists() and not path.is_file():  # to read a pipe is to wait for ever
            raise OSError("not a regular file")
        with Image.open(path) as image:
            return read(image)
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        reason = reason.splitlines()[0]
        raise UserError(
            f"{path}: cannot be read as an image ({reason}); repair or remove it"
        ) from None


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation from the header, 1 (upright) to 8; 5 and above swap the sides."""
    if image.format == "PNG" and "exif" not in image.info:
        return 1  # to look further, PIL would decode the pixels
    try:
        orientation = image.getexif().get(ExifTags.Base.Orientation, 1)
    except SyntaxError:
        return 1  # the EXIF data are damaged, the image is not
    return orientation if orientation in range(1, 9) else 1


def _check_depth(image: Image.Image, path: Path) -> None:
    """Raise `UserError` for an image of which PIL would keep the lowest 8 bits."""
    if image.mode == "F" or image.mode.startswith("I"):
        raise UserError(
            f"{path}: an image has 8 bits per channel, but this one has 16 or 32 "
            f"(mode {image.mode}); save it as 8 bit"
        )


def read_rgb(path: Path, size: Size | None = None, exif: bool = True) -> Image.Image:
    """An image file in RGB, resized with antialiasing if `size` is given.

    Args:
        path: the file.
        size: (height, width), or None for the image's own.
        exif: whether the image is turned by its EXIF orientation.

    Raises:
        UserError: with the path, if the file cannot be read or has more than 8 bits per channel.
    """

    def read(image: Image.Image) -> Image.Image:
        _check_depth(image, path)
        orientation = _orientation(image) if exif else 1
        if size is not None:
            # The JPEG decoder may skip details that the smaller image does not show.
            image.draft("RGB", size if orientation >= 5 else size[::-1])
        if orientation > 1:
            image = ImageOps.exif_transpose(image)
        if size is None:
            return image.convert("RGB")
        return image.convert("RGB").resize(size[::-1], Image.Resampling.BILINEAR)

    return _open(path, read)


def image_size(path: Path, exif: bool = True) -> Size:
    """(height, width) of `read_rgb`, from the header of the file. Raises `UserError` as it does."""

    def read(image: Image.Image) -> Size:
        _check_depth(image, path)
        return _turned_size(image, exif)

    return _open(path, read)


def _turned_size(image: Image.Image, exif: bool) -> Size:
    """(height, width) of an image that is not decoded yet, once it is turned."""
    width, height = image.size
    # PIL turns a TIFF file by itself; its size is the turned one.
    swapped = exif and image.format != "TIFF" and _orientation(image) >= 5
    return (width, height) if swapped else (height, width)


class Header(NamedTuple):
    """What the header of an image file says.

    Attributes:
        mode: PIL's name of the channels, such as RGB, L (gray) or I;16 (gray of 16 bits).
        size: (height, width), once the image is turned.
        turned: whether it is turned by its EXIF orientation.
    """

    mode: str
    size: Size
    turned: bool


def image_header(path: Path, exif: bool = True) -> Header:
    """The header of an image file of any mode. Raises `UserError` if it cannot be read."""

    def read(image: Image.Image) -> Header:
        turned = exif and _orientation(image) > 1
        return Header(image.mode, _turned_size(image, exif), turned)

    return _open(path, read)


def decode(path: Path, size: Size | None = None, exif: bool = True) -> torch.Tensor:
    """An image file as uint8 (3, H, W); see `read_rgb`."""
    return torch.from_numpy(np.array(read_rgb(path, size, exif))).permute(2, 0, 1)


class ImageDecoder:
    """`decode` with a fixed `size` and `exif`, as an object that can be sent to the workers."""

    channels = (3,)

    def __init__(self, size: Size | None, exif: bool):
        self.size, self.exif = size, exif

    @property
    def name(self) -> str:
        """Names all that the pixels depend on besides the files."""
        return f"decoded_{_size_name(self.size)}{'' if self.exif else '_unturned'}"

    def header(self, path: Path) -> Size:
        """The size of the file's image. Raises `UserError` for what the header shows."""
        return image_size(path, self.exif)

    def __call__(self, path: Path) -> torch.Tensor:
        return decode(path, self.size, self.exif)


class MaskDecoder:
    """Path of a mask file -> class numbers, uint8 (H, W).

    A mask has one channel of numbers, or a palette. It is not turned by an EXIF orientation.

    Args:
        table: class number of each number in a mask, see `id_map`.
        names: the class names, for messages.
        size: (height, width) to which masks are resized, by nearest neighbor; None: not resized.

    Raises:
        UserError: with the path, for a color mask or a number without a class.
    """

    channels = ()

    def __init__(self, table: torch.Tensor, names: list[str], size: Size | None = None):
        self.table, self.names, self.size = table.numpy(), names, size

    @property
    def name(self) -> str:
        """Names all that the class numbers depend on besides the files."""
        meaning = f"{generator(*self.table.tolist()).initial_seed():016x}"[:8]
        return f"masks_{_size_name(self.size)}_{meaning}"

    def header(self, path: Path) -> Size:
        """The size of the file's mask. Raises `UserError` for what the header shows."""

        def read(image: Image.Image) -> Size:
            _check_mode(image, path)
            return image.size[::-1]

        return _open(path, read)

    def look_up(self, numbers: np.ndarray) -> np.ndarray:
        """The class number of each number in a mask, uint8; `UNKNOWN` where it has none."""
        outside = (numbers < 0) | (numbers >= len(self.table))
        return np.where(outside, np.uint8(UNKNOWN), self.table[np.where(outside, 0, numbers)])

    def __call__(self, path: Path) -> torch.Tensor:
        numbers = mask_numbers(path)
        classes = self.look_up(numbers)
        unknown = classes == UNKNOWN
        if unknown.any():
            found = np.unique(numbers[unknown]).tolist()
            shown = ", ".join(map(str, found[:SHOWN])) + (" ..." if len(found) > SHOWN else "")
            names = ", ".join(self.names[:12]) + (" ..." if len(self.names) > 12 else "")
            raise UserError(
                f"{path}: the mask contains {shown}, which ids does not define "
                f"({len(self.names)} classes: {names}); add it to a class or to void"
            )
        if self.size and self.size != classes.shape:
            resized = Image.fromarray(classes).resize(self.size[::-1], Image.Resampling.NEAREST)
            classes = np.array(resized)
        return torch.from_numpy(classes)


def _check_mode(mask: Image.Image, path: Path) -> None:
    """Raise `UserError` for a mask with colors."""
    if mask.mode not in ("L", "P", "1", "I", "I;16", "I;16B", "I;16L"):
        raise UserError(
            f"{path}: a mask has one number per pixel, or a palette, but this one has colors "
            f"({mask.mode}); convert its colors to numbers"
        )


def mask_numbers(path: Path) -> np.ndarray:
    """The numbers in a mask file, int64 (H, W).

    Raises:
        UserError: with the path, if the file cannot be read or has colors.
    """
    mask = _open(path, lambda image: image.copy())
    _check_mode(mask, path)
    return np.asarray(mask).astype(np.int64)


def _size_name(size: Size | None) -> str:
    return "x".join(map(str, size)) if size else "whole"


def size_mistake(mask: Path, mask_size: Size, image: Path, image_size: Size) -> str:
    """A sentence for a mask that differs in size from its image, or an empty text.

    Args:
        mask, image: the files.
        mask_size: (height, width) of the mask.
        image_size: that of the image, once it is turned by its EXIF orientation.
    """
    if mask_size == image_size:
        return ""
    (mask_height, mask_width), (height, width) = mask_size, image_size
    return (
        f"{mask}: the mask is {mask_height}x{mask_width} px, its image {image} "
        f"{height}x{width}; a mask has the size of its image: correct or remove the two"
    )


def check_sizes(images: list[Path], masks: list[Path], exif: bool) -> None:
    """Raise one `UserError` for all masks that differ in size from their images.

    Only the headers of the files are read. An image has its size after it is turned by its EXIF
    orientation, if `exif`.
    """
    image_of = dict(zip(masks, images, strict=True))

    def check(mask: Path) -> None:
        size = _open(mask, lambda image: image.size)[::-1]
        image = image_of[mask]
        if mistake := size_mistake(mask, size, image, image_size(image, exif)):
            raise UserError(mistake)

    for_each(masks, check, "sizes of masks")


def _stat(path: Path) -> str:
    """What tells a changed file, without reading it."""
    try:
        stat = path.stat()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read as an image ({error.strerror}); repair or remove it"
        ) from None
    return f"{path}:{stat.st_size}:{stat.st_mtime_ns}"


class Decoded:
    """Files as one indexable set: `decoded[index]` -> uint8 (n, *shape) for an int64 index (n,).

    A file is decoded when it is first requested. A small set is then stored in the memory of this
    process; a set of more than `limit` bytes, or one that several workers read, is stored in a file
    in `folder`, which later runs use too. There each image follows its checksum. It is compared
    when a process reads the image for the first time, so that a damaged image is decoded again; so
    is one that is cut short later. Images are stored with their channels last, and so they are
    delivered.

    The headers of all files are read at once, unless a cache file shows that they were before.

    Args:
        paths: the files; those of one index must be decoded to the same shape.
        decode: an `ImageDecoder` or a `MaskDecoder`.
        folder: the folder of the cache file, or None to store nothing.
        limit: largest size in memory, in bytes.
        shared: whether several workers read the set.

    Raises:
        UserError: the headers of some files cannot be read, or the cache cannot be written (5).
    """

    def __init__(
        self,
        paths: list[Path],
        decode: ImageDecoder | MaskDecoder,
        folder: Path | None,
        limit: float,
        shared: bool,
    ):
        self.paths, self.decode = paths, decode
        sizes = [decode.size] * len(paths) if decode.size else self._headers()
        self.shapes = [(*decode.channels, *size) for size in sizes]
        self.starts = [0, *itertools.accumulate(math.prod(shape) for shape in self.shapes)]
        self.bytes = self.starts[-1]
        self.store = self.file = None
        # Images that this process has stored in its memory, or seen undamaged in the file.
        self.ready = np.zeros(len(paths), bool)
        self.told = False
        self.bar, self.shows = None, folder is not None and not shared
        if folder is not None and (self.bytes > limit or shared):
            self._choose_file(folder)
        if decode.size and not (self.file and self.file.exists()):
            self._headers()
        if self.file is not None:
            self._open_file()
        elif folder is not None:
            self.store = self._allocate()

    def _allocate(self) -> torch.Tensor:
        try:
            return torch.empty(self.bytes, dtype=torch.uint8)
        except (RuntimeError, MemoryError):
            raise UserError(
                f"out of memory: {len(self.paths)} decoded images (first: {self.paths[0]}) need "
                f"{self.bytes / 2**30:.1f} GiB; lower data.cache_gb to store them in a file"
            ) from None

    def _headers(self) -> list[Size]:
        return for_each(self.paths, self.decode.header, "headers of images")

    def identity(self) -> int:
        """A number that changes with the path, the size or the date of one of the files."""
        return generator(*for_each(self.paths, _stat, "dates of images")).initial_seed()

    def _choose_file(self, folder: Path) -> None:
        """Name the cache file, and tell of others that may no longer be used."""
        place = os.path.commonpath([os.path.abspath(path) for path in self.paths])
        name = f"{self.decode.name}_v{VERSION}_{generator(place).initial_seed():016x}"[:-8]
        self.file = folder / f"{name}_{self.identity():016x}.bin"
        if self.file.exists():
            return
        # Of these images before they changed, of other images there, or of an earlier version.
        others = [*folder.glob(f"{name}_*.bin"), *folder.glob("decoded_*.npy")]
        others += folder.glob("masks_*.npy")
        if others:
            size = sum(other.stat().st_size for other in others) / 2**30
            print(
                f"data.cache: a new file is made for {place}; {folder} has {len(others)} others of "
                f"it or of an earlier version ({size:.1f} GiB, first: {others[0].name}); "
                "remove those that no run needs"
            )

    def _open_file(self) -> None:
        """Open the cache file, and create it if necessary, at its full size.

        A full disk is reported here, and not when an image is stored. Two runs may do this at once.
        """
        size = self._offset(len(self.paths))
        empty = False
        try:
            self.file.parent.mkdir(parents=True, exist_ok=True)
            self.descriptor = os.open(self.file, os.O_RDWR | os.O_CREAT, 0o666)
            weakref.finalize(self, os.close, self.descriptor)
            length = os.fstat(self.descriptor).st_size
            empty = length == 0
            if length < size and hasattr(os, "posix_fallocate"):
                os.posix_fallocate(self.descriptor, 0, size)
        except OSError as error:
            if empty:
                self.file.unlink(missing_ok=True)
            raise self._not_written(error) from None

    def _not_written(self, error: OSError) -> UserError:
        return UserError(
            f"data.cache: {self.file} cannot be written ({error.strerror}); choose another folder",
            5,
        )

    def __getstate__(self) -> dict:
        return {**{k: x for k, x in vars(self).items() if k != "descriptor"}, "bar": None}

    def __setstate__(self, state: dict) -> None:
        vars(self).update(state)
        if self.file is not None:
            self._open_file()

    def __len__(self) -> int:
        return len(self.paths)

    def _offset(self, i: int) -> int:
        """The place of image i in the cache file, where its checksum begins."""
        return self.starts[i] + CHECKSUM * i

    def _read(self, i: int, pixels: np.ndarray) -> bool:
        """Read an image of the cache file into `pixels`; False if it is not there, or damaged."""
        checksum = bytearray(CHECKSUM)
        try:
            # Not mapped into memory: there a file that is cut short would kill the process.
            count = os.preadv(self.descriptor, [checksum, pixels], self._offset(i))
        except OSError as error:
            raise UserError(
                f"data.cache: {self.file} cannot be read ({error.strerror}); remove it"
            ) from None
        complete = any(checksum) and count == CHECKSUM + pixels.nbytes
        if complete and self.ready[i]:
            return True
        if complete and checksum == _checksum(pixels):
            self.ready[i] = True
            return True
        if any(checksum) and not self.told:
            self.told = True
            print(f"warning: {self.file}: has damaged images; they are decoded again", flush=True)
        return False

    def _write(self, i: int, pixels: np.ndarray) -> None:
        try:
            if os.pwrite(self.descriptor, pixels, self._offset(i) + CHECKSUM) < pixels.nbytes:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            # Last, so that a process that reads meanwhile sees no checksum without its image.
            os.pwrite(self.descriptor, _checksum(pixels), self._offset(i))
        except OSError as error:
            raise self._not_written(error) from None

    def _decode(self, i: int) -> torch.Tensor:
        try:
            return self.decode(self.paths[i])
        except UserError as error:
            raise UserError(
                f"{error} (--dry-run --all with a new out_dir names all such files; a run cannot "
                "go on without one of its images, and starts again)"
            ) from None

    def _stored(self, i: int) -> np.ndarray:
        """The place of image i in the memory of this process."""
        stored = self.store[self.starts[i] : self.starts[i + 1]]
        return stored.view(_in_memory(self.shapes[i])).numpy()

    def _copy(self, i: int, pixels: np.ndarray) -> bool:
        """Copy a stored image into `pixels`; False if it must be decoded first."""
        if self.file is not None:
            return self._read(i, pixels)
        if self.store is None or not self.ready[i]:
            return False
        pixels[:] = self._stored(i)
        return True

    def _decode_into(self, i: int, pixels: np.ndarray) -> None:
        """Decode a file into `pixels`, and store it."""
        decoded = self._decode(i)
        pixels[:] = decoded.movedim(0, -1) if decoded.dim() == 3 else decoded
        if self.file is not None:
            self._write(i, pixels)
        elif self.store is not None:
            self._stored(i)[:] = pixels
            self.ready[i] = True
        if self.bar is not None:
            self.bar.update()

    def _show_progress(self, decoding: bool) -> None:
        """Show on a terminal how many images are decoded, in the first pass over them."""
        if not decoding and self.bar is not None:
            self.bar.close()
            self.bar = None
        elif decoding and self.bar is None and self.shows and ranks.is_first():
            counts = {"total": len(self), "unit": "file"}
            self.bar = tqdm(desc="decoding", leave=False, disable=None, delay=1, **counts)

    def __getitem__(self, index: torch.Tensor) -> torch.Tensor:
        numbers = index.tolist()
        if self.store is not None and self.decode.size and self.ready[numbers].all():
            images = self.store.view(len(self), *_in_memory(self.shapes[0]))
            batch = empty_batch((len(numbers), *images.shape[1:]))
            torch.index_select(images, 0, index, out=batch)
        else:
            (shape,) = {_in_memory(self.shapes[i]) for i in numbers}
            batch = self._fill(numbers, empty_batch((len(numbers), *shape)))
        return batch.movedim(-1, 1) if batch.dim() == 4 else batch

    def one(self, i: int) -> torch.Tensor:
        """An image, or a mask; a view where it is in memory."""
        if self.store is None or not self.ready[i]:
            shape = (1, *_in_memory(self.shapes[i]))
            pixels = self._fill([i], torch.empty(shape, dtype=torch.uint8))[0]
        else:
            pixels = torch.from_numpy(self._stored(i))
        return pixels.movedim(-1, 0) if pixels.dim() == 3 else pixels

    def _fill(self, numbers: list[int], batch: torch.Tensor) -> torch.Tensor:
        """Fill `batch` with images of one size, (n, H, W, C), or masks (n, H, W)."""
        places: dict[int, list[np.ndarray]] = {}  # in the batch; an image may have several
        for i, pixels in zip(numbers, batch.numpy(), strict=True):
            places.setdefault(i, []).append(pixels)
        missing = [i for i, rows in places.items() if not self._copy(i, rows[0])]
        self._show_progress(bool(missing))
        if len(missing) == 1:
            self._decode_into(missing[0], places[missing[0]][0])
        elif missing:
            # Decoding releases the interpreter's lock, so that threads use several cores.
            with ThreadPoolExecutor(threads()) as pool:
                list(pool.map(lambda i: self._decode_into(i, places[i][0]), missing))
        for first, *others in places.values():
            for row in others:
                row[:] = first
        return batch

    def describe(self) -> str:
        """The size of the decoded set and where it is stored."""
        if self.file is not None:
            where = f"in {self.file}"
        else:
            where = "decoded whenever it is used" if self.store is None else "in memory"
        return f"{self.bytes / 2**20:.0f} MiB decoded, {where}"


def _in_memory(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape of an image in memory, (H, W, C), as resizing is fastest; or of a mask, (H, W)."""
    return (*shape[1:], shape[0]) if len(shape) == 3 else shape


def threads() -> int:
    """How many files this process decodes at once: the processes of a machine share its cores."""
    worker = get_worker_info()
    processes = ranks.local_count() * (worker.num_workers if worker else 1)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return max((cores or 1) // processes, 1)


def _checksum(pixels: np.ndarray) -> bytes:
    """Never zero, which marks an image that is not stored."""
    return (zlib.crc32(pixels) or 1).to_bytes(CHECKSUM, sys.byteorder)


def decoded_images(
    paths: list[Path],
    size: Size | None,
    folder: Path | None,
    limit: float,
    shared: bool,
    exif: bool = True,
) -> Decoded:
    """Image files as uint8 (3, H, W).

    Args:
        paths: the files.
        size: (height, width) of all images, or None for their own sizes.
        folder, limit, shared: see `Decoded`.
        exif: whether images are turned by their EXIF orientation.
    """
    return Decoded(paths, ImageDecoder(size, exif), folder, limit, shared)
