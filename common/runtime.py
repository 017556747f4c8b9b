"""Errors a user can mend, the device, and the seeds."""

import os
import platform
import re
import sys
import traceback
from pathlib import Path

import torch


class UserError(Exception):
    """A mistake the user can mend: one line saying what, where and what to do.

    Exit codes: 2 config or data, 3 not finite, 4 no usable checkpoint, 5 disk.
    """

    def __init__(self, message: str, code: int = 2):
        super().__init__(message)
        self.code = code


def last_line(error: BaseException) -> str:
    """The message itself; a loader worker wraps it in its own traceback."""
    text = str(error).strip()
    if "Original Traceback" in text:
        text = text.splitlines()[-1].split("UserError: ", 1)[-1]
    return text


def exit_with(main) -> None:
    """Run a script's `main`, turning a `UserError` into its line and exit code (`--debug` keeps the traceback)."""
    try:
        code = main()
    except UserError as error:
        if "--debug" in sys.argv:
            traceback.print_exc()
        print(f"error: {last_line(error)}", file=sys.stderr)
        traceback.clear_frames(error.__traceback__)  # drops main's loaders, whose workers a cycle would keep alive
        code = error.code
    sys.exit(code)


def get_device(name: str) -> torch.device:
    """`auto | cpu | cuda`. Raises `UserError` where cuda is asked for and absent: never a silent fall-back."""
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError(
            "WORLD_SIZE is above 1, and several processes are not supported yet: start the script with python"
        )
    if name == "cuda" and not torch.cuda.is_available():
        raise UserError("device: cuda is asked for but torch sees no GPU; use device=auto or device=cpu")
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    return torch.device(name)


def describe_machine(device: torch.device) -> str:
    """What a run's seconds were measured on, and its bits depend on: the GPU, or threads and processor; torch."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
    else:
        cpu_info = Path("/proc/cpuinfo").read_text() if Path("/proc/cpuinfo").is_file() else ""
        cpu = re.search(r"^model name\s*: (.+)$", cpu_info, re.M)
        threads = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
        name = f"{threads}, {cpu[1] if cpu else platform.machine()}"
    return f"{name}, torch {torch.__version__}"


def seed_everything(seed: int) -> None:
    """Seed weights and dropout, and choose deterministic kernels, so that a resumed run is exact."""
    torch.manual_seed(seed)  # every device
    if torch.cuda.is_available():
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # a debugging aid that costs a kernel each
        torch.backends.cudnn.benchmark = False
