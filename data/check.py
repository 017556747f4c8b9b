"""Reads every image and mask of a run, to name all that cannot be used at once."""

from collections.abc import Callable
from pathlib import Path

from torch.utils.data import Dataset
from tqdm import tqdm

from common.errors import UserError
from data.decoded import Decoded, raise_all
from data.domains import Domains
from data.image_set import ImageSet, Joined, Renumbered
from data.loaders import Loader


class Mistakes(Dataset):
    """Item k: what is wrong with file k, or an empty text."""

    def __init__(self, files: list[tuple[Path, Callable]]):
        self.files = files

    def __getitem__(self, k: int) -> str:
        path, decode = self.files[k]
        try:
            decode(path)
        except UserError as error:
            return str(error)
        return ""


def _decoded(images: object | None) -> list[Decoded]:
    """The sets of files in the `images` or `labels` of an `ImageSet`."""
    if isinstance(images, Joined):
        return [decoded for part in images.parts for decoded in _decoded(part)]
    if isinstance(images, Renumbered):
        return _decoded(images.masks)
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
        for decoded in _decoded(part)
        for path in decoded.paths
    }
    files = [(path, decode) for (path, _), decode in decoders.items()]
    loader = Loader(Mistakes(files), range(len(files)), domains.config, "--all")
    texts = tqdm(loader, "reading files", unit="file", leave=False, disable=None)
    raise_all([text for text in texts if text])
    return len(files)
