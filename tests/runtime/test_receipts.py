"""The chain of hashes over the steps and checkpoints of a run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from genfound.runtime import receipts


@pytest.fixture
def file(tmp_path: Path) -> Path:
    file = tmp_path / receipts.FILE
    receipts.Receipt(file, 0).add(*({"step": step, "loss": f"{step}"} for step in range(1, 6)))
    return file


def test_lines_follow_from_each_other(file: Path) -> None:
    assert [line["step"] for line in receipts.read(file)] == [1, 2, 3, 4, 5]
    assert len({line["hash"] for line in receipts.read(file)}) == 5


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (3, lambda lines: [*lines[:2], lines[2].replace('"loss": "3"', '"loss": "4"'), *lines[3:]]),
        (2, lambda lines: [lines[0], *lines[2:]]),
        (1, lambda lines: lines[1:]),
        (4, lambda lines: [*lines[:3], lines[4], lines[3]]),
        (2, lambda lines: [lines[0], "no line", *lines[1:]]),
    ],
)
def test_a_changed_line_is_named(number: int, change, file: Path) -> None:  # type: ignore[no-untyped-def]
    file.write_text("\n".join(change(file.read_text().splitlines())) + "\n")
    with pytest.raises(ValueError, match=f"was changed: line {number} does not follow"):
        receipts.read(file)


def test_a_line_that_a_kill_cut_short_is_left_out_and_a_run_goes_on_behind_its_checkpoint(file: Path) -> None:
    straight = file.read_text()
    file.write_text(straight[:-9])
    assert len(receipts.read(file)) == 4
    again = receipts.Receipt(file, 3)
    assert len(receipts.read(file)) == 3
    again.add({"step": 4, "loss": "4"})
    again.add({"step": 5, "loss": "5"})
    assert file.read_text() == straight


def test_the_head_of_a_checkpoint_is_the_hash_of_its_last_line(file: Path) -> None:
    receipts.Receipt(file, 5).add({"step": 5, "checkpoint": "step-00000005.ckpt"})
    assert receipts.head_at(file, "step-00000005.ckpt") == json.loads(file.read_text().splitlines()[-1])["hash"]
    assert receipts.head_at(file, "step-00000004.ckpt") is None
    assert receipts.head_at(file.with_name("none"), "step-00000005.ckpt") is None


def test_a_checkpoint_is_told_by_its_tensors_and_values_to_the_bit() -> None:
    state = {
        "state_dict": {"a": torch.arange(3.0), "b": torch.zeros((), dtype=torch.bfloat16)},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(2.0)}}, "lr": 0.1}],
        "ema": {"0.9": {"a": torch.ones(3)}}, "GenerativeDataModule": {"step": 2}, "loops": "free",
    }  # fmt: skip
    before = receipts.hashes(state)
    assert before == receipts.hashes({key: state[key] for key in reversed(state)} | {"loops": "other"})
    state["state_dict"]["a"][1] = torch.nextafter(torch.tensor(1.0), torch.tensor(2.0))  # type: ignore[index]
    state["GenerativeDataModule"]["step"] = 3  # type: ignore[index]
    changed = {name for name, value in receipts.hashes(state).items() if value != before[name]}
    assert changed == {"weights", "position"}
    assert before["weights"] != receipts.hashes({**state, "state_dict": {"a": torch.arange(3), "b": 0.0}})["weights"]
