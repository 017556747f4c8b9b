"""Augmentation of uint8 batches, with parameters drawn per image, and of images with their masks.

`data.augment` maps operations to their parameters. They are applied in the order written:

    augment:
      affine: {degrees: 15, translate: 0.1, scale: [0.8, 1.2], shear: 10}
      photometric: {gain: [0.5, 1.5]}

torchvision's v2 draws one set of parameters per batch; here every draw has the length of the batch.

Operations on a batch have the arguments (images, size, draws) and then their parameters, which
are the keys of the config:

    images     uint8 (N, C, H, W)
    size       px of the resulting square (`data.size`); only `crop` reads it
    draws      the source of all random numbers, `Draws`

and return uint8 images. With task: segmentation the operations are `zoom`, a part of the random
crop, `flip`, and those that do not move pixels (`IN_PLACE`); a mask is transformed like its image,
by nearest neighbor. A strong view, as self-training needs it, is the weak view after further
operations; for segmentation these must not move pixels.
"""

import difflib
import inspect
import math
from collections.abc import Sequence

import numpy as np
import torch
from torchvision.transforms.v2 import functional as F

from common.config import cut, shorten
from common.errors import UserError
from common.metrics import IGNORE_INDEX
from data.order import Draws

Range = Sequence[float]


def _some(images, changed, probability: float, draws: Draws) -> torch.Tensor:
    """Each image is replaced by its changed version with this probability; 1 draws nothing."""
    if probability == 1:
        return changed
    chosen = draws.uniform() < probability
    return torch.where(chosen.view(-1, 1, 1, 1), changed, images)


def affine(
    images,
    size,
    draws,
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: Range = (1.0, 1.0),
    shear: float = 0.0,
):
    """Random rotation, scale, shear and shift of a square image; pixels at the edge are repeated.

    Args:
        degrees: largest angle of the rotation, either way.
        translate: largest shift along each axis, either way, as a share of the side.
        scale: range of the scale factor.
        shear: largest angle of the shear in degrees, either way.
    """
    angle = torch.deg2rad(draws.uniform(-degrees, degrees))
    factor = draws.uniform(*scale)
    slant = torch.deg2rad(draws.uniform(-shear, shear)).tan()
    shift = draws.uniform(-2 * translate, 2 * translate, 2)
    cos, sin = angle.cos() / factor, angle.sin() / factor
    row_x = torch.stack([cos, cos * slant - sin, shift[:, 0]], 1)
    row_y = torch.stack([sin, sin * slant + cos, shift[:, 1]], 1)
    theta = torch.stack([row_x, row_y], 1)
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(
        images.float(), grid, padding_mode="border", align_corners=False
    )
    return moved.round_().to(torch.uint8)


def photometric(
    images,
    size,
    draws,
    invert: float = 0.0,
    gain: Range = (1.0, 1.0),
    offset: float = 0.0,
    channel_gain: Range = (1.0, 1.0),
    channel_offset: float = 0.0,
    noise: float = 0.0,
):
    """Random brightness, contrast, color and noise; values are in units of the full range.

    A pixel becomes gain * (x - 1/2) + 1/2 + offset, where gain and offset combine those of the
    image and those of the channel.

    Args:
        invert: probability of a negative gain, which inverts the image.
        gain: range of the gain per image.
        offset: largest offset per image, either way.
        channel_gain: range of the gain per image and channel.
        channel_offset: largest offset per image and channel, either way.
        noise: largest standard deviation of normal noise; it is drawn per image.
    """
    n = len(images)
    per_channel = tuple(channel_gain) != (1.0, 1.0) or channel_offset > 0
    slope = draws.uniform(*gain)
    slope = torch.where(draws.uniform(0, 1) < invert, -slope, slope).view(n, 1, 1, 1)
    level = 0.5 + draws.uniform(-offset, offset).view(n, 1, 1, 1)
    if per_channel:
        slope = slope * draws.uniform(*channel_gain, 3, 1, 1)
        level = level + draws.uniform(-channel_offset, channel_offset, 3, 1, 1)
    x = images.float().sub_(127.5) * slope + 255 * level
    if noise > 0:
        deviation = draws.uniform(0, noise, 1, 1, 1)
        x = x + 255 * deviation * draws.normal(*x.shape[1:])
    return x.round_().clamp_(0, 255).to(torch.uint8)


