"""Augmentation of uint8 batches with parameters drawn for each image, and of images together with their masks.

`data.augment` maps an operation to its parameters, applied in the order written:

    augment:
      affine: {degrees: 15, translate: 0.1, scale: [0.8, 1.2], shear: 10}
      photometric: {gain: [0.5, 1.5]}

torchvision's v2 draws one set of parameters for a whole batch; here every draw has the length of the batch.

With task: segmentation there are `zoom`, which belongs to the random crop, `flip`, and what leaves pixels in their
place; the mask goes where the image goes, by the nearest pixel. A strong view, as self-training needs, is the weak view
changed further by operations of its own; for segmentation by those that leave pixels in their place.
"""

import difflib
import inspect
import math
from collections.abc import Sequence

import torch
from torchvision import tv_tensors
from torchvision.transforms.v2 import functional as F

from common.evaluation import IGNORE_INDEX
from common.runtime import UserError

Range = Sequence[float]


def _uniform(n: int, low: float, high: float, generator: torch.Generator, *shape: int) -> torch.Tensor:
    return torch.rand((n, *shape), generator=generator) * (high - low) + low


def affine(
    images, size, generator, degrees: float = 0.0, translate: float = 0.0, scale: Range = (1.0, 1.0), shear: float = 0.0
):
    """Random rotation (+-degrees), scale, shear (+-degrees) and shift (+-share of the side); edges are repeated."""
    n = len(images)
    angle = torch.deg2rad(_uniform(n, -degrees, degrees, generator))
    zoom = _uniform(n, *scale, generator)
    slant = torch.deg2rad(_uniform(n, -shear, shear, generator)).tan()
    shift = _uniform(n, -2 * translate, 2 * translate, generator, 2)
    cos, sin = angle.cos() / zoom, angle.sin() / zoom
    theta = torch.stack(
        [torch.stack([cos, cos * slant - sin, shift[:, 0]], 1), torch.stack([sin, sin * slant + cos, shift[:, 1]], 1)],
        1,
    )
    grid = torch.nn.functional.affine_grid(theta, list(images.shape), align_corners=False)
    moved = torch.nn.functional.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round_().to(torch.uint8)


def photometric(
    images,
    size,
    generator,
    invert: float = 0.0,
    gain: Range = (1.0, 1.0),
    offset: float = 0.0,
    channel_gain: Range = (1.0, 1.0),
    channel_offset: float = 0.0,
    noise: float = 0.0,
):
    """Brightness and colour, in units of the full range: with probability `invert` the negative; gain * (x - 1/2)
    + 1/2 + offset, for the whole image and for each channel; normal noise of a standard deviation up to `noise`."""
    n = len(images)
    per_channel = tuple(channel_gain) != (1.0, 1.0) or channel_offset > 0
    slope = _uniform(n, *gain, generator)
    slope = torch.where(_uniform(n, 0, 1, generator) < invert, -slope, slope).view(n, 1, 1, 1)
    level = 0.5 + _uniform(n, -offset, offset, generator).view(n, 1, 1, 1)
    if per_channel:
        slope = slope * _uniform(n, *channel_gain, generator, 3, 1, 1)
        level = level + _uniform(n, -channel_offset, channel_offset, generator, 3, 1, 1)
    x = images.float().sub_(127.5) * slope + 255 * level
    if noise > 0:
        x = x + 255 * _uniform(n, 0, noise, generator, 1, 1, 1) * torch.randn(x.shape, generator=generator)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def crop(images, size, generator, scale: Range = (0.08, 1.0), ratio: Range = (3 / 4, 4 / 3)):
    """Random resized crop to `data.size`, of a share of the area in `scale` and an aspect in `ratio`."""
    n, side = len(images), images.shape[-1]
    area = _uniform(n, *scale, generator) * side**2
    aspect = torch.exp(_uniform(n, math.log(ratio[0]), math.log(ratio[1]), generator))
    height = (area / aspect).sqrt().round().clamp(1, side).long()
    width = (area * aspect).sqrt().round().clamp(1, side).long()
    top = (torch.rand(n, generator=generator) * (side - height + 1)).long()
    left = (torch.rand(n, generator=generator) * (side - width + 1)).long()
    boxes = torch.stack([top, left, height, width], 1).tolist()
    return torch.stack(
        [F.resized_crop(image, *box, [size, size], antialias=True) for image, box in zip(images, boxes, strict=True)]
    )


