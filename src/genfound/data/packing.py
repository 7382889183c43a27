"""Grouping of a stream of positions into micro-batches.

`Packer` fills packs of a token budget in arrival order and closes each pack's gap with the best-fitting of
the next images; what does not fit is carried over, so that no token budget is lost. `Chunker` takes a fixed
number of images. Both are deterministic, see sizes only, and can be put back to a recorded state.
"""

from __future__ import annotations

import bisect
from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any, Protocol

TokensAt = Callable[[int], int]
"""Tokens of the image at a position of the run."""

LOOKAHEAD = 256


class Grouper(Protocol):
    """Produces micro-batches of positions, one after another."""

    window: int

    def take(self) -> list[int]:
        """Positions of the next micro-batch."""

    def state(self) -> dict[str, Any]:
        """What `restore` needs to continue from here; plain numbers and lists."""

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a recorded state."""


class Packer:
    """Arrival order with best-fit gaps.

    Args:
        tokens_at: tokens of the image at a position.
        max_tokens: budget of a pack.
        max_images: a pack that reaches this number is closed.
        lookahead: how many waiting images the gap search sees.
    """

    window = 64

    def __init__(self, tokens_at: TokensAt, max_tokens: int, max_images: int, lookahead: int = LOOKAHEAD) -> None:
        self.tokens_at = tokens_at
        self.max_tokens = max_tokens
        self.max_images = max_images
        self.lookahead = lookahead
        self._clear()

    def _clear(self) -> None:
        self._next = 0
        self._waiting: OrderedDict[int, int] = OrderedDict()  # position -> tokens, in arrival order
        self._by_tokens: dict[int, OrderedDict[int, None]] = {}
        self._lengths: list[int] = []  # sorted keys of _by_tokens

    def take(self) -> list[int]:
        """Positions of the next pack."""
        pack: list[int] = []
        gap = self.max_tokens
        while len(pack) < self.max_images:
            while len(self._waiting) < self.lookahead:
                self._admit(self._next, self.tokens_at(self._next))
                self._next += 1
            position = self._choose(gap)
            if position is None:
                break
            gap -= self._remove(position)
            pack.append(position)
        return pack

    def _choose(self, gap: int) -> int | None:
        """The oldest waiting image if it fits, else the largest that does (the oldest of equals)."""
        oldest = next(iter(self._waiting))
        if self._waiting[oldest] <= gap:
            return oldest
        fitting = bisect.bisect_right(self._lengths, gap)
        return next(iter(self._by_tokens[self._lengths[fitting - 1]])) if fitting else None

    def _admit(self, position: int, tokens: int) -> None:
        self._waiting[position] = tokens
        if tokens not in self._by_tokens:
            self._by_tokens[tokens] = OrderedDict()
            bisect.insort(self._lengths, tokens)
        self._by_tokens[tokens][position] = None

    def _remove(self, position: int) -> int:
        tokens = self._waiting.pop(position)
        same = self._by_tokens[tokens]
        del same[position]
        if not same:
            del self._by_tokens[tokens]
            self._lengths.remove(tokens)
        return tokens

    def state(self) -> dict[str, Any]:
        """The next position and the images carried over."""
        return {"next": self._next, "waiting": list(self._waiting)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a recorded state."""
        self._clear()
        self._next = state["next"]
        for position in state["waiting"]:
            self._admit(position, self.tokens_at(position))


class Chunker:
    """A fixed number of images a micro-batch, in order."""

    window = 1

    def __init__(self, images: int) -> None:
        self.images = images
        self._next = 0

    def take(self) -> list[int]:
        """Positions of the next micro-batch."""
        first, self._next = self._next, self._next + self.images
        return list(range(first, self._next))

    def state(self) -> dict[str, Any]:
        """The next position."""
        return {"next": self._next}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a recorded state."""
        self._next = state["next"]
