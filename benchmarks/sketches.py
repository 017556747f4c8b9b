"""Turn a folder of images into sketches, for a domain that is far from photographs.

    python benchmarks/sketches.py datasets/PACS/art_painting datasets/PACS/art_sketched

Every image becomes the ratio of its brightness to that of its blurred copy, stretched so that even
areas are white and edges black. The folders below the first one are made again below the second.
Exit code 2 if the first is no folder of jpg files, or the second exists.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from common.errors import UserError, exit_with  # noqa: E402

BLACK, WHITE = 140, 235  # of the ratio, in units of 1/255


def sketch(image: Image.Image) -> Image.Image:
    """A sketch of an image: black lines on white, RGB."""
    gray = image.convert("L")
    blurred = gray.filter(ImageFilter.GaussianBlur(4))
    ratio = 255 * (np.asarray(gray, float) + 1) / (np.asarray(blurred, float) + 1)
    stretched = (ratio.clip(0, 255) - BLACK) * 255 / (WHITE - BLACK)
    return Image.fromarray(stretched.clip(0, 255).astype(np.uint8)).convert("RGB")


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("images", type=Path, help="a folder of jpg files, in folders of classes")
    parser.add_argument("sketches", type=Path, help="the folder to make")
    args = parser.parse_args()
    files = sorted(args.images.rglob("*.jpg"))
    if not files:
        raise UserError(f"{args.images}: there are no jpg files")
    if args.sketches.exists():
        raise UserError(f"{args.sketches} exists; choose another folder")
    for file in files:
        target = args.sketches / file.relative_to(args.images)
        target.parent.mkdir(parents=True, exist_ok=True)
        with Image.open(file) as image:
            sketch(image).save(target)
    print(f"{args.sketches}: {len(files)} sketches")
    return 0


if __name__ == "__main__":
    exit_with(main)
