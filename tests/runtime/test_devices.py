from __future__ import annotations

import time

import pytest
import torch

from genfound.runtime import devices
from genfound.runtime.devices import Stopwatch


def test_what_is_done_in_its_context_is_summed_until_it_is_taken() -> None:
    watch, device = Stopwatch(), torch.device("cpu")
    for _ in range(2):
        with watch.running(device):
            time.sleep(0.05)
        time.sleep(0.05)
    assert watch.take() == pytest.approx(0.1, abs=0.04)
    assert watch.take() == 0


@pytest.mark.gpu
def test_on_cuda_it_counts_the_work_of_the_device_without_waiting_for_it() -> None:
    watch, device = Stopwatch(), torch.device("cuda")
    a = torch.randn(4096, 4096, device=device)
    torch.cuda.synchronize()
    begin = time.perf_counter()
    with watch.running(device):
        for _ in range(100):
            a = a @ a / 4096
    started = time.perf_counter() - begin
    torch.cuda.synchronize()
    whole = time.perf_counter() - begin
    assert watch.take() == pytest.approx(whole, rel=0.2)
    assert started < whole / 2


def test_a_device_without_float64_is_refused() -> None:
    with pytest.raises(ValueError, match=r"trainer\.accelerator=mps: .*float64.*trainer\.accelerator=cpu runs there"):
        devices.device("mps", key="trainer.accelerator")
