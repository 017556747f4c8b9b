"""The `data` section of a config: which domains, and how their images are prepared."""

import difflib
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from common.config import not_negative, positive, range_rules
from common.errors import require
from data.augment import IN_PLACE, OPERATIONS, check_augment

DRAWN = {
    "classification": ("drawn_digits", "drawn_digits_shifted"),
    "segmentation": ("drawn_street", "drawn_street_dusk"),
}
DIGITS = ("mnist", "usps", "svhn", "mnistm")
FILES = ("folder", "list")
EVAL_BATCH = {"classification": 250, "segmentation": 1}
MOST_PX = 100_000  # of a side


def expand_home(config: object, *names: str) -> None:
    """Replace a `~` at the start of these paths of a config by the home folder."""
    for name in names:
        if isinstance(path := getattr(config, name), str):
            setattr(config, name, os.path.expanduser(path))


@dataclass
class DomainConfig:
    name: str  # mnist usps svhn mnistm | folder list | drawn_digits[_shifted] drawn_street[_dusk]
    path: str | None = None  # from data.root: the folder, the list file, or mnistm's photographs
    classes: str | None = None  # list: file from data.root with one class name per line, in order
    labels: bool = True  # folder: false: folders are no classes; all images below are unlabeled
    resize: int | list[int] | None = None  # px, or [height, width]: size of images before cropping
    masks: str | None = None  # segmentation, folder: the folder of masks, from data.root
    image_suffix: str | None = None  # segmentation, folder: end of an image's name, after its stem
    mask_suffix: str | None = None  # segmentation, folder: the same for masks; null: the extension
    ids: str | list[str] | dict | None = None  # segmentation: numbers in a mask; data/id_maps.py
    crop: list[int] | None = None  # segmentation: [height, width] of training crops; null: none
    augment: dict | None = None  # of this domain's training images; null: data.augment

    def __post_init__(self):
        expand_home(self, "path", "classes", "masks")
        sides = self.resize if isinstance(self.resize, list) else [self.resize]
        both_sizes = isinstance(self.resize, list) and self.crop
        require(
            *self._name_rules(),
            (all(side is None or side > 0 for side in sides), "resize must be positive"),
            (all(side > 0 for side in self.crop or ()), "crop must be positive"),
            (1 not in sides, "resize must be at least 2"),  # 1 is an internal error of torch
            (1 not in (self.crop or ()), "crop must be at least 2"),
            (all(s is None or s <= MOST_PX for s in sides), f"resize must be at most {MOST_PX}"),
            (all(side <= MOST_PX for side in self.crop or ()), f"crop must be at most {MOST_PX}"),
            (
                not isinstance(self.resize, list) or len(self.resize) == 2,
                "resize must be a number or [height, width]",
            ),
            (self.crop is None or len(self.crop) == 2, "crop must be [height, width]"),
            (
                not both_sizes or all(c <= r for c, r in zip(self.crop, self.resize, strict=False)),
                f"crop {self.crop} is larger than resize {self.resize}",
            ),
        )

    def _name_rules(self) -> list[tuple[bool, str]]:
        drawn = (*DRAWN["classification"], *DRAWN["segmentation"])
        names = (*DIGITS, *FILES, *drawn)
        near = difflib.get_close_matches(self.name, names, 1)
        hint = f"did you mean {near[0]!r}?" if near else f"there are {', '.join(names)}"
        folder = self.name == "folder"
        return [
            (self.name in names, f"name: no data set {self.name!r}; {hint}"),
            (
                self.name not in (*FILES, "mnistm") or self.path is not None,
                f"path is missing for name: {self.name}",
            ),
            (
                self.path is None or self.name not in (*drawn, "mnist", "usps", "svhn"),
                f"path is not read for name: {self.name}; leave it out",
            ),
            (
                self.classes is None or self.name == "list",
                "classes goes with name: list only",
            ),
            (self.labels or folder, "labels: false goes with name: folder only"),
            (self.masks is None or folder, "masks goes with name: folder only"),
            (self.image_suffix is None or folder, "image_suffix goes with name: folder only"),
            (self.mask_suffix is None or self.masks is not None, "mask_suffix goes with masks"),
        ]

    def rules(self, role: str, task: str) -> list[tuple[bool, str]]:
        """Rules (holds, sentence) that the task asks of a domain, named by its `role`."""
        if task == "classification":
            keys = ("masks", "image_suffix", "ids", "crop")
            given = [key for key in keys if getattr(self, key) is not None]
            known = self.name in (*FILES, *DIGITS, *DRAWN[task])
            return [
                (not given, f"{role}: {', '.join(given)} for task: segmentation only"),
                (
                    not isinstance(self.resize, list),
                    f"{role}.resize must be a number for task: classification",
                ),
                (known, f"{role}.name: {self.name} is for task: segmentation"),
            ]
        known = self.name in (*FILES, *DRAWN[task])
        return [
            (
                not isinstance(self.resize, int),
                f"{role}.resize must be [height, width] for task: segmentation",
            ),
            (self.classes is None, f"{role}.classes: the classes of masks are named by ids"),
            (self.labels, f"{role}.labels: images without masks are unlabeled; leave it out"),
            (known, f"{role}.name: {self.name} is for task: classification"),
            (
                self.masks is None or self.ids is not None,
                f"{role}.ids is missing: what the numbers of its masks mean",
            ),
        ]


