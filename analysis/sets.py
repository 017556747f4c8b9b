"""The images that a run is evaluated on, opened again from its config.yaml."""

from collections.abc import Sequence
from dataclasses import dataclass, make_dataclass
from pathlib import Path
from typing import Literal

from common.config import load_config, read_config
from common.errors import UserError
from data import DataConfig, Domains, LabeledDataConfig, TargetDataConfig, open_domains
from data.domains import open_test
from data.image_set import ImageSet

TEST = "data.target_test"


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
    special = {"classes_from": TargetDataConfig, "val_share": LabeledDataConfig}
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
        shares = [key for key in ("test_share", "val_share") if key in keys]
        overrides = [*(f"data.{key}=null" for key in shares), *overrides]
    return load_config(cls, str(file), overrides, ignore_others=True)


def names_a_set(overrides: Sequence[str]) -> bool:
    """Whether the overrides name another test set than that of the run."""
    return any(word.startswith((f"{TEST}.", f"{TEST}=")) for word in overrides)


def open_labeled_set(
    config: EvaluationConfig, classes: list[str], named: bool
) -> tuple[ImageSet, str, Domains | None]:
    """The labeled target images to evaluate a run on.

    Args:
        config: of `load_evaluation_config`.
        classes: the classes of the model, in its order.
        named: whether the overrides name the set (`names_a_set`); then nothing else is opened.

    Returns:
        (the set, a description of it, all sets of the run). The sets are None if the set is named.

    Raises:
        UserError: the run has no labeled target images.
    """
    if named:
        return open_test(config.data, classes), TEST, None
    domains = open_domains(config.data, config.seed, trained=classes)
    if domains.classes != classes:
        raise UserError(
            f"the data have other classes than the run: now {', '.join(domains.classes)}; "
            f"restore them, or name a set by {TEST}"
        )
    if domains.target_test is None:
        raise UserError(
            "the run has no labeled target images to evaluate on; name some, such as "
            f"{TEST}.name=folder {TEST}.path=FOLDER"
        )
    return domains.target_test, domains.target_test_note, domains
