"""Data sets, and loaders whose order and augmentation depend only on seed, role and position."""

from data.config import (
    ClassificationTargetDataConfig,
    DataConfig,
    LabeledDataConfig,
    StreamDataConfig,
    TargetDataConfig,
)
from data.domains import Domains, EvaluationSets, open_domains
from data.loaders import eval_loader, train_loader
from data.prepare import load_image, target_size
from data.read_all import check_files
from data.views import to_views

__all__ = [
    "ClassificationTargetDataConfig",
    "DataConfig",
    "Domains",
    "EvaluationSets",
    "LabeledDataConfig",
    "StreamDataConfig",
    "TargetDataConfig",
    "check_files",
    "eval_loader",
    "load_image",
    "open_domains",
    "target_size",
    "to_views",
    "train_loader",
]
