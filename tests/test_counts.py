"""Counts of whole numbers, and what the CPU reads from a device."""

import pytest
import torch

from common.counts import occurrences
from common.transfer import read


@pytest.fixture(params=[(True, True), (True, False), (False, False)])
def mode(request):
    """torch's deterministic mode: on with warnings, on with errors, off."""
    torch.use_deterministic_algorithms(request.param[0], warn_only=request.param[1])
    yield request.param
    torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("shape", [(0,), (7,), (2, 30, 40)])
def test_occurrences(mode, shape):
    numbers = torch.randint(5, shape)
    expected = torch.bincount(numbers.flatten(), minlength=8)
    assert torch.equal(occurrences(numbers, 8), expected)
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    assert (torch.are_deterministic_algorithms_enabled(), warn_only) == mode  # as before


def test_a_number_outside_is_an_error_and_the_mode_is_restored(mode):
    with pytest.raises(RuntimeError):
        occurrences(torch.tensor([1, 8]), 8)
    assert torch.are_deterministic_algorithms_enabled() == mode[0]


def test_what_is_read_is_what_was_there():
    tensors = [
        torch.tensor(True),
        torch.tensor([2**52 + 1, -3]),
        torch.randn(3, 4, dtype=torch.float64),
        torch.randn(2, 2),
        torch.tensor(float("nan")),
        torch.empty(0, 5),
        torch.tensor(0.1, dtype=torch.bfloat16),
    ]
    for x, copy in zip(tensors, read(tensors), strict=True):
        assert (copy.dtype, copy.shape) == (x.dtype, x.shape)
        assert torch.equal(copy.nan_to_num(7), x.nan_to_num(7))
    assert read([]) == []
