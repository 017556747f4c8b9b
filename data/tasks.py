"""The only place in this folder that chooses by the task."""

from types import ModuleType

from data import classification, segmentation
from data.config import DataConfig


def task_module(config: DataConfig) -> ModuleType:
    """data/classification.py or data/segmentation.py, which define the same names."""
    return {"classification": classification, "segmentation": segmentation}[config.task]
