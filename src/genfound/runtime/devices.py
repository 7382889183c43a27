"""The device of a process, the precision of its arithmetic, and the time that it takes."""

import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed

from genfound.config.checks import accelerator

NAMES = {"cuda": "CUDA device", "mps": "Apple GPU"}


def precision(wanted: str, device: torch.device, key: str = "trainer.precision") -> str:
    """`auto`, `bf16` or `fp32` -> Lightning's name; auto is bf16 where the machine has faster arithmetic for it."""
    if wanted == "auto":
        own = {  # arithmetic, since PyTorch also emulates bf16, slowly
            "cuda": lambda: torch.cuda.is_bf16_supported(False),
            "cpu": _has_fast_bf16,
        }
        wanted = "bf16" if device.type in own and own[device.type]() else "fp32"
    names = {"bf16": "bf16-mixed", "fp32": "32-true"}
    if wanted not in names:
        raise ValueError(f"{key}={wanted} is unknown; choose auto, bf16 or fp32")
    return names[wanted]


def _has_fast_bf16() -> bool:
    """AMX, or AVX-512's products in bf16, which on Intel's processors are half as fast as those in float32."""
    known = Path("/proc/cpuinfo")
    intel = "GenuineIntel" in (known.read_text() if known.exists() else platform.processor())
    return torch.cpu._is_amx_tile_supported() or (torch.cpu._is_avx512_bf16_supported() and not intel)


@contextmanager
def float32_products(precision: str, device: torch.device) -> Iterator[None]:
    """Products that stay in float32 (conditioning, router, autoencoder): beside bf16 arithmetic on CUDA in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if (precision, device.type) == ("bf16-mixed", "cuda") else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def compiled(wanted: bool | str, device: torch.device) -> bool:
    """`auto`, True or False -> whether blocks are compiled; auto does so on CUDA."""
    return device.type == "cuda" if wanted == "auto" else bool(wanted)


def device(wanted: str, local_rank: int | None = None, key: str = "accelerator") -> torch.device:
    """`auto`, `cpu`, `cuda` or `mps` -> the device of this process; with a local rank, the one that `cuda` now means.

    As Lightning's, `auto` is a graphics card where there is one, NVIDIA's or Apple's.
    """
    accelerator(key, wanted)
    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if wanted == "auto":
        wanted = next(name for name, is_there in there.items() if is_there)
    if not there[wanted]:
        raise ValueError(f"{key}={wanted}, but this machine has no {NAMES[wanted]}; set {key}=cpu")
    if wanted != "cuda" or local_rank is None:
        return torch.device(wanted)
    found = torch.device("cuda", local_rank % torch.cuda.device_count())
    torch.cuda.set_device(found)
    return found


def check_count(key: str, wanted: int, device: torch.device) -> None:
    """Raise a ValueError for more processes than this machine has GPUs of a kind, which do not share one."""
    if device.type == "cpu":
        return
    there = torch.cuda.device_count() if device.type == "cuda" else 1
    if wanted > there:
        raise ValueError(f"{key}={wanted}, but this machine has {there} {NAMES[device.type]}(s); set {key}={there}")


def backend(device: torch.device) -> str:
    """Of torch.distributed: gloo, and for CUDA NCCL, but where PyTorch has none, as on Windows."""
    return "nccl" if device.type == "cuda" and torch.distributed.is_nccl_available() else "gloo"


def synchronize(device: torch.device) -> None:
    """Wait until a device has finished what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


class Stopwatch:
    """Sums the time spent in its context without waiting: on a GPU by marks among the device's own work."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._marks: list[tuple[Any, Any]] = []

    @contextmanager
    def running(self, device: torch.device) -> Iterator[None]:
        """Count what is done in this context, or started on the device."""
        if device.type != "cpu":
            begin, end = (getattr(torch, device.type).Event(enable_timing=True) for _ in range(2))
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
