"""Random numbers as pure functions of what they are for."""

import hashlib

import torch


def generator(*purpose) -> torch.Generator:
    """A CPU generator seeded by a hash of `purpose`, such as (seed, domain, "augment", step)."""
    digest = hashlib.blake2b("/".join(map(str, purpose)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") & (2**63 - 1))


class Order:
    """Endless order of `size` images: one random permutation a pass, so that each image comes once a pass."""

    def __init__(self, seed: int, domain: str, size: int):
        self.seed, self.domain, self.size = seed, domain, size
        self.number, self.permutation = -1, None

    def _pass(self, number: int) -> torch.Tensor:
        if number != self.number:
            self.permutation = torch.randperm(self.size, generator=generator(self.seed, self.domain, "order", number))
            self.number = number
        return self.permutation

    def positions(self, start: int, count: int) -> torch.Tensor:
        """Image numbers at positions start .. start + count - 1, int64 (count,)."""
        parts = []
        while count > 0:
            number, offset = divmod(start, self.size)
            parts.append(self._pass(number)[offset : offset + count])
            start, count = start + len(parts[-1]), count - len(parts[-1])
        return torch.cat(parts)
