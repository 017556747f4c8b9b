"""Feature extractors, classifier, segmenter, domain discriminators and gradient reversal."""

from models.build import build_discriminator, build_model
from models.classifier import build_classifier
from models.discriminator import DomainDiscriminator, FCDiscriminator, feature_vectors
from models.gradient_reversal import gradient_reversal
from models.network import ModelOutput, forward_domains, head_features, init_from
from models.segmenter import build_segmenter

__all__ = [
    "DomainDiscriminator",
    "FCDiscriminator",
    "ModelOutput",
    "build_classifier",
    "build_discriminator",
    "build_model",
    "build_segmenter",
    "feature_vectors",
    "forward_domains",
    "gradient_reversal",
    "head_features",
    "init_from",
]
