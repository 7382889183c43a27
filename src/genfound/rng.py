"""Random numbers without state: every draw is a pure function of (seed, purpose, key).

A key is the number of a pack, an image or a step. Because nothing is consumed, a restarted run, another
number of ranks or another order of calls cannot change what is drawn.

On the CPU all 19,937 bits of a generator's state are hashed from its name, so that no two draws of a run share
a stream. `torch.Generator.manual_seed` keeps 32 bits of a seed there, of which 10,000 draws have two equal ones with
a probability of 1 %, and 100,000 of 69 %. On CUDA 63 bits of the name count, and two in a billion draws are
equal with a probability of 5 %. Numbers for Apple's GPUs are those of the CPU.
"""

import hashlib
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor

Key = int | str

FRESH = torch.Generator().get_state().numpy()
"""Bytes of a CPU generator before its first draw (ATen/CPUGeneratorImpl.cpp)."""
WORDS = slice(24, 24 + 624 * 8)
"""Those of the 624 words of its Mersenne Twister, each in a 64-bit integer."""


class Rng:
    """A stream of random numbers: of the seed of a run, and of what it belongs to, e.g. `"train", 17` for pack 17."""

    def __init__(self, seed: int, *key: Key) -> None:
        self.seed = seed
        self.key = key

    def at(self, *key: Key) -> "Rng":
        """The stream of something inside this one, e.g. of one pack or one image."""
        return Rng(self.seed, *self.key, *key)

    def integer(self, purpose: str) -> int:
        """A 63-bit integer; also the seed of every other draw with this purpose on CUDA."""
        return int.from_bytes(hashlib.blake2b(self._name(purpose), digest_size=8).digest(), "little") >> 1

    def generator(self, purpose: str, device: torch.device | str = "cpu") -> torch.Generator:
        """A generator placed at the beginning of this draw."""
        generator = torch.Generator(device)
        if generator.device.type != "cpu":
            return generator.manual_seed(self.integer(purpose))
        state = FRESH.copy()
        state[WORDS].view(np.uint64)[:] = np.frombuffer(hashlib.shake_128(self._name(purpose)).digest(624 * 4), "<u4")
        generator.set_state(torch.from_numpy(state))
        return generator

    def _name(self, purpose: str) -> bytes:
        return "/".join(map(str, (self.seed, *self.key, purpose))).encode()

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Standard normal float32 numbers of the given shape."""
        return self._drawn(torch.randn, purpose, shape, device)

    def uniform(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """Uniform float32 numbers in [0, 1) of the given shape."""
        return self._drawn(torch.rand, purpose, shape, device)

    def _drawn(
        self, law: Callable[..., Tensor], purpose: str, shape: Sequence[int], device: torch.device | str
    ) -> Tensor:
        place = torch.device("cpu") if torch.device(device).type == "mps" else device
        return law(tuple(shape), generator=self.generator(purpose, place), device=place).to(device)

    def permutation(self, purpose: str, n: int) -> Tensor:
        """(n,) int64, a uniformly random order of 0 .. n-1."""
        return torch.randperm(n, generator=self.generator(purpose))
