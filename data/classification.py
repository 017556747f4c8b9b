"""Images with one class each. data/segmentation.py defines the same names; see data/tasks.py."""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset
from torchvision.transforms.v2 import functional as F

from common import ranks
from common.errors import UserError
from common.metrics import accuracies
from data.augment import Augment, center, three_channels
from data.config import FILES, DataConfig, DomainConfig
from data.decoded import Decoded, ImageDecoder, decoded_images
from data.digits import open_digits
from data.drawn import open_drawn
from data.folder import Files, read_labeled, read_list, scan_folder, scan_unlabeled
from data.image_set import ImageSet, image_set
from data.labeled import hold_out_of_each
from data.listing import Listing
from data.order import generator
from data.views import ViewBatches

LABELS = "a folder per class, or `path label` lines"  # what labels look like, for messages
CLASSES_DIFFER = (  # what to do if the classes of the target are not those of the source
    "; for unlabeled images in any folders set data.target.labels: false; "
    "name classes that the target lacks in data.absent_classes"
)


def open_set(
    domain: DomainConfig,
    role: str,
    config: DataConfig,
    train: bool,
    read_only: bool,
    trains: bool = False,
) -> ImageSet | None:
    """The training or test split of a domain; None for the test split of a set that has none.

    Digits are resized to `resize` (default `data.size`), files to `resize` (default 8/7 of
    `data.size`, which leaves room for crops).

    Args:
        domain: the section of the config.
        role: its place in the config, for messages.
        config: the section `data`.
        train: the training split, or the test split.
        read_only: store and download nothing (dry run).
        trains: whether the labels are for training; no effect here, see data/segmentation.py.
    """
    root = Path(config.root)
    if domain.name not in FILES:
        if domain.name.startswith("drawn"):
            images = open_drawn(domain.name, train)
        else:
            cache = Path(config.cache)
            images = open_digits(domain.name, domain.path, root, train, cache, read_only)
        return replace(images, images=_square(images.images, resize_of(domain, config)))
    return _decoded(domain, _files(domain, role, config), config, read_only) if train else None


def list_set(domain: DomainConfig, role: str, config: DataConfig, train: bool) -> Listing | None:
    """What `open_set` opens, before a file is read. For the parameters see there."""
    if domain.name in FILES:
        return _listing(domain, _files(domain, role, config), config) if train else None
    images = open_set(domain, role, config, train, read_only=True)
    return Listing(images.name, images.images, images.labels, images.classes)


def _files(domain: DomainConfig, role: str, config: DataConfig) -> Files:
    """The files of a folder or of a list; `role` is the place of the domain in the config."""
    root, absent = Path(config.root), config.absent_of(role)
    if domain.name == "list":
        return read_list(domain.path, domain.classes, root, role, absent)
    if domain.labels:
        return scan_folder(domain.path, root, f"data.{role}.path", absent)
    return scan_unlabeled(domain.path, root, f"data.{role}.path")


def _listing(domain: DomainConfig, files: Files, config: DataConfig) -> Listing:
    labels = None if files.labels is None else torch.tensor(files.labels)
    side = resize_of(domain, config)
    name, decode = f"{domain.name} {domain.path}", ImageDecoder((side, side), config.exif)
    return Listing(name, files.images, labels, files.classes, files.skipped, decode)


def resize_of(domain: DomainConfig, config: DataConfig) -> int | tuple[int, int] | None:
    """The side, in px, of the square that images are resized to before they are cropped."""
    if domain.name in FILES:
        return domain.resize or round(config.size * 8 / 7)
    return domain.resize or config.size


def _square(images: torch.Tensor, side: int) -> torch.Tensor:
    return images if images.shape[-1] == side else F.resize(images, [side, side], antialias=True)


def _decoded(domain: DomainConfig, files: Files, config: DataConfig, read_only: bool) -> ImageSet:
    """The set of image files, decoded to a square.

    Args:
        domain: the section of the config.
        files: the images, with their labels if there are any.
        config: the section `data`.
        read_only: store nothing (dry run).
    """
    side = resize_of(domain, config)
    folder = None if read_only or config.storage == "files" else Path(config.cache)
    limit = config.cache_gb * 2**30
    shared = config.workers > 0 or ranks.count() > 1
    images = decoded_images(files.images, (side, side), folder, limit, shared, config.exif)
    name = f"{domain.name} {domain.path}"
    return image_set(name, images, files.labels, files.classes, skipped=files.skipped)


