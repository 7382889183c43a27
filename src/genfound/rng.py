"""Random numbers without state: every draw is a pure function of (seed, purpose, key).

A key is the number of a pack, an image or a step. Because nothing is consumed, a restarted run, another
number of ranks or another order of calls cannot change what is drawn.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import torch
from torch import Tensor

Key = int | str


class Rng:
    """A stream of random numbers addressed by name.

    Args:
        seed: the seed of the run.
        key: what this stream belongs to, e.g. `("train", 17)` for pack 17.
    """

    def __init__(self, seed: int, *key: Key) -> None:
        self.seed = seed
        self.key = key

    def at(self, *key: Key) -> Rng:
        """The stream of something inside this one, e.g. of one pack or one image."""
        return Rng(self.seed, *self.key, *key)

    def integer(self, purpose: str) -> int:
        """A 63-bit integer; also the seed of every other draw with this purpose."""
        text = "/".join(map(str, (self.seed, *self.key, purpose)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little") >> 1

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator placed at the beginning of this draw."""
        return torch.Generator(device).manual_seed(self.integer(purpose))

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Standard normal float32 numbers of the given shape."""
        return torch.randn(tuple(shape), generator=self.generator(purpose, device), device=device)

    def uniform(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Uniform float32 numbers in [0, 1) of the given shape."""
        return torch.rand(tuple(shape), generator=self.generator(purpose, device), device=device)

    def permutation(self, purpose: str, n: int) -> Tensor:
        """(n,) int64, a uniformly random order of 0 .. n-1."""
        return torch.randperm(n, generator=self.generator(purpose))
