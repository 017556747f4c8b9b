"""Images with masks. data/classification.py defines the same names; see data/tasks.py."""

import functools
import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch.utils.data import Dataset

from common import ranks
from common.errors import UserError
from common.metrics import ious
from data.augment import IN_PLACE, Augment, Crops
from data.config import FILES, DataConfig, DomainConfig
from data.decoded import Decoded, ImageDecoder, MaskDecoder, check_sizes, decoded_images
from data.drawn_street import open_street
from data.folder import Pairs, read_mask_list, scan_masks
from data.id_maps import id_map
from data.image_set import ImageSet, image_set, one
from data.listing import Listing
from data.order import generator
from data.rare_classes import LEAST_SHARE, RareClassOrder
from data.views import ViewBatches

LABELS = "masks and ids"  # what labels look like, for messages
CLASSES_DIFFER = "; name the same classes in the ids of both"  # what to do then


def open_set(
    domain: DomainConfig,
    role: str,
    config: DataConfig,
    train: bool,
    read_only: bool,
    trains: bool = False,
) -> ImageSet | None:
    """The training or test split of a domain; None for the test split of a set that has none.

    Args:
        domain: the section of the config.
        role: its place in the config, for messages.
        config: the section `data`.
        train: the training split, or the test split.
        read_only: store nothing (dry run).
        trains: whether the masks are for training; these are resized with their images. Masks for
            evaluation keep their size.
    """
    if domain.name not in FILES:
        images = open_street(domain.name, train)
        if domain.resize not in (None, list(images.images.shape[2:])):
            raise UserError(
                f"data.{role}.resize: {domain.name} is drawn at its own size; leave resize out"
            )
        return replace(images, crop=domain.crop and tuple(domain.crop))
    if not train:
        return None
    return _decoded(domain, _pairs(domain, role, config), role, config, read_only, trains)


def list_set(domain: DomainConfig, role: str, config: DataConfig, train: bool) -> Listing | None:
    """What `open_set` opens, before a file is read. For the parameters see there."""
    if domain.name in FILES:
        return _listing(domain, _pairs(domain, role, config), role, config) if train else None
    images = open_set(domain, role, config, train, read_only=True)
    return Listing(images.name, images.images, images.labels, images.classes, by_pixel=True)


def _pairs(domain: DomainConfig, role: str, config: DataConfig) -> Pairs:
    """The files of a folder or of a list; `role` is the place of the domain in the config."""
    root = Path(config.root)
    if domain.name == "folder":
        suffixes = domain.image_suffix, domain.mask_suffix
        return scan_masks(domain.path, domain.masks, suffixes, root, role)
    return read_mask_list(domain.path, root, f"data.{role}.path")


def _listing(domain: DomainConfig, pairs: Pairs, role: str, config: DataConfig) -> Listing:
    """The files as a listing; for the parameters see `_decoded`."""
    decode = ImageDecoder(domain.resize and tuple(domain.resize), config.exif)
    classes = decode_mask = None
    if pairs.masks is not None:
        table, classes = _mask_ids(domain, role)
        decode_mask = MaskDecoder(table, classes)
    name, files = f"{domain.name} {domain.path}", pairs.images
    decoders = decode, decode_mask
    return Listing(name, files, pairs.masks, classes, pairs.skipped, *decoders, by_pixel=True)


def _mask_ids(domain: DomainConfig, role: str) -> tuple[torch.Tensor, list[str]]:
    """The table and the class names of the masks of a domain; see `id_map`."""
    if domain.ids is None:
        raise UserError(f"data.{role}.ids is missing: what the numbers of its masks mean")
    return id_map(domain.ids, f"data.{role}.ids")


def resize_of(domain: DomainConfig, config: DataConfig) -> int | tuple[int, int] | None:
    """The height and width that images are resized to; None if they keep their size."""
    return domain.resize and tuple(domain.resize)


