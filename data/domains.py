"""The two domains of a run, opened from its config."""

import weakref
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from common.errors import UserError
from common.files import trained_classes
from data.config import DataConfig, LabeledDataConfig, StreamDataConfig
from data.decoded import Decoded
from data.fingerprint import fingerprint
from data.image_set import ImageSet, join
from data.labeled import draw_labeled, list_labeled, without
from data.loaders import CPU, Loader, eval_loader, stream_loader, train_loader
from data.order import Draws, Order, generator
from data.rare_classes import class_counts
from data.tasks import task_module

LABEL_SAMPLE = 100  # masks that the source's class shares, and a dry run, are taken from


@dataclass
class EvaluationSets:
    """The sets on which a model is evaluated.

    Attributes:
        source_val, target_test: loaders of (images, labels), or None.
        target_train: loader of images for the label-free criteria, or None.
        classes: names of the K classes.
        measure: computes the metrics of a confusion matrix (K, K).
        val_loss: whether the loss on `target_test` is a criterion; its labels then select.
    """

    source_val: Iterable | None
    target_train: Iterable | None
    target_test: Iterable | None
    classes: list[str]
    measure: Callable[[torch.Tensor], dict]
    val_loss: bool = False


@dataclass(kw_only=True)
class Domains:
    """The sets on which a run trains and is evaluated.

    Labels of the target's training images are dropped.

    Attributes:
        config: the section `data`.
        seed: of order, augmentation and splits.
        classes: names of the classes.
        absent_classes: those of them of which the target has no image.
        source, target: training sets, labeled and unlabeled. Without a source
            (`TargetDataConfig`) `source` and `source_val` are None.
        source_val: held-out source images, or None with `source_val: 0`.
        stream: the target's images in the order of a `StreamDataConfig`, with their labels if there
            are any; else None.
        target_labeled: the images of `data.target_labeled`, which are in no other set of the
            target, or None. With a `LabeledDataConfig`, the images to train on.
        target_test: labeled target images for reporting, or None. With a `LabeledDataConfig`, the
            images to validate on; there are no other sets then.
        target_test_note: a description of `target_test`.
        criteria: unlabeled training images for model selection.
        lists: the text of each list of images drawn by the seed, by file name.
        dry_run: whether a pass is one batch only.
        device: of the run. CUDA devices compute the views of training images.
        parts: batches of `batches` per step of the run; together they are one of `data.batch`.
        on_wait: called about once per second while a batch of `batches` is awaited from the
            workers; it may raise.
    """

    config: DataConfig
    seed: int
    classes: list[str]
    absent_classes: list[str] = field(default_factory=list)
    source: ImageSet | None = None
    source_val: ImageSet | None = None
    target: ImageSet | None = None
    stream: ImageSet | None = None
    target_labeled: ImageSet | None = None
    target_test: ImageSet | None = None
    target_test_note: str
    criteria: ImageSet | None = None
    lists: dict[str, str]
    dry_run: bool = False
    device: torch.device = CPU
    parts: int = 1
    on_wait: Callable[[], None] = lambda: None
    _opened: weakref.WeakValueDictionary = field(
        default_factory=weakref.WeakValueDictionary, init=False, repr=False
    )

    @property
    def num_classes(self) -> int:
        return len(self.classes)

    def class_numbers(self, names: list[str], key: str) -> list[int]:
        """The numbers of classes that the config's `key` names. Raises `UserError` for others."""
        _check_class_names(names, self.classes, key)
        return [self.classes.index(name) for name in names]

    def batches(
        self, role: str, start: int, steps: int, strong: dict | None = None
    ) -> Iterator | None:
        """Shuffled batches of the steps start + 1 to `steps`.

        Args:
            role: source, target or target_labeled.
            start: steps done.
            steps: steps of the run.
            strong: a mapping as `data.augment`; then a batch is (weak view, strong view).

        Returns:
            An iterator over batches for `to_views`, of images, with labels where the set has them;
            `parts` of them for each step. None where there is no such set.
        """
        images = getattr(self, role)
        if images is None:
            return None
        place = self.config, self.seed, role, start, steps
        how = strong, self.parts, self.device, self._wait
        styles = counts = None
        if role == "source" and self.config.fda is not None:
            styles = self.target
        if role == "source" and self.config.rare_class_temperature is not None:
            if self.dry_run:  # one batch is taken, and the masks of a large set take minutes
                images = images.subset(torch.arange(min(len(images), LABEL_SAMPLE)))
            counts = class_counts(images, None if self.dry_run else Path(self.config.cache))
        batches = iter(train_loader(images, *place, *how, styles, counts))
        self._opened[role] = batches
        return batches

    def stream_length(self) -> int:
        """The number of batches of the stream."""
        return len(stream_loader(self.stream, self.config).dataset)

    def stream_batches(self, start: int, steps: int) -> Iterator:
        """Batches start + 1 to `steps` of the stream: images, or (images, labels) if it has labels.

        Every image comes once, as for an evaluation; the last batch may be smaller.
        """
        place = start, steps, self.device, self._wait
        batches = iter(stream_loader(self.stream, self.config, *place))
        self._opened["stream"] = batches
        return batches

    def _wait(self) -> None:
        self.on_wait()

    def fetch(self) -> None:
        """Wait for the batches of the next step, of every iterator of `batches` in use."""
        for batches in list(self._opened.values()):
            batches.fetch(self.parts)

    def positions(self, role: str, start: int, steps: int) -> tuple[torch.Tensor, ...]:
        """Numbers of the images in each of the batches that `batches` yields.

        In a dry run they are numbers of the images of one evaluation batch, as in `labeled_pass`.
        """
        size, batch = len(getattr(self, role)), self.config.batch_of(role) // self.parts
        if self.dry_run:
            size = min(size, self.config.eval_batch)
        order = Order(self.seed, role, size, batch)
        return tuple(order.rows(k)[1] for k in range(start * self.parts, steps * self.parts))

    def source_shares(self) -> list[float] | None:
        """The share of each class in the source labels, of masks from a sample; None without."""
        return None if self.source is None else self.source.label_shares(LABEL_SAMPLE)

    def evaluation(self) -> EvaluationSets:
        """The sets of an evaluation; in a dry run one batch of each."""
        return EvaluationSets(
            source_val=self._pass(self.source_val),
            target_train=self._pass(self.criteria),
            target_test=self._pass(self.target_test),
            classes=self.classes,
            measure=task_module(self.config).measure(self.config, self.classes),
            val_loss=isinstance(self.config, LabeledDataConfig),
        )

    @property
    def unchanging(self) -> bool:
        """Whether a labeled target image is the same in every step, and all are of one size."""
        images = self.target_labeled.images
        one_size = isinstance(images, torch.Tensor) or len(set(images.shapes)) == 1
        augmented = self.config.augment_of("target") or self.config.target.crop is not None
        return not augmented and one_size

    def labeled_pass(self) -> Loader:
        """Every labeled target image once, not augmented; in a dry run one batch of them.

        Every process sees all of them.
        """
        return self._pass(self.target_labeled, shared=False)

    def target_pass(self) -> Loader:
        """Every unlabeled target image once, not augmented; in a dry run one batch of them."""
        return self._pass(self.target)

    def _pass(self, images: ImageSet | None, shared: bool = True) -> Loader | None:
        """Every image once, or the first batch of them in a dry run; None for None."""
        if images is None:
            return None
        if self.dry_run:
            images = images.subset(torch.arange(min(len(images), self.config.eval_batch)))
        return eval_loader(images, self.config, shared, self.device)

    def fingerprints(self) -> dict[str, torch.Tensor]:
        """The fingerprint of each set by its role."""
        roles = ("source", "source_val", "target", "target_labeled", "target_test")
        found, listed = {}, set()
        for role in roles:
            images = getattr(self, role)
            if images is not None:
                files = id(images.images), id(images.labels)
                found[role] = fingerprint(images, Path(self.config.root), files not in listed)
                listed.add(files)
        return found

    def describe(self, storage: bool = True) -> str:
        """One line per set, with where it is stored if `storage`, and the sizes of a batch."""
        names = ", ".join(self.classes[:12]) + (" ..." if self.num_classes > 12 else "")
        absent = f"; the target lacks {', '.join(self.absent_classes)}" * bool(self.absent_classes)
        lines = [f"{self.num_classes} classes: {names}{absent}"]
        roles = [] if self.target is None else ["source", "source_val", "target"]
        roles += ["target_labeled"] if self.target_labeled else []
        for role in [*roles, "target_test"]:
            lines.append(f"{role:14} {self._describe_set(role, storage)}")
        sets = {role: getattr(self, role) for role in ("source", "target", "target_labeled")}
        present = {role: images for role, images in sets.items() if images}
        sizes = task_module(self.config).describe_sizes(present, self.config)
        lines.append(f"{'batch':14} {self._describe_batch()}, {sizes}")
        if self.stream is not None:
            lines.append(f"{'stream':14} {self.config.order}, {self.stream_length()} batches")
            present = {}
        for role, images in present.items():
            if len(images) < (batch := self.config.batch_of(role)):
                lines.append(
                    f"note: a batch of {role} has {batch} images and the set {len(images)}: "
                    "they repeat"
                )
        if self.config.fda is not None:
            lines.append("note: source images take low frequencies of target images (data.fda)")
        if self.config.rare_class_temperature is not None:
            key = "data.rare_class_temperature"
            lines.append(f"note: source images with rare classes are drawn more often ({key})")
        return "\n".join(lines)

    def _describe_batch(self) -> str:
        batch, target_batch = self.config.batch, self.config.batch_of("target")
        if self.target is None:
            return str(batch)
        if batch == target_batch:
            return f"{batch} per domain"
        others = "source" if self.source else "labeled target" if self.target_labeled else ""
        return (f"{batch} {others} and " if others else "") + f"{target_batch} target images"

    def _describe_set(self, role: str, storage: bool) -> str:
        images = getattr(self, role)
        if images is None:
            if role == "source_val" and self.source is not None:
                return "none: data.source_val is 0, all source images are trained on"
            return self.target_test_note if role == "target_test" else "none"
        text = f"{images.name}: {len(images)} images"
        if role == "target_test":
            text += f" ({self.target_test_note})"
        trains = role in ("source", "target") or self.target is None
        if storage and isinstance(images.images, Decoded) and trains:
            text += f", {images.images.describe()}"
        own_folder = role in ("source", "target", "target_labeled") or self.config.target_test
        if images.skipped and role != "source_val" and own_folder:
            text += f"; {images.skipped}"
        return text