def flip(images, size, generator, probability: float = 0.5):
    """Horizontal flip."""
    flipped = torch.rand(len(images), generator=generator) < probability
    return torch.where(flipped.view(-1, 1, 1, 1), images.flip(3), images)


def jitter(
    images,
    size,
    generator,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    gamma: Range = (1.0, 1.0),
):
    """Colour jitter in this order: brightness, contrast, saturation by a factor in 1 +- the value, hue by +- it; then
    a gamma drawn evenly on a logarithmic scale: above 1 darkens, below brightens."""
    operations = [
        (F.adjust_brightness, 1, brightness),
        (F.adjust_contrast, 1, contrast),
        (F.adjust_saturation, 1, saturation),
        (F.adjust_hue, 0, hue),
    ]
    out = list(images)
    for adjust, centre, spread in operations:
        if spread:
            low = max(centre - spread, 0.0) if centre else -spread
            factors = _uniform(len(out), low, centre + spread, generator).tolist()
            out = [adjust(image, factor) for image, factor in zip(out, factors, strict=True)]
    if tuple(gamma) != (1.0, 1.0):
        exponents = _uniform(len(out), math.log(gamma[0]), math.log(gamma[1]), generator).exp().tolist()
        out = [F.adjust_gamma(image, exponent) for image, exponent in zip(out, exponents, strict=True)]
    return torch.stack(out)


def blur(images, size, generator, sigma: Range = (0.1, 2.0)):
    """Gaussian blur, of a standard deviation in px."""
    sigmas, largest = _uniform(len(images), *sigma, generator).tolist(), min(images.shape[2:]) - 1  # of its padding
    radii = [min(math.ceil(2 * s), largest) for s in sigmas]
    blurred = [F.gaussian_blur(x, [2 * r + 1] * 2, [s] * 2) for x, r, s in zip(images, radii, sigmas, strict=True)]
    return torch.stack(blurred)


def cutout(images, size, generator, side: float = 0.5):
    """A grey rectangle at a random place, each side up to a share `side` of the image's (arXiv:1708.04552)."""
    n, inside = len(images), None
    for axis in (2, 3):
        length = images.shape[axis]
        centre, half = _uniform(n, 0, length, generator), _uniform(n, 0, side * length / 2, generator)
        pixel = torch.arange(length) + 0.5
        near = (pixel - centre[:, None]).abs() < half[:, None]
        inside = near[:, :, None] if inside is None else inside & near[:, None, :]
    return torch.where(inside[:, None], torch.tensor(127, dtype=torch.uint8), images)


def zoom(images, size, generator, scale: Range = (1.0, 1.0)):
    """Enlargement of the image before its random crop, drawn evenly on a logarithmic scale -> (n,) factors."""
    return _uniform(len(images), math.log(scale[0]), math.log(scale[1]), generator).exp()


_LARGEST = {"hue": 0.5, "probability": 1, "invert": 1, "side": 1}
IN_PLACE = {f.__name__: f for f in (photometric, jitter, blur, cutout)}
OPERATIONS = {
    "classification": {f.__name__: f for f in (affine, crop, flip)} | IN_PLACE,
    "segmentation": {f.__name__: f for f in (zoom, flip)} | IN_PLACE,
}


def _matches(value, default) -> bool:
    if isinstance(default, tuple):
        return (
            isinstance(value, list)
            and len(value) == 2
            and all(_matches(v, 0.0) for v in value)
            and value[0] <= value[1]
        )
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)


