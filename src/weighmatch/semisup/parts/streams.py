"""Random streams: one generator for each purpose of a run.

What one purpose draws never shifts another's draws, so that two arms of the same seed see the
same initialisation, the same batches and the same augmentations.
"""

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor


def derive_seed(seed: int, purpose: str) -> int:
    """A 63-bit seed for `purpose`, by SHA-256."""
    digest = hashlib.sha256(f"{seed}/{purpose}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> 1


class Rows(NamedTuple):
    """Some of the rows of random numbers that are drawn together, one an image.

    Attributes:
        total: how many rows are drawn.
        own: which of them are used here.
    """

    total: int
    own: slice | Tensor = slice(None)


class Streams:
    """CPU generators by purpose, made on first use, saved and restored with a checkpoint."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self._generators: dict[str, torch.Generator] = {}

    def __getitem__(self, purpose: str) -> torch.Generator:
        if purpose not in self._generators:
            generator = torch.Generator().manual_seed(derive_seed(self.seed, purpose))
            self._generators[purpose] = generator
        return self._generators[purpose]

    def draw(self, size: int, count: int, purpose: str) -> torch.Tensor:
        """Indices (count,) below `size`, with replacement, on the CPU."""
        return torch.randint(size, (count,), generator=self[purpose])

    def state_dict(self) -> dict[str, torch.Tensor]:
        """Where each stream stands."""
        return {name: g.get_state() for name, g in self._generators.items()}

    def load_state_dict(self, state: dict[str, torch.Tensor]) -> None:
        """Continue where `state` stood."""
        for name, value in state.items():
            self[name].set_state(value)