def open_domains(
    config: DataConfig, seed: int, dry_run: bool = False, trained: list[str] | None = None
) -> Domains:
    """Open both domains, match their classes by name and make the splits.

    In a dry run nothing is written and every pass is one batch.

    Args:
        config: the section `data`.
        seed: of order, augmentation and splits.
        dry_run: whether this is a dry run.
        trained: the class names of a run that is resumed. Without a source they are the classes;
            if they are None too, the classes are those of the run `classes_from`.
    """
    if isinstance(config, LabeledDataConfig):
        return _open_labeled_target(config, seed, dry_run)
    if config.sources:
        source, source_val = _open_source(config, seed, dry_run)
        classes = source.classes
    else:
        source, source_val = None, None
        classes = trained or classes_of_run(config.classes_from)
    _check_iou_classes(config, classes)
    _check_absent_classes(config, classes)
    opener = task_module(config)
    target = opener.open_set(config.target, "target", config, True, dry_run)
    target = _matched(target, "target", classes, config)
    target, held_out = _hold_out_test(config, target, seed, dry_run)
    if held_out is not None and config.target_is_source():
        source, source_val = (without(images, held_out) for images in (source, source_val))
    target_labeled, lists = _open_labeled(config, target, classes, seed, dry_run)
    if held_out is not None:
        target_test, note = held_out, f"{100 * config.test_share:.4g} % of the target, held out"
        lists = {**lists, "target_test.txt": list_labeled(held_out, Path(config.root))}
    else:
        target_test, note = _open_target_test(config, target, source_val, classes, dry_run)
    if target_labeled is not None:
        target, target_test = (without(images, target_labeled) for images in (target, target_test))
        if len(target) == 0 or (target_test is not None and len(target_test) == 0):
            missing = "unlabeled image" if len(target) == 0 else "image to test on"
            raise UserError(
                f"data.target_labeled: {config.target_labeled} leaves no {missing}; "
                "give fewer labels"
            )
    stream = _stream(target, config, seed) if isinstance(config, StreamDataConfig) else None
    target = target.unlabeled()
    return Domains(
        config=config,
        seed=seed,
        classes=classes,
        absent_classes=config.absent_classes,
        source=source,
        source_val=source_val,
        target=target,
        stream=stream,
        target_labeled=target_labeled,
        target_test=target_test,
        target_test_note=note,
        criteria=_criteria(target, config),
        lists=lists,
        dry_run=dry_run,
    )


