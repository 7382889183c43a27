"""Times of calls that take turns, so that a machine that slows down slows all of them."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch

Call = Callable[[], object]


def interleaved(calls: Sequence[Call], repeats: int) -> list[list[float]]:
    """Seconds of each call in each round, after one round that is not counted.

    On CUDA by the clock, with all of the device's work; on the CPU processor time.
    """
    return [[seconds(call) for call in calls] for _ in range(repeats + 1)][1:]


def seconds(call: Call) -> float:
    """See `interleaved`."""
    cuda = torch.cuda.is_available()
    clock = time.perf_counter if cuda else time.process_time
    if cuda:
        torch.cuda.synchronize()
    begin = clock()
    call()
    if cuda:
        torch.cuda.synchronize()
    return clock() - begin


def medians(rounds: Sequence[Sequence[float]]) -> list[float]:
    """Of each call."""
    return [statistics.median(column) for column in zip(*rounds, strict=True)]


def ratio(rounds: Sequence[Sequence[float]], of: int, to: int) -> float:
    """Median over the rounds of the seconds of one call over those of another."""
    return statistics.median(row[of] / row[to] for row in rounds)


def cpu_precisions() -> list[str]:
    """Those worth a measurement on the CPU: fp32, and bf16 where it has the arithmetic."""
    return ["fp32", *["bf16"] * torch.cpu._is_avx512_bf16_supported()]
