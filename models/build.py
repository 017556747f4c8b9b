"""What a config asks for, by its `data.task`."""

from torch import nn

from common.config import RunConfig
from models.classifier import build_classifier
from models.discriminator import DomainDiscriminator, FCDiscriminator
from models.network import Network
from models.segmenter import build_segmenter


def build_model(config: RunConfig, num_classes: int) -> Network:
    """The network of `config.model`."""
    build = build_segmenter if config.data.task == "segmentation" else build_classifier
    return build(config.model, num_classes, config.data.root)


def build_discriminator(config: RunConfig, num_classes: int, hidden: int | None) -> nn.Module:
    """A discriminator of predictions without batch norm: convolutions on their maps, or a perceptron on vectors.

    `hidden`: width of the first convolution (null: 64), or of both hidden layers (null: 1024).
    """
    if config.data.task == "segmentation":
        return FCDiscriminator(num_classes, hidden or 64)
    return DomainDiscriminator(num_classes, hidden or 1024, norm="none")
