"""Augmentation of uint8 images, with numbers drawn per image, and of images with their masks.

`data.augment` maps operations to their parameters. They are applied in the order written:

    augment:
      affine: {degrees: 15, translate: 0.1, scale: [0.8, 1.2], shear: 10}
      photometric: {gain: [0.5, 1.5]}

The operations are in data/operations.py: each draws numbers for every image, and computes the
pixels of a batch from them, so that a CPU can draw while a GPU computes (data/views.py). With
task: segmentation the random crop, its `zoom`, and `flip` come first, and are computed by the CPU;
the others do not move pixels (`IN_PLACE`), and masks stay as they are. A strong view, as
self-training needs it, is the weak view after further operations; for segmentation these must not
move pixels.
"""

import difflib
import inspect
from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from common.config import cut, shorten
from common.errors import UserError
from common.metrics import IGNORE_INDEX
from data import operations as ops
from data.memory import empty_batch
from data.operations import Operation
from data.order import Draws

# Least and largest value of a parameter, and of the ends of a range.
_BOUNDS = {
    "degrees": (0, 360),
    "translate": (0, 1),
    "shear": (0, 89),
    "scale": (0.01, 100),
    "crop.scale": (0.0001, 1),
    "ratio": (0.01, 100),
    "invert": (0, 1),
    "gain": (-100, 100),
    "channel_gain": (-100, 100),
    "offset": (0, 1),
    "channel_offset": (0, 1),
    "noise": (0, 1),
    "probability": (0, 1),
    "hue": (0, 0.5),
    "gamma": (0.01, 100),
    "sigma": (0.01, 1000),
    "side": (0, 1),
}
_OTHER_BOUNDS = (0, 100)  # such as of brightness
IN_PLACE = {  # they do not move pixels
    "photometric": Operation(ops.draw_photometric, ops.photometric),
    "jitter": Operation(ops.draw_jitter, ops.jitter),
    "blur": Operation(ops.draw_blur, ops.blur),
    "cutout": Operation(ops.draw_cutout, ops.cutout),
}
FLIP = Operation(ops.draw_flip, ops.flip)
OPERATIONS = {
    "classification": {
        "affine": Operation(ops.draw_affine, ops.affine),
        "crop": Operation(ops.draw_crop, ops.crop),
        "flip": FLIP,
        **IN_PLACE,
    },
    # `Crops` applies the first two, to images and masks.
    "segmentation": {"zoom": Operation(ops.draw_zoom, None), "flip": FLIP, **IN_PLACE},
}


def _matches(value, default) -> bool:
    """Whether a parameter is a number, or a range [low, high] where its default is one."""
    if isinstance(default, tuple):
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(_matches(v, 0.0) for v in value)
            and value[0] <= value[1]
        )
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and abs(value) <= 1e300  # finite, and a whole number that has a float


def check_augment(spec: dict, operations: dict, where: str = "augment") -> list[str]:
    """The mistakes in a mapping of operations to their parameters, one sentence each.

    Args:
        spec: the mapping.
        operations: the operations that are allowed, by name.
        where: the key of the mapping in the config, for messages.
    """
    mistakes = []
    for name, parameters in spec.items():
        if name not in operations:
            near = difflib.get_close_matches(name, operations, 1)
            hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(operations)}"
            mistakes.append(f"{where}: no operation {shorten(name)}; {hint}")
        elif not isinstance(parameters, dict):
            mistakes.append(
                f"{where}.{name} must be a mapping of parameters, {{}} for the defaults, "
                f"not {shorten(parameters)}"
            )
        else:
            mistakes += _check_parameters(name, parameters, operations[name], where)
    return mistakes


def _check_parameters(name: str, parameters: dict, operation: Operation, where: str) -> list[str]:
    """The mistakes in the parameters of the operation `name`, one sentence each."""
    where = f"{where}.{name}"
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(operation.draw).parameters.items()
        if parameter.default is not parameter.empty
    }
    mistakes = []
    for key, value in parameters.items():
        if key not in defaults:
            near = difflib.get_close_matches(key, defaults, 1, 0)
            hint = f"did you mean {near[0]}?" if near else "it has none"
            mistakes.append(f"{where}: unknown parameter {cut(key, 80)}; {hint}")
            continue
        is_range = isinstance(defaults[key], tuple)
        if not _matches(value, defaults[key]):
            kind = "[low, high]" if is_range else "a number"
            mistakes.append(f"{where}.{key} must be {kind}, not {shorten(value)}")
            continue
        ends = value if is_range else [value]
        low, high = _BOUNDS.get(f"{name}.{key}", _BOUNDS.get(key, _OTHER_BOUNDS))
        if not low <= min(ends) <= max(ends) <= high:
            mistakes.append(f"{where}.{key} must lie in [{low}, {high}], not {shorten(value)}")
    return mistakes


class Augment:
    """Operations that are drawn and applied apart from each other.

    Args:
        spec: operations and their parameters; of segmentation those of `IN_PLACE`.
        size: px of the square that `crop` resizes to and images are cropped to at their center;
            None for images of any size.
    """

    def __init__(self, spec: dict, size: int | None):
        self.spec, self.size = spec, size

    def draw(self, draws: Draws) -> list[torch.Tensor]:
        """The numbers of each operation, (n, P)."""
        known = OPERATIONS["classification"]
        return [known[name].draw(draws, **parameters) for name, parameters in self.spec.items()]

    def apply(self, images: torch.Tensor, numbers: list[torch.Tensor]) -> torch.Tensor:
        """uint8 (N, C, H, W) on any device -> uint8 (N, 3, H', W'); may overwrite `images`."""
        for name, drawn in zip(self.spec, numbers, strict=True):
            images = OPERATIONS["classification"][name].apply(images, drawn, self.size)
        if self.size is not None and images.shape[-1] > self.size:
            images = center(images, self.size)
        return three_channels(images)


