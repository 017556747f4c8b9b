"""Feature extractors, classifier, domain discriminator and gradient reversal."""

from models.classifier import ModelOutput, build_classifier, build_model, forward_domains, init_from
from models.discriminator import DomainDiscriminator
from models.gradient_reversal import gradient_reversal

__all__ = [
    "DomainDiscriminator",
    "ModelOutput",
    "build_classifier",
    "build_model",
    "forward_domains",
    "gradient_reversal",
    "init_from",
]
