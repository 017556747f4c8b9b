"""Random numbers as pure functions of their purpose."""

import hashlib

import torch


def generator(*purpose) -> torch.Generator:
    """A CPU generator, seeded by a hash of `purpose`, such as (seed, role, "augment", step)."""
    # A file's name may hold bytes that are no UTF-8.
    text = "/".join(map(str, purpose)).encode(errors="surrogateescape")
    digest = hashlib.blake2b(text, digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


class Draws:
    """Random numbers for the images of a batch, of which this process has some rows.

    They are drawn for the entire batch, so that an image has the same ones in any number of
    processes.

    Args:
        generator: the source of the numbers.
        count: images in the entire batch.
        rows: the rows of this process; None for all.
    """

    def __init__(self, generator: torch.Generator, count: int, rows: slice | None = None):
        self.generator, self.count = generator, count
        self.rows = slice(None) if rows is None else rows

    def uniform(self, low: float = 0.0, high: float = 1.0, *shape: int) -> torch.Tensor:
        """A value of `shape` per image, uniform in [low, high): (n, *shape)."""
        values = torch.rand((self.count, *shape), generator=self.generator)[self.rows]
        return values * (high - low) + low

    def normal(self, *shape: int) -> torch.Tensor:
        """A value of `shape` per image, standard normal: (n, *shape)."""
        return torch.randn((self.count, *shape), generator=self.generator)[self.rows]


class Order:
    """Endless random order of a set, in which every pass contains each image once.

    Args:
        seed: of the run.
        domain: the role of the set; every role has its own order.
        size: number of images.
    """

    def __init__(self, seed: int, domain: str, size: int):
        self.seed, self.domain, self.size = seed, domain, size
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
