"""The order of images, a pure function of the seed."""

import functools

from genfound.rng import Rng


class Order:
    """Position in the run -> index in the data set: infinite, shuffled pass by pass, and without state.

    Position k of a run is image `k mod n` of a permutation drawn from (seed, k div n), so any position can be
    looked up directly; a resumed run and any number of ranks see the same sequence.
    """

    def __init__(self, images: int, seed: int) -> None:
        self.images = images
        rng = Rng(seed, "order")
        self._permutation = functools.lru_cache(maxsize=2)(lambda k: rng.at(k).permutation("pass", images).numpy())

    def __getitem__(self, position: int) -> int:
        number, within = divmod(position, self.images)
        return int(self._permutation(number)[within])
