"""Numbers that a device has computed, read by the CPU."""

import torch


def read(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    """Copies on the CPU, for which a GPU is waited for once, and not once per tensor.

    Args:
        tensors: bool, integers below 2^53, or floating numbers.
    """
    if any(x.device.type == "mps" for x in tensors):  # it has no float64
        return [x.cpu() for x in tensors]
    device = next((x.device for x in tensors if x.device.type != "cpu"), torch.device("cpu"))
    parts = [x.detach().to(device, torch.float64, non_blocking=True).flatten() for x in tensors]
    numbers = torch.cat(parts).cpu() if parts else torch.empty(0)
    pieces = numbers.split([x.numel() for x in tensors])
    return [piece.view(x.shape).to(x.dtype) for piece, x in zip(pieces, tensors, strict=True)]
