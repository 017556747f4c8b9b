"""Rare class sampling of source images, from DAFormer (Hoyer et al. 2022, arXiv:2111.14887).

Each position of the endless order draws a class, rare ones more often, and then an image with it.
"""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from torch.nn.functional import one_hot
from tqdm import tqdm

from common import ranks
from common.counts import occurrences
from common.errors import UserError
from common.files import is_intact, load_tensors, save_tensors
from data.decoded import VERSION, Decoded, threads
from data.image_set import ImageSet, Joined, Renumbered, are_class_numbers, one
from data.order import Draws, Order, generator

# An image counts for a class that has this share of its labels, and a crop should show as many
# pixels of the class as this share of the image. DAFormer asks for 3000 px of labels of 1914 x 1052
# (1/671), and for 1500 px in crops of images of 1280 x 720 (1/614).
LEAST_SHARE = 1 / 640


class RareClassOrder(Order):
    """An order in which an image with a rare class comes more often.

    A class c with the share f_c of all labels is drawn with a probability proportional to
    exp((1 - f_c) / temperature), then one of its images, all with the same probability. If no image
    has `LEAST_SHARE` of a class, all images with the class count.

    Args:
        seed, domain, batch: as in `Order`.
        counts: labels of each class in each image of the set, int64 (N, K).
        temperature: above 0; a smaller one prefers rare classes more.
    """

    def __init__(
        self, seed: int, domain: str, counts: torch.Tensor, batch: int, temperature: float
    ):
        super().__init__(seed, domain, len(counts), batch)
        sums = counts.sum(0)
        if sums.sum() == 0:
            raise UserError("data.rare_class_temperature: the source has no label; leave it out")
        self.numbers = sums.nonzero().flatten()  # of the classes that occur
        shares = sums[self.numbers].double() / sums.sum()
        self.probabilities = ((1 - shares) / temperature).softmax(0)
        enough = (counts > 0) & (counts >= LEAST_SHARE * counts.sum(1, keepdim=True))
        enough = torch.where(enough.any(0), enough, counts > 0)
        self.images = [enough[:, c].nonzero().flatten() for c in self.numbers.tolist()]

    def _draw(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Places in `numbers` of the classes at these positions, and a number below 1 for each."""
        drawn = Draws(positions, self.seed, self.domain, "rare classes").uniform(count=2).double()
        places = torch.searchsorted(self.probabilities.cumsum(0), drawn[:, 0].contiguous())
        return places.clamp_max(len(self.numbers) - 1), drawn[:, 1]

    def classes(self, positions: torch.Tensor) -> torch.Tensor:
        """The classes that were drawn at these positions, int64 (n,)."""
        return self.numbers[self._draw(positions)[0]]

    def positions(self, start: int, count: int) -> torch.Tensor:
        places, drawn = self._draw(torch.arange(start, start + count))
        chosen = (self.images[place] for place in places.tolist())
        pairs = zip(chosen, drawn.tolist(), strict=True)
        return torch.stack([images[int(x * len(images))] for images, x in pairs])


def class_counts(images: ImageSet, folder: Path | None) -> torch.Tensor:
    """How many labels of each class an image has: int64 (N, K), ignored ones aside.

    All masks are read once; of files the counts are then stored in `folder`, unless that is None.
    """

    def count() -> torch.Tensor:
        return _counts(images.labels, len(images.classes), folder)

    return ranks.first_on_machine(count)[images.indices]


def _counts(labels, num_classes: int, folder: Path | None) -> torch.Tensor:
    """The counts of all labels of a set, as `class_counts`."""
    if isinstance(labels, Joined):
        return torch.cat([_counts(part, num_classes, folder) for part in labels.parts])
    if isinstance(labels, Renumbered):
        counts = _counts(labels.masks, num_classes, folder)
        renumbered = torch.zeros_like(counts)
        renumbered[:, labels.table[:num_classes].long()] = counts
        return renumbered
    if are_class_numbers(labels):
        return one_hot(labels, num_classes)
    file = None
    if folder is not None and isinstance(labels, Decoded):
        name = generator(VERSION, labels.decode.name, labels.identity()).initial_seed()
        file = folder / f"counts_{name:016x}.pt"
        if is_intact(file):
            return load_tensors(file)["counts"]

    def count(i: int) -> torch.Tensor:
        mask = one(labels, i).flatten().long().clamp_max(num_classes)
        return occurrences(mask, num_classes + 1)[:-1]

    # Decoding releases the interpreter's lock, so that threads use several cores.
    with ThreadPoolExecutor(threads()) as pool:
        rows = pool.map(count, range(len(labels)))
        shown = {"total": len(labels), "leave": False, "disable": None, "delay": 1}
        counts = torch.stack(list(tqdm(rows, "counts of classes", **shown)))
    if file is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_tensors(file, {"counts": counts})
        except (UserError, OSError) as error:
            print(f"warning: data.cache: counts of classes are not stored ({error})", flush=True)
    return counts