def crop(images, size, draws, scale: Range = (0.08, 1.0), ratio: Range = (3 / 4, 4 / 3)):
    """Random crop of a square image, resized to `size`.

    Args:
        scale: range of the area of the crop, as a share of the image.
        ratio: range of width over height; drawn uniformly on a logarithmic scale.
    """
    side = images.shape[-1]
    area = draws.uniform(*scale) * side**2
    aspect = torch.exp(draws.uniform(math.log(ratio[0]), math.log(ratio[1])))
    height = (area / aspect).sqrt().round().clamp(1, side).long()
    width = (area * aspect).sqrt().round().clamp(1, side).long()
    top = (draws.uniform() * (side - height + 1)).long()
    left = (draws.uniform() * (side - width + 1)).long()
    boxes = torch.stack([left, top, width, height], 1).tolist()
    images = images.contiguous(memory_format=torch.channels_last)
    cropped = images.new_empty(len(images), size, size, images.shape[1]).movedim(-1, 1)
    for image, box, out in zip(images, boxes, cropped, strict=True):
        _resize(_cut(image, *box), out)
    return cropped


def _cut(image: torch.Tensor, left: int, top: int, width: int, height: int) -> torch.Tensor:
    """A view of a box of an image (..., H, W)."""
    return image[..., top : top + height, left : left + width]


def _resize(image: torch.Tensor, out: torch.Tensor) -> None:
    """Resize a uint8 image (C, H, W) bilinearly with antialiasing to the size of `out`.

    Both have their channels last in memory, as torch resizes images and their views fastest.
    """
    # torch.nn.functional.interpolate has no `out`.
    torch.ops.aten._upsample_bilinear2d_aa.out(
        image[None], list(out.shape[1:]), False, None, None, out=out[None]
    )


def _resize_mask(mask: torch.Tensor, size: Sequence[int]) -> torch.Tensor:
    """Resize class numbers (H, W) to `size` by nearest neighbor.

    It is "nearest-exact" of torch, in a third of its time. v2 resizes masks by "nearest", which is
    half a pixel off the image.
    """
    places = []
    for new, old in zip(size, mask.shape, strict=True):
        centers = np.arange(new, dtype=np.float32) + np.float32(0.5)
        place = (centers * (np.float32(old) / np.float32(new))).astype(np.int64)
        places.append(np.minimum(place, old - 1))
    rows, columns = places
    return torch.from_numpy(mask.numpy().take(columns, 1).take(rows, 0))


def flip(images, size, draws, probability: float = 0.5):
    """Horizontal flip, with a `probability` per image."""
    for i in (draws.uniform() < probability).nonzero()[:, 0].tolist():
        images[i] = images[i].flip(2)
    return images


def jitter(
    images,
    size,
    draws,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    gamma: Range = (1.0, 1.0),
    probability: float = 1.0,
):
    """Color jitter, in the order of the parameters.

    Args:
        brightness, contrast, saturation: a factor is drawn from 1 - value to 1 + value.
        hue: the shift is drawn from -value to value; 0.5 is half of the color circle.
        gamma: range of the exponent, drawn uniformly on a logarithmic scale; above 1 it darkens,
            below 1 it brightens.
        probability: that an image is changed.
    """
    operations = [
        (F.adjust_brightness, 1, brightness),
        (F.adjust_contrast, 1, contrast),
        (F.adjust_saturation, 1, saturation),
        (F.adjust_hue, 0, hue),
    ]
    changed = list(images)
    for adjust, center, spread in operations:
        if spread:
            low = max(center - spread, 0.0) if center else -spread
            factors = draws.uniform(low, center + spread).tolist()
            changed = [adjust(x, factor) for x, factor in zip(changed, factors, strict=True)]
    if tuple(gamma) != (1.0, 1.0):
        log_gamma = draws.uniform(math.log(gamma[0]), math.log(gamma[1]))
        exponents = log_gamma.exp().tolist()
        changed = [F.adjust_gamma(x, power) for x, power in zip(changed, exponents, strict=True)]
    return _some(images, torch.stack(changed), probability, draws)


def blur(images, size, draws, sigma: Range = (0.1, 2.0), probability: float = 1.0):
    """Gaussian blur.

    Args:
        sigma: range of the standard deviation in px.
        probability: of an image to be blurred.
    """
    sigmas = draws.uniform(*sigma).tolist()
    largest = min(images.shape[2:]) - 1  # the padding by reflection allows no larger radius
    radii = [min(math.ceil(2 * s), largest) for s in sigmas]
    blurred = [
        F.gaussian_blur(x, [2 * r + 1] * 2, [s] * 2)
        for x, r, s in zip(images, radii, sigmas, strict=True)
    ]
    return _some(images, torch.stack(blurred), probability, draws)


def cutout(images, size, draws, side: float = 0.5):
    """A gray rectangle at a random place (DeVries and Taylor 2017, arXiv:1708.04552).

    Args:
        side: largest height and width of the rectangle, as shares of those of the image.
    """
    inside = None
    for axis in (2, 3):
        length = images.shape[axis]
        center = draws.uniform(0, length)
        half = draws.uniform(0, side * length / 2)
        pixel = torch.arange(length) + 0.5
        near = (pixel - center[:, None]).abs() < half[:, None]
        inside = near[:, :, None] if inside is None else inside & near[:, None, :]
    return torch.where(inside[:, None], torch.tensor(127, dtype=torch.uint8), images)


