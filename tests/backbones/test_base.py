"""Training with compiled blocks, as `compile` starts it."""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch._dynamo.utils import counters

from genfound.training import fit
from tests.helpers import run_dir, state_differences

SHORT = [
    "model.width=32", "model.depth=2", "model.heads=1", "data.max_tokens=128", "trainer.precision=fp32",
    "trainer.log_every_n_steps=1", "callbacks.validation.images=16", "sampler=euler", "sampler.steps=1",
    "sample.batch=4",
    "logger=jsonl", "compile=true", "data.num_workers=0",
]  # fmt: skip
FAMILIES = {
    "nit_tiny": ["batch.packs=1"],
    "fit_tiny": ["batch.packs=1", "sampler=ddim"],
    "fitv2_tiny": ["batch.packs=1", "layout=packed", "model.adaln_rank=8"],
    "dit_tiny": ["batch.images=8", "data.batch_size=4", "sampler=ddim"],
    "sit_tiny": ["batch.images=8", "data.batch_size=4"],
    "dit_moe_tiny": ["batch.images=8", "data.batch_size=4", "sampler=ddim"],
}


@pytest.fixture
def quick_compiler(monkeypatch: pytest.MonkeyPatch, fresh_compiler: None) -> Iterator[None]:
    """Everything of torch.compile but the generation of kernels, and its counters at zero."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    counters.clear()
    yield
    counters.clear()


def compilations() -> int:
    """How many graphs were compiled; none may have a break."""
    assert not counters["graph_break"] and not counters["unimplemented"]
    stats: Counter[str] = counters["stats"]
    return stats["unique_graphs"]


def logged(folder: Path, key: str = "train/loss") -> list[float]:
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[key] for line in found if key in line]


@pytest.mark.usefixtures("quick_compiler")
def test_a_run_is_compiled_once(tmp_path: Path) -> None:
    """200 packs of other sizes and numbers of images, with validation, previews and averages in between."""
    every = [
        "trainer.max_steps=200",
        "trainer.log_every_n_steps=20",
        "callbacks.validation.every=100",
        "callbacks.preview.every=120",
    ]
    fit(run_dir(tmp_path, "model=nit_tiny", *SHORT, *FAMILIES["nit_tiny"], *every, "callbacks.checkpointing.every=180"))
    assert len(logged(tmp_path)) == 10 and len(logged(tmp_path, "val/loss_ema")) >= 3
    assert len(list((tmp_path / "samples").glob("*.png"))) >= 2
    assert compilations() == 1


@pytest.mark.usefixtures("quick_compiler")
@pytest.mark.parametrize("model", FAMILIES)
@pytest.mark.slow
def test_every_family_trains_compiled_as_it_does_uncompiled(model: str, tmp_path: Path) -> None:
    options = [f"model={model}", *SHORT, *FAMILIES[model], "trainer.max_steps=4", "callbacks.validation.every=8"]
    for name, more in (("compiled", []), ("eager", ["compile=false"])):
        fit(run_dir(tmp_path / name, *options, *more))
        assert 1 <= compilations() <= 3
    for key in ("train/loss", "train/grad_norm", "val/loss"):
        compiled, eager = (logged(tmp_path / name, key) for name in ("compiled", "eager"))
        assert compiled == pytest.approx(eager, rel=1e-6) and compiled


@pytest.mark.usefixtures("quick_compiler")
def test_a_compiled_run_is_continued_bit_by_bit(tmp_path: Path) -> None:
    options = ["model=nit_tiny", *SHORT, "batch.packs=2", "model.activation_checkpointing=true"]
    for name, ends in (("straight", [4]), ("resumed", [2, 4])):
        for end in ends:
            fit(run_dir(tmp_path / name, *options, f"trainer.max_steps={end}"))
    assert not state_differences(tmp_path / "straight", tmp_path / "resumed")
    assert compilations() == 1


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
def test_generated_kernels_train_as_eager_ones_do(tmp_path: Path) -> None:
    options = ["model=nit_tiny", *SHORT, "batch.packs=1", "trainer.max_steps=3"]
    for name, more in (("compiled", []), ("eager", ["compile=false"])):
        fit(run_dir(tmp_path / name, *options, *more))
    compiled, eager = (logged(tmp_path / name) for name in ("compiled", "eager"))
    assert compiled == pytest.approx(eager, rel=1e-5)
    assert compilations() >= 1
