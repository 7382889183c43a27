"""Sixty steps with accumulation are those of one process, on any number of processes and under any strategy."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from genfound import training
from genfound.layers.moe import Router, Routing
from genfound.modules.base import GenerativeModule, TrainItem
from tests.distributed.test_devices import curve, free_port
from tests.distributed.test_fsdp import NETS, of_one, prepared, spawn

STEPS = ["trainer.max_steps=60", "callbacks.validation.every=100000", "callbacks.preview.every=null"]
OPTIONS = {
    "nit": NETS["nit"],
    "dit": NETS["dit"],
    "dit_moe": [*NETS["dit_moe"], "model.experts=8", "data.size=16"],  # 123,000 choices of a token
}
ROUNDING = 1e-5
"""Relative difference of two losses whose sums have another order, and of two scores of a router."""

FLIPPED = 1e-3
"""Relative difference of two losses once a token has met another expert."""

Routings = dict[int, list[tuple[Tensor, Tensor]]]
"""Number of a micro-batch -> scores (B, N, E) and choices (B, N, k) of each of its layers."""


@contextmanager
def noting(found: dict[str, Routings]) -> Iterator[None]:
    """Within this context the routing of each micro-batch is noted under its run."""
    step, route, layers = GenerativeModule.training_step, Router.forward, list[tuple[Tensor, Tensor]]()

    def noted_step(module: GenerativeModule, item: TrainItem, batch_idx: int) -> dict[str, Any]:
        layers.clear()
        out = step(module, item, batch_idx)
        found.setdefault(str(module.trainer.default_root_dir), {})[item[1].number] = list(layers)
        return out

    def noted_route(router: Router, x: Tensor) -> Routing:
        routing = route(router, x)
        layers.append((routing.scores.detach(), routing.choices.sort(dim=-1).values))
        return routing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(GenerativeModule, "training_step", noted_step)
        patch.setattr(Router, "forward", noted_route)
        yield


def noted(rank: int, ranks: int, port: int, runs: Sequence[Path]) -> None:
    """One process of a group, which leaves the routings of its micro-batches in the folders of its runs."""
    found: dict[str, Routings] = {}
    with noting(found):
        training.fit(runs[0]) if ranks == 1 else of_one(rank, ranks, port, runs)
    for run, routings in found.items():
        torch.save(routings, Path(run) / f"routing-{ranks}-{rank}.pt")


def routings_of(run: Path) -> Routings:
    return {number: layers for file in run.glob("routing-*.pt") for number, layers in torch.load(file).items()}


def first_flip(one: Routings, other: Routings) -> int | None:
    """The micro-batch in which a token first meets other experts; there its scores must tie."""
    assert one.keys() == other.keys() and len(one) == 240
    for number in sorted(one):
        for (scores, choices), (_, others) in zip(one[number], other[number], strict=True):
            flipped = (choices != others).any(dim=-1)
            if flipped.any():
                chosen = scores[flipped].sort(descending=True).values
                assert (chosen[:, 1] - chosen[:, 2]).max() < ROUNDING * chosen.max(), "no tie of the second expert"
                return number
    return None


@pytest.mark.slow
def test_losses_are_equal_to_rounding_over_sixty_steps(tmp_path: Path) -> None:
    def run(name: str, processes: int, strategy: str, steps: int = 60) -> list[Path]:
        strategy, limit = f"strategy={strategy}", f"trainer.max_steps={steps}"
        return [
            prepared(tmp_path / f"{net}_{name}", processes, *options, *STEPS, strategy, limit)
            for net, options in OPTIONS.items()
        ]

    for one in run("one", 1, "auto"):
        noted(0, 1, 0, [one])
    shared = [*OPTIONS["dit_moe"], *STEPS, "strategy=fsdp"]
    for processes, moved in ((2, ("ddp", 20)), (4, ("fsdp", 40))):
        runs = [*run(f"ddp{processes}", processes, "ddp"), *run(f"fsdp{processes}", processes, "fsdp")]
        name = tmp_path / f"dit_moe_shared{processes}"
        runs.append(prepared(name, processes, *shared, "strategy.expert_parallel=2"))
        spawn(noted, processes, free_port(), [*runs, *run("moved", processes, *moved)], processes=processes)
    for one in run("moved", 1, "auto"):
        noted(0, 1, 0, [one])
    for net in OPTIONS:
        expected, routings = curve(tmp_path / f"{net}_one"), routings_of(tmp_path / f"{net}_one")
        several = ["ddp2", "fsdp2", "ddp4", "fsdp4", "moved"]
        for name in several + ["shared2", "shared4"] * (net == "dit_moe"):
            found = curve(tmp_path / f"{net}_{name}")
            flip = first_flip(routings, routings_of(tmp_path / f"{net}_{name}"))
            same = 60 if flip is None else flip // 4  # steps before that of the flip
            assert len(found) == 60
            assert found[:same] == pytest.approx(expected[:same], rel=ROUNDING), f"{net} {name}"
            assert found[same:] == pytest.approx(expected[same:], rel=FLIPPED), f"{net} {name}"
