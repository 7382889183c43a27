"""How fast a run is: images, tokens and arithmetic per second, padding, and time spent waiting for data."""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch
from lightning import Trainer
from torch import Tensor

from genfound.backbones.base import Flops
from genfound.batch import Batch
from genfound.data.datamodule import GenerativeDataModule
from genfound.data.packing.batch_plan import MicroBatch
from genfound.modules.base import GenerativeModule
from genfound.runtime import devices


class Throughput:
    """Sums of one window of steps.

    The clock runs from the end of the last step of a window to that of the next: waiting for data, the tokenizer,
    the steps themselves, and what is written about them. It stands while a run does something else (`paused`).

    `perf/mfu` is the arithmetic that the images need in a forward and backward pass (three times `Backbone.flops`,
    without padding) over the rate that a plain matrix product reaches on the same machine in the same precision;
    `perf/gflops_per_image` is that of a forward pass.
    """

    def __init__(self, data: GenerativeDataModule) -> None:
        self.data = data
        self.flops: Flops | None = None
        self.matmul_rate = 0.0
        self.begin()

    def begin(self, now: float | None = None) -> None:
        """Begin a window now."""
        self._micros: list[tuple[MicroBatch, int]] = []  # and its slots
        self.away = 0.0
        self._began, self._waited = time.perf_counter() if now is None else now, self.data.train.waited

    def calibrate(self, module: GenerativeModule) -> str | None:
        """Measure the machine and the network; a reason if that is impossible, and `perf/mfu` is left out."""
        try:
            with module.trainer.precision_plugin.forward_context():
                self.flops, self.matmul_rate = module.net.flops(), matmul_rate(module.device)
        except Exception as error:  # a gauge must not end a run
            return f"no perf/mfu: {type(error).__name__}: {error}"
        return None

    @contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """Stop the clock within this context, which is no part of training."""
        begin = _now(device)
        try:
            yield
        finally:
            self.away += _now(device) - begin

    def add(self, micro: MicroBatch, batch: Batch) -> None:
        """Add a micro-batch of this rank."""
        self._micros.append((micro, micro.tokens if batch.layout == "dense" else batch.slots))

    def sums(self, module: GenerativeModule) -> Tensor:
        """What ranks add up; ends the window, once the device has finished it, and begins the next one."""
        now = _now(module.device)
        wall = now - self._began - self.away
        waited, encoded = self.data.train.waited - self._waited, self.data.encoding.take()
        taught = self.data.teaching.take()
        tokens = self.data.train.plan.tokens[[i for micro, _ in self._micros for i in micro.indices]].astype(float)
        slots = sum(slots for _, slots in self._micros)
        values = [len(tokens), tokens.sum(), (tokens**2).sum(), slots, wall, waited, encoded, taught]
        self.begin(now)
        return torch.tensor(values, dtype=torch.float32, device=module.device)

    def metrics(self, sums: list[float], ranks: int) -> dict[str, float]:
        """The keys `perf/*` from the sums of all ranks."""
        images, tokens, pairs, slots, of_ranks, waited, encoded, taught = sums
        wall = of_ranks / ranks
        found = {
            "perf/images_per_s": images / wall,
            "perf/tokens_per_s": tokens / wall,
            "perf/padding": 1 - tokens / slots,
            "perf/data_wait": waited / of_ranks,
            "perf/encode_share": encoded / of_ranks,
        }
        if self.data.parts.teachers is not None:
            found["perf/teacher_share"] = taught / of_ranks
        if self.flops is not None:
            forward = self.flops.total(images, tokens, pairs)
            found["perf/gflops_per_image"] = forward / images / 1e9
            found["perf/mfu"] = 3 * forward / of_ranks / self.matmul_rate
        return found


@contextmanager
def paused(trainer: Trainer, module: GenerativeModule) -> Iterator[None]:
    """Stop the clocks of a run within this context, which is no part of training."""
    with ExitStack() as stack:
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(speed := getattr(callback, "speed", None), Throughput):
                stack.enter_context(speed.paused(module.device))
        yield


def _now(device: torch.device) -> float:
    """Seconds, when the device has finished what it was given."""
    devices.synchronize(device)
    return time.perf_counter()


def matmul_rate(device: torch.device) -> float:
    """Operations per second of a plain matrix product under the current autocast."""
    n = {"cuda": 8192, "mps": 4096}.get(device.type, 1024)
    a = torch.randn(n, n, device=device, generator=torch.Generator(device).manual_seed(0))
    linear = torch.nn.functional.linear
    if torch.is_autocast_enabled(device.type):
        a = a.to(torch.get_autocast_dtype(device.type))
    best = float("inf")
    for _ in range(5):
        begin = time.perf_counter()
        linear(a, a)
        best = min(best, _now(device) - begin)
    return 2 * n**3 / best