def center(images: torch.Tensor, size: int) -> torch.Tensor:
    """The middle square of images (N, C, H, W), padded with zeros if need be, without gaps."""
    return F.center_crop(images, [size]).contiguous(memory_format=torch.channels_last)


def three_channels(images: torch.Tensor) -> torch.Tensor:
    """(N, C, H, W) -> (N, 3, H, W), with a gray channel repeated."""
    return images if images.shape[1] == 3 else images.expand(-1, 3, -1, -1).contiguous()


class Crops:
    """Random crops of images and masks, zoomed and flipped.

    Args:
        spec: the operations of `data.augment`, of which `zoom` and `flip` are applied.
        size: height and width of the crops, or None for entire images.

    A crop without a labeled pixel is drawn again, up to REDRAWS times, and before that as often one
    without the class that it should show. A zoom that would make the image smaller than the crop is
    raised until the image fills the crop.
    """

    REDRAWS = 10

    def __init__(self, spec: dict, size: tuple[int, int] | None):
        self.spec, self.size = spec, size

    def __call__(
        self,
        images: Sequence[torch.Tensor],
        masks: Sequence[torch.Tensor] | None,
        draws: Draws,
        wanted: Sequence[tuple[int, int]] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Crops of a batch.

        Args:
            images: uint8 (3, H, W) each; with `size`, of any sizes.
            masks: uint8 (H, W) each, or None.
            draws: of the batch.
            wanted: for each crop a class that it should show, and on how many pixels; or None.

        Returns:
            (uint8 (N, 3, H', W') with the channels last in memory, uint8 (N, H', W') or None).

        Raises:
            UserError: the crop is larger than an image.
        """
        size = self.size or images[0].shape[1:]
        crops = empty_batch((len(images), *size, 3)).movedim(-1, 1)
        crop_masks = None if masks is None else empty_batch((len(images), *size))
        flips = [False] * len(images)
        if "flip" in self.spec:
            flips = (FLIP.draw(draws, **self.spec["flip"])[:, 0] > 0).tolist()
        pending = range(len(images))
        # A class that is not found is given up, and then a crop with any label is drawn.
        redraws = self.REDRAWS if wanted is None else 2 * self.REDRAWS
        for attempt in range(1 + redraws):
            zooms = ops.draw_zoom(draws, **self.spec.get("zoom", {}))
            places = torch.cat([zooms, draws.uniform(count=2)], 1).tolist()
            boxes = {i: self._box(images[i].shape[1:], *places[i]) for i in pending}
            if masks is not None:
                for i in pending:
                    crop_masks[i] = _flipped(_crop_mask(masks[i], boxes[i], size), flips[i])
            done = pending
            if masks is not None and attempt < redraws:  # void is the largest number
                done = [i for i in pending if crop_masks[i].min() != IGNORE_INDEX]
                if wanted is not None and attempt <= self.REDRAWS:
                    done = [
                        i for i in done if (crop_masks[i] == wanted[i][0]).sum() >= wanted[i][1]
                    ]
            for i in done:
                _crop_into(crops[i], images[i], boxes[i], flips[i])
            pending = [i for i in pending if i not in done]
            if not pending:
                break
        return crops, crop_masks

    def _box(
        self, image_size: Sequence[int], factor: float, *places: float
    ) -> tuple[int, int, int, int]:
        """Left, top, width and height of the part of an image that becomes the crop.

        Args:
            image_size: height and width of the image.
            factor: by which the image is enlarged.
            places: of the crop from the top and from the left, as shares of what is possible.
        """
        size = self.size or image_size
        if size[0] > image_size[0] or size[1] > image_size[1]:
            raise UserError(
                f"crop {list(size)} is larger than an image of {image_size[0]}x{image_size[1]} px; "
                "choose a smaller crop"
            )
        factor = max(factor, size[0] / image_size[0], size[1] / image_size[1])
        sides, corner = [], []
        for side, image_side, place in zip(size, image_size, places, strict=True):
            box_side = min(max(round(side / factor), 1), image_side)
            sides.append(box_side)
            corner.append(int(place * (image_side - box_side + 1)))
        return *corner[::-1], *sides[::-1]


def _flipped(x: torch.Tensor, flip: bool) -> torch.Tensor:
    return x.flip(-1) if flip else x


def _crop_into(
    crop: torch.Tensor, image: torch.Tensor, box: tuple[int, int, int, int], flip: bool
) -> None:
    part = ops.cut(image, *box)
    if part.shape == crop.shape:
        crop.copy_(_flipped(part, flip))
        return
    if image.stride(0) != 1:  # the built-in scenes have their channels first
        part = part.movedim(0, -1).contiguous().movedim(-1, 0)
    ops.resize(part, crop)
    if flip:
        crop.copy_(crop.flip(2))


def _crop_mask(
    mask: torch.Tensor, box: tuple[int, int, int, int], size: Sequence[int]
) -> torch.Tensor:
    part = ops.cut(mask, *box)
    return part if part.shape == tuple(size) else resize_mask(part, size)


def resize_mask(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize class numbers (H, W) to `size` by nearest neighbor.

    It is "nearest-exact" of torch, in a third of its time; a center between two pixels may take the
    other one. v2 resizes masks by "nearest", which is half a pixel off the image.
    """
    places = []
    for new, old in zip(size, mask.shape, strict=True):
        centers = np.arange(new, dtype=np.float32) + np.float32(0.5)
        place = (centers * (np.float32(old) / np.float32(new))).astype(np.int64)
        places.append(np.minimum(place, old - 1))
    rows, columns = places
    return torch.from_numpy(mask.numpy().take(columns, 1).take(rows, 0))
