"""Random numbers as pure functions of their purpose."""

import hashlib

import numpy as np
import torch

from common import ranks


def _hash(purpose: tuple) -> int:
    """A number of 64 bits for a purpose, such as (seed, role, "augment")."""
    # A file's name may hold bytes that are no UTF-8.
    text = "/".join(map(str, purpose)).encode(errors="surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def generator(*purpose) -> torch.Generator:
    """A CPU generator, seeded by a hash of `purpose`, such as (seed, role, "order", pass)."""
    return torch.Generator().manual_seed(_hash(purpose) & (2**63 - 1))


def _mixed(x: np.ndarray) -> np.ndarray:
    """The output function of the generator splitmix64, for uint64 (Steele et al. 2014, OOPSLA)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class Draws:
    """Random numbers for the images of a batch.

    Each is a function of the purpose, the image's position in the endless order, and how many
    numbers were drawn before: it does not depend on the other images of the batch, and so not on
    the number of workers or processes.

    Args:
        positions: of the images, int64 (n,).
        purpose: what the numbers are for, such as (seed, role, "augment").
    """

    BLOCK = 16  # numbers that are computed at once
    STEP = np.uint64(0x9E3779B97F4A7C15)  # of splitmix64

    def __init__(self, positions: torch.Tensor, *purpose):
        starts = positions.numpy().astype(np.uint64) * self.STEP + np.uint64(_hash(purpose))
        self.starts = _mixed(starts)[:, None]
        self.drawn = 0  # numbers that were drawn for each image
        self.bits = np.empty((len(positions), 0), np.uint64)  # from which numbers are drawn next

    def _take(self, count: int) -> np.ndarray:
        """The next `count` numbers of 24 bits per image: uint64 (n, count)."""
        while self.bits.shape[1] < count:
            numbers = np.arange(1, self.BLOCK + 1, dtype=np.uint64) + np.uint64(self.drawn)
            self.drawn += self.BLOCK
            block = _mixed(self.starts + numbers * self.STEP) >> np.uint64(40)
            self.bits = np.concatenate([self.bits, block], 1)
        taken, self.bits = self.bits[:, :count], self.bits[:, count:]
        return taken

    def uniform(self, low: float = 0.0, high: float = 1.0, count: int = 1) -> torch.Tensor:
        """`count` numbers per image, uniform in [low, high) up to rounding: float32 (n, count)."""
        values = torch.from_numpy(self._take(count).astype(np.float32)) * 2.0**-24
        return values * (high - low) + low

    def log_uniform(self, low: float, high: float) -> torch.Tensor:
        """A number per image in [low, high], uniform on a logarithmic scale: (n, 1)."""
        return self.uniform(float(np.log(low)), float(np.log(high))).exp().clamp(low, high)

    def seeds(self) -> torch.Tensor:
        """The two halves of a seed per image, whole numbers below 2^24: float32 (n, 2)."""
        return torch.from_numpy(self._take(2).astype(np.float32))


class Order:
    """Endless random order of a set, in which every pass contains each image once.

    Args:
        seed: of the run.
        domain: the role of the set; every role has its own order.
        size: number of images.
        batch: images in a batch of all processes.
    """

    def __init__(self, seed: int, domain: str, size: int, batch: int = 1):
        self.seed, self.domain, self.size, self.batch = seed, domain, size, batch
        self.number = -1  # of the pass that `permutation` belongs to
        self.permutation = None

    def _pass(self, number: int) -> torch.Tensor:
        """The permutation of one pass; the latest one is cached."""
        if number != self.number:
            random = generator(self.seed, self.domain, "order", number)
            self.permutation = torch.randperm(self.size, generator=random)
            self.number = number
        return self.permutation

    def positions(self, start: int, count: int) -> torch.Tensor:
        """Numbers of the images at positions start .. start + count - 1, int64 (count,)."""
        parts = []
        while count > 0:
            number, offset = divmod(start, self.size)
            parts.append(self._pass(number)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)

    def rows(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(positions, numbers of the images) of the rows that this process has of a batch.

        Args:
            number: of the batch, from 0.
        """
        start, rows = number * self.batch, ranks.rows(self.batch)
        positions = torch.arange(start, start + self.batch)
        return positions[rows], self.positions(start, self.batch)[rows]
