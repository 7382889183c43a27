"""A step whose gradient is not finite leaves the weights alone, is written down, and is not repeated for ever."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from genfound.objectives.flow import Flow
from genfound.runtime import checkpoint_io
from genfound.training import fit
from tests.cli.commands import TINY
from tests.helpers import run_dir

FP32 = (*TINY, "trainer.precision=fp32")


@pytest.fixture
def poison(monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """Numbers of micro-batches whose loss becomes NaN."""
    numbers: set[int] = set()
    clean = Flow.loss

    def loss(self, net, batch, rng):  # type: ignore[no-untyped-def]
        losses = clean(self, net, batch, rng)
        if rng.key[0] != "train" or rng.key[1] not in numbers:
            return losses
        terms = {name: term * float("nan") for name, term in losses.terms.items()}
        return replace(losses, total=losses.total * float("nan"), terms=terms)

    monkeypatch.setattr(Flow, "loss", loss)
    return numbers


def test_a_poisoned_step_is_skipped_and_written_down(poison: set[int], tmp_path: Path) -> None:
    poison.add(2)
    folder = run_dir(tmp_path / "run", *FP32, "trainer.max_steps=5", "trainer.log_every_n_steps=2")
    fit(folder)
    lines = [json.loads(line) for line in (folder / "nonfinite.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2]
    assert len(lines[0]["images"]) == len(lines[0]["t"]) > 0
    state = checkpoint_io.read(checkpoint_io.newest(folder / "checkpoints"))
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())
    assert all(tensor.isfinite().all() for tensor in state["ema"]["0.995"].values())


def logged(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("packs", [1, 2])
def test_a_skipped_step_is_left_out_of_the_averages_and_named(
    packs: int, poison: set[int], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """As a whole: of two micro-batches of a step, one alone is poisoned."""
    poison.add(2 * packs)
    runs = {}
    for every in (1, 2):
        options = ("objective.directional=0.5", "trainer.max_steps=5", f"batch.packs={packs}")
        runs[every] = run_dir(tmp_path / f"every_{every}", *FP32, *options, f"trainer.log_every_n_steps={every}")
        fit(runs[every])
        assert capsys.readouterr().out.count("skipped step 2: the gradient was not finite") == 1
        notes = [line for line in logged(runs[every]) if "skipped" in line.get("note", "")]
        assert len(notes) == 1 and str(runs[every] / "nonfinite.jsonl") in notes[0]["note"]
        assert notes[0]["step"] == (3 if every == 1 else 4)
    single, double = ([line for line in logged(runs[n]) if "train/loss" in line] for n in (1, 2))
    assert [line["train/skipped"] for line in single] == [0, 0, 1, 0, 0]
    assert [line["train/skipped"] for line in double] == [0, 1, 0]
    assert single[2]["train/loss"] is None  # of no step at all
    averages = [key for key in double[1] if key.startswith("train/") and key not in ("train/skipped", "train/lr")]
    assert {"train/mse", "train/grad_norm"} < set(averages) and any("loss_t" in key for key in averages)
    assert {key: double[1][key] for key in averages} == pytest.approx({key: single[3][key] for key in averages})


def test_a_skipped_step_moves_no_weight(poison: set[int], tmp_path: Path) -> None:
    weights = []
    for name, steps in (("before", 3), ("with", 4)):
        poison.clear()
        poison.add(3)
        folder = run_dir(tmp_path / name, *FP32, f"trainer.max_steps={steps}")
        fit(folder)
        weights.append(checkpoint_io.read(checkpoint_io.newest(folder / "checkpoints"))["state_dict"])
    assert all(torch.equal(weights[1][key], tensor) for key, tensor in weights[0].items())


def test_too_many_in_a_row_stop_the_run(poison: set[int], tmp_path: Path) -> None:
    poison.update(range(4, 100))
    folder = run_dir(
        tmp_path / "run",
        *FP32,
        "callbacks.nonfinite.limit=3",
        "callbacks.checkpointing.every=8",
        "trainer.log_every_n_steps=1",
    )
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        fit(folder)
    state = checkpoint_io.read(checkpoint_io.newest(folder / "checkpoints"))
    assert all(tensor.isfinite().all() for tensor in state["state_dict"].values())


def test_the_last_steps_are_judged_too(poison: set[int], tmp_path: Path) -> None:
    poison.update((1, 2, 3, 4))
    short = run_dir(tmp_path / "short", *FP32, "trainer.max_steps=5", "trainer.log_every_n_steps=50")
    fit(short)
    assert len((short / "nonfinite.jsonl").read_text().splitlines()) == 4
    folder = run_dir(
        tmp_path / "run", *FP32, "trainer.max_steps=5", "trainer.log_every_n_steps=50", "callbacks.nonfinite.limit=3"
    )
    with pytest.raises(FloatingPointError, match="3 steps in a row"):
        fit(folder)
