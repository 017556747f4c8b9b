"""What predictions leave in a folder: a csv, and for maps files per image."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from analysis.prediction import TOP, predict_map, top_classes
from common.drawing import class_colors, save_png, with_legend
from common.writing import write_atomically
from data.decoded import Size, read_rgb
from data.image_files import NamedFiles
from models import ModelCard

OVERLAY = 0.5  # weight of the colors of the classes over the image


def _short(value: str | float) -> str:
    """A cell of a table; numbers have the six digits that are known of a float32."""
    return value if isinstance(value, str) else f"{value:.6g}"


class ClassWriter:
    """predictions.csv of a classifier. `batch` is the number of images that are predicted at once.

    Args:
        folder: where to write; it is made.
        classes: the class names.
        names: what each image is called.
    """

    batch = 64

    def __init__(self, folder: Path, classes: Sequence[str], names: Sequence[Path]):
        self.classes, self.names = classes, names
        folder.mkdir(parents=True, exist_ok=True)
        # Closed by `close`, since lines are added batch by batch.
        self.file = open(  # noqa: SIM115
            folder / "predictions.csv", "w", encoding="utf-8", newline=""
        )
        self.table = csv.writer(self.file, lineterminator="\n")
        self.table.writerow(self.head())

    def head(self) -> list[str]:
        more = range(2, min(TOP, len(self.classes)) + 1)
        others = (word for i in more for word in (f"class_{i}", f"confidence_{i}"))
        return ["path", "class", "confidence", "entropy", *others]

    def add(self, numbers: Sequence[int], sizes: Sequence[Size], logits: torch.Tensor) -> None:
        """Write the predictions on some images.

        Args:
            numbers: of the images.
            sizes: (height, width) of each.
            logits: (N, K), or (N, K, H, W).
        """
        rows = zip(numbers, top_classes(logits, self.classes), strict=True)
        for number, (entropy, ((name, confidence), *others)) in rows:
            more = (word for pair in others for word in pair)
            row = [name, confidence, entropy, *more]
            self.table.writerow([self.names[number], *map(_short, row)])
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class MapWriter(ClassWriter):
    """predictions.csv and legend.png of a segmenter, and masks/, overlays/ and soft/.

    Args:
        folder, classes, names: see `ClassWriter`.
        files: the image files, for overlays.
        exif: whether they are turned by their EXIF orientation.
        overlays, soft: whether these are written.
    """

    batch = 1

    def __init__(
        self,
        folder: Path,
        classes: Sequence[str],
        names: Sequence[Path],
        files: Sequence[Path],
        exif: bool,
        overlays: bool,
        soft: bool,
    ):
        super().__init__(folder, classes, names)
        self.folder, self.files, self.exif = folder, files, exif
        self.overlays, self.soft = overlays, soft
        self.colors = class_colors(list(classes))
        entries = [(name, tuple(self.colors[i].tolist())) for i, name in enumerate(classes)]
        save_png(with_legend(Image.new("RGB", (400, 1), "white"), entries), folder / "legend.png")
        # A file keeps its stem, as a mask beside its image; of two with one stem, the whole name.
        stems = Counter(name.with_suffix("") for name in names)
        self.outputs = [
            name.with_suffix("") if stems[name.with_suffix("")] == 1 else name for name in names
        ]

    def head(self):
        return ["path", "confidence", "entropy"]

    def _place(self, kind: str, number: int, ending: str) -> Path:
        output = self.outputs[number]
        return self.folder / kind / output.with_name(output.name + ending)

    def add(self, numbers, sizes, logits):
        for number, size, logit in zip(numbers, sizes, logits, strict=True):
            prediction = predict_map(logit, size, self.soft)
            mask = Image.fromarray(prediction.classes.to(torch.uint8).numpy(), mode="P")
            mask.putpalette(self.colors.flatten().tolist())
            save_png(mask, self._place("masks", number, ".png"))
            if self.overlays:
                self._save_overlay(number, mask)
            if self.soft:
                probabilities = prediction.probabilities.numpy()
                place = self._place("soft", number, ".npy")
                write_atomically(place, lambda file, x=probabilities: np.save(file, x))
            doubts = prediction.confidence, prediction.entropy
            self.table.writerow([self.names[number], *map(_short, doubts)])
        self.file.flush()

    def _save_overlay(self, number: int, mask: Image.Image) -> None:
        image = read_rgb(self.files[number], exif=self.exif)
        overlay = Image.blend(image, mask.convert("RGB"), OVERLAY)
        save_png(overlay, self._place("overlays", number, ".png"))


def open_writer(
    folder: Path, card: ModelCard, images: NamedFiles, overlays: bool, soft: bool
) -> ClassWriter:
    """The writer for the predictions of a model.

    Args:
        folder: where to write.
        card: of the run.
        images: the files that are predicted.
        overlays, soft: whether these are written; for maps.
    """
    if not card.predicts_maps:
        return ClassWriter(folder, card.classes, images.names)
    outputs = overlays, soft
    return MapWriter(folder, card.classes, images.names, images.files, card.exif, *outputs)