def check_augment(spec: dict, operations: dict, where: str = "augment") -> list[str]:
    """The mistakes in a mapping of some of the `operations` to their parameters, one sentence each."""
    mistakes = []
    for name, parameters in spec.items():
        if name not in operations:
            near = difflib.get_close_matches(name, operations, 1)
            mistakes.append(
                f"{where}: no operation {name!r}; "
                + (f"did you mean {near[0]}?" if near else f"there are {', '.join(operations)}")
            )
            continue
        if not isinstance(parameters, dict):
            mistakes.append(
                f"{where}.{name} must be a mapping of parameters, {{}} for the defaults, not {parameters!r}"
            )
            continue
        known = {
            k: p.default for k, p in inspect.signature(operations[name]).parameters.items() if p.default is not p.empty
        }
        for key, value in parameters.items():
            if key not in known:
                near = difflib.get_close_matches(key, known, 1, 0)
                mistakes.append(
                    f"{where}.{name}: unknown parameter {key}; "
                    + (f"did you mean {near[0]}?" if near else "it has none")
                )
            elif not _matches(value, known[key]):
                kind = "[low, high]" if isinstance(known[key], tuple) else "a number"
                mistakes.append(f"{where}.{name}.{key} must be {kind}, not {value!r}")
            elif isinstance(known[key], tuple) and key != "gain" and key != "channel_gain" and value[0] <= 0:
                mistakes.append(f"{where}.{name}.{key} must be above 0, not {value!r}")
            elif not isinstance(known[key], tuple) and not 0 <= value <= _LARGEST.get(key, math.inf):
                allowed = f"lie in [0, {_LARGEST[key]}]" if key in _LARGEST else "not be negative"
                mistakes.append(f"{where}.{name}.{key} must {allowed}, not {value!r}")
    return mistakes


class Augment:
    """The operations of a mapping as `data.augment`: uint8 (N, C, S, S) and a generator -> uint8 (N, C', S', S').

    Those that leave pixels in their place take images of any height and width.
    """

    def __init__(self, spec: dict, size: int):
        self.spec, self.size = spec, size

    def __call__(self, images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
        for name, parameters in self.spec.items():
            images = OPERATIONS["classification"][name](images, self.size, generator, **parameters)
        return images


class JointAugment:
    """A random crop and the operations of a `data.augment` mapping, on one image with its mask or alone.

    Args:
        spec: the mapping, for segmentation.
        crop: height and width of the crop, or None for the whole image.
    """

    REDRAWS = 10  # of a crop without a single labelled pixel

    def __init__(self, spec: dict, crop: tuple[int, int] | None):
        self.spec, self.crop = spec, crop

    def __call__(
        self, image: torch.Tensor, mask: torch.Tensor | None, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """image: uint8 (3, H, W); mask: uint8 (H, W) or None -> both at the size of the crop.

        A crop that is all void is drawn again, up to REDRAWS times. A zoom that the image cannot fill is raised.
        """
        image = tv_tensors.Image(image)
        mask = None if mask is None else tv_tensors.Mask(mask)
        for _ in range(1 + self.REDRAWS):
            crop, crop_mask = self._crop(image, mask, generator)
            if crop_mask is None or (crop_mask != IGNORE_INDEX).any():
                break
        for name, parameters in self.spec.items():
            if name == "flip":
                if torch.rand((), generator=generator) < parameters.get("probability", 0.5):
                    crop = F.horizontal_flip(crop)
                    crop_mask = None if crop_mask is None else F.horizontal_flip(crop_mask)
            elif name != "zoom":
                crop = OPERATIONS["segmentation"][name](crop[None], None, generator, **parameters)[0]
        return crop, crop_mask

    def _crop(self, image: tv_tensors.Image, mask: tv_tensors.Mask | None, generator: torch.Generator):
        height, width = image.shape[-2:]
        size = self.crop or (height, width)
        if size[0] > height or size[1] > width:
            raise UserError(f"crop {list(size)} is larger than an image of {height}x{width} px; choose a smaller crop")
        factor = zoom(image[None], None, generator, **self.spec.get("zoom", {})).item()
        factor = max(factor, size[0] / height, size[1] / width)
        box = [min(max(round(side / factor), 1), whole) for side, whole in zip(size, (height, width), strict=True)]
        free = [whole - side + 1 for side, whole in zip(box, (height, width), strict=True)]
        top, left = (int(u * n) for u, n in zip(torch.rand(2, generator=generator).tolist(), free, strict=True))
        crop, crop_mask = (None if x is None else F.crop(x, top, left, *box) for x in (image, mask))
        if tuple(box) == tuple(size):
            return crop, crop_mask
        if mask is not None:  # v2 resizes masks by `nearest`, which lies half a pixel off the image
            resized = torch.nn.functional.interpolate(crop_mask[None, None], size=list(size), mode="nearest-exact")
            crop_mask = resized[0, 0]
        return F.resize(crop, list(size), antialias=True), crop_mask
