"""Predictions on a fixed sample of the target's training images, for criteria computed later."""

import itertools
from collections.abc import Iterable
from pathlib import Path

import torch

from common import files, ranks
from common.errors import UserError

PREDICTIONS = "predictions.pt"  # the file in a run folder
POINTS = 4096  # about how many predictions are kept of maps
LARGEST = 60_000.0  # of a logit in half precision
# Steps of the R2 sequence (Roberts 2018), whose consecutive points cover a map evenly.
STEP_Y, STEP_X = 0.5698402909980532, 0.7548776662466927


def pixels_of(numbers: torch.Tensor, height: int, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows and columns, int64 like `numbers`, of points of the R2 sequence in a map.

    They lie at the same places of maps of any size.

    Args:
        numbers: of the points in the sequence, int64.
        height, width: of the map.
    """
    places = 0.5 + numbers.double()
    rows = ((places * STEP_Y) % 1 * height).long()
    columns = ((places * STEP_X) % 1 * width).long()
    return rows, columns


class Sample:
    """Logits of each image of a loader, or of a few pixels of each map.

    The pixels depend on the number of the image alone, so that runs of other networks, seeds, batch
    sizes or numbers of processes have predictions of the same pixels.

    Args:
        loader: of the images.
    """

    def __init__(self, loader: Iterable):
        self.batches = getattr(loader, "dataset", None)  # those of all processes
        images = 0 if self.batches is None else len(self.batches.set)
        self.points = max(POINTS // images, 1) if images else 1  # per map
        self.number = ranks.number()  # of the next batch
        self.count = 0  # images so far
        self.numbered: list[tuple[int, torch.Tensor]] = []

    def add(self, logits: torch.Tensor) -> None:
        """Add the logits (N, K, ...) of the next batch."""
        start = self.count if self.batches is None else self.batches.start(self.number)
        self.count += len(logits)
        if logits.dim() > 2:
            count, _, height, width = logits.shape
            of_images = torch.arange(start, start + count)
            if self.batches is not None:
                of_images = self.batches.set.indices[of_images]
            numbers = (of_images[:, None] * self.points + torch.arange(self.points)).flatten()
            rows, columns = pixels_of(numbers, height, width)
            images = torch.arange(count).repeat_interleave(self.points)
            device = logits.device
            place = (x.to(device, non_blocking=True) for x in (images, rows, columns))
            of_image, row, column = place
            logits = logits[of_image, :, row, column]
        logits = logits.float()
        # What is too large for half precision is shifted, which changes no probability.
        logits = logits - (logits.amax(1, keepdim=True) - LARGEST).clamp(min=0)
        self.numbered.append((self.number, logits.clamp(-LARGEST, LARGEST)))
        self.number += ranks.count()

    def rows(self) -> torch.Tensor | None:
        """float16 (M, K) on the CPU, in the order of the set; None without a prediction.

        With several processes, those of all of them.
        """
        own = [(number, x.cpu()) for number, x in self.numbered]
        numbered = sorted(itertools.chain(*ranks.gather_objects(own)), key=lambda pair: pair[0])
        if not numbered:
            return None
        return torch.cat([x for _, x in numbered]).half()  # autocast cannot join halves on a CPU


def is_of_same_set(first: dict, second: dict) -> bool:
    """Whether two samples are of one domain, whichever images of it, and of the same classes.

    Args:
        first, second: contents of predictions.pt. `set` names the images of the domain, `numbers`
            (N,) are those in the sample, and `classes` the names of the classes.
    """
    return all(first[name] == second[name] for name in ("set", "classes"))


def is_of_same_images(first: dict, second: dict) -> bool:
    """Whether two samples are of the same images and classes; see `is_of_same_set`."""
    return is_of_same_set(first, second) and torch.equal(first["numbers"], second["numbers"])


def predictions_of(start: str | None, sample: dict) -> torch.Tensor | None:
    """The logits that the run `start` has left of its selected step on the same images.

    Args:
        start: a run folder, or a file in it.
        sample: see `is_of_same_images`.

    Returns:
        None if that run has no such file that can be read, or one of other images or classes.
    """
    if start is None:
        return None
    place = Path(start)
    try:
        saved = files.load_tensors((place.parent if place.is_file() else place) / PREDICTIONS)
        return saved["selected"] if is_of_same_images(saved, sample) else None
    except (UserError, KeyError):  # it is for a figure more, for which no run is to fail
        return None


def agreement_of(first: dict, second: dict) -> float | None:
    """The share of predictions of two runs' selected steps that are of the same class.

    The runs may have sampled other images of the same domain, such as those that their seed has
    left to train on. Those that both have count.

    Args:
        first, second: contents of predictions.pt.

    Returns:
        None if the runs have no image in common, or other domains or classes.
    """
    if not is_of_same_set(first, second):
        return None
    of_both = [x["selected"].unflatten(0, (len(x["numbers"]), -1)) for x in (first, second)]
    if of_both[0].shape[1] != of_both[1].shape[1]:  # other numbers of pixels per map
        return None
    pairs = (first, second), (second, first)
    common = [torch.isin(x["numbers"], y["numbers"]) for x, y in pairs]
    if not common[0].any():
        return None
    one, other = (x[mask].argmax(2) for x, mask in zip(of_both, common, strict=True))
    return float((one == other).double().mean())


def share_that_differs(first: torch.Tensor, second: torch.Tensor) -> float:
    """The share of the predictions (M, K) that are of different classes."""
    return float((first.argmax(1) != second.argmax(1)).double().mean())
