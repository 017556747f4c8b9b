"""Feature extractors, classifier, segmenter, domain discriminators and gradient reversal."""

from models.build import build_discriminator, build_model, build_reference
from models.card import ModelCard, load_card, load_run
from models.classifier import build_classifier
from models.discriminator import DomainDiscriminator, FCDiscriminator, feature_vectors
from models.gradient_reversal import gradient_reversal
from models.network import (
    BackboneFeatures,
    ModelOutput,
    Network,
    cache_features,
    eval_mode,
    forward_domains,
    forward_head,
)
from models.segmenter import build_segmenter
from models.weights import init_from

__all__ = [
    "BackboneFeatures",
    "DomainDiscriminator",
    "FCDiscriminator",
    "ModelCard",
    "ModelOutput",
    "Network",
    "build_classifier",
    "build_discriminator",
    "build_model",
    "build_reference",
    "build_segmenter",
    "cache_features",
    "eval_mode",
    "feature_vectors",
    "forward_domains",
    "forward_head",
    "gradient_reversal",
    "init_from",
    "load_card",
    "load_run",
]
