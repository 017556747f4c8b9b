"""Reads many files, in the loader's processes and in threads; all files of a run, to try them."""

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch.utils.data import Dataset
from tqdm import tqdm

from common.errors import UserError
from data.config import DataConfig
from data.decoded import Decoded, raise_all, threads
from data.domains import Domains
from data.image_set import ImageSet, Joined, Renumbered
from data.loaders import Loader

CHUNK = 32  # files that one process reads at once


class Chunks(Dataset):
    """Item k: the results of `read` for the files of chunk k."""

    def __init__(self, files: Sequence, read: Callable):
        self.files, self.read = files, read

    def __len__(self) -> int:
        return -(-len(self.files) // CHUNK)

    def __getitem__(self, k: int) -> list:
        # Decoding and hashing release the interpreter's lock, so that threads use several cores.
        with ThreadPoolExecutor(threads()) as pool:
            return list(pool.map(self.read, self.files[k * CHUNK : (k + 1) * CHUNK]))


def read_each(files: Sequence, read: Callable, config: DataConfig, name: str) -> Iterator:
    """`read(file)` of each file, in order; a terminal shows the progress.

    Only the results of a few chunks are in memory at a time.

    Args:
        files: what `read` takes.
        read: a function that can be sent to the workers, as its results can.
        config: the section `data`. `data.workers` processes read, or with 0 of them the threads of
            this process.
        name: of the reading, for messages.
    """
    chunks = Chunks(files, read)
    loader = Loader(chunks, range(len(chunks)), config, name)
    bar = tqdm(total=len(files), desc="reading files", unit="file", leave=False, disable=None)
    with bar:
        for results in loader:
            bar.update(len(results))
            yield from results


def _mistake(file: tuple[Path, Callable]) -> str:
    """What is wrong with a file, or an empty text."""
    path, decode = file
    try:
        decode(path)
    except UserError as error:
        return str(error)
    return ""


def file_sets(images: object | None) -> list[Decoded]:
    """The sets of files in the `images` or `labels` of an `ImageSet`."""
    if isinstance(images, Joined):
        return [decoded for part in images.parts for decoded in file_sets(part)]
    if isinstance(images, Renumbered):
        return file_sets(images.masks)
    return [images] if isinstance(images, Decoded) else []


def check_files(domains: Domains) -> int:
    """Decode every file of every set once, in `data.workers` processes, and store nothing.

    A terminal shows the progress.

    Returns:
        The number of files.

    Raises:
        UserError: some files cannot be used; it names all of them.
    """
    sets = [images for images in vars(domains).values() if isinstance(images, ImageSet)]
    decoders = {
        (path, type(decoded.decode)): decoded.decode
        for images in sets
        for part in (images.images, images.labels)
        for decoded in file_sets(part)
        for path in decoded.paths
    }
    files = [(path, decode) for (path, _), decode in decoders.items()]
    mistakes = [text for text in read_each(files, _mistake, domains.config, "--all") if text]
    raise_all(mistakes)
    return len(files)