def _decoded(
    domain: DomainConfig,
    pairs: Pairs,
    role: str,
    config: DataConfig,
    read_only: bool,
    trains: bool,
) -> ImageSet:
    """The set of image files and their masks, if there are any.

    Args:
        domain: the section of the config.
        pairs: the files.
        role, config, read_only, trains: see `open_set`.
    """
    files, mask_files, skipped = pairs
    size = resize_of(domain, config)
    folder = None if read_only or config.storage == "files" else Path(config.cache)
    shared = config.workers > 0 or ranks.count() > 1
    storage = folder, config.cache_gb * 2**30, shared
    images = decoded_images(files, size, *storage, config.exif)
    masks = classes = None
    for file, shape in zip(files, images.shapes, strict=True):
        if domain.crop and (domain.crop[0] > shape[1] or domain.crop[1] > shape[2]):
            raise UserError(
                f"data.{role}.crop: {domain.crop} is larger than {file} of {list(shape[1:])} px"
            )
    if mask_files is not None:
        table, classes = _mask_ids(domain, role)
        check_sizes(files, mask_files, config.exif)
        decoder = MaskDecoder(table, classes, size if trains else None)
        masks = Decoded(mask_files, decoder, *storage)
    return image_set(f"{domain.name} {domain.path}", images, masks, classes, domain.crop, skipped)


def check_sources(sources: list[ImageSet]) -> None:
    """Accept sources of different sizes: crops give the batch one size."""


