"""The device of a run, its description, and the seeds."""

import os
import platform
import re
from pathlib import Path

import torch

from common.errors import UserError


def get_device(name: str) -> torch.device:
    """The device for `auto`, `cpu` or `cuda`.

    Raises:
        UserError: cuda is asked for and absent (there is never a silent fall-back), or several
            processes were started.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "WORLD_SIZE is above 1, and several processes are not supported yet: "
            "start the script with python"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError(
            "device: cuda is asked for but torch sees no GPU; use device=auto or device=cpu"
        )
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe_machine(device: torch.device) -> str:
    """What a run's seconds were measured on and its bits depend on: GPU or CPU threads, torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu_info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        cpu = re.search(r"^model name\s*: (.+)$", cpu_info, re.M)
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
        name = f"{threads}, {cpu[1] if cpu else platform.machine()}"
    return f"{name}, torch {torch.__version__}"


def seed_everything(seed: int) -> None:
    """Seed weights and dropout and choose deterministic kernels, so that a resumed run is exact."""
    torch.manual_seed(seed)  # every device
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        # A debugging aid that costs one kernel per tensor.
        torch.utils.deterministic.fill_uninitialized_memory = False
        torch.backends.cudnn.benchmark = False