def check_sources(sources: list[ImageSet]) -> None:
    """Raise `UserError` where the images of several sources differ in size."""
    sides = [_side(source) for source in sources]
    if len(set(sides)) > 1:
        pairs = zip(sources, sides, strict=True)
        shown = ", ".join(f"{source.name} {side} px" for source, side in pairs)
        raise UserError(
            f"data.source: the sources are one set, whose images have one size ({shown}); "
            "give each a resize"
        )


def _side(images: ImageSet) -> int:
    decoded = isinstance(images.images, Decoded)
    return images.images.shapes[0][-1] if decoded else images.images.shape[-1]


def hold_out(images: ImageSet, seed: int, count: int) -> tuple[ImageSet, ImageSet]:
    """(`count` images drawn at random by `seed`, the rest)."""
    order = torch.randperm(len(images), generator=generator(seed, "source_val"))
    return images.subset(order[:count].sort().values), images.subset(order[count:].sort().values)


def split_validation(
    train: ImageSet, config: DataConfig, seed: int, read_only: bool
) -> tuple[ImageSet, ImageSet]:
    """Split a labeled target.

    Args:
        train: the labeled images of the target.
        config: the section `data`.
        seed: of the draw.
        read_only: store nothing (dry run).

    Returns:
        (validation set, training set); the former is `data.val_share` of each class.
    """
    val, train = hold_out_of_each(train, config.val_share, seed)
    return replace(train, indices=val.indices), train


def hold_out_test(target: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(test set, other images) of a labeled target; the test set is a share of each class."""
    return hold_out_of_each(target, share, seed, "data.test_share")


def with_training_labels(
    target: ImageSet, config: DataConfig, classes: list[str], read_only: bool
) -> ImageSet:
    """The target with labels for training, of which `draw_labeled` draws a few.

    Args:
        target: the set as it is opened for evaluation.
        config: the section `data`.
        classes: the class names of the source, by number.
        read_only: store nothing (dry run).
    """
    return target


def open_listed(path: str, config: DataConfig, classes: list[str], read_only: bool) -> ImageSet:
    """The labeled target images that the list file `data.target_labeled` names.

    Args:
        path: the list file, below `data.root`.
        config: the section `data`.
        classes: the class names of the source, by number.
        read_only: store nothing (dry run).
    """
    listed, files = _listed(path, config, classes)
    return _decoded(listed, files, config, read_only)


def list_listed(path: str, config: DataConfig, classes: list[str]) -> Listing:
    """What `open_listed` opens, before a file is read. For the parameters see there."""
    return _listing(*_listed(path, config, classes), config)


def _listed(path: str, config: DataConfig, classes: list[str]) -> tuple[DomainConfig, Files]:
    """The list file `data.target_labeled` as a domain, and its files."""
    absent = config.absent_of("target_labeled")
    files, labels = read_labeled(path, classes, Path(config.root), absent)
    listed = replace(config.target, name="list", path=path, labels=True)
    return listed, Files(files, labels, classes)


def measure(config: DataConfig, classes: list[str]) -> Callable[[torch.Tensor], dict]:
    """The function that computes the metrics of a confusion matrix (K, K)."""
    return functools.partial(accuracies, classes=classes)


def describe_sizes(sets: dict[str, ImageSet], config: DataConfig) -> str:
    """The size of training images."""
    return f"3x{config.size}x{config.size}"


class TrainBatches(ViewBatches):
    """Batches of images, and labels if any; see data/views.py."""

    def augment(self, spec):
        return Augment(spec, self.config.size)

    def load(self, index, positions):
        images = self.set.images[index]
        if images.shape[-1] < self.config.size:
            images = F.center_crop(images, [self.config.size])  # pads with zeros
        return images, None if self.set.labels is None else self.set.labels[index]


class EvalBatches(Dataset):
    """The set in its own order, `batch` images at a time, cropped or padded, not augmented."""

    def __init__(self, images: ImageSet, config: DataConfig, batch: int):
        self.set, self.config, self.batch = images, config, batch

    def __len__(self) -> int:
        return -(-len(self.set) // self.batch)

    def start(self, k: int) -> int:
        """The number of images before batch k."""
        return k * self.batch

    def __getitem__(self, k: int):
        index = self.set.indices[self.start(k) : self.start(k + 1)]
        images = three_channels(center(self.set.images[index], self.config.size))
        return images if self.set.labels is None else (images, self.set.labels[index])
