"""The safetensors format (https://github.com/huggingface/safetensors), without its package.

A file is the length of its header (8 bytes, little-endian), the header, and the bytes of all
tensors. The header is json: {name: {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}},
with an entry `__metadata__` of texts.
"""

import json
import math
from pathlib import Path

import torch

from common.errors import UserError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
LENGTH = 8  # bytes that hold the length of the header
LONGEST = 100_000_000  # bytes of a header, as in the package


def to_bytes(tensors: dict[str, torch.Tensor]) -> bytes:
    """The content of a file with these tensors, which must be on the CPU."""
    header: dict = {"__metadata__": {"format": "pt"}}
    parts, offset = [], 0
    for name, tensor in tensors.items():
        data = tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes()
        header[name] = {
            "dtype": NAMES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + len(data)],
        }
        parts.append(data)
        offset += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the tensors begin at a multiple of 8
    return b"".join([len(text).to_bytes(LENGTH, "little"), text, *parts])


def read(path: Path) -> dict[str, torch.Tensor]:
    """The tensors of a file, by name.

    Raises:
        UserError: (code 4) it is not such a file, or it is damaged.
    """
    content = bytearray(path.read_bytes())
    try:
        length = int.from_bytes(content[:LENGTH], "little")
        if length > min(LONGEST, len(content) - LENGTH):
            raise ValueError
        header = dict(json.loads(content[LENGTH : LENGTH + length]))
        header.pop("__metadata__", None)
        start = LENGTH + length
        return {name: _tensor(entry, content, start) for name, entry in header.items()}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError, RuntimeError):
        raise UserError(f"{path}: is not a readable safetensors file", 4) from None


def _tensor(entry: dict, content: bytearray, start: int) -> torch.Tensor:
    """The tensor of an entry of the header; `start` is where the bytes of all tensors begin."""
    dtype, shape = DTYPES[entry["dtype"]], entry["shape"]
    first, end = entry["data_offsets"]
    count = math.prod(shape)
    fits = 0 <= first <= end <= len(content) - start and count * dtype.itemsize == end - first
    if not fits or any(side < 0 for side in shape):
        raise ValueError
    if count == 0:
        return torch.empty(shape, dtype=dtype)
    return torch.frombuffer(content, dtype=dtype, count=count, offset=start + first).view(shape)
