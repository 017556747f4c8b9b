"""Predictions of a finished run on images, and the export of its model.

Images are files of any size and format, or folders, of which all images in them and below are
taken. They are prepared as in the evaluations of the run. The folder `out` gets predictions.csv,
with a line per image: of a classifier its path, class, confidence, entropy in nats and the next
two classes; of a segmenter path, mean confidence and mean entropy, and masks/, a png per image
whose numbers are those of the classes and whose palette shows their colors. Files that cannot be
read are skipped, listed at the end and in unreadable.txt; the exit code is then 1.

    python predict.py runs/own/images_pseudo photographs
    python predict.py runs/own/images_pseudo a.jpg b.png out=two flip=true
    python predict.py runs/camvid/day_dusk_minent street out=masks overlays=true window=[256,256]
    python predict.py runs/own/images_pseudo --export model.pt2 --onnx model.onnx
"""

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from analysis.export import check_onnx, export, save_onnx, save_program
from analysis.prediction import predict_logits
from analysis.writers import open_writer
from common.config import (
    describe,
    load_config,
    not_negative,
    positive,
    range_rules,
    split_words,
)
from common.errors import UserError, exit_with, require
from common.writing import write_text
from data.image_files import FileBatches, NamedFiles, find_images
from data.loaders import Loader
from models import ModelCard, load_card, load_run
from models.card import CARD
from training.device import get_device


@dataclass
class Config:
    out: str = "predictions"  # the folder to write to; it must not have predictions yet
    batch: int | None = positive(None, most=100_000)  # images per forward; null: 64, of maps 1
    workers: int = not_negative(2, most=1000)  # processes that read files
    worker_timeout: int = positive(300, most=10**6)  # s without a batch that end the command
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    amp: Literal["float32", "float16", "bfloat16"] | None = None  # precision; null: the run's
    flip: bool = False  # average with the predictions on the mirrored image
    window: list[int] | None = None  # maps: [height, width] of sliding windows; null: whole images
    stride: list[int] | None = None  # maps: [rows, columns] between windows; null: half a window
    overlays: bool = False  # maps: write images with the classes in color to overlays/
    soft: bool = False  # maps: write probabilities, float16 (K, H, W), to soft/

    def __post_init__(self):
        pairs = {"window": self.window, "stride": self.stride}
        require(
            *range_rules(self),
            *(
                (pair is None or (len(pair) == 2 and min(pair) > 0), f"{key} must be two sizes")
                for key, pair in pairs.items()
            ),
            (self.stride is None or self.window is not None, "stride goes with window"),
            (
                not (self.stride and self.window)
                or all(step <= side for step, side in zip(self.stride, self.window, strict=False)),
                "stride must not be larger than window, or pixels are left out",
            ),
        )

    def check(self, card: ModelCard) -> None:
        """Raise `UserError` for a key that is for maps, if the model has one class per image."""
        keys = [key for key in ("window", "overlays", "soft") if getattr(self, key)]
        if keys and not card.predicts_maps:
            raise UserError(f"{', '.join(keys)}: for a segmenter; this run has a class per image")


def parse_args(argv: Sequence[str] | None) -> tuple[argparse.Namespace, Config]:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"keys:\n{describe(Config)}",
    )
    parser.add_argument("run", metavar="RUN", help="a run folder, or weights in one")
    parser.add_argument("words", nargs="*", metavar="IMAGES key=value", help="folders or files")
    parser.add_argument("--export", type=Path, metavar="FILE", help="for torch.export.load")
    parser.add_argument("--onnx", type=Path, metavar="FILE", help="needs onnx and onnxscript")
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    args = parser.parse_intermixed_args(argv)
    args.images, overrides = split_words(args.words)
    config = load_config(Config, [], overrides)
    if not (args.images or args.export or args.onnx):
        raise UserError(
            f"name images, or folders of images, behind the run {args.run}; or --export FILE"
        )
    return args, config


def export_model(run: str, file: Path | None, onnx: Path | None) -> None:
    """Write the model of a run to one file, or two."""
    if onnx is not None:
        check_onnx()
    network, card = load_run(run)
    program, difference = export(network, card)
    folder = Path(run) if Path(run).is_dir() else Path(run).parent
    text = (folder / CARD).read_text(encoding="utf-8")
    print(f"the exported program agrees with the network: logits differ by {difference:.1g}")
    if file is not None:
        save_program(program, text, file)
        print(f"{file}: uint8 images (N, 3, H, W) -> logits of {len(card.classes)} classes")
    if onnx is not None:
        save_onnx(program, text, onnx)
        print(f"{onnx}: the same program, as onnxscript converts it")


def predict_files(run: str, images: NamedFiles, config: Config) -> list[tuple[int, str]]:
    """Predict image files. Returns (number, what is wrong) of those that cannot be read."""
    device, out = get_device(config.device), Path(config.out)
    network, card = load_run(run, device)
    amp = config.amp or card.amp
    autocast = torch.autocast(device.type, getattr(torch, amp), amp != "float32")
    writer = open_writer(out, card, images, config.overlays, config.soft)
    batches = FileBatches(images.files, config.batch or writer.batch, card)
    loader = Loader(batches, range(len(batches)), config, "images", device)
    mistakes = []
    bar = tqdm(total=len(images.files), unit="image", disable=None)
    with torch.inference_mode():
        for prepared in loader:
            for numbers, x, sizes in prepared.groups():
                x = x.to(device, non_blocking=True)
                with autocast:
                    logits = predict_logits(network, x, config.flip, config.window, config.stride)
                writer.add(numbers, sizes, logits)
            mistakes += prepared.mistakes
            bar.update(len(prepared.numbers) + len(prepared.mistakes))
    bar.close()
    writer.close()
    return mistakes


def main(argv: Sequence[str] | None = None) -> int:
    args, config = parse_args(argv)
    if args.export or args.onnx:
        export_model(args.run, args.export, args.onnx)
    if not args.images:
        return 0
    config.check(load_card(args.run))
    out = Path(config.out)
    if (out / "predictions.csv").exists():
        raise UserError(f"out: {out} has predictions already; choose another folder")
    images = find_images(args.images)
    if inside := [
        path for path in args.images if out.resolve().is_relative_to(Path(path).resolve())
    ]:
        raise UserError(f"out: {out} lies in {inside[0]}, whose images are read; choose another")
    mistakes = predict_files(args.run, images, config)
    count = len(images.files) - len(mistakes)
    skipped = f"; {images.skipped}" if images.skipped else ""
    print(f"{count} of {len(images.files)} files predicted: {out / 'predictions.csv'}{skipped}")
    if mistakes:
        lines = [text for _, text in sorted(mistakes)]
        write_text(out / "unreadable.txt", "\n".join(lines) + "\n")
        print(f"error: skipped ({len(lines)}):", *lines, sep="\n  ", file=sys.stderr)
    return 1 if mistakes else 0


if __name__ == "__main__":
    exit_with(main)