def hold_out(images: ImageSet, seed: int, count: int) -> tuple[ImageSet, ImageSet]:
    """(`count` images that follow each other, from a place drawn by `seed`, the rest).

    The images may be frames of a video, where neighbors are nearly the same.
    """
    random = generator(seed, "source_val")
    first = int(torch.randint(len(images) - count + 1, (), generator=random))
    order = torch.arange(len(images)).roll(-first)
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
        (validation set, training set); the former is `data.val_share` of its images.
    """
    # For validation, masks keep their size.
    evaluated = open_set(config.target, "target", config, True, read_only)
    val, train = _hold_out_share(train, config.val_share, seed, "data.val_share")
    return replace(evaluated, images=train.images, indices=val.indices), train


def hold_out_test(target: ImageSet, share: float, seed: int) -> tuple[ImageSet, ImageSet]:
    """(test set, other images) of a labeled target; the test images follow each other."""
    return _hold_out_share(target, share, seed, "data.test_share")


def _hold_out_share(
    images: ImageSet, share: float, seed: int, key: str
) -> tuple[ImageSet, ImageSet]:
    """`hold_out` of a share of the images, at least one; `key` is that of the share."""
    count = max(round(share * len(images)), 1)
    if count >= len(images):
        raise UserError(f"{key}: {share} of {len(images)} images leaves none to train on")
    return hold_out(images, seed, count)


def with_training_labels(
    target: ImageSet, config: DataConfig, classes: list[str], read_only: bool
) -> ImageSet:
    """The target with masks for training, of which `draw_labeled` draws a few.

    Args:
        target: the set as it is opened for evaluation.
        config: the section `data`.
        classes: the class names of the source, by number.
        read_only: store nothing (dry run).
    """
    trains = open_set(config.target, "target", config, True, read_only, trains=True)
    return trains.relabeled(classes)


def open_listed(path: str, config: DataConfig, classes: list[str], read_only: bool) -> ImageSet:
    """The labeled target images that the list file `data.target_labeled` names.

    Args:
        path: the list file, below `data.root`.
        config: the section `data`.
        classes: the class names of the source, by number.
        read_only: store nothing (dry run).
    """
    listed, pairs = _listed(path, config)
    labeled = _decoded(listed, pairs, "target", config, read_only, trains=True)
    return labeled.relabeled(classes)


def list_listed(path: str, config: DataConfig, classes: list[str]) -> Listing:
    """What `open_listed` opens, before a file is read. For the parameters see there."""
    return _listing(*_listed(path, config), "target", config)


def _listed(path: str, config: DataConfig) -> tuple[DomainConfig, Pairs]:
    """The list file `data.target_labeled` as a domain, and its files."""
    pairs = read_mask_list(path, Path(config.root), "data.target_labeled")
    if pairs.masks is None:
        raise UserError(f"data.target_labeled: {path} names no masks; its lines are `image mask`")
    no_folder = {"masks": None, "image_suffix": None, "mask_suffix": None}
    return replace(config.target, name="list", path=path, **no_folder), pairs


def measure(config: DataConfig, classes: list[str]) -> Callable[[torch.Tensor], dict]:
    """The function that computes the metrics of a confusion matrix (K, K)."""
    return functools.partial(ious, classes=classes, over=config.iou_classes)


def describe_sizes(sets: dict[str, ImageSet], config: DataConfig) -> str:
    """The size of training images, by role."""
    return ", ".join(f"{role} {_train_size(images)}" for role, images in sets.items())


def _train_size(images: ImageSet) -> str:
    if isinstance(images.images, torch.Tensor):
        shapes = {tuple(images.images.shape[1:])}
    else:
        shapes = set(images.images.shapes)
    size = images.crop or (next(iter(shapes))[1:] if len(shapes) == 1 else ("H", "W"))
    return f"3x{size[0]}x{size[1]}"


class TrainBatches(ViewBatches):
    """Batches of images, and masks if any; see data/views.py.

    They are cropped when they are loaded; what remains to be done does not move pixels.
    """

    def augment(self, spec):
        in_place = {name: parameters for name, parameters in spec.items() if name in IN_PLACE}
        return Augment(in_place, None)

    def load(self, index, positions):
        numbers = index.tolist()
        sizes = {(_shape(self.set.images, i) or ())[-2:] for i in numbers}
        if self.set.crop is None and len(sizes) > 1:
            raise UserError(
                f"{self.set.name}: its images differ in size, and a batch has one size; set "
                f"data.{self.role.removesuffix('_labeled')}.crop or resize, or data.batch: 1"
            )
        images = [one(self.set.images, i) for i in numbers]
        masks = None
        if self.set.labels is not None:
            masks = [one(self.set.labels, i) for i in numbers]
        crops = Crops(self.config.augment_of(self.role), self.set.crop)
        return crops(images, masks, self.draws(positions, "crop"), self._wanted(positions, masks))

    def _wanted(self, positions, masks) -> list[tuple[int, int]] | None:
        """The class that each crop should show, and on how many pixels; None without such."""
        if not isinstance(self.order, RareClassOrder) or self.set.crop is None:
            return None
        classes = self.order.classes(positions).tolist()
        most = self.set.crop[0] * self.set.crop[1] // 2  # of a small crop of a large image
        least = [min(max(int(LEAST_SHARE * mask.numel()), 1), most) for mask in masks]
        return list(zip(classes, least, strict=True))


class EvalBatches(Dataset):
    """The set in its own order, `batch` at a time: entire images, and masks at their own size.

    A batch ends where the sizes change.
    """

    def __init__(self, images: ImageSet, config: DataConfig, batch: int):
        self.set, self.batches = images, []
        last = None
        for index in images.indices.tolist():
            size = tuple(_shape(x, index) for x in (images.images, images.labels))
            if size != last or len(self.batches[-1]) == batch:
                self.batches.append([])
            self.batches[-1].append(index)
            last = size
        self.starts = list(itertools.accumulate(map(len, self.batches), initial=0))

    def __len__(self) -> int:
        return len(self.batches)

    def start(self, k: int) -> int:
        """The number of images before batch k."""
        return self.starts[k]

    def __getitem__(self, k: int):
        index = torch.tensor(self.batches[k])
        images = self.set.images[index]
        return images if self.set.labels is None else (images, self.set.labels[index])


def _shape(images: object | None, index: int) -> tuple[int, ...] | None:
    """The shape of one image; None for a tensor or no images, which have one size."""
    return images.shapes[index] if hasattr(images, "shapes") else None