@dataclass
class DataConfig:
    source: DomainConfig | list[DomainConfig]  # the labeled domain, or several as one
    target: DomainConfig  # the unlabeled domain; its training labels are dropped on loading
    target_test: DomainConfig | None = None  # null: the set's test split, else the target images
    test_share: float | None = None  # of the labeled target, held out for the test; null: none
    target_labeled: int | str | None = None  # labels to train on: images per class, or a list file
    task: Literal["classification", "segmentation"] = "classification"  # of images | of pixels
    root: str | None = None  # null: the variable DA_DATA, else ./datasets
    size: int = positive(28, most=MOST_PX)  # classification: px of the square the network sees
    batch: int = positive(64, most=100_000)  # images per step and domain
    target_batch: int | None = positive(None, most=100_000)  # unlabeled per step; null: batch
    eval_batch: int | None = positive(None, most=100_000)  # null: 250 images, masks: 1
    augment: dict = field(default_factory=dict)  # operation: {parameter: value}; data/augment.py
    fda: float | None = not_negative(None, most=0.5)  # share of frequencies from target to source
    rare_class_temperature: float | None = positive(None)  # draw rare source classes more often
    source_val: int | float = not_negative(0.1)  # of the source, held out: share or number
    select_images: int = positive(2000)  # target images the criteria see; limit of a held-out share
    absent_classes: list[str] = field(default_factory=list)  # classes that the target lacks
    iou_classes: list[str] | None = None  # segmentation: classes of the mean IoU; null: all
    exif: bool = True  # turn image files by their EXIF orientation
    workers: int = not_negative(0, most=1000)  # processes per domain; they change no result
    worker_timeout: int = positive(300, most=10**6)  # s without a batch that end the run
    cache: str | None = None  # folder of decoded images, not under root; null: ./cache
    cache_gb: float = not_negative(2.0)  # larger sets, and all sets with workers, go to files
    storage: Literal["decoded", "files"] = "decoded"  # files: decoded anew in each step

    def __post_init__(self):
        self.root = self.root or os.environ.get("DA_DATA") or "datasets"
        self.cache = self.cache or "cache"
        expand_home(self, "root", "cache", "target_labeled")
        if self.eval_batch is None:
            self.eval_batch = EVAL_BATCH[self.task]
        root, cache = Path(self.root).resolve(), Path(self.cache).resolve()
        require(
            *range_rules(self),
            (self.size != 1, "size must be at least 2"),
            *self.domain_rules(),
            *self.extra_rules(),
            (
                not cache.is_relative_to(root),
                f"cache {self.cache} lies under root {self.root}; name another folder",
            ),
            (
                self.iou_classes is None or self.task == "segmentation",
                "iou_classes is for task: segmentation",
            ),
            (
                self.target_labeled is None or not self.target_is_source(),
                "target_labeled: the target is a source too, and all of its labels are trained on; "
                "leave it out",
            ),
            (
                not isinstance(self.target_labeled, int) or self.target_labeled > 0,
                "target_labeled must be positive, a list file, or null",
            ),
            (
                self.fda is None or self.sources != [],
                "fda changes source images, which this method does not read; leave it out",
            ),
            (
                self.rare_class_temperature is None or self.sources != [],
                "rare_class_temperature is for source images, which this method does not read; "
                "leave it out",
            ),
            self.equal_batches_rule(self.fda is not None, "fda pairs"),
            (
                self.test_share is None or 0 < self.test_share < 1,
                "test_share must lie between 0 and 1",
            ),
            (
                self.test_share is None or self.target_test is None,
                "test_share is for a target without target_test; leave one of them out",
            ),
            (
                isinstance(self.source_val, int) or self.source_val < 1,
                "source_val must be a share below 1, or a whole number of images",
            ),
            *((False, s) for s in check_augment(self.augment, OPERATIONS[self.task])),
        )

    def domain_rules(self) -> list[tuple[bool, str]]:
        """Rules (holds, sentence) of each domain, and of several sources as one set."""
        several = len(self.sources) > 1
        domains = {
            f"source[{i}]" if several else "source": domain for i, domain in enumerate(self.sources)
        }
        domains |= {"target": self.target, "target_test": self.target_test}
        domains = {role: domain for role, domain in domains.items() if domain}
        shared = [(domain.crop, domain.augment) for domain in self.sources if domain]
        rules = [
            (self.source != [], "source is an empty list; it must name a domain"),
            (
                all(pair == shared[0] for pair in shared),
                "source: several sources are one set; give all the same crop and augment",
            ),
            (
                self.target_test is None or self.target_test.augment is None,
                "target_test.augment: test images are never augmented; leave it out",
            ),
        ]
        for role, domain in domains.items():
            rules += domain.rules(role, self.task)
            mistakes = check_augment(domain.augment or {}, OPERATIONS[self.task])
            rules += [(False, f"{role}.{mistake}") for mistake in mistakes]
        return rules

    def extra_rules(self) -> list[tuple[bool, str]]:
        """Rules (holds, sentence) that a subclass adds."""
        return []

    def strong_view_rules(self, strong_augment: dict, mix: str = "none") -> list[tuple[bool, str]]:
        """Rules (holds, sentence) of the strong view of a target image and of its mixing."""
        segmentation = self.task == "segmentation"
        operations = IN_PLACE if segmentation else OPERATIONS[self.task]
        crops = {tuple(d.crop) for d in (*self.sources[:1], self.target) if d and d.crop}
        mistakes = check_augment(strong_augment, operations, "strong_augment")
        return [
            *((False, mistake) for mistake in mistakes),
            (mix == "none" or segmentation, f"mix: {mix} is for data.task: segmentation"),
            (
                mix == "none" or len(crops) < 2,
                f"mix: {mix} pastes source onto target images; give data.source and data.target "
                "the same crop",
            ),
            self.equal_batches_rule(mix != "none", f"mix: {mix} pastes"),
        ]

    def block_rules(self, side: int) -> list[tuple[bool, str]]:
        """The rule (holds, sentence) of the side of the blocks that hide parts of target images."""
        sizes = self.target and (self.target.crop or self.target.resize)
        shape = [self.size] if self.task == "classification" else sizes
        if not isinstance(shape, list):  # images of any size
            return []
        return [
            (
                side <= min(shape) // 2,
                f"mask_block: {side} px is more than half of an image's side of {min(shape)} px; "
                "leave it out for a quarter of it, or for maps a sixteenth",
            )
        ]

    def equal_batches_rule(self, needed: bool, reason: str) -> tuple[bool, str]:
        """The rule (holds, sentence) of a loss that pairs source and target images.

        Args:
            needed: whether the method has such a loss.
            reason: subject and verb of the sentence, such as "mmd_loss compares".
        """
        return (
            not needed or self.batch_of("target") == self.batch,
            f"data.target_batch: {reason} equal numbers of source and target images; leave it out",
        )

    def batch_of(self, role: str) -> int:
        """Images per step of source, target or target_labeled."""
        return self.target_batch or self.batch if role == "target" else self.batch

    def absent_of(self, role: str) -> list[str] | None:
        """The classes of which a domain has no image; None if it may not lack any.

        A set with masks may: its classes are those of `ids`, whether they occur or not.
        """
        may_lack = role.startswith("target") and self.task == "classification"
        return self.absent_classes if may_lack else None

    @property
    def sources(self) -> list[DomainConfig]:
        """The source domains; none for a method without a source."""
        if self.source is None:
            return []
        return self.source if isinstance(self.source, list) else [self.source]

    def is_source(self, domain: DomainConfig | None) -> bool:
        """Whether a domain's images are those of a source."""

        def images(section: DomainConfig) -> tuple[str, str]:
            return section.name, os.path.realpath(Path(self.root, section.path or ""))

        return domain is not None and images(domain) in [images(x) for x in self.sources if x]

    def target_is_source(self) -> bool:
        """Whether the target's images are those of a source."""
        return self.is_source(self.target)

    def augments_by(self, operation: str) -> bool:
        """Whether any set is augmented by an operation; sections that are mistakes do not count."""
        sections = (self, *self.sources, self.target)
        return any(operation in (section.augment or {}) for section in sections if section)

    def augment_of(self, role: str) -> dict:
        """The augmentation of source, target or target_labeled."""
        domain = self.sources[0] if role == "source" else self.target
        return self.augment if domain.augment is None else domain.augment


