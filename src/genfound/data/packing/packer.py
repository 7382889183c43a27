"""Grouping of a stream of positions into micro-batches.

`Packer` fills packs of a token budget in arrival order and closes each pack's gap with those of the next images
that fit best together; what does not fit is carried over, so that no token budget is lost. `FixedBatcher` takes a
fixed number of images. Both are deterministic, see sizes only, and can be put back to a recorded state.
"""

import bisect
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

TokensAt = Callable[[int], int]
"""Tokens of the image at a position of the run."""

LOOKAHEAD = 256

RESERVE = 64
"""The last 1/64 of a budget is not filled in arrival order: a gap of a few images can nearly always be closed."""


def in_order(tokens: Sequence[int], max_tokens: float, max_images: int) -> Iterator[range]:
    """Places 0 .. n-1, each once: runs of consecutive ones, as many as fit, and the last with what is left."""
    first = total = 0
    for place, count in enumerate(tokens):
        if place > first and (total + count > max_tokens or place - first == max_images):
            yield range(first, place)
            first, total = place, 0
        total += count
    if tokens:
        yield range(first, len(tokens))


class Packer:
    """Arrival order with gaps that are closed as far as possible.

    The oldest image that waits always opens a pack, so that none waits for ever. A pack that reaches `max_images` is
    closed; the gap search sees `lookahead` waiting images.
    """

    window = 64

    def __init__(self, tokens_at: TokensAt, max_tokens: int, max_images: int, lookahead: int = LOOKAHEAD) -> None:
        self.tokens_at, self.lookahead = tokens_at, lookahead
        self.max_tokens, self.max_images = max_tokens, max_images
        self.reserve = max_tokens // RESERVE
        self.kind = repr(("packs", max_tokens, max_images, lookahead))
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
            self._refill()
            oldest = next(iter(self._waiting))
            if pack and self._waiting[oldest] > gap - self.reserve:
                break
            gap -= self._remove(oldest)
            pack.append(oldest)
        self._close(pack, gap)
        return pack

    def _refill(self) -> None:
        """Let so many images wait as the gap search sees."""
        while len(self._waiting) < self.lookahead:
            self._admit(self._next, self.tokens_at(self._next))
            self._next += 1

    def _close(self, pack: list[int], gap: int) -> None:
        """Fill the gap of a pack."""
        for tokens in self._closing(gap)[: self.max_images - len(pack)]:
            pack.append(self._take_of(tokens))

    def _take_of(self, tokens: int) -> int:
        """The position of the oldest image with so many tokens."""
        position = next(iter(self._by_tokens[tokens]))
        self._remove(position)
        return position

    def _closing(self, gap: int) -> list[int]:
        """Tokens of the waiting images that fill a gap as far as any of them can, large ones first.

        Bit s of `reach[i]` says that some of the first i candidates have s tokens together.
        """
        reach, candidates = [1], list[int]()
        below = (1 << (gap + 1)) - 1
        for tokens in reversed(self._lengths[: bisect.bisect_right(self._lengths, gap)]):
            for _ in range(min(len(self._by_tokens[tokens]), gap // tokens)):
                reach.append(reach[-1] | reach[-1] << tokens & below)
                candidates.append(tokens)
                if reach[-1] >> gap:
                    return _sum_to(gap, reach, candidates)
        return _sum_to(reach[-1].bit_length() - 1, reach, candidates)

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


def _sum_to(total: int, reach: list[int], candidates: list[int]) -> list[int]:
    """The candidates that add up to a total that can be reached."""
    chosen = []
    for i, tokens in reversed(list(enumerate(candidates))):
        if not reach[i] >> total & 1:
            chosen.append(tokens)
            total -= tokens
    return chosen[::-1]


class Repeated:
    """The first micro-batches of another batcher, again and again, to see whether a network can learn them."""

    def __init__(self, batcher: Packer, count: int) -> None:
        self.window = batcher.window
        self.kind = repr((batcher.kind, count))
        self._micros = [batcher.take() for _ in range(count)]
        self._after = batcher.state()
        self._taken = 0

    def take(self) -> list[int]:
        """Positions of the next micro-batch."""
        self._taken += 1
        return list(self._micros[(self._taken - 1) % len(self._micros)])

    def state(self) -> dict[str, Any]:
        """How many were taken, and where the other batcher would go on."""
        return {**self._after, "taken": self._taken}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from a recorded state."""
        self._taken = state.get("taken", 0)


class FixedBatcher(Packer):
    """A fixed number of images a micro-batch, in order."""

    window = 1

    def __init__(self, images: int) -> None:
        super().__init__(lambda position: 1, images, images, lookahead=1)
        self.kind, self.reserve = repr(("chunks", images)), 0


Batcher = Packer | Repeated
"""Produces micro-batches of positions. `window` of them are matched by cost; `kind` changes with whatever decides,
besides the tokens of each position, what a micro-batch holds; `restore` continues from what `state` gave."""
