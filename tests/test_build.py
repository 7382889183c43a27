from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from genfound import build
from genfound.runtime import devices
from genfound.runtime.processes import RankInfo
from genfound.training import fit
from tests.cli.commands import TINY
from tests.helpers import run_dir


@pytest.mark.parametrize(("hardware", "found"), [(True, "bf16-mixed"), (False, "32-true")])
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_auto_takes_the_bf16_of_the_hardware_and_no_emulation(
    device: str, hardware: bool, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def on_cuda(including_emulation: bool = True) -> bool:
        return hardware or including_emulation

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", on_cuda)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: hardware)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: False)
    assert devices.precision("auto", torch.device(device)) == found


@pytest.mark.parametrize(("maker", "found"), [("AuthenticAMD", "bf16-mixed"), ("GenuineIntel", "32-true")])
def test_auto_takes_the_bf16_of_avx_512_where_it_is_fast(
    maker: str, found: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: True)
    for there in (True, False):  # what Linux says of processors, and what Windows does
        monkeypatch.setattr(Path, "exists", lambda path, there=there: there)
        monkeypatch.setattr(Path, "read_text", lambda path: f"vendor_id\t: {maker}\n")
        monkeypatch.setattr("platform.processor", lambda: f"Family 6 Model 85 Stepping 7, {maker}")
        assert devices.precision("auto", torch.device("cpu")) == found


@pytest.mark.parametrize(("ranks", "rank"), [(2, 1), (1, 0)])
def test_a_process_has_its_device_before_anything_is_built(
    ranks: int, rank: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is built goes to `cuda`, which is the first device of the machine until another one is set."""
    current: list[int | None] = []

    def parts(*_: Any, **__: Any) -> None:
        raise InterruptedError("building begins")

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: current.append(device.index))
    monkeypatch.setattr(build, "build_run", parts)
    with pytest.raises(InterruptedError, match="building begins"):
        fit(run_dir(tmp_path, *TINY), RankInfo(rank, ranks, rank))
    assert current == [rank]


def test_a_process_without_a_graphics_card_sets_none() -> None:
    assert devices.device("cpu", 3) == torch.device("cpu")
