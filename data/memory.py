"""Memory for batches."""

import math
from collections.abc import Sequence

import torch
from torch.utils.data import get_worker_info


def empty_batch(shape: Sequence[int]) -> torch.Tensor:
    """An uninitialized uint8 tensor; in a loader's worker it lies in shared memory.

    There the main process reads it, so that it need not be copied once more.
    """
    if get_worker_info() is None:
        return torch.empty(tuple(shape), dtype=torch.uint8)
    storage = torch.UntypedStorage._new_shared(math.prod(shape))
    return torch.empty(0, dtype=torch.uint8).set_(storage, 0, tuple(shape))