def _matched(images: ImageSet, role: str, classes: list[str], config: DataConfig) -> ImageSet:
    """A set of the target with the class numbers of the source.

    Args:
        images: the set, with or without labels.
        role: its place in the config.
        classes: the class names of the source, by number.
        config: the section `data`.
    """
    absent, remedy = config.absent_of(role) or (), task_module(config).CLASSES_DIFFER
    return images.relabeled(classes, absent=absent, remedy=remedy)


def classes_of_run(path: str) -> list[str]:
    """The class names of a run folder. Raises `UserError` if it does not name them."""
    classes = trained_classes(str(Path(path).expanduser()))
    if classes is None:
        raise UserError(
            f"{path} has no summary.json that names the classes; "
            "name the folder of a finished run in init_from or in data.classes_from"
        )
    return classes


def _open_source(config: DataConfig, seed: int, dry_run: bool) -> tuple[ImageSet, ImageSet | None]:
    """Training and validation set of all sources; no validation set with `source_val: 0`.

    A source without a test split is validated on a part of its images, held out by `seed`.
    """
    opener, trained, held_out = task_module(config), [], []
    for i, domain in enumerate(config.sources):
        role = f"source[{i}]" if len(config.sources) > 1 else "source"
        source = opener.open_set(domain, role, config, True, dry_run, trains=True)
        if source.labels is None:
            raise UserError(f"{source.name}: the source needs labels: {opener.LABELS}")
        trained.append(source)
        if config.source_val == 0:
            continue
        source_val = opener.open_set(domain, role, config, False, dry_run, trains=True)
        if source_val is None:
            count = _held_out_count(source, config)
            source_val, trained[-1] = opener.hold_out(source, seed, count)
        held_out.append(source_val)
    opener.check_sources(trained)
    return join(trained), join(held_out) if held_out else None


