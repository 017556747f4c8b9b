"""Size and cost of every backbone, as the table of docs/backbones.md.

    python benchmarks/backbones.py
    python benchmarks/backbones.py resnet50 vit_b_16 --size 512

Counted, not timed, and without a value in any tensor: parameters of the backbone; floating-point
operations of one forward pass on one image (a multiplication and an addition are two; a training
step takes about three times as many); and what autograd keeps of it for the backward pass, in
float32 (bfloat16: about half).
"""

import argparse
import sys
from pathlib import Path

import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).parents[1]))

from common.errors import UserError, exit_with
from models.backbones import BACKBONES, BatchNorm, build_backbone
from models.config import fitting_heads
from models.layers import Backbone
from models.published import published_weights

COLUMNS = "backbone", "parameters, million", "GFLOP per image", "MiB kept per image"
COLUMNS += "width of layer4", "batch norm", "weights", "heads for segmentation"
HEADER = f"| {' | '.join(COLUMNS)} |\n|{'---|' * len(COLUMNS)}"


def without_values(name: str, dense: bool = False) -> tuple[Backbone, dict[str, int]]:
    """What `build_backbone` returns, with tensors that have shapes only."""
    if name.startswith("regnet"):  # torchvision computes its widths with tensors
        backbone, channels = build_backbone(name, dense=dense)
        return backbone.to("meta"), channels
    with torch.device("meta"):
        return build_backbone(name, dense=dense)


def operations(backbone: Backbone, size: int) -> int:
    """Floating-point operations of a forward pass on an image of `size` px."""
    with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
        backbone.eval()(torch.empty(1, 3, size, size))
    return counter.get_total_flops()


def bytes_kept(backbone: Backbone, size: int) -> int:
    """What the backward pass of a training step needs of an image, without the parameters."""
    own = {p.untyped_storage()._cdata for p in backbone.parameters()}
    kept = {}

    def pack(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # kept alive, so that no two have the same number
        return x

    with torch.device("meta"), saved_tensors_hooks(pack, lambda x: x):
        # Two images, because batch norm refuses a map of one value.
        features = backbone.train()(torch.empty(2, 3, size, size))
    del features
    return sum(storage.nbytes() for storage in kept.values()) // 2


def table_line(name: str, size: int) -> str:
    backbone, channels = without_values(name)
    parameters = sum(p.numel() for p in backbone.parameters())
    flops = operations(backbone, size)
    kept = bytes_kept(backbone, size)
    cells = [
        f"`{name}`",
        f"{parameters / 1e6:.1f}",
        f"{flops / 1e9:.2f}" if flops < 1e9 else f"{flops / 1e9:.1f}",
        f"{kept / 2**20:.0f}",
        str(channels["layer4"]),
        "yes" if any(isinstance(m, BatchNorm) for m in backbone.modules()) else "no",
        ", ".join(published_weights(name)) or "a file",
        ", ".join(fitting_heads(name)) or "-",
    ]
    return f"| {' | '.join(cells)} |"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("names", nargs="*", metavar="NAME", help="backbones; all by default")
    parser.add_argument("--size", type=int, default=224, help="px of the square image")
    args = parser.parse_args(argv)
    if unknown := [name for name in args.names if name not in BACKBONES]:
        raise UserError(
            f"{unknown[0]}: there is no such backbone; there are {', '.join(BACKBONES)}"
        )
    print(HEADER)
    for name in args.names or BACKBONES:
        print(table_line(name, args.size))
    return 0


if __name__ == "__main__":
    exit_with(main)
