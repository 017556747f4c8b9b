"""model.yaml of a run folder: what its model is. With model.pt it is all that a user needs."""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from common.config import dump, load_config
from common.errors import UserError, require
from common.files import SAFETENSORS, load_tensors
from models.build import BUILDERS
from models.config import ModelConfig
from models.network import Network
from models.published import normalization
from models.weights import compare

CARD = "model.yaml"
HEAD = "# What model.pt is. models.load_run(folder) makes the network of both; see docs/use.md.\n"


@dataclass(kw_only=True)
class ModelCard:
    method: str  # that trained the model
    task: Literal["classification", "segmentation"]
    classes: list[str]  # names, in the order of the logits
    resize: int | list[int] | None  # px; of a square, or [height, width]; null: images as they are
    size: int | None  # classification: px of the square that is cropped from the middle then
    exif: bool  # whether files are turned by their EXIF orientation
    amp: Literal["float32", "float16", "bfloat16"]  # the precision of the run's evaluations
    mean: list[float]  # of the channels red, green and blue, from 0 to 1; the network subtracts it
    std: list[float]  # the network divides by it
    model: ModelConfig  # the section `model` of the run

    def __post_init__(self):
        require(
            (len(self.classes) > 1, "classes must name at least two classes"),
            (len(self.mean) == len(self.std) == 3, "mean and std need three numbers each"),
            (all(value > 0 for value in self.std), "std must be positive"),
            ((self.size is None) == (self.task == "segmentation"), "size is for classification"),
        )

    @property
    def predicts_maps(self) -> bool:
        """Whether every pixel has a prediction, and not the image."""
        return self.task == "segmentation"


def card_text(
    config, model: ModelConfig, classes: list[str], resize: int | tuple[int, int] | None
) -> str:
    """The content of model.yaml.

    Args:
        config: of the run.
        model: its section `model`, as it was at the start: a run that goes on reads no weights.
        classes: names of the classes.
        resize: what the files of the target are resized to: px of a square, or (height, width).
    """
    mean, std = normalization(model.backbone, model.weights)
    card = ModelCard(
        method=type(config).method,
        task=config.data.task,
        classes=classes,
        resize=list(resize) if isinstance(resize, tuple) else resize,
        size=config.data.size if config.data.task == "classification" else None,
        exif=config.data.exif,
        amp=config.amp,
        mean=list(mean),
        std=list(std),
        model=model,
    )
    return HEAD + dump(card)


def _weights_file(path: Path) -> Path:
    """The file of weights that a path names: itself, or that of a run folder."""
    if not path.is_dir():
        return path
    names = ["model.pt", f"model{SAFETENSORS}"]
    for name in names:
        if (path / name).is_file():
            return path / name
    raise UserError(
        f"{path}: has neither {' nor '.join(names)}; a run writes it at its first evaluation; "
        "go on with it by --resume"
    )


def load_card(path: str | Path) -> ModelCard:
    """The card of a run.

    Args:
        path: a run folder, or a file of weights in it.

    Raises:
        UserError: there is no such folder or card, or the card is wrong.
    """
    path = Path(path)
    if not path.exists():
        raise UserError(f"there is no run {path}; name a run folder")
    file = (path if path.is_dir() else path.parent) / CARD
    if not file.is_file():
        raise UserError(
            f"{file.parent}: has no {CARD}, which describes the model; name a run folder "
            "(runs of earlier versions have none; train again)"
        )
    return load_config(ModelCard, str(file))


def load_run(path: str | Path, device: torch.device | str = "cpu") -> tuple[Network, ModelCard]:
    """The network of a run, in eval mode, and the card that describes it.

    The network takes uint8 images (N, 3, H, W) and returns a `ModelOutput`; it normalizes them
    itself. `data.load_image(file, card)` prepares a file as in training.

    Args:
        path: a run folder, for its model.pt or else model.safetensors; or a file of weights in one,
            such as stage1.pt. Nothing else of the folder is read but model.yaml.
        device: of the network.

    Raises:
        UserError: there is no such run, or its files do not fit each other.
    """
    card = load_card(path)
    file = _weights_file(Path(path))
    # The weights are those of the run, whatever it was started from.
    config = replace(card.model, weights=None)
    network = BUILDERS[card.task](config, len(card.classes), ".")
    state = load_tensors(file)
    if mismatch := compare(network, state):
        raise UserError(f"{file} does not fit {file.parent / CARD}: {mismatch}")
    network.load_state_dict(state)
    network.set_normalization(card.mean, card.std)
    return network.to(device).eval(), card
