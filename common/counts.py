"""Counts of whole numbers, on the device that they are on."""

import contextlib

import torch


@contextlib.contextmanager
def _any_order():
    """A context in which CUDA may add in any order, which no sum of whole numbers depends on.

    In torch's deterministic mode each such sum would sort the numbers first.
    """
    mode = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(False)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(mode, warn_only=warn_only)


@torch.no_grad()
def occurrences(numbers: torch.Tensor, size: int) -> torch.Tensor:
    """How often each of 0 .. size - 1 occurs: int64 of any shape -> int64 (size,).

    Unlike `torch.bincount` it does not wait for the device.
    """
    numbers = numbers.flatten()
    counts = torch.zeros(size, dtype=torch.int64, device=numbers.device)
    with _any_order():
        return counts.scatter_add_(0, numbers, torch.ones_like(numbers))
