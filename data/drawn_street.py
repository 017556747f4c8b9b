"""Built-in street scenes with masks, drawn with PIL: by day, and at dusk as a shifted target."""

import numpy as np
import torch
from PIL import Image, ImageDraw

from data.image_set import ImageSet, image_set
from data.order import generator

CLASSES = ["sky", "road", "building", "vehicle", "person", "vegetation", "pole"]
SKY, ROAD, BUILDING, VEHICLE, PERSON, VEGETATION, POLE = range(7)
HEIGHT, WIDTH = 64, 128  # px
COUNT = {"train": 300, "test": 60}  # images per split


class _Scene:
    """One street, drawn as an image and as a mask of class numbers at the same time.

    Colors are floats in [0, 1]. The order of the random draws determines the scene.
    """

    def __init__(self, random: np.random.Generator, dusk: bool):
        self.random, self.dusk = random, dusk
        self.mask = Image.new("L", (WIDTH, HEIGHT), SKY)
        self.image = Image.new("RGB", (WIDTH, HEIGHT))
        self.draws = ImageDraw.Draw(self.image), ImageDraw.Draw(self.mask)
        self.lights: list[tuple[float, float, float]] = []  # x, y and radius of headlights

    def _color(self, *base: float, spread: float = 0.08) -> tuple[int, ...]:
        color = np.clip(np.array(base) + self.random.uniform(-spread, spread, 3), 0, 1)
        return tuple((255 * color).astype(int).tolist())

    def _put(self, shape: str, box, color: tuple[int, ...], label: int) -> None:
        """Draw a rectangle or an ellipse in image and mask; a box is [left, top, right, bottom]."""
        for draw, fill in zip(self.draws, (color, label), strict=True):
            getattr(draw, shape)(box, fill=fill)

    def _sky(self, horizon: int) -> None:
        if self.dusk:
            top, low = (0.35, 0.3, 0.55), (0.95, 0.55, 0.35)
        else:
            top, low = (0.45, 0.65, 0.95), (0.8, 0.9, 1.0)
        for y in range(horizon + 1):
            share = y / horizon
            color = [(1 - share) * a + share * b for a, b in zip(top, low, strict=True)]
            self._put("rectangle", [0, y, WIDTH, y], self._color(*color, spread=0.01), SKY)

    def _buildings(self, horizon: int) -> None:
        x = int(self.random.integers(-10, 10))
        while x < WIDTH:
            width = int(self.random.integers(12, 30))
            height = int(self.random.integers(8, horizon))
            if self.random.random() < 0.75:
                colors = [(0.7, 0.6, 0.5), (0.6, 0.35, 0.3), (0.6, 0.6, 0.62)]
                color = self._color(*self.random.choice(colors))
                box = [x, horizon - height, x + width, horizon + 3]
                self._put("rectangle", box, color, BUILDING)
                for wx in range(x + 2, x + width - 2, 5):
                    for wy in range(horizon - height + 2, horizon - 2, 5):
                        lit = self.dusk and self.random.random() < 0.3
                        window = self._color(*((1.0, 0.85, 0.5) if lit else (0.25, 0.3, 0.4)))
                        self._put("rectangle", [wx, wy, wx + 2, wy + 2], window, BUILDING)
            x += width + int(self.random.integers(0, 6))

    def _tree(self, horizon: int) -> None:
        x = self.random.integers(0, WIDTH)
        radius = self.random.integers(4, 11)
        y = horizon + 2 - self.random.integers(0, 8)
        for _ in range(4):
            dx, dy = self.random.integers(-4, 5, 2)
            box = [x + dx - radius, y + dy - radius, x + dx + radius, y + dy + radius * 0.8]
            self._put("ellipse", [int(v) for v in box], self._color(0.2, 0.45, 0.18), VEGETATION)

    def _pole(self, horizon: int) -> None:
        x = int(self.random.integers(2, WIDTH - 2))
        foot = int(self.random.integers(horizon + 3, horizon + 14))
        height = int(self.random.integers(22, 40))
        color = self._color(0.35, 0.35, 0.36)
        self._put("rectangle", [x, foot - height, x + 1, foot], color, POLE)

    def _vehicle(self, foot: int, horizon: int) -> None:
        size = 6 + (foot - horizon) * 0.45
        x = int(self.random.integers(-5, WIDTH - 5))
        colors = [(0.8, 0.1, 0.1), (0.1, 0.2, 0.7), (0.9, 0.9, 0.9), (0.15, 0.15, 0.15)]
        color = self._color(*self.random.choice(colors))
        body = [x, foot - 0.55 * size, x + 1.9 * size, foot - 0.12 * size]
        cabin = [x + 0.4 * size, foot - size, x + 1.5 * size, foot - 0.5 * size]
        self._put("rectangle", body, color, VEHICLE)
        self._put("rectangle", cabin, self._color(0.3, 0.35, 0.45), VEHICLE)
        for across in (0.4, 1.5):
            wheel = [x + (across - 0.2) * size, foot - 0.35 * size, x + (across + 0.2) * size, foot]
            self._put("ellipse", wheel, self._color(0.05, 0.05, 0.05, spread=0.03), VEHICLE)
        if self.random.random() < 0.7:
            self.lights += [(x + 1.85 * size, foot - 0.35 * size, 0.35 * size)]

    def _person(self, foot: int, horizon: int) -> None:
        size = 7 + (foot - horizon) * 0.4
        x = int(self.random.integers(2, WIDTH - 2))
        colors = [(0.5, 0.2, 0.2), (0.2, 0.25, 0.5), (0.75, 0.7, 0.3)]
        clothes = self._color(*self.random.choice(colors))
        body = [x - 0.13 * size, foot - 0.78 * size, x + 0.13 * size, foot]
        self._put("rectangle", body, clothes, PERSON)
        head = [x - 0.1 * size, foot - size, x + 0.1 * size, foot - 0.78 * size]
        self._put("ellipse", head, self._color(0.8, 0.6, 0.5), PERSON)

    def draw(self) -> tuple[np.ndarray, np.ndarray]:
        """Image uint8 (64, 128, 3) and mask uint8 (64, 128)."""
        random = self.random
        horizon = int(random.integers(22, 32))
        self._sky(horizon)
        self._put("rectangle", [0, horizon, WIDTH, HEIGHT], self._color(0.45, 0.45, 0.47), ROAD)
        self._buildings(horizon)
        for _ in range(random.integers(1, 5)):
            self._tree(horizon)
        for _ in range(random.integers(1, 4)):
            self._pole(horizon)
        for y in range(horizon + 6, HEIGHT, 9):
            lane_mark = [WIDTH // 2 - 1, y, WIDTH // 2 + 1, y + 4]
            self._put("rectangle", lane_mark, self._color(0.85, 0.85, 0.8), ROAD)
        feet = sorted(random.integers(horizon + 6, HEIGHT - 2, random.integers(2, 7)).tolist())
        for foot in feet:  # distant objects first: near ones cover them
            draw = self._vehicle if random.random() < 0.55 else self._person
            draw(foot, horizon)
        image = np.asarray(self.image, np.float32) / 255
        if self.dusk:
            image = self._at_dusk(image, horizon)
        noise = 0.05 if self.dusk else 0.015
        image = image + random.normal(0, noise, image.shape)
        return (255 * image.clip(0, 1)).round().astype(np.uint8), np.asarray(self.mask)

    def _at_dusk(self, image: np.ndarray, horizon: int) -> np.ndarray:
        """The image in darker light, bluish below the sky, with the glare of headlights."""
        down, across = np.mgrid[:HEIGHT, :WIDTH]
        gain = self.random.uniform(0.3, 0.5) * np.array([0.85, 0.9, 1.2])
        sky = (np.asarray(self.mask) == SKY)[..., None]
        image = np.where(sky, image * self.random.uniform(0.6, 0.9), image**1.3 * gain)
        for x, y, radius in self.lights:
            glare = np.exp(-((across - x) ** 2 + (down - y) ** 2) / (2 * radius**2))
            image = image + glare[..., None] * np.array([1.0, 0.9, 0.6])
        return image


def draw(split: str, dusk: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """uint8 images (N, 3, 64, 128) and masks (N, 64, 128), the same on every call."""
    random = np.random.default_rng(generator("drawn_street", split, dusk).initial_seed())
    scenes = [_Scene(random, dusk).draw() for _ in range(COUNT[split])]
    images, masks = (torch.from_numpy(np.stack(part)) for part in zip(*scenes, strict=True))
    return images.permute(0, 3, 1, 2).contiguous(), masks


def open_street(name: str, train: bool) -> ImageSet:
    """`drawn_street`, by day, or `drawn_street_dusk`, at dusk."""
    images, masks = draw("train" if train else "test", dusk=name.endswith("_dusk"))
    return image_set(name, images, masks, CLASSES)
