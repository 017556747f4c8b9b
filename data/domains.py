"""The two domains of a run, opened from its config."""

import functools
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from common.checkpoint import trained_classes
from common.config import FILES, DataConfig, DomainConfig, LabeledDataConfig
from common.evaluation import accuracies, ious
from common.runtime import UserError
from data.decoded import Decoded, MaskDecoder, check_sizes, decoded_images, decoded_masks
from data.digits import open_digits
from data.drawn import open_drawn
from data.drawn_street import open_street
from data.folder import read_labeled, read_list, read_mask_list, scan_folder, scan_masks
from data.id_maps import id_map
from data.image_set import ImageSet, image_set, join
from data.labeled import draw_labeled, hold_out_of_each, list_labeled, without
from data.loaders import eval_loader
from data.order import generator


def _square(images: torch.Tensor, side: int) -> torch.Tensor:
    return images if images.shape[-1] == side else F.resize(images, [side, side], antialias=True)


def _open_classes(domain: DomainConfig, config: DataConfig, train: bool, read_only: bool) -> ImageSet | None:
    """`open_set` of images with a class each.

    Digits are resized to `resize` (default `data.size`), files to `resize` (default 8/7 of `data.size`, for crops).
    """
    root, cache = Path(config.root), Path(config.cache)
    if domain.name not in FILES:
        if domain.name.startswith("drawn"):
            images = open_drawn(domain.name, train)
        else:
            images = open_digits(domain.name, domain.path, root, train, cache, read_only)
        return replace(images, images=_square(images.images, domain.resize or config.size))
    if not train:
        return None
    files, labels, classes = (
        scan_folder(domain.path, root) if domain.name == "folder" else read_list(domain.path, domain.classes, root)
    )
    return _decoded_classes(domain, files, labels, classes, config, read_only)


def _decoded_classes(
    domain: DomainConfig, files: list[Path], labels: list[int] | None, classes, config: DataConfig, read_only: bool
) -> ImageSet:
    side = domain.resize or round(config.size * 8 / 7)
    keep = None if read_only else Path(config.cache), config.cache_gb * 2**30, config.workers > 0
    return image_set(f"{domain.name} {domain.path}", decoded_images(files, (side, side), *keep), labels, classes)


def _open_maps(
    domain: DomainConfig, role: str, config: DataConfig, train: bool, read_only: bool, whole_masks: bool
) -> ImageSet | None:
    """`open_set` of images with masks; `whole_masks` keeps these at their own size, else they go with their images."""
    root, cache = Path(config.root), Path(config.cache)
    if domain.name not in FILES:
        images = open_street(domain.name, train)
        if domain.resize not in (None, list(images.images.shape[2:])):
            raise UserError(f"data.{role}.resize: {domain.name} is drawn at its own size; leave resize out")
        return replace(images, crop=domain.crop and tuple(domain.crop))
    if not train:
        return None
    if domain.name == "folder":
        suffixes = domain.image_suffix, domain.mask_suffix
        files, mask_files = scan_masks(domain.path, domain.masks, suffixes, root)
    else:
        files, mask_files = read_mask_list(domain.path, root)
    size = domain.resize and tuple(domain.resize)
    keep = None if read_only else cache, config.cache_gb * 2**30, config.workers > 0
    images, masks, classes = decoded_images(files, size, *keep), None, None
    for file, shape in zip(files, images.shapes, strict=True):
        if domain.crop and (domain.crop[0] > shape[1] or domain.crop[1] > shape[2]):
            raise UserError(f"data.{role}.crop: {domain.crop} is larger than {file} of {list(shape[1:])} px")
    if mask_files is not None:
        if domain.ids is None:
            raise UserError(f"data.{role}.ids is missing: what the numbers of its masks mean")
        table, classes = id_map(domain.ids, f"data.{role}.ids")
        check_sizes(files, mask_files)
        decoder = MaskDecoder(table, classes, None if whole_masks else size)
        masks = decoded_masks(mask_files, decoder, *keep)
    return image_set(f"{domain.name} {domain.path}", images, masks, classes, domain.crop)


