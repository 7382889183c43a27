"""How long a part of the work takes, without waiting for the device."""

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch


class Stopwatch:
    """Sums the time spent in its context; on CUDA by marks among the device's own work."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._marks: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what is done in this context, or started on the device."""
        if device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._marks.append((begin, end))
        else:
            start = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - start

    def take(self) -> float:
        """Seconds since this was last called; the device must have finished."""
        seconds = self._seconds + sum(begin.elapsed_time(end) for begin, end in self._marks) / 1000
        self._seconds, self._marks = 0.0, []
        return seconds
