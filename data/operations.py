"""Operations of augmentation: what is drawn for each image, and what is done to its pixels.

An operation is a pair of functions. The first draws numbers for each image, from nothing but
`Draws` and the parameters of the config:

    draw_flip(draws, probability=0.5) -> float32 (N, P)

The second computes the pixels of a batch from them, on the device that the images are on:

    flip(images, numbers, size) -> uint8 images

    images     uint8 (N, C, H, W), on any device; they may be overwritten
    numbers    float32 (N, P), on the CPU
    size       px of the resulting square (`data.size`), which `crop` alone reads

On every device the result is the same within a gray level of rounding.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F

from data.memory import empty_batch
from data.order import Draws

Range = Sequence[float]
LARGE = 2**16  # values of an image from which a CPU computes one image after another


class Operation(NamedTuple):
    """The two functions of an operation.

    Attributes:
        draw: (draws, **parameters of the config) -> numbers.
        apply: (images, numbers, size) -> images.
    """

    draw: Callable[..., torch.Tensor]
    apply: Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def per_image(numbers: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Numbers (N,) or (N, P) on the device of the images: (N, P, 1, 1)."""
    return numbers.to(images.device, non_blocking=True).view(len(images), -1, 1, 1)


def change_some(
    images: torch.Tensor,
    numbers: torch.Tensor,
    changed: torch.Tensor,
    operation: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Overwrite the images for which `changed`, bool (N,), by operation(images, numbers).

    A CPU takes large images one by one, so that what is computed stays in its cache.
    """
    if images.device.type == "cpu":
        count = 1 if images.shape[1:].numel() >= LARGE else max(len(images), 1)
        parts = (x.split(count) for x in (images, numbers, changed))
        for part, drawn, which in zip(*parts, strict=True):
            if which.all():
                part.copy_(operation(part, drawn))
            elif which.any():
                part[which] = operation(part[which], drawn[which])
        return images
    rows = changed.nonzero()[:, 0]
    if len(rows) > 0:
        on_device = rows.to(images.device, non_blocking=True)
        result = operation(images.index_select(0, on_device), numbers[rows])
        images.index_copy_(0, on_device, result)
    return images


def draw_affine(
    draws: Draws,
    degrees: float = 0.0,
    translate: float = 0.0,
    scale: Range = (1.0, 1.0),
    shear: float = 0.0,
) -> torch.Tensor:
    """Random rotation, scale, shear and shift of a square image; pixels at the edge are repeated.

    Args:
        degrees: largest angle of the rotation, either way.
        translate: largest shift along each axis, either way, as a share of the side.
        scale: range of the scale factor.
        shear: largest angle of the shear in degrees, either way.

    Returns:
        The rows of the matrix of `torch.nn.functional.affine_grid`, (N, 6).
    """
    angle = torch.deg2rad(draws.uniform(-degrees, degrees))
    factor = draws.uniform(*scale)
    slant = torch.deg2rad(draws.uniform(-shear, shear)).tan()
    shift_x, shift_y = draws.uniform(-2 * translate, 2 * translate, 2).split(1, 1)
    cos, sin = angle.cos() / factor, angle.sin() / factor
    return torch.cat([cos, cos * slant - sin, shift_x, sin, sin * slant + cos, shift_y], 1)


def affine(images: torch.Tensor, numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Move the pixels by the matrices that `draw_affine` returns."""
    theta = numbers.to(images.device, non_blocking=True).view(-1, 2, 3)
    grid = F.affine_grid(theta, list(images.shape), align_corners=False)
    moved = F.grid_sample(images.float(), grid, padding_mode="border", align_corners=False)
    return moved.round_().to(torch.uint8)


def draw_crop(
    draws: Draws, scale: Range = (0.08, 1.0), ratio: Range = (3 / 4, 4 / 3)
) -> torch.Tensor:
    """Random crop of a square image, resized to `size`.

    Args:
        scale: range of the area of the crop, as a share of the image.
        ratio: range of width over height; drawn uniformly on a logarithmic scale.

    Returns:
        Area, ratio, and the place from top and left, all as shares: (N, 4).
    """
    area, aspect = draws.uniform(*scale), draws.log_uniform(*ratio)
    return torch.cat([area, aspect, draws.uniform(count=2)], 1)


def crop(images: torch.Tensor, numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Cut out the boxes that `draw_crop` describes, and resize them to `size`."""
    boxes = crop_boxes(numbers, images.shape[-1])
    if images.device.type == "cpu":
        return crop_one_by_one(images, boxes, size)
    return crop_together(images, boxes, size)


def crop_boxes(numbers: torch.Tensor, side: int) -> torch.Tensor:
    """Left, top, width and height in px of the crops of images of this side: int64 (N, 4)."""
    area, aspect, down, across = numbers.unbind(1)
    area = area * side**2
    height = (area / aspect).sqrt().round().clamp(1, side)
    width = (area * aspect).sqrt().round().clamp(1, side)
    top, left = ((place * (side - x + 1)).floor() for place, x in ((down, height), (across, width)))
    return torch.stack([left, top, width, height], 1).long()


def crop_one_by_one(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """The fastest way on a CPU."""
    images = images.contiguous(memory_format=torch.channels_last)
    cropped = empty_batch((len(images), size, size, images.shape[1])).movedim(-1, 1)
    for image, box, out in zip(images, boxes.tolist(), cropped, strict=True):
        resize(cut(image, *box), out)
    return cropped


def cut(image: torch.Tensor, left: int, top: int, width: int, height: int) -> torch.Tensor:
    """A view of a box of an image (..., H, W)."""
    return image[..., top : top + height, left : left + width]


def resize(image: torch.Tensor, out: torch.Tensor) -> None:
    """Resize a uint8 image (C, H, W) bilinearly with antialiasing to the size of `out`.

    Both have their channels last in memory, as torch resizes images and their views fastest.
    """
    # torch.nn.functional.interpolate has no `out`.
    torch.ops.aten._upsample_bilinear2d_aa.out(
        image[None], list(out.shape[1:]), False, None, None, out=out[None]
    )


def crop_together(images: torch.Tensor, boxes: torch.Tensor, size: int) -> torch.Tensor:
    """The same on a GPU: two products of all images with the weights of `resize`."""
    left, top, width, height = boxes.to(images.device, non_blocking=True).unbind(1)
    rows = resize_weights(top, height, size, images.shape[2])
    columns = resize_weights(left, width, size, images.shape[3])
    resized = rows[:, None] @ images.float() @ columns[:, None].mT
    return resized.round_().clamp_(0, 255).to(torch.uint8)


def resize_weights(first: torch.Tensor, length: torch.Tensor, size: int, side: int) -> torch.Tensor:
    """Weights with which pixels first .. first + length - 1 of `side` become `size` pixels.

    They fall linearly from the center of the new pixel, over a pixel of the larger grid.

    Shapes: (N,) int64 on the device of the result, float32 (N, size, side).
    """
    first, length = (x.float().view(-1, 1, 1) for x in (first, length))
    new = torch.arange(size, device=first.device).view(1, -1, 1) + 0.5
    old = torch.arange(side, device=first.device).view(1, 1, -1) + 0.5
    scale = length / size
    center = first + new * scale
    weights = (1 - (old - center).abs() / scale.clamp_min(1)).clamp_min(0)
    weights = weights * ((old > first) & (old < first + length))
    return weights / weights.sum(2, keepdim=True)


def draw_flip(draws: Draws, probability: float = 0.5) -> torch.Tensor:
    """Horizontal flip, with a `probability` per image: 0 or 1, (N, 1)."""
    return (draws.uniform() < probability).float()


def flip(images: torch.Tensor, numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Flip the images whose number is 1."""
    return change_some(images, numbers, numbers[:, 0] > 0, lambda x, _: x.flip(3))


def pointwise(
    images: torch.Tensor, function: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """`function`, from float32 values (N, C, ...) to values in [0, 255], of every pixel.

    A CPU computes it for 256 values and looks the pixels up in this table.
    """
    if images.device.type != "cpu" or images.shape[1:].numel() < LARGE:
        return function(images.float()).to(torch.uint8)
    tables = function(torch.arange(256.0).view(1, 1, 1, 256)).to(torch.uint8)
    channels = tables.shape[1]  # 1 if all are treated alike
    offsets = torch.arange(0, 256 * channels, 256, dtype=torch.int32)
    pixels = images.movedim(1, -1)  # channels last
    changed = torch.empty(pixels.shape, dtype=torch.uint8)
    for image, table, out in zip(pixels, tables, changed, strict=True):
        index = image.int() if channels == 1 else image.int().add_(offsets)
        torch.index_select(table.flatten(), 0, index.flatten(), out=out.view(-1))
    return changed.movedim(-1, 1)


def draw_photometric(
    draws: Draws,
    invert: float = 0.0,
    gain: Range = (1.0, 1.0),
    offset: float = 0.0,
    channel_gain: Range = (1.0, 1.0),
    channel_offset: float = 0.0,
    noise: float = 0.0,
) -> torch.Tensor:
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

    Returns:
        The gain and the level that it is added to, of all channels or of three; and with noise its
        standard deviation and the halves of its seed: (N, 2, 5, 6 or 9).
    """
    slope = draws.uniform(*gain)
    slope = torch.where(draws.uniform() < invert, -slope, slope)
    level = 0.5 + draws.uniform(-offset, offset)
    if tuple(channel_gain) != (1.0, 1.0) or channel_offset > 0:
        slope = slope * draws.uniform(*channel_gain, 3)
        level = level + draws.uniform(-channel_offset, channel_offset, 3)
    columns = [slope, level]
    if noise > 0:
        columns += [draws.uniform(0, noise), draws.seeds()]
    return torch.cat(columns, 1)


def photometric(images: torch.Tensor, numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Apply what `draw_photometric` returns: (x - 127.5) * gain + 255 * level, and noise."""
    noisy = numbers.shape[1] % 2 == 1
    channels = (numbers.shape[1] - 3 * noisy) // 2
    slope, level = (per_image(x, images) for x in numbers[:, : 2 * channels].split(channels, 1))
    images = images.expand(-1, max(channels, images.shape[1]), -1, -1)

    def changed(x: torch.Tensor) -> torch.Tensor:
        return torch.addcmul(255 * level, x - 127.5, slope)

    if not noisy:
        return pointwise(images, lambda x: changed(x).round_().clamp_(0, 255))
    deviation = per_image(numbers[:, -3], images)
    x = changed(images.float()) + 255 * deviation * normal(numbers[:, -2:], images)
    return x.round_().clamp_(0, 255).to(torch.uint8)


def normal(seeds: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Standard normal numbers of the shape of `images`, by the device's generator.

    Args:
        seeds: the halves of the seed of each image, as `Draws.seeds`: (N, 2) on the CPU.
        images: (N, C, H, W).
    """
    noise = torch.empty(images.shape, device=images.device)
    random = torch.Generator(images.device)
    high, low = seeds.long().unbind(1)
    for part, seed in zip(noise, (2**24 * high + low).tolist(), strict=True):
        part.normal_(generator=random.manual_seed(seed))
    return noise


def draw_jitter(
    draws: Draws,
    brightness: float = 0.0,
    contrast: float = 0.0,
    saturation: float = 0.0,
    hue: float = 0.0,
    gamma: Range = (1.0, 1.0),
    probability: float = 1.0,
) -> torch.Tensor:
    """Color jitter, in the order of the parameters.

    Args:
        brightness, contrast, saturation: a factor is drawn from 1 - value to 1 + value.
        hue: the shift is drawn from -value to value; 0.5 is half of the color circle.
        gamma: range of the exponent, drawn uniformly on a logarithmic scale; above 1 it darkens,
            below 1 it brightens.
        probability: that an image is changed.

    Returns:
        Factors of brightness, contrast and saturation, shift of the hue, exponent: (N, 5); those
        of an image that does not change are 1, and 0 for the hue.
    """
    columns = [draws.uniform(max(1 - x, 0.0), 1 + x) for x in (brightness, contrast, saturation)]
    columns += [draws.uniform(-hue, hue), draws.log_uniform(*gamma)]
    return torch.where(draws.uniform() < probability, torch.cat(columns, 1), UNCHANGED)


UNCHANGED = torch.tensor([1.0, 1.0, 1.0, 0.0, 1.0])  # by jitter


def jitter(images: torch.Tensor, numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Apply what `draw_jitter` returns, one factor after another."""
    adjust = adjust_brightness, adjust_contrast, adjust_saturation, adjust_hue, adjust_gamma
    needed = (numbers != UNCHANGED).any(0).tolist()

    def changed(images: torch.Tensor, numbers: torch.Tensor) -> torch.Tensor:
        for function, column, is_needed in zip(adjust, numbers.unbind(1), needed, strict=True):
            if is_needed:
                images = function(images, per_image(column, images))
        return images

    return change_some(images, numbers, (numbers != UNCHANGED).any(1), changed)


# The formulas of torchvision.transforms.v2.functional for uint8, with one factor (N, 1, 1, 1) per
# image in place of one for all.


def adjust_brightness(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply by the factor."""
    return pointwise(images, lambda x: (x * factor).clamp(0, 255))


def gray(images: torch.Tensor) -> torch.Tensor:
    """The luma of uint8 (N, 3, H, W) or (N, 1, H, W), whole numbers as float32 (N, 1, H, W)."""
    if images.shape[1] == 1:
        return images.float()
    red, green, blue = images.unbind(1)
    luma = red.float().mul_(0.2989).add_(green, alpha=0.587).add_(blue, alpha=0.114)
    return luma.floor_()[:, None]


def adjust_contrast(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply the distance from the mean luma by the factor."""
    mean = gray(images).mean((2, 3), keepdim=True)
    return pointwise(images, lambda x: (x * factor + (1 - factor) * mean).clamp(0, 255))


def adjust_saturation(images: torch.Tensor, factor: torch.Tensor) -> torch.Tensor:
    """Multiply the distance from a pixel's luma by the factor."""
    if images.shape[1] == 1:
        return images
    blended = images.to(torch.float32, memory_format=torch.contiguous_format).mul_(factor)
    return blended.add_(gray(images) * (1 - factor)).clamp_(0, 255).to(torch.uint8)


def adjust_hue(images: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    """Rotate the hue by a share of the color circle."""
    if images.shape[1] == 1:
        return images
    values = images.to(torch.float32, memory_format=torch.contiguous_format).div_(255)
    red, green, blue = values.unbind(1)
    high = torch.maximum(torch.maximum(red, green), blue)
    chroma = high - torch.minimum(torch.minimum(red, green), blue)
    inverse = 1 / chroma.clamp_min(1e-8)
    hue = torch.where(
        high == red,
        (green - blue) * inverse,
        torch.where(high == green, 2 + (blue - red) * inverse, 4 + (red - green) * inverse),
    )
    hue = hue + 6 * shift[:, 0]
    for channel, place in enumerate((5, 3, 1)):  # in sixths of the circle
        distance = (hue + place).remainder_(6)
        distance = torch.minimum(distance, 4 - distance).clamp_(0, 1)
        torch.addcmul(high, chroma, distance, value=-1, out=values[:, channel])
    return values.mul_(255 + 1 - 1e-3).floor_().to(torch.uint8)


def adjust_gamma(images: torch.Tensor, exponent: torch.Tensor) -> torch.Tensor:
    """Raise values in [0, 1] to the exponent."""
    return pointwise(images, lambda x: (x / 255).pow(exponent).mul(255 + 1 - 1e-3).floor())


def draw_blur(draws: Draws, sigma: Range = (0.1, 2.0), probability: float = 1.0) -> torch.Tensor:
    """Gaussian blur, cut off at twice its standard deviation.

    Args:
        sigma: range of the standard deviation in px.
        probability: of an image to be blurred.

    Returns:
        The standard deviation, 0 for an image that does not change: (N, 1).
    """
    deviation = draws.uniform(*sigma)
    return torch.where(draws.uniform() < probability, deviation, 0.0)


def blur(images: torch.Tensor, numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Blur the images whose number is above 0."""
    return change_some(images, numbers, numbers[:, 0] > 0, gaussian_blur)


def gaussian_blur(images: torch.Tensor, sigma: torch.Tensor) -> torch.Tensor:
    """Blur uint8 (N, C, H, W) by the standard deviations (N, 1), which are on the CPU.

    One axis after the other; the border is reflected. A sum of shifted images is ten times faster
    on a CPU than a convolution of so few channels.
    """
    values = images.to(torch.float32, memory_format=torch.contiguous_format)
    # The reflection allows no larger radius.
    radii = (2 * sigma).ceil().clamp_max(min(images.shape[2:]) - 1)
    radius = int(radii.max())
    offsets = torch.arange(-radius, radius + 1)
    weights = torch.exp(-0.5 * (offsets / sigma).square()) * (offsets.abs() <= radii)
    weights = per_image(weights / weights.sum(1, keepdim=True), images)
    for axis in (2, 3):
        borders = [0, 0, radius, radius] if axis == 2 else [radius, radius, 0, 0]
        padded = F.pad(values, borders, mode="reflect")
        values = torch.zeros_like(values)
        for i, weight in enumerate(weights.split(1, 1)):
            values.addcmul_(padded.narrow(axis, i, values.shape[axis]), weight)
    return values.round_().to(torch.uint8)


def draw_cutout(draws: Draws, side: float = 0.5) -> torch.Tensor:
    """A gray rectangle at a random place (DeVries and Taylor 2017, arXiv:1708.04552).

    Args:
        side: largest height and width of the rectangle, as shares of those of the image.

    Returns:
        The vertical and the horizontal center and half the height and the width, as shares: (N, 4).
    """
    return torch.cat([draws.uniform(count=2), draws.uniform(0, side / 2, 2)], 1)


def cutout(images: torch.Tensor, numbers: torch.Tensor, size: int) -> torch.Tensor:
    """Fill the rectangles that `draw_cutout` describes."""
    inside = []
    for axis in (0, 1):
        length = images.shape[2 + axis]
        center, half = (length * numbers[:, column : column + 1] for column in (axis, 2 + axis))
        near = (torch.arange(length) + 0.5 - center).abs() < half
        inside.append(near.to(images.device, non_blocking=True))
    rectangle = inside[0][:, None, :, None] & inside[1][:, None, None, :]
    return images.masked_fill_(rectangle, 127)


def draw_zoom(draws: Draws, scale: Range = (1.0, 1.0)) -> torch.Tensor:
    """Factor by which an image is enlarged before the random crop of `Crops`: (N, 1).

    It is drawn from the range `scale`, uniformly on a logarithmic scale.
    """
    return draws.log_uniform(*scale)
