from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from genfound.callbacks.train_log import first_batch
from genfound.training import fit
from tests.cli.commands import TINY
from tests.helpers import packed, run_dir


@pytest.mark.parametrize(
    ("options", "terms"),
    [
        (["objective=gaussian_x0"], ["mse"]),
        (["objective.directional=0.5", "objective.weight=token"], ["mse", "directional"]),
        (["objective.directional=0.5", "batch.packs=2"], ["mse", "directional"]),
    ],
)
def test_the_named_parts_of_the_loss_add_up_to_it(options: list[str], terms: list[str], tmp_path: Path) -> None:
    """In packs with filler, over several micro-batches and steps."""
    fit(run_dir(tmp_path, *TINY, *options, "trainer.max_steps=4", "trainer.log_every_n_steps=2", "logger=jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    lines = [line for line in lines if "train/loss" in line]
    assert len(lines) == 2
    for line in lines:
        assert sum(line[f"train/{name}"] for name in terms) == pytest.approx(line["train/loss"], rel=1e-5)
        assert all(line[f"train/{name}"] > 0 for name in terms)


def test_the_first_batch_shows_a_wrong_scale_and_stops_at_what_is_not_finite() -> None:
    batch = packed([(4, 4), (3, 5)], max_tokens=40, max_images=4)
    assert "warning" not in first_batch(batch)
    for factor in (20.0, 0.01):
        scaled = batch.to("cpu")
        scaled.x[:31] *= factor / (scaled.x[:31].std() / 1)
        assert "warning: normalised latents are near 0 and 1" in first_batch(scaled)
    batch.x[3] = torch.nan
    with pytest.raises(ValueError, match=r"latents of the first batch are not finite .*data\.root"):
        first_batch(batch)


def test_what_a_network_says_of_itself_is_in_every_line(tmp_path: Path) -> None:
    short = [
        "model=dit_moe_tiny",
        "batch.images=16",
        "trainer.max_steps=2",
        "trainer.log_every_n_steps=1",
        "sample.batch=4",
    ]
    fit(run_dir(tmp_path, *short, "callbacks.validation.images=16", "logger=jsonl"))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    loads = [line["train/experts/layer00/load_max"] for line in lines if "train/loss" in line]
    assert len(loads) == 2 and all(0 < load <= 1 for load in loads)
