"""A finished run, opened again with the labeled images that it is evaluated on."""

import contextlib
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, make_dataclass
from pathlib import Path
from typing import Literal

import torch
from torch import nn

from common.config import build_config, read_config, read_layers
from common.errors import UserError
from data import (
    DataConfig,
    Domains,
    LabeledDataConfig,
    StreamDataConfig,
    TargetDataConfig,
    eval_loader,
    open_domains,
)
from data.decoded import Decoded
from data.domains import open_test
from data.image_set import ImageSet
from data.loaders import Loader
from data.tasks import task_module
from models import ModelCard, load_card, load_run
from training.device import get_device

TEST = "data.target_test"
HELD_OUT = 200  # held-out source images from which on they suffice for features


@dataclass(kw_only=True)
class EvaluationConfig:
    """The keys of a run's config that an evaluation reads; see training/config.py."""

    data: DataConfig
    seed: int = 0
    device: str = "auto"
    amp: Literal["float32", "float16", "bfloat16"] = "float32"
    init_from: str | None = None


def _data_class(keys: Sequence[str]) -> type[DataConfig]:
    """The class of a section `data` in a config.yaml, which has all keys of its class."""
    special = {"order": StreamDataConfig, "classes_from": TargetDataConfig}
    special |= {"val_share": LabeledDataConfig}
    return next((cls for key, cls in special.items() if key in keys), DataConfig)


def load_evaluation_config(run: Path, overrides: Sequence[str] = ()) -> EvaluationConfig:
    """What an evaluation needs of a run's config.

    Args:
        run: the run folder.
        overrides: texts `key=value`, of data.* and device. If one is of data.target_test, the
            images of that set take the place of those that the run has held out for the test.

    Raises:
        UserError: there is no config, or a key is wrong.
    """
    file = run / "config.yaml"
    if not file.is_file():
        raise UserError(f"{run}: has no config.yaml; name a run folder")
    section = read_config(str(file)).get("data")
    keys = list(section) if isinstance(section, dict) else []
    data_class = _data_class(keys)
    cls = make_dataclass("Config", [("data", data_class)], bases=(EvaluationConfig,), kw_only=True)
    if names_a_set(overrides):
        overrides = [*_of_another_set(run, keys, overrides), *overrides]
    tree, layers = read_layers(cls, [str(file)], overrides)
    # Those of the run and of its method are left aside, but not misspelled in an override.
    read = {spec.name for spec in fields(cls)} | {re.split(r"[.=]", word)[0] for word in overrides}
    tree = {key: value for key, value in tree.items() if key in read}
    return build_config(cls, tree, layers, str(file))


def names_a_set(overrides: Sequence[str]) -> bool:
    """Whether the overrides name another test set than that of the run."""
    return any(word.startswith((f"{TEST}.", f"{TEST}=")) for word in overrides)


def _of_another_set(run: Path, keys: Sequence[str], overrides: Sequence[str]) -> list[str]:
    """The overrides that another set needs before its own.

    It takes the place of the images that the run has held out, with keys of its own, and files are
    prepared as those of the run.

    Args:
        run: the run folder.
        keys: of the run's section `data`.
        overrides: those that name the set.
    """
    words = [f"data.{key}=null" for key in ("test_share", "val_share") if key in keys]
    if any(word.startswith(f"{TEST}.name=") for word in overrides):
        words.append(f"{TEST}=null")
        resize = load_card(run).resize
        words += [f"{TEST}.resize={resize}"] if resize is not None else []
    return words


@dataclass
class OpenedRun:
    """A run, its model, and the labeled images to evaluate it on.

    Attributes:
        folder: the run folder.
        config: what an evaluation needs of its config.
        device: of the model.
        network: the model, in eval mode.
        card: describes it.
        images: the labeled target images.
        note: a description of them.
        domains: all sets of the run; None if the images are others than the run's.
    """

    folder: Path
    config: EvaluationConfig
    device: torch.device
    network: nn.Module
    card: ModelCard
    images: ImageSet
    note: str
    domains: Domains | None

    @property
    def measure(self) -> Callable[[torch.Tensor], dict]:
        """The function that computes the metrics of a confusion matrix (K, K)."""
        data = self.config.data
        return task_module(data).measure(data, self.card.classes)

    def loader(self) -> Loader:
        """The labeled images in their order."""
        return eval_loader(self.images, self.config.data, device=self.device)

    def names(self) -> list[str]:
        """The name of each image: its path, below `data.root` if there; or set and number."""
        images, root = self.images, Path(self.config.data.root)
        if not isinstance(images.images, Decoded):
            return [f"{images.name} {i}" for i in images.indices.tolist()]
        paths = (images.images.paths[i] for i in images.indices.tolist())
        return [str(p.relative_to(root) if p.is_relative_to(root) else p) for p in paths]

    def source(self) -> ImageSet | None:
        """Source images to compute features of: the held-out ones, or if few the training images.

        None without a source.
        """
        if self.domains is None:
            return None
        held_out, trained = self.domains.source_val, self.domains.source
        few = held_out is None or len(held_out) < HELD_OUT
        return trained if few else held_out

    def trained_on(self) -> list[str]:
        """The names of the labeled images that are files of the run's source.

        Only the images of a named set can be: those of the run are apart.
        """
        if self.domains is not None or not isinstance(self.images.images, Decoded):
            return []
        config, files = self.config.data, set()
        for i, domain in enumerate(config.sources):
            with contextlib.suppress(UserError):  # such as of a folder that is gone
                listing = task_module(config).list_set(domain, f"source[{i}]", config, True)
                files |= set(map(os.path.realpath, listing.files))
        numbers = self.images.indices.tolist()
        return [
            name
            for name, i in zip(self.names(), numbers, strict=True)
            if os.path.realpath(self.images.images.paths[i]) in files
        ]

    def start(self) -> Path | None:
        """The run that this one was started from, if its folder is there."""
        start = self.config.init_from
        return Path(start) if start is not None and Path(start).is_dir() else None


def open_run(folder: Path, overrides: Sequence[str] = ()) -> OpenedRun:
    """Open a run and its labeled target images.

    Args:
        folder: the run folder.
        overrides: see `load_evaluation_config`. If they name a set, nothing else is opened.

    Raises:
        UserError: there is no such run, it has no labeled target images, or its data have changed.
    """
    config = load_evaluation_config(folder, overrides)
    device = get_device(config.device)
    network, card = load_run(folder, device)
    if names_a_set(overrides):
        if config.data.target_test is None:
            raise UserError(f"{TEST} is null: name a set, such as {TEST}.name=folder {TEST}.path=F")
        images, note, domains = open_test(config.data, card.classes), TEST, None
    else:
        domains = open_domains(config.data, config.seed, trained=card.classes)
        images, note = domains.target_test, domains.target_test_note
        _check_sets(domains, card)
    return OpenedRun(folder, config, device, network, card, images, note, domains)


def _check_sets(domains: Domains, card: ModelCard) -> None:
    if domains.classes != card.classes:
        raise UserError(
            f"the data have other classes than the run: now {', '.join(domains.classes)}; "
            f"restore them, or name a set by {TEST}"
        )
    if domains.target_test is None:
        raise UserError(
            "the run has no labeled target images to evaluate on; name some, such as "
            f"{TEST}.name=folder {TEST}.path=FOLDER"
        )
