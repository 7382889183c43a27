"""How fast a run is: images, tokens and arithmetic per second, padding, and time spent waiting for data."""

from __future__ import annotations

import time
from contextlib import AbstractContextManager

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from genfound.batch import Batch
from genfound.data.loader import TrainLoader
from genfound.data.plan import Micro
from genfound.module import GenerativeModule


class Speed:
    """Sums of one window of steps.

    `perf/mfu` is the arithmetic of the forward and backward pass (three times the operations counted in one
    forward pass) over the rate that a plain matrix product reaches on the same machine in the same precision.
    """

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader
        self.calibrated = False
        self.clear()

    def clear(self) -> None:
        """Begin a new window."""
        self.images = self.tokens = self.slots = self.micros = 0
        self.seconds = 0.0
        self._waited = self.loader.waited

    def calibrate(self, module: GenerativeModule, batch: Batch) -> None:
        """Count the operations of one forward pass, and measure the machine."""
        self.calibrated = True
        times = torch.zeros(len(batch.y), device=batch.x.device)
        autocast: AbstractContextManager[None] = module.trainer.precision_plugin.forward_context()
        with torch.no_grad(), autocast:
            with FlopCounterMode(display=False) as counter:
                module.net(batch, times)
            self.matmul_rate = matmul_rate(batch.x.device)
        self.forward_flops = counter.get_total_flops()

    def add(self, micro: Micro, batch: Batch, seconds: float) -> None:
        """Add a micro-batch of this rank."""
        self.images += len(micro.indices)
        self.tokens += micro.tokens
        self.slots += micro.tokens if batch.layout == "dense" else batch.slots
        self.micros += 1
        self.seconds += seconds

    def sums(self, device: torch.device) -> Tensor:
        """What ranks add up."""
        waited = self.loader.waited - self._waited
        values = [self.images, self.tokens, self.slots, self.micros, self.seconds, waited]
        return torch.tensor(values, dtype=torch.float32, device=device)

    def metrics(self, sums: list[float], ranks: int) -> dict[str, float]:
        """The keys `perf/*` from the sums of all ranks."""
        images, tokens, slots, micros, seconds, waited = sums
        wall = max((seconds + waited) / ranks, 1e-9)
        flops = 3 * self.forward_flops * micros
        return {
            "perf/images_per_s": images / wall,
            "perf/tokens_per_s": tokens / wall,
            "perf/padding": 1 - tokens / slots,
            "perf/data_wait": waited / ranks / wall,
            "perf/mfu": flops / wall / ranks / self.matmul_rate,
        }


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a plain matrix product under the current autocast."""
    n = 8192 if device.type == "cuda" else 1024
    a = torch.randn(n, n, device=device)
    linear = torch.nn.functional.linear
    if torch.is_autocast_enabled(device.type):
        a = a.to(torch.get_autocast_dtype(device.type))
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        linear(a, a)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - begin)
    return 2 * n**3 / best
