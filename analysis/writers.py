"""What predictions leave in a folder: a csv, and for maps files per image."""

import csv
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from analysis.prediction import TOP, predict_map, top_classes
from common.drawing import class_colors
from common.writing import write_atomically
from data.decoded import Size, read_rgb

OVERLAY = 0.5  # weight of the colors of the classes over the image


class ClassWriter:
    """predictions.csv of a classifier.

    Args:
        folder: where to write; it is made.
        classes: the class names.
        names: what each image is called.
    """

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
            self.table.writerow([self.names[number], name, confidence, entropy, *more])
        self.file.flush()

    def close(self) -> None:
        self.file.close()


class MapWriter(ClassWriter):
    """predictions.csv of a segmenter, and masks/, overlays/ and soft/.

    Args:
        folder, classes, names: see `ClassWriter`.
        files: the image files, for overlays.
        exif: whether they are turned by their EXIF orientation.
        overlays, soft: whether these are written.
    """

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
            found = predict_map(logit, size, self.soft)
            mask = Image.fromarray(found.classes.to(torch.uint8).numpy(), mode="P")
            mask.putpalette(self.colors.flatten().tolist())
            _save(mask, self._place("masks", number, ".png"))
            if self.overlays:
                self._save_overlay(number, mask)
            if self.soft:
                probabilities = found.probabilities.numpy()
                place = self._place("soft", number, ".npy")
                write_atomically(place, lambda file, x=probabilities: np.save(file, x))
            self.table.writerow([self.names[number], found.confidence, found.entropy])
        self.file.flush()

    def _save_overlay(self, number: int, mask: Image.Image) -> None:
        image = read_rgb(self.files[number], exif=self.exif)
        overlay = Image.blend(image, mask.convert("RGB"), OVERLAY)
        _save(overlay, self._place("overlays", number, ".png"))


def _save(image: Image.Image, file: Path) -> None:
    write_atomically(file, lambda f: image.save(f, format="png"))
