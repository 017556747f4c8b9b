"""Packages that are not required, imported where they are first used."""

import importlib
from types import ModuleType


def optional(name: str) -> ModuleType | None:
    """The module of an optional package, such as matplotlib.figure; None if it is not installed."""
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name is None or name.split(".")[0] != error.name.split(".")[0]:
            raise  # the package is there, and lacks another one
        return None