@dataclass
class TargetDataConfig(DataConfig):
    """`DataConfig` of a method that adapts a trained model without the source's images."""

    source: None = field(default=None, kw_only=True)  # null: this method sees no source images
    classes_from: str | None = None  # a run folder that names the classes; null: init_from

    def __post_init__(self):
        expand_home(self, "classes_from")
        super().__post_init__()


@dataclass
class ClassificationTargetDataConfig(TargetDataConfig):
    """`TargetDataConfig` of a method that has no segmentation."""

    task: Literal["classification"] = "classification"


@dataclass
class StreamDataConfig(TargetDataConfig):
    """`DataConfig` of a method that takes the target's images once, one batch after another.

    If they have labels, the predictions are scored by them.
    """

    order: Literal["shuffled", "listed", "sorted"] = "shuffled"  # sorted: by label, a benchmark
    target_labeled: None = None  # null: labels of the stream score its predictions only
    batch: int = positive(64, most=100_000)  # images per step, predicted together

    def extra_rules(self):
        return [
            (
                self.order != "sorted" or self.task == "classification",
                "order: sorted is by the label of an image, for task: classification",
            ),
            (self.target_batch is None, "target_batch: all images are target images; set batch"),
        ]


@dataclass
class LabeledDataConfig(DataConfig):
    """`DataConfig` of a method that trains on a labeled target; a part of it is for validation."""

    source: None = field(default=None, kw_only=True)  # null: this method sees no source images
    target: DomainConfig = field(kw_only=True)  # the labeled images
    target_test: DomainConfig | None = None  # the validation set; null: val_share of the target
    target_labeled: None = None  # null: all of the target is labeled
    test_share: None = None  # null: val_share holds out images here
    batch: int = positive(64, most=100_000)  # images per step
    val_share: float | None = None  # of each class, held out by seed; null: 0.2 without target_test

    def __post_init__(self):
        if self.val_share is None and self.target_test is None:
            self.val_share = 0.2
        super().__post_init__()

    def absent_of(self, role: str) -> None:
        """None: the classes are those of the target."""
        return None

    def extra_rules(self):
        both = self.val_share is not None and self.target_test is not None
        return [
            (
                self.val_share is None or 0 < self.val_share < 1,
                "val_share must lie between 0 and 1",
            ),
            (
                not both,
                "val_share is for a target without target_test; leave one of them out",
            ),
            (not self.absent_classes, "absent_classes: the classes are those of the target here"),
            (self.target_batch is None, "target_batch: all target images are labeled; set batch"),
        ]
