"""The two domains of a run, opened from its config."""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch.utils.data import DataLoader
from torchvision.transforms.v2 import functional as F

from common.config import DataConfig, DomainConfig
from common.runtime import UserError
from data.decoded import DecodedImages
from data.digits import open_digits
from data.drawn import open_drawn
from data.folder import read_list, scan_folder
from data.image_set import ImageSet, image_set
from data.loaders import eval_loader
from data.order import generator


def _square(images: torch.Tensor, side: int) -> torch.Tensor:
    return images if images.shape[-1] == side else F.resize(images, [side, side], antialias=True)


def open_set(domain: DomainConfig, config: DataConfig, train: bool, read_only: bool) -> ImageSet | None:
    """The training or test split of a domain; None for the test split of a set that has none.

    Digits are resized to `resize` (default `data.size`), files to `resize` (default 8/7 of `data.size`, for crops).
    """
    root, cache = Path(config.root), Path(config.cache)
    if domain.name not in ("folder", "list"):
        if domain.name.startswith("drawn"):
            images = open_drawn(domain.name, train)
        else:
            images = open_digits(domain.name, domain.path, root, train, cache, read_only)
        return image_set(
            images.name, _square(images.images, domain.resize or config.size), images.labels, images.classes
        )
    if not train:
        return None
    files, labels, classes = (
        scan_folder(domain.path, root) if domain.name == "folder" else read_list(domain.path, domain.classes, root)
    )
    side = domain.resize or round(config.size * 8 / 7)
    images = DecodedImages(
        files, side, None if read_only else cache, config.cache_gb * 2**30, shared=config.workers > 0
    )
    return image_set(f"{domain.name} {domain.path}", images, labels, classes)


@dataclass
class Domains:
    """What a run trains and is measured on. Labels of the target's training images are dropped here.

    source, target: training sets, labelled and unlabelled. source_val: held-out source images. target_test: labelled
    target images for reporting, or None. criteria: unlabelled target training images for model selection.
    target_test_note says what `target_test` is.
    """

    config: DataConfig
    classes: list[str]
    source: ImageSet
    source_val: ImageSet
    target: ImageSet
    target_test: ImageSet | None
    criteria: ImageSet
    target_test_note: str

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def eval_loaders(self) -> dict[str, DataLoader | None]:
        """The loaders `common.evaluation.evaluate` takes."""
        test = self.target_test
        return {
            "source_val": eval_loader(self.source_val, self.config),
            "target_train": eval_loader(self.criteria, self.config),
            "target_test": None if test is None else eval_loader(test, self.config),
        }

    def describe(self) -> str:
        lines = [f"{self.num_classes} classes: {', '.join(self.classes[:12])}{' ...' if self.num_classes > 12 else ''}"]
        for role in ("source", "source_val", "target", "target_test"):
            images = getattr(self, role)
            if images is None:
                lines.append(f"{role:12} none: no target labels")
                continue
            note = f" ({self.target_test_note})" if role == "target_test" else ""
            kept = (
                f", {images.images.describe()}"
                if isinstance(images.images, DecodedImages) and not role.startswith("target_")
                else ""
            )
            lines.append(f"{role:12} {images.name}: {len(images)} images{note}{kept}")
        size = self.config.size
        return "\n".join([*lines, f"batch        {self.config.batch} a domain, 3x{size}x{size}"])


def open_domains(config: DataConfig, seed: int, dry_run: bool = False) -> Domains:
    """Open both domains, match their classes by name and make the splits.

    `source_val` is the source's own test split, else a tenth drawn by `seed`. In a dry run nothing is written and
    every evaluation set is one batch.
    """
    source = open_set(config.source, config, True, dry_run)
    if source.labels is None:
        raise UserError(f"{source.name}: the source needs labels: a folder per class, or `path label` lines")
    classes = source.classes
    source_val = open_set(config.source, config, False, dry_run)
    if source_val is None:
        if len(source) < 2:
            raise UserError(f"{source.name}: one image is not enough to train and to validate")
        order, held = torch.randperm(len(source), generator=generator(seed, "source_val")), max(len(source) // 10, 1)
        source, source_val = source.subset(order[held:].sort().values), source.subset(order[:held].sort().values)

    target = open_set(config.target, config, True, dry_run).relabelled(classes)
    if config.target_test is not None:
        target_test, note = open_set(config.target_test, config, False, dry_run), "data.target_test"
        if target_test is None:
            target_test = open_set(config.target_test, config, True, dry_run)
        if target_test.labels is None:
            raise UserError(f"{target_test.name}: target_test needs labels")
    else:
        target_test, note = open_set(config.target, config, False, dry_run), "the target's own test split"
        if target_test is None:
            target_test, note = target, "the target's training images: transductive"
            if target.labels is None:
                target_test, note = None, "none: no target labels"
            elif config.source == config.target:  # the upper bound: not measured on what it trains on
                target_test, note = source_val, "a held-out tenth of the target"
    target_test = None if target_test is None else target_test.relabelled(classes)
    target = target.unlabelled()
    chosen = torch.randperm(len(target), generator=generator(seed, "criteria"))[: config.select_images].sort().values
    criteria = target.subset(chosen)
    if dry_run:
        first = torch.arange(config.eval_batch)
        source_val, criteria = (s.subset(first[: len(s)]) for s in (source_val, criteria))
        target_test = None if target_test is None else target_test.subset(first[: len(target_test)])
    return Domains(config, classes, source, source_val, target, target_test, criteria, note)