def _held_out_count(source: ImageSet, config: DataConfig) -> int:
    """How many images of one source are held out.

    A share of all sources is at most `select_images`, so that evaluations of a large set stay
    short; a number is taken as it is.
    """
    count = config.source_val
    if not isinstance(count, int):
        most = config.select_images // len(config.sources)
        count = max(min(int(count * len(source)), most), 1)
    if count >= len(source):
        raise UserError(
            f"data.source_val: {config.source_val} leaves none of the {len(source)} images of "
            f"{source.name} to train on; hold out fewer, or 0"
        )
    return count


def _hold_out_test(
    config: DataConfig, target: ImageSet, seed: int, dry_run: bool
) -> tuple[ImageSet, ImageSet | None]:
    """(the target without its test images, the test images); None without `test_share`.

    Raises:
        UserError: the target has no labels or a test split of its own, or is one of several
            sources.
    """
    if config.test_share is None:
        return target, None
    opener = task_module(config)
    if target.labels is None:
        raise UserError(f"data.test_share: {target.name} has no labels to test on; leave it out")
    if opener.open_set(config.target, "target", config, False, dry_run) is not None:
        raise UserError(f"data.test_share: {target.name} has a test split of its own; leave it out")
    if config.target_is_source() and len(config.sources) > 1:
        raise UserError(
            "data.test_share: one of several sources is the target, whose test images it would "
            "train on; set data.target_test"
        )
    test, rest = opener.hold_out_test(target, config.test_share, seed)
    return rest, test


