"""Bilinear resizing beside torch's own kernel."""

import pytest
import torch
import torch.nn.functional as F

from common.resize import resize_maps


def native(x: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(x, size=size, mode="bilinear", align_corners=False)


SIZES = [
    ((1, 19, 64, 128), (512, 1024)),
    ((2, 5, 23, 30), (180, 240)),
    ((2, 3, 9, 7), (9, 7)),
    ((1, 3, 1, 4), (5, 16)),
    ((2, 4, 40, 30), (5, 7)),  # without antialiasing
    ((0, 3, 4, 4), (8, 8)),
]


@pytest.mark.parametrize(("shape", "size"), SIZES)
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_values_and_gradients_are_those_of_torch(shape, size, layout):
    torch.manual_seed(0)
    x = torch.randn(shape).contiguous(memory_format=layout).requires_grad_()
    resized, expected = resize_maps(x, size), native(x, size)
    assert resized.shape == (*shape[:2], *size)
    torch.testing.assert_close(resized, expected, rtol=0, atol=5e-6)
    gradient = torch.randn(resized.shape)
    (ours,) = torch.autograd.grad(resized, x, gradient)
    (theirs,) = torch.autograd.grad(expected, x, gradient)
    largest = float(theirs.abs().max()) if theirs.numel() else 1.0
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6 * largest)


@pytest.mark.parametrize("size", [(5, 9), (65, 129), (33, 1), (7, 30)])
def test_corners_may_coincide(size):
    x = torch.randn(2, 3, 9, 17)
    expected = F.interpolate(x, size=size, mode="bilinear", align_corners=True)
    torch.testing.assert_close(resize_maps(x, size, corners=True), expected, rtol=0, atol=5e-6)
    assert (resize_maps(x, size) - expected).abs().max() > 0.1  # control


def test_the_enlargement_of_a_segmenter_is_exact_to_rounding():
    torch.manual_seed(0)
    x = torch.randn(1, 19, 64, 128, requires_grad=True)
    resized, expected = resize_maps(x, (512, 1024)), native(x, (512, 1024))
    torch.testing.assert_close(resized, expected, rtol=0, atol=1e-6)
    gradient = torch.randn(resized.shape)
    (ours,) = torch.autograd.grad(resized, x, gradient)
    (theirs,) = torch.autograd.grad(expected, x, gradient)
    assert (ours - theirs).abs().max() < 1e-6 * theirs.abs().max()
    shifted = x.roll(1, 3)  # control
    assert (resize_maps(shifted, (512, 1024)) - expected).abs().max() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_other_precisions(dtype):
    x = torch.randn(1, 3, 8, 8, dtype=dtype)
    resized = resize_maps(x, (64, 64))
    assert resized.dtype == dtype
    expected = native(x.double(), (64, 64))
    limit = 0.03 if dtype == torch.bfloat16 else 1e-6
    assert (resized.double() - expected).abs().max() < limit
