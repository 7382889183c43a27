from __future__ import annotations

import time
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genfound import build, training
from genfound.config import compose
from genfound.runtime import devices
from genfound.runtime.devices import Stopwatch
from tests.apple_gpu import apple_gpu
from tests.helpers import composed


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


@pytest.mark.parametrize(("wanted", "lack"), [("mps", "Apple GPU"), ("cuda", "CUDA device")])
def test_a_device_that_is_not_there_is_named(wanted: str, lack: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for backend in (torch.cuda, torch.backends.mps):
        monkeypatch.setattr(backend, "is_available", lambda: False)
    with pytest.raises(ValueError, match=f"trainer.accelerator={wanted}, but this machine has no {lack}"):
        devices.device(wanted, key="trainer.accelerator")
    assert devices.device("auto").type == "cpu"


def test_what_is_decided_for_an_apple_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    with apple_gpu():
        found = devices.device("auto", local_rank=0)
        assert found == torch.device("mps") and devices.device("cpu").type == "cpu"
        assert devices.precision("auto", found) == "32-true" and devices.precision("bf16", found) == "bf16-mixed"
        assert not devices.compiled("auto", found)
        devices.check_count("trainer.devices", 1, found)
        with pytest.raises(ValueError, match=r"trainer\.devices=2, but this machine has 1 Apple GPU"):
            devices.check_count("trainer.devices", 2, found)
        with pytest.raises(
            ValueError, match=r"trainer\.num_nodes=2: an Apple GPU trains alone; set trainer\.num_nodes=1"
        ):
            build.check(composed("model=nit_tiny", "trainer.num_nodes=2"), ranks=2)


def test_an_apple_gpu_is_timed_by_marks_among_its_work() -> None:
    watch = Stopwatch()
    with apple_gpu():
        with watch.running(torch.device("mps")):
            time.sleep(0.05)
        time.sleep(0.05)
        assert watch._seconds == 0 and 0.05 <= watch.take() < 0.1
        assert watch.take() == 0


def test_processes_meet_by_gloo_where_there_is_no_nccl(monkeypatch: pytest.MonkeyPatch) -> None:
    for there, expected in ((True, "nccl"), (False, "gloo")):
        monkeypatch.setattr(torch.distributed, "is_nccl_available", lambda there=there: there)
        parts: Any = SimpleNamespace(device=torch.device("cuda"), config={"strategy": None})
        assert training._strategy(parts).process_group_backend == devices.backend(parts.device) == expected
        chosen = {**compose.read_option("strategy", "ddp"), "process_group_backend": "mpi"}
        parts.config = {"strategy": chosen}
        assert training._strategy(parts).process_group_backend == "mpi"
    assert devices.backend(torch.device("cpu")) == "gloo"
