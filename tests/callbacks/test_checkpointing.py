"""Checkpoints that are written while the training goes on are those that it would have waited for."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from genfound.callbacks.checkpointing import AsyncCheckpointIO
from genfound.runtime import checkpoint_io, receipts
from genfound.runtime.files import visible
from genfound.training import fit
from tests.cli.commands import TINY, genfound, one_error
from tests.helpers import run_dir, state_differences

SAVING = [*TINY, "trainer.max_steps=12", "callbacks.checkpointing.every=20", "callbacks.preview=null"]
ASYNCHRONOUS = "callbacks.checkpointing.asynchronous=true"


@pytest.fixture
def writers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the threads that write checkpoints, each slower than the steps between two of them."""
    names: list[str] = []
    save = checkpoint_io.save

    def slow(state: dict[str, Any], path: Path) -> None:
        names.append(threading.current_thread().name)
        time.sleep(0.2)
        save(state, path)

    monkeypatch.setattr(checkpoint_io, "save", slow)
    return names


def noted(run: Path) -> list[tuple[int, str]]:
    return [(line["step"], line["weights"]) for line in receipts.read(run / receipts.FILE) if "checkpoint" in line]


def test_a_run_is_the_same_with_a_receipt_of_each_checkpoint(tmp_path: Path, writers: list[str]) -> None:
    fit(run_dir(tmp_path / "waits", *SAVING))
    assert set(writers) == {"MainThread"} and len(writers) > 2
    count = len(writers)
    fit(run_dir(tmp_path / "goes_on", *SAVING, ASYNCHRONOUS))
    assert {name.partition("_")[0] for name in writers[count:]} == {"checkpoint"} and len(writers) == 2 * count
    assert not state_differences(tmp_path / "waits", tmp_path / "goes_on")
    assert noted(tmp_path / "waits") == noted(tmp_path / "goes_on") and len(noted(tmp_path / "waits")) == count
    kept = [[file.name for file in visible(tmp_path / run / "checkpoints")] for run in ("waits", "goes_on")]
    assert kept[0] == kept[1] and len(kept[0]) == 2


def test_a_run_that_was_cut_goes_on_with_the_receipt_of_one_that_was_not(tmp_path: Path, writers: list[str]) -> None:
    fit(run_dir(tmp_path / "whole", *SAVING, ASYNCHRONOUS))
    fit(run_dir(tmp_path / "cut", *SAVING, ASYNCHRONOUS, "trainer.max_steps=7"))
    for last in visible(tmp_path / "cut/checkpoints")[1:]:  # as if it had been killed before this was complete
        last.unlink()
    fit(run_dir(tmp_path / "cut", *SAVING, ASYNCHRONOUS))
    assert not state_differences(tmp_path / "whole", tmp_path / "cut")
    assert noted(tmp_path / "whole")[-1] == noted(tmp_path / "cut")[-1]


def test_a_copy_is_written_and_what_fails_is_raised_once(tmp_path: Path) -> None:
    io, weights = AsyncCheckpointIO(), torch.zeros(3)
    io.save_checkpoint({"global_step": 1, "weights": weights}, tmp_path / "first.ckpt")
    weights.fill_(1.0)
    io.teardown()
    assert torch.equal(io.load_checkpoint(tmp_path / "first.ckpt")["weights"], torch.zeros(3))
    (tmp_path / "file").touch()
    io.save_checkpoint({"global_step": 2}, tmp_path / "file/second.ckpt")
    with pytest.raises(OSError, match="second"):
        io.teardown()
    io.teardown()


def test_what_cannot_be_is_one_clear_line(tmp_path: Path) -> None:
    refused = genfound("train", *SAVING, "callbacks.checkpointing.asynchronous=thread", cwd=tmp_path)
    assert "asynchronous=thread must be true or false" in one_error(refused)
