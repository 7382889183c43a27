"""How far long work on many images is: a line that moves for a person, one every few seconds for a log file."""

import sys
import time
from collections.abc import Callable

Progress = Callable[[float, int], None]
"""Called with the number of images that are finished, and that of all; the first time before any is."""


def no_progress(done: float, total: int) -> None:
    """Say nothing."""


QUIET, MOVING = 10.0, 0.2
"""Seconds between two lines."""


class ProgressCounter:
    """Prints images finished, images/s and the time that is left."""

    def __init__(self, what: str, every: float = QUIET) -> None:
        self.what = what
        self.moves = sys.stdout.isatty()
        self.every = MOVING if self.moves else every
        self._first: tuple[float, float] | None = None

    def __call__(self, done: float, total: int) -> None:
        """Say it when it is time, and at the end."""
        now = time.monotonic()
        if self._first is None:
            self._first, self._said = (now, done), now
        over = done >= total
        if not over and now - self._said < self.every:
            return
        self._said = now
        rate = (done - self._first[1]) / max(now - self._first[0], 1e-9)
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        left = round((total - done) / rate) if rate else 0
        clock = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
        count = f"{done:,.0f}" if done == int(done) else f"{done:,.1f}"
        line = f"{count}/{total:,} {self.what}  {speed} images/s  {clock} left"
        print(f"\r{line}\x1b[K" if self.moves else line, end="" if self.moves and not over else "\n", flush=True)


def shared_progress(what: str, rank: int, ranks: int) -> Progress:
    """A counter on the first of several processes, which speaks for its own share."""
    if rank:
        return no_progress
    return ProgressCounter(what if ranks == 1 else f"{what} on the first of {ranks} processes")