def open_set(
    domain: DomainConfig, role: str, config: DataConfig, train: bool, read_only: bool, trains: bool = False
) -> ImageSet | None:
    """The training or test split of a domain; None for the test split of a set that has none.

    role: its place in the config, for messages. Masks that train (`trains`) are resized with their images; others stay
    as they are, since they measure.
    """
    if config.task == "segmentation":
        return _open_maps(domain, role, config, train, read_only, whole_masks=not trains)
    return _open_classes(domain, config, train, read_only)


def _hold_out(source: ImageSet, task: str, seed: int, held: int) -> tuple[ImageSet, ImageSet]:
    """(`held` of the images, the rest) by `seed`: drawn at random, or of maps, which may be frames of a video where
    neighbours are nearly the same, images that follow each other."""
    random = generator(seed, "source_val")
    if task == "segmentation":
        first = int(torch.randint(len(source) - held + 1, (), generator=random))
        order = torch.arange(len(source)).roll(-first)
    else:
        order = torch.randperm(len(source), generator=random)
    return source.subset(order[:held].sort().values), source.subset(order[held:].sort().values)


def _train_size(images: ImageSet) -> str:
    shapes = {tuple(images.images.shape[1:])} if isinstance(images.images, torch.Tensor) else set(images.images.shapes)
    size = images.crop or (next(iter(shapes))[1:] if len(shapes) == 1 else ("H", "W"))
    return f"3x{size[0]}x{size[1]}"


@dataclass
class Domains:
    """What a run trains and is measured on. Labels of the target's training images are dropped here.

    source, target: training sets, labelled and unlabelled. source_val: held-out source images. Without a source
    (`TargetDataConfig`) both of its sets are None. target_labeled: the images of `data.target_labeled`, which are in no
    other set of the target, or None. target_test: labelled target images for reporting, or None. criteria: unlabelled
    training images for model selection. target_test_note says what `target_test` is. lists: the text of each list of
    images drawn by the seed, by file name.

    Of a `LabeledDataConfig` there are target_labeled, to train on, and target_test, to validate on, alone.
    """

    config: DataConfig
    classes: list[str]
    source: ImageSet | None
    source_val: ImageSet | None
    target: ImageSet | None
    target_labeled: ImageSet | None
    target_test: ImageSet | None
    criteria: ImageSet | None
    target_test_note: str
    lists: dict[str, str]
    dry_run: bool = False

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def evaluation(self) -> dict:
        """What `common.evaluation.evaluate` takes besides model and device."""
        test = self.target_test
        measure = accuracies
        if self.config.task == "segmentation":
            measure = functools.partial(ious, classes=self.classes, over=self.config.iou_classes)
        return {
            "source_val": None if self.source_val is None else eval_loader(self.source_val, self.config),
            "target_train": None if self.criteria is None else eval_loader(self.criteria, self.config),
            "target_test": None if test is None else eval_loader(test, self.config),
            "classes": self.classes,
            "measure": measure,
            **({"val_loss": True} if isinstance(self.config, LabeledDataConfig) else {}),
        }

    @property
    def unchanging(self) -> bool:
        """Whether a labelled target image is the same each time it is trained on, and all are of one size."""
        images = self.target_labeled.images
        one_size = isinstance(images, torch.Tensor) or len(set(images.shapes)) == 1
        return not self.config.augment_of("target") and self.config.target.crop is None and one_size

    def labeled_pass(self) -> DataLoader:
        """Every labelled target image once, not augmented; in a dry run one batch of them."""
        images = self.target_labeled
        return eval_loader(_first_batch(images, self.config) if self.dry_run else images, self.config)

    def target_pass(self) -> DataLoader:
        """Every unlabelled target training image once, not augmented; in a dry run one batch of them."""
        return eval_loader(self.criteria if self.dry_run else self.target, self.config)

    def describe(self) -> str:
        lines = [f"{self.num_classes} classes: {', '.join(self.classes[:12])}{' ...' if self.num_classes > 12 else ''}"]
        roles = [] if self.target is None else ["source", "source_val", "target"]
        for role in [*roles, *(["target_labeled"] if self.target_labeled else []), "target_test"]:
            images = getattr(self, role)
            if images is None:
                lines.append(f"{role:14} none{': no target labels' if role == 'target_test' else ''}")
                continue
            note = f" ({self.target_test_note})" if role == "target_test" else ""
            kept = (
                f", {images.images.describe()}"
                if isinstance(images.images, Decoded) and (role in ("source", "target") or self.target is None)
                else ""
            )
            lines.append(f"{role:14} {images.name}: {len(images)} images{note}{kept}")
        sizes = f"3x{self.config.size}x{self.config.size}"
        if self.config.task == "segmentation":
            sets = {role: getattr(self, role) for role in ("source", "target", "target_labeled") if getattr(self, role)}
            sizes = ", ".join(f"{role} {_train_size(images)}" for role, images in sets.items())
        return "\n".join([*lines, f"{'batch':14} {self.config.batch}{' a domain' if self.target else ''}, {sizes}"])


