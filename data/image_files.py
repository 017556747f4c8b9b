"""Image files that belong to no data set, to predict."""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils.data import Dataset

from common.errors import UserError
from data.decoded import Size, image_size
from data.folder import scan_unlabeled
from data.prepare import Preparation, load_image


class NamedFiles(NamedTuple):
    """Image files, and what each is called.

    Attributes:
        files: the files.
        names: their paths relative to the folder that was named, or as they were named.
        skipped: how many other files a folder has; "" for none.
    """

    files: list[Path]
    names: list[Path]
    skipped: str


def find_images(paths: Sequence[str]) -> NamedFiles:
    """The image files that a command names.

    Args:
        paths: files, and folders, of which all images in them and in the folders below are taken.

    Raises:
        UserError: there is no such file or folder, a folder has no images, or a file is named
            twice.
    """
    files, names, skipped = [], [], []
    for path in map(Path, paths):
        if path.is_dir():
            listed = scan_unlabeled(str(path.absolute()), path, str(path))
            names += [file.relative_to(path.absolute()) for file in listed.images]
            files += listed.images
            skipped += [listed.skipped] if listed.skipped else []
        elif path.is_file():
            files.append(path)
            inside = not path.is_absolute() and ".." not in path.parts
            names.append(path if inside else Path(path.name))
        else:
            raise UserError(f"{path}: there is no such file or folder; name images, or folders")
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(
            f"{twice[0]}: is named twice, or two images have this name; name each image once, and "
            "predict folders one by one"
        )
    return NamedFiles(files, names, "; ".join(skipped))


class Prepared(NamedTuple):
    """A batch of image files.

    Attributes:
        numbers: of the files that could be read.
        images: uint8 (3, H, W) of each, as `load_image`.
        sizes: (height, width) of each file's own image, turned by its EXIF orientation.
        mistakes: (number, what is wrong) of the other files.
    """

    numbers: list[int]
    images: list[torch.Tensor]
    sizes: list[Size]
    mistakes: list[tuple[int, str]]

    def groups(self) -> list[tuple[list[int], torch.Tensor, list[Size]]]:
        """(numbers, images (n, 3, H, W), sizes) of images of one size that follow each other."""
        groups: list[list[int]] = []
        for i, image in enumerate(self.images):
            if not groups or image.shape != self.images[groups[-1][0]].shape:
                groups.append([])
            groups[-1].append(i)
        return [
            (
                [self.numbers[i] for i in group],
                torch.stack([self.images[i] for i in group]),
                [self.sizes[i] for i in group],
            )
            for group in groups
        ]


class FileBatches(Dataset):
    """The files in their order; item k is batch k, a `Prepared`.

    Args:
        files: the files.
        batch: how many a batch has.
        how: how they are prepared: the card of a run.
    """

    def __init__(self, files: Sequence[Path], batch: int, how: Preparation):
        self.files, self.batch, self.how = files, batch, how

    def __len__(self) -> int:
        return -(-len(self.files) // self.batch)

    def __getitem__(self, k: int) -> Prepared:
        batch = Prepared([], [], [], [])
        first = k * self.batch
        for number, file in enumerate(self.files[first : first + self.batch], first):
            try:
                size = image_size(file, self.how.exif)
                image = load_image(file, self.how)
            except UserError as error:
                batch.mistakes.append((number, str(error)))
                continue
            batch.numbers.append(number)
            batch.images.append(image)
            batch.sizes.append(size)
        return batch
