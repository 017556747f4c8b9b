"""The device of a run, its description, and the seeds."""

import ctypes
import os
import platform
import re
import sys
from pathlib import Path

import torch

from common import ranks
from common.errors import UserError

TRIM_THRESHOLD, MMAP_MAX = -1, -4  # parameters of mallopt(3)


def get_device(name: str) -> torch.device:
    """The device for `auto` (a GPU of CUDA if there is one), `cpu`, `cuda`, `cuda:1` or `mps`.

    On a CPU it lets the process keep the memory that it frees, see `_keep_freed_memory`.

    Raises:
        UserError: the device is absent (there is never a silent fall-back), or of several processes
            more than one would use it.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if ranks.count() > 1 and name not in ("cpu", "cuda"):
        raise UserError(
            f"device: {name} is one device, and each of several processes takes its own; "
            "use device=cuda or device=cpu"
        )
    if ranks.count() > 1 and name == "cuda":
        name = f"cuda:{ranks.local_number()}"
    device = torch.device(name)
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"device: {name} is asked for but torch sees no GPU; use device=auto or device=cpu"
        )
    if device.type == "mps" and not torch.backends.mps.is_available():
        raise UserError(
            "device: mps is asked for but torch sees no Apple GPU; use device=auto or device=cpu"
        )
    if device.index is not None:
        count = torch.cuda.device_count()
        if device.index >= count:
            raise UserError(
                f"device: {name} is asked for but torch sees {count} GPU{'s' * (count > 1)}, "
                f"cuda:0 to cuda:{count - 1}; name one of them, or start fewer processes"
            )
        torch.cuda.set_device(device)  # also for the pinned memory of the loaders
    if device.type == "cpu":
        _keep_freed_memory()
    return device


def _keep_freed_memory() -> None:
    """Keep the memory that a step frees for the next step, on Linux with glibc.

    glibc returns large blocks to the kernel, which clears every page of them when the next step
    asks for them again: up to a fifth of the CPU time of a run (benchmarks/README.md).
    Who sets a variable of its malloc, such as MALLOC_CHECK_=0, decides otherwise.
    """
    if sys.platform != "linux" or any(name.startswith("MALLOC_") for name in os.environ):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # another C library may have none
    if mallopt is not None:
        mallopt(MMAP_MAX, 0)
        mallopt(TRIM_THRESHOLD, -1)


def warn_of_slow_precision(device: torch.device, amp: str) -> None:
    """Print a warning if autocast to `amp` makes the device slower."""
    if amp == "float16" and device.type == "cpu":
        print(
            "warning: amp: float16 is many times slower than float32 on a CPU; "
            "use amp=float32 or amp=bfloat16"
        )


def describe_machine(device: torch.device) -> str:
    """What a run's seconds were measured on and its bits depend on: GPU or CPU threads, torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    elif device.type == "mps":
        name = f"Apple GPU ({platform.machine()})"
    else:
        cpu_info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        cpu = re.search(r"^model name\s*: (.+)$", cpu_info, re.M)
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
        name = f"{threads}, {cpu[1] if cpu else platform.machine()}"
    several = f"{ranks.count()} processes, each on " if ranks.count() > 1 else ""
    return f"{several}{name}, torch {torch.__version__}"


def seed_everything(seed: int, deterministic: bool) -> None:
    """Seed the weights, and choose the kernels of CUDA.

    Args:
        seed: of the run.
        deterministic: whether a run repeats to the bit, so that a resumed one is exact; else cuDNN
            tries several kernels and takes the fastest.
    """
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    torch.manual_seed(seed)  # every device
    if torch.cuda.is_available():
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        # A debugging aid that costs one kernel per tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = not deterministic
