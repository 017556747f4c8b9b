"""Built-in digits, drawn with the font of PIL: an easy source domain, and a shifted target."""

import torch
from PIL import Image, ImageDraw, ImageFont

from data.digits import CLASSES
from data.image_set import ImageSet, image_set
from data.order import generator

SIDE = 28  # px
COUNT = {"train": 4000, "test": 1000}  # images per split
STROKES = (0, 1, 2, 3)  # px; widths of a stroke


def _glyphs() -> torch.Tensor:
    """White digits on black, in every stroke width: float (10, strokes, 56, 56) in [0, 1]."""
    font = ImageFont.load_default(44)
    glyphs = []
    for digit in CLASSES:
        for stroke in STROKES:
            image = Image.new("L", (2 * SIDE, 2 * SIDE))
            ImageDraw.Draw(image).text(
                (SIDE, SIDE), digit, fill=255, font=font, anchor="mm", stroke_width=stroke
            )
            pixels = torch.frombuffer(bytearray(image.tobytes()), dtype=torch.uint8)
            glyphs.append(pixels.view(2 * SIDE, 2 * SIDE))
    return torch.stack(glyphs).view(10, len(STROKES), 2 * SIDE, 2 * SIDE) / 255


def _texture(n: int, random: torch.Generator) -> torch.Tensor:
    """Smooth colored noise on several scales, (n, 3, 28, 28) in [0, 1]."""
    texture = torch.zeros(n, 3, SIDE, SIDE)
    for cells in (2, 4, 9):
        noise = torch.rand(n, 3, cells, cells, generator=random) - 0.5
        texture += torch.nn.functional.interpolate(
            noise, size=(SIDE, SIDE), mode="bilinear", align_corners=True
        )
    return (0.5 + 0.6 * texture).clamp(0, 1)


def draw(split: str, shifted: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (N, 3, 28, 28) and labels (N,), the same on every call.

    Digits of both domains have affine jitter and strokes of several widths. With `shifted` they are
    drawn on a colored texture, in a color lighter or darker than it (inverted), with more noise.
    """
    n = COUNT[split]
    random = generator("drawn_digits", split, shifted)

    def uniform(low, high, *shape):
        return torch.rand((n, *shape), generator=random) * (high - low) + low

    labels = torch.randint(10, (n,), generator=random)
    stroke = torch.randint(len(STROKES), (n,), generator=random)
    spread = 1.2 if shifted else 1.0
    angle = uniform(-0.2, 0.2) * spread
    zoom = 1 + uniform(-0.15, 0.15) * spread
    slant = uniform(-0.2, 0.2) * spread
    shift = uniform(-0.12, 0.12, 2) * spread
    cos, sin = angle.cos() * zoom, angle.sin() * zoom
    rows = [cos, cos * slant - sin, shift[:, 0], sin, sin * slant + cos, shift[:, 1]]
    theta = torch.stack(rows, 1).view(n, 2, 3)
    grid = torch.nn.functional.affine_grid(theta, [n, 1, SIDE, SIDE], align_corners=False)
    digit = torch.nn.functional.grid_sample(
        _glyphs()[labels, stroke].unsqueeze(1), grid, align_corners=False
    )
    if not shifted:
        image = digit.expand(-1, 3, -1, -1) + 0.02 * torch.randn(n, 3, SIDE, SIDE, generator=random)
    else:
        ground = 0.3 + 0.9 * (_texture(n, random) - 0.5) + 0.1 * uniform(-1, 1, 3, 1, 1)
        image = ground + digit * uniform(0.2, 0.5, 3, 1, 1)
        inverted = uniform(0, 1, 1, 1, 1) < 0.5
        image = torch.where(inverted, 1 - image, image)
        image = image + 0.08 * torch.randn(n, 3, SIDE, SIDE, generator=random)
    return (255 * image).round().clamp(0, 255).to(torch.uint8), labels


def open_drawn(name: str, train: bool) -> ImageSet:
    """`drawn_digits` or `drawn_digits_shifted`."""
    images, labels = draw("train" if train else "test", shifted=name.endswith("_shifted"))
    return image_set(name, images, labels, CLASSES)
