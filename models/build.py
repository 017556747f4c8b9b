"""The networks that a config asks for, by its `data.task`."""

from dataclasses import replace

from torch import nn

from common import ranks
from models.classifier import build_classifier
from models.discriminator import DomainDiscriminator, FCDiscriminator
from models.network import Network
from models.published import normalization
from models.segmenter import build_segmenter
from models.weights import init_from

BUILDERS = {"classification": build_classifier, "segmentation": build_segmenter}


def build_model(
    config, classes: list[str], new_head: bool = False, initialize: bool = True
) -> Network:
    """The network of a run: random weights, then those of `init_from`, else of `model.weights`.

    Args:
        config: of the run; its `model`, `data.task`, `data.root`, `init_from` and `compile` are
            read.
        classes: names of the classes.
        new_head: with `init_from`, whether a run of other classes may be started from, with a new
            head.
        initialize: whether to load those weights. They are not needed for a network that takes
            another state next, such as a run's model.pt.

    Raises:
        UserError: weights that do not fit.
    """
    replaced = config.init_from or not initialize
    section = replace(config.model, weights=None) if replaced else config.model
    model = BUILDERS[config.data.task](section, len(classes), config.data.root)
    model.set_normalization(*normalization(config.model.backbone, config.model.weights))
    if config.init_from and initialize:
        init_from(model, config.init_from, classes, new_head)
    if config.model.bn_sync and ranks.count() > 1:
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if config.compile:
        model.compile()
    return model


def build_reference(config, classes: list[str]) -> Network:
    """The network with `model.weights` alone, fixed and in eval mode, without `init_from`.

    Args:
        config: of the run; its `model`, `data.task` and `data.root` are read.
        classes: names of the classes.
    """
    reference = BUILDERS[config.data.task](config.model, len(classes), config.data.root)
    return reference.eval().requires_grad_(False)


def build_discriminator(config, num_classes: int, hidden: int | None) -> nn.Module:
    """A discriminator of predictions, without batch norm.

    Args:
        config: of the run; its `data.task` is read.
        num_classes: channels of the predictions.
        hidden: segmentation: width of the first convolution, None for 64. Classification: width of
            both hidden layers, None for 1024.
    """
    if config.data.task == "segmentation":
        return FCDiscriminator(num_classes, hidden or 64)
    return DomainDiscriminator(num_classes, hidden or 1024, norm="none")
