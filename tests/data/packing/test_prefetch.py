from __future__ import annotations

import multiprocessing
import os
import resource
import signal
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genfound.data.packing.prefetch import read_ahead


class Numbers(Dataset[int]):
    def __getitem__(self, key: int) -> int:
        if key == 3:
            raise FileNotFoundError(2, "no such file", "three.jpg")
        if key > 3:
            raise ValueError(f"{key}.jpg is damaged")
        return 10 * key


@pytest.mark.parametrize("workers", [0, 2])
def test_items_come_in_the_order_of_the_keys_and_errors_as_they_were(workers: int) -> None:
    items = read_ahead(Numbers(), (key for key in (2, 0, 1, 5)), workers)
    assert [next(items) for _ in range(3)] == [20, 0, 10]
    with pytest.raises(ValueError, match=r"^5\.jpg is damaged$"):
        next(items)
    with pytest.raises(FileNotFoundError, match=r"no such file: 'three\.jpg'"):
        next(read_ahead(Numbers(), [3], workers))


def test_workers_are_spawned_where_that_is_all_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows."""
    monkeypatch.setattr(multiprocessing, "get_all_start_methods", lambda: ["spawn"])
    started = []
    spawn = multiprocessing.context.SpawnProcess.start
    monkeypatch.setattr(multiprocessing.context.SpawnProcess, "start", lambda own: started.append(own) or spawn(own))
    assert list(read_ahead(Numbers(), [2, 0], 1)) == [20, 0]
    assert len(started) == 1


class Killed(Dataset[int]):
    def __getitem__(self, key: int) -> int:
        if key == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return key


@pytest.mark.slow
def test_a_killed_worker_is_one_clear_error() -> None:
    with pytest.raises(
        ValueError, match=r"was ended from outside, .* memory .*: set a smaller data\.num_workers, or 0"
    ):
        list(read_ahead(Killed(), [0, 1, 2], 1))


class Broken(Dataset[int]):
    def __getitem__(self, key: int) -> int:
        raise RuntimeError("a mistake")


def test_other_errors_keep_their_traceback() -> None:
    with pytest.raises(RuntimeError, match="a mistake"):
        next(read_ahead(Broken(), [0], 0))


def test_a_negative_number_of_workers_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.num_workers=-1 must be a whole number of at least 0"):
        read_ahead(Broken(), [0], -1)


class Shared(Dataset[tuple[list[Tensor], str]]):
    def __getitem__(self, key: int) -> tuple[list[Tensor], str]:
        if key == 1:
            Tensor.share_memory_ = full  # type: ignore[method-assign]
        return [torch.full((3,), float(key))], "name"


def full(_: Tensor) -> Tensor:
    raise RuntimeError("unable to allocate shared memory(shm) for file </torch_1>: No space left on device (28)")


def test_shared_memory_without_room_is_an_error_and_not_an_endless_wait() -> None:
    items = read_ahead(Shared(), [0, 1], 1)
    (values,), name = next(items)
    assert values.tolist() == [0.0] * 3 and values.is_shared() and name == "name"
    with pytest.raises(OSError, match=r"/dev/shm.*No space left.*docker run --shm-size=8g.* data\.num_workers"):
        next(items)


FILES = 256


class Many(Dataset[list[Tensor]]):
    """Items of more tensors than a process may open files."""

    def __getitem__(self, key: int) -> list[Tensor]:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
        return [torch.tensor([key, number]) for number in range(2 * FILES)]


def test_an_item_of_many_images_takes_few_open_files() -> None:
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    items = read_ahead(Many(), [4, 5, 6], 1)
    try:
        resource.setrlimit(resource.RLIMIT_NOFILE, (FILES, limits[1]))
        read = list(items)
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limits)
    assert [torch.stack(item).tolist() for item in read] == [[[k, n] for n in range(2 * FILES)] for k in (4, 5, 6)]


def each_kind() -> dict[str, Any]:
    """Tensors of sizes whose ends are not those of any alignment."""
    bits = torch.arange(5, dtype=torch.uint8)
    kinds = [bits, bits.bool(), bits.bfloat16() / 3, bits.double()[:, None] / 3, torch.tensor(7), torch.empty(0, 3)]
    return {"kinds": kinds, "turned": torch.arange(6).view(2, 3).T, "name": "seven", "none": None}


class EachKind(Dataset[dict[str, Any]]):
    def __getitem__(self, key: int) -> dict[str, Any]:
        return each_kind()


@pytest.mark.parametrize(("workers", "pinned"), [(0, False), (0, True), (2, False), (2, True)])
def test_tensors_arrive_as_they_were_and_are_pinned_in_one_piece(
    workers: int, pinned: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    pieces: list[Tensor] = []
    if pinned:  # as where there is a GPU
        monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
        monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cpu"))
        monkeypatch.setattr(torch.accelerator, "current_device_index", lambda: 0)
        monkeypatch.setattr(torch.accelerator, "set_device_index", lambda _: None)
        monkeypatch.setattr(Tensor, "pin_memory", lambda own: pieces.append(own.clone()) or pieces[-1])
    read = list(read_ahead(EachKind(), [0, 1], workers, pin_memory=pinned))
    assert len(pieces) == (2 if pinned else 0)
    for item in read:
        expected = each_kind()
        assert (item["name"], item["none"]) == (expected["name"], expected["none"])
        for name in ("kinds", "turned"):
            torch.testing.assert_close(item[name], expected[name], rtol=0, atol=0)
    buffers = {part.untyped_storage().data_ptr() for item in read for part in item["kinds"]}
    if pinned:  # in the order in which workers were ready
        assert buffers == {piece.untyped_storage().data_ptr() for piece in pieces}