def _open_source(config: DataConfig, seed: int, dry_run: bool) -> tuple[ImageSet, ImageSet]:
    """Training and validation set of all sources: of each its own test split, else a tenth held out by `seed`."""
    trained, held_out = [], []
    for i, domain in enumerate(config.sources):
        role = f"source[{i}]" if len(config.sources) > 1 else "source"
        source = open_set(domain, role, config, True, dry_run, trains=True)
        if source.labels is None:
            kind = "masks and ids" if config.task == "segmentation" else "a folder per class, or `path label` lines"
            raise UserError(f"{source.name}: the source needs labels: {kind}")
        source_val = open_set(domain, role, config, False, dry_run, trains=True)
        if source_val is None:
            if len(source) < 2:
                raise UserError(f"{source.name}: one image is not enough to train and to validate")
            source_val, source = _hold_out(source, config.task, seed, max(len(source) // 10, 1))
        trained.append(source)
        held_out.append(source_val)
    if config.task == "classification" and len({_side(source) for source in trained}) > 1:
        sides = ", ".join(f"{source.name} {_side(source)} px" for source in trained)
        raise UserError(
            f"data.source: the sources are one set, whose images have one size ({sides}); give each a resize"
        )
    return join(trained), join(held_out)


def _side(images: ImageSet) -> int:
    return images.images.shapes[0][-1] if isinstance(images.images, Decoded) else images.images.shape[-1]


def _open_labeled(
    config: DataConfig, target: ImageSet, classes: list[str], seed: int, dry_run: bool
) -> tuple[ImageSet | None, dict[str, str]]:
    """The labelled target images, and the list of those that were drawn."""
    asked, maps, root = config.target_labeled, config.task == "segmentation", Path(config.root)
    if asked is None:
        return None, {}
    if isinstance(asked, int):
        whole = (
            open_set(config.target, "target", config, True, dry_run, trains=True).relabelled(classes)
            if maps
            else target
        )
        labeled = draw_labeled(replace(whole, images=target.images), asked, seed)
        return labeled, {"target_labeled.txt": list_labeled(labeled, root)}
    if not isinstance(target.images, Decoded):
        raise UserError(
            f"data.target_labeled: {asked} names files, {target.name} has none; give a number of images a class"
        )
    if not maps:
        files, labels = read_labeled(asked, classes, root)
        listed = replace(config.target, name="list", path=asked)
        return _decoded_classes(listed, files, labels, classes, config, dry_run), {}
    listed = replace(config.target, name="list", path=asked, masks=None, image_suffix=None, mask_suffix=None)
    labeled = open_set(listed, "target", config, True, dry_run, trains=True)
    if labeled.labels is None:
        raise UserError(f"data.target_labeled: {asked} names no masks; its lines are `image mask`")
    return labeled.relabelled(classes), {}


def _open_test(config: DataConfig, dry_run: bool) -> ImageSet:
    """The set of `data.target_test`: its own test split, else its images."""
    test = open_set(config.target_test, "target_test", config, False, dry_run)
    if test is None:
        test = open_set(config.target_test, "target_test", config, True, dry_run)
    if test.labels is None:
        raise UserError(f"{test.name}: target_test needs labels")
    return test


def _split_labeled(config: LabeledDataConfig, seed: int, dry_run: bool) -> tuple[ImageSet, ImageSet, dict[str, str]]:
    """(training, validation) set of a labelled target, and their lists where the split is made here."""
    train = open_set(config.target, "target", config, True, dry_run, trains=True)
    if train.labels is None:
        kind = "masks and ids" if config.task == "segmentation" else "a folder per class, or `path label` lines"
        raise UserError(f"{train.name}: fine-tuning needs labels: {kind}")
    if config.target_test is not None:
        return train, _open_test(config, dry_run).relabelled(train.classes, "target"), {}
    whole = train
    if config.task == "segmentation":
        whole = open_set(config.target, "target", config, True, dry_run)  # masks as they are
        held = max(round(config.val_share * len(train)), 1)
        if held >= len(train):
            raise UserError(f"data.val_share: {config.val_share} of {len(train)} images leaves none to train on")
        val, train = _hold_out(train, config.task, seed, held)
    else:
        val, train = hold_out_of_each(train, config.val_share, seed)
    val, root = replace(whole, images=train.images, indices=val.indices), Path(config.root)
    return train, val, {"train.txt": list_labeled(train, root), "val.txt": list_labeled(val, root)}


def _criteria(target: ImageSet, config: DataConfig, seed: int) -> ImageSet:
    """What the label-free criteria see: a sample of the target's training images, by `seed`."""
    order = torch.randperm(len(target), generator=generator(seed, "criteria"))
    return target.subset(order[: config.select_images].sort().values)


def _first_batch(images: ImageSet | None, config: DataConfig) -> ImageSet | None:
    return None if images is None else images.subset(torch.arange(config.eval_batch)[: len(images)])


def _check_iou_classes(config: DataConfig, classes: list[str]) -> None:
    if absent := set(config.iou_classes or ()) - set(classes):
        raise UserError(f"data.iou_classes: no class {sorted(absent)[0]!r}; there are {', '.join(classes)}")


def open_domains(config: DataConfig, seed: int, dry_run: bool = False) -> Domains:
    """Open both domains, match their classes by name and make the splits.

    Without a source the classes are those of the run `classes_from`. In a dry run nothing is written and every
    evaluation set is one batch.
    """
    if isinstance(config, LabeledDataConfig):
        train, val, lists = _split_labeled(config, seed, dry_run)
        _check_iou_classes(config, train.classes)
        if shared := len(val) - len(without(val, train)):
            raise UserError(
                f"{val.name}: {shared} of {len(val)} validation images are trained on too; name each image once, in one"
                " set"
            )
        note = "data.target_test" if config.target_test else f"{100 * config.val_share:.4g} % of the target, held out"
        val = _first_batch(val, config) if dry_run else val
        return Domains(config, train.classes, None, None, None, train, val, None, note, lists, dry_run)
    if not config.sources:
        source, source_val, classes = None, None, trained_classes(config.classes_from)
        if classes is None:
            remedy = "name the folder of a finished run in init_from or in data.classes_from"
            raise UserError(f"{config.classes_from} has no summary.json that names the classes; {remedy}")
    else:
        source, source_val = _open_source(config, seed, dry_run)
        classes = source.classes
    _check_iou_classes(config, classes)
    target = open_set(config.target, "target", config, True, dry_run).relabelled(classes)
    target_labeled, lists = _open_labeled(config, target, classes, seed, dry_run)
    if config.target_test is not None:
        target_test, note = _open_test(config, dry_run), "data.target_test"
    else:
        target_test, note = open_set(config.target, "target", config, False, dry_run), "the target's own test split"
        if target_test is None:
            target_test, note = target, "the target's training images: transductive"
            if target.labels is None:
                target_test, note = None, "none: no target labels"
            elif config.target_is_source():  # the upper bound: not measured on what it trains on
                if len(config.sources) > 1:
                    raise UserError(
                        "data.source: one of several is the target, which leaves no test; set data.target_test"
                    )
                target_test = replace(target, indices=source_val.indices)
                note = "a held-out tenth of the target"
    target_test = None if target_test is None else target_test.relabelled(classes)
    if target_labeled is not None:
        target, target_test = without(target, target_labeled), without(target_test, target_labeled)
        if len(target) == 0 or (target_test is not None and len(target_test) == 0):
            left = "unlabelled image" if len(target) == 0 else "image to test on"
            raise UserError(f"data.target_labeled: {config.target_labeled} leaves no {left}; give fewer labels")
    target = target.unlabelled()
    criteria = _criteria(target, config, seed)
    if dry_run:
        source_val, criteria, target_test = (
            _first_batch(images, config) for images in (source_val, criteria, target_test)
        )
    return Domains(
        config, classes, source, source_val, target, target_labeled, target_test, criteria, note, lists, dry_run
    )