def zoom(images, size, draws, scale: Range = (1.0, 1.0)):
    """Factors (N,) by which images are enlarged before the random crop of `JointAugment`.

    They are drawn from the range `scale`, uniformly on a logarithmic scale.
    """
    return draws.uniform(math.log(scale[0]), math.log(scale[1])).exp()


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
IN_PLACE = {f.__name__: f for f in (photometric, jitter, blur, cutout)}  # they do not move pixels
OPERATIONS = {
    "classification": {f.__name__: f for f in (affine, crop, flip)} | IN_PLACE,
    "segmentation": {f.__name__: f for f in (zoom, flip)} | IN_PLACE,
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
            mistakes += _check_parameters(parameters, operations[name], f"{where}.{name}")
    return mistakes


def _check_parameters(parameters: dict, operation, where: str) -> list[str]:
    """The mistakes in the parameters of one operation, one sentence each."""
    defaults = {
        key: parameter.default
        for key, parameter in inspect.signature(operation).parameters.items()
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
        low, high = _BOUNDS.get(f"{operation.__name__}.{key}", _BOUNDS.get(key, _OTHER_BOUNDS))
        if not low <= min(ends) <= max(ends) <= high:
            mistakes.append(f"{where}.{key} must lie in [{low}, {high}], not {shorten(value)}")
    return mistakes


class Augment:
    """The operations of `data.augment` for classification, or of a strong view.

    Args:
        spec: operations and their parameters.
        size: px of the square that `crop` resizes to.

    Shapes: uint8 (N, C, S, S) and `Draws` -> uint8 (N, C, S', S'). The operations of
        `IN_PLACE` take images of any height and width. The images given may be overwritten.
    """

    def __init__(self, spec: dict, size: int):
        self.spec, self.size = spec, size

    def __call__(self, images: torch.Tensor, draws: Draws) -> torch.Tensor:
        for name, parameters in self.spec.items():
            images = OPERATIONS["classification"][name](images, self.size, draws, **parameters)
        return images


class JointAugment:
    """A random crop and the operations of `data.augment` for segmentation.

    Args:
        spec: operations and their parameters.
        crop: height and width of the crop, or None for the entire image.

    Shapes: image uint8 (3, H, W), mask uint8 (H, W) or None, and its `Draws` -> image and mask at
        the size of the crop.

    A crop without a labeled pixel is drawn again, up to REDRAWS times. A zoom that would make the
    image smaller than the crop is raised until the image fills the crop.

    Raises:
        UserError: the crop is larger than the image.
    """

    REDRAWS = 10

    def __init__(self, spec: dict, crop: tuple[int, int] | None):
        self.spec, self.crop = spec, crop

    def __call__(
        self, image: torch.Tensor, mask: torch.Tensor | None, draws: Draws
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        image = image.movedim(0, -1).contiguous().movedim(-1, 0)  # as `_resize` needs it
        for _ in range(1 + self.REDRAWS):
            crop, crop_mask = self._crop(image, mask, draws)
            if crop_mask is None or crop_mask.min() != IGNORE_INDEX:  # which is the largest number
                break
        for name, parameters in self.spec.items():
            if name == "flip":
                if draws.uniform() < parameters.get("probability", 0.5):
                    crop = crop.flip(2)
                    crop_mask = None if crop_mask is None else crop_mask.flip(1)
            elif name != "zoom":
                operation = OPERATIONS["segmentation"][name]
                crop = operation(crop[None], None, draws, **parameters)[0]
        return crop, crop_mask

    def _crop(self, image: torch.Tensor, mask: torch.Tensor | None, draws: Draws):
        """A random crop of image and mask: a box is cut out and resized to the size of the crop."""
        height, width = image.shape[-2:]
        size = self.crop or (height, width)
        if size[0] > height or size[1] > width:
            raise UserError(
                f"crop {list(size)} is larger than an image of {height}x{width} px; "
                "choose a smaller crop"
            )
        factor = zoom(image[None], None, draws, **self.spec.get("zoom", {})).item()
        factor = max(factor, size[0] / height, size[1] / width)
        sides, corner = [], []
        places = draws.uniform(0, 1, 2)[0].tolist()
        for side, image_side, place in zip(size, (height, width), places, strict=True):
            box_side = min(max(round(side / factor), 1), image_side)
            sides.append(box_side)
            corner.append(int(place * (image_side - box_side + 1)))
        box = (*corner[::-1], *sides[::-1])
        crop, crop_mask = (None if x is None else _cut(x, *box) for x in (image, mask))
        if tuple(sides) == tuple(size):
            return crop, crop_mask
        if mask is not None:
            crop_mask = _resize_mask(crop_mask, size)
        resized = crop.new_empty(*size, len(crop)).movedim(-1, 0)
        _resize(crop, resized)
        return resized, crop_mask
