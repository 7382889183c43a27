"""Other ways to pack, to compare with and to read old lists: NiT's offline LPFHP, and greedy best fit."""

from __future__ import annotations

import bisect
import json
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from genfound.data.packing.packer import Packer, TokensAt

Strategy = tuple[list[int], int]
"""Lengths of a pack, and how many such packs there are."""


class BestFit(Packer):
    """Arrival order; a gap gets the largest waiting image that fits, again and again.

    Args:
        tokens_at, max_tokens, max_images, lookahead: see `Packer`.
    """

    def __init__(self, tokens_at: TokensAt, max_tokens: int, max_images: int, lookahead: int) -> None:
        super().__init__(tokens_at, max_tokens, max_images, lookahead)
        self.reserve = 0

    def _close(self, pack: list[int], gap: int) -> None:
        """Fill the gap of a pack."""
        while len(pack) < self.max_images:
            self._refill()
            fitting = bisect.bisect_right(self._lengths, gap)
            if not fitting:
                return
            tokens = self._lengths[fitting - 1]
            gap -= tokens
            pack.append(self._take_of(tokens))


def lpfhp(lengths: Iterable[int], max_length: int, max_images: int) -> list[Strategy]:
    """Longest-pack-first histogram packing, as NiT does it offline (nit/data/pack/lpfhp.py).

    Args:
        lengths: tokens of all images.
        max_length: budget of a pack.
        max_images: images of a pack at most.

    Returns:
        In the official order; the lengths of a pack ascend.

    Raises:
        ValueError: an image is longer than a pack, or has no tokens.
    """
    count = Counter(map(int, lengths))
    if count and not 1 <= min(count) <= max(count) <= max_length:
        raise ValueError(f"images of {min(count)} to {max(count)} tokens do not fit packs of {max_length}")
    packing = _Lpfhp(max_length, max_images)
    for length in sorted(count, reverse=True):
        packing.place(length, count[length])
    return packing.strategies()


class _Lpfhp:
    """Packs by what is left in them, in the order in which such a rest first came up."""

    def __init__(self, max_length: int, max_images: int) -> None:
        self.max_length, self.max_images = max_length, max_images
        self.open: dict[int, list[Strategy]] = {}  # tokens left -> packs, newest last
        self.full: dict[int, list[Strategy]] = {}

    def place(self, length: int, number: int) -> None:
        """Put `number` images of one length into open packs that they leave fullest, or into new ones."""
        offset = 0
        while number > 0:
            if length + offset in self.open:
                number -= self._fill(length, offset, number)
                offset = 0
            else:
                offset += 1
            if offset >= self.max_length - length + 1:
                repeat = min(self.max_length // length, self.max_images, number)
                self._add([length] * repeat, number // repeat, self.max_length - length * repeat)
                number -= number // repeat * repeat

    def _fill(self, length: int, offset: int, number: int) -> int:
        """Use the newest packs that have `length + offset` left; returns how many images went in."""
        newest = self.open[length + offset]
        pack, count = newest.pop()
        repeat = min(1 + offset // length, self.max_images - len(pack), number)
        used = min(count, number // repeat)
        if count > used:
            newest.append((pack, count - used))
        self._add(pack + [length] * repeat, used, offset - (repeat - 1) * length)
        if not newest:
            del self.open[length + offset]
        return used * repeat

    def _add(self, pack: list[int], count: int, left: int) -> None:
        done = len(pack) == self.max_images or left == 0
        (self.full if done else self.open).setdefault(left, []).append((pack, count))

    def strategies(self) -> list[Strategy]:
        """All packs."""
        for left, packs in self.open.items():
            self.full.setdefault(left, []).extend(packs)
        return [(pack[::-1], count) for same in self.full.values() for pack, count in same]


def assign(strategies: Iterable[Strategy], lengths: Sequence[int]) -> list[list[int]]:
    """Images for packs: each place takes the last image of its length that is left (nit/data/pack/__init__.py)."""
    left: dict[int, list[int]] = defaultdict(list)
    for index, length in enumerate(lengths):
        left[int(length)].append(index)
    return [[left[length].pop() for length in pack] for pack, count in strategies for _ in range(count)]


def pack_meta(meta: Path, max_length: int, split: int) -> Path:
    """Write the list of packs of a meta file of NiT beside it (tools/pack_dataset.py).

    Args:
        meta: `<name>_meta.jsonl`, one image per line with `latent_h` and `latent_w`.
        max_length: budget of a pack.
        split: so many consecutive parts are packed each by itself; what is left of the division is dropped.

    Returns:
        `<name>_LPFHP_<max_length>.json`, a list of lists of line numbers from 0.
    """
    lines = (json.loads(line) for line in meta.read_text().splitlines())
    lengths = [line["latent_h"] * line["latent_w"] for line in lines]
    size = len(lengths) // split
    packs: list[list[int]] = []
    for begin in range(0, size * split, size):
        own = lengths[begin : begin + size]
        found = assign(lpfhp(own, max_length, max_length), own)
        packs += [[begin + index for index in pack] for pack in found]
    file = meta.with_name(f"{meta.name.removesuffix('_meta.jsonl')}_LPFHP_{max_length}.json")
    file.write_text(json.dumps(packs))
    return file


def fill(packs: Sequence[Sequence[int]], max_length: int) -> np.ndarray:
    """(n,) float64, the share of each pack that its images take up; packs as lists of lengths."""
    return np.array([sum(pack) for pack in packs]) / max_length


def costs(packs: Sequence[Sequence[int]], width: int) -> np.ndarray:
    """(n,) float64, operations of each pack in a layer of a width D: 12 D^2 tokens + 2 D pairs that attend."""
    tokens = np.array([sum(pack) for pack in packs], dtype=np.float64)
    pairs = np.array([sum(length**2 for length in pack) for pack in packs], dtype=np.float64)
    return 12 * width**2 * tokens + 2 * width * pairs