def _open_target_test(
    config: DataConfig,
    target: ImageSet,
    source_val: ImageSet | None,
    classes: list[str],
    dry_run: bool,
) -> tuple[ImageSet | None, str]:
    """The set on which the target is evaluated.

    Args:
        config: the section `data`.
        target: the target images, with their labels if there are any.
        source_val: the held-out source images, or None.
        classes: the class names of the source, by number.
        dry_run: store nothing.

    Returns:
        (the set, a description of it); the set is None without labels.
    """
    if config.target_test is not None:
        test = _open_test(config, dry_run)
        return _matched(test, "target_test", classes, config), "data.target_test"
    test = task_module(config).open_set(config.target, "target", config, False, dry_run)
    if test is not None:
        return _matched(test, "target", classes, config), "the target's own test split"
    if target.labels is None:
        return None, "none: no target labels"
    if config.target_is_source():
        # The upper bound must not be evaluated on images that it trains on.
        if len(config.sources) > 1:
            raise UserError(
                "data.source: one of several is the target, which leaves no test; "
                "set data.target_test"
            )
        if source_val is None:
            raise UserError(
                "data.source_val: 0 leaves no test, since the target is the source, and all of its "
                "images are trained on; set data.target_test, or hold out a share"
            )
        tenth = len(source_val) == max(len(target) // 10, 1)
        part = "a held-out tenth" if tenth else f"{len(source_val)} held-out images"
        return replace(target, indices=source_val.indices), f"{part} of the target"
    return target, "the target's training images: transductive"


def _open_test(config: DataConfig, dry_run: bool) -> ImageSet:
    """The set of `data.target_test`: its own test split, else its images."""
    open_set = task_module(config).open_set
    test = open_set(config.target_test, "target_test", config, False, dry_run)
    if test is None:
        test = open_set(config.target_test, "target_test", config, True, dry_run)
    if test.labels is None:
        raise UserError(f"{test.name}: target_test needs labels")
    return test


def open_test(config: DataConfig, classes: list[str]) -> ImageSet:
    """The labeled set `data.target_test` alone, with the class numbers of a trained model."""
    return _matched(_open_test(config, dry_run=False), "target_test", classes, config)


def _open_labeled(
    config: DataConfig, target: ImageSet, classes: list[str], seed: int, dry_run: bool
) -> tuple[ImageSet | None, dict[str, str]]:
    """The images of `data.target_labeled`.

    Args:
        config: the section `data`.
        target: the target images, with their labels if there are any.
        classes: the class names of the source, by number.
        seed: of the draw.
        dry_run: store nothing.

    Returns:
        (the set or None, the text of the list of drawn images by file name).
    """
    wanted, opener = config.target_labeled, task_module(config)
    if wanted is None:
        return None, {}
    if isinstance(wanted, int):
        pool = opener.with_training_labels(target, config, classes, dry_run)
        pool = replace(pool, images=target.images, indices=target.indices)
        labeled = draw_labeled(pool, wanted, seed, config.absent_of("target_labeled") or ())
        return labeled, {"target_labeled.txt": list_labeled(labeled, Path(config.root))}
    if not isinstance(target.images, Decoded):
        raise UserError(
            f"data.target_labeled: {wanted} names files, {target.name} has none; "
            "give a number of images per class"
        )
    return opener.open_listed(wanted, config, classes, dry_run), {}


def _open_labeled_target(config: LabeledDataConfig, seed: int, dry_run: bool) -> Domains:
    """`open_domains` of a labeled target: a training and a validation set."""
    opener, lists = task_module(config), {}
    train = opener.open_set(config.target, "target", config, True, dry_run, trains=True)
    if train.labels is None:
        raise UserError(f"{train.name}: fine-tuning needs labels: {opener.LABELS}")
    if config.target_test is not None:
        val = _open_test(config, dry_run).relabeled(train.classes, "target")
        note = "data.target_test"
    else:
        val, train = opener.split_validation(train, config, seed, dry_run)
        note, root = f"{100 * config.val_share:.4g} % of the target, held out", Path(config.root)
        lists = {"train.txt": list_labeled(train, root), "val.txt": list_labeled(val, root)}
    _check_iou_classes(config, train.classes)
    if shared := len(val) - len(without(val, train)):
        raise UserError(
            f"{val.name}: {shared} of {len(val)} validation images are trained on too; "
            "name each image once, in one set"
        )
    return Domains(
        config=config,
        seed=seed,
        classes=train.classes,
        target_labeled=train,
        target_test=val,
        target_test_note=note,
        lists=lists,
        dry_run=dry_run,
    )


def _stream(target: ImageSet, config: StreamDataConfig, seed: int) -> ImageSet:
    """The target in the order of the stream.

    Raises:
        UserError: it is to be sorted by labels that it does not have.
    """
    if config.order == "listed":
        return target
    order = torch.randperm(len(target), generator=generator(seed, "stream"))
    if config.order == "sorted":
        if target.labels is None:
            raise UserError(f"data.order: sorted needs labels, and {target.name} has none")
        order = order[target.labels[target.indices[order]].argsort(stable=True)]
    return target.subset(order)


def _criteria(target: ImageSet, config: DataConfig) -> ImageSet:
    """The images of the label-free criteria: a sample of the target's training images.

    It does not depend on the seed, so that runs of several seeds can be compared: each image has a
    random number that depends on its index alone, and those with the lowest numbers are taken.
    """
    order = Draws(target.indices, "criteria").uniform().flatten().argsort(stable=True)
    return target.subset(order[: config.select_images].sort().values)


def _check_class_names(names: Iterable[str], classes: list[str], key: str) -> None:
    """Raise `UserError`, naming the config's `key`, for a name that is no class."""
    if unknown := [name for name in names if name not in classes]:
        raise UserError(f"{key}: no class {unknown[0]!r}; there are {', '.join(classes)}")


def _check_absent_classes(config: DataConfig, classes: list[str]) -> None:
    _check_class_names(config.absent_classes, classes, "data.absent_classes")
    if len(set(config.absent_classes)) >= len(classes):
        raise UserError("data.absent_classes: names all classes; the target must have one of them")


def _check_iou_classes(config: DataConfig, classes: list[str]) -> None:
    _check_class_names(config.iou_classes or (), classes, "data.iou_classes")
