from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch

from genfound.data.packing.batch_plan import MicroBatch
from genfound.layouts import Packed
from genfound.modules.base import GenerativeModule, learning_rate, schedule
from genfound.objectives.weighting import EXPONENTS, image_weight
from genfound.rng import Rng
from tests.helpers import composed, latents, small_nit, training_module

PACKS = [[(3, 5), (1, 1)], [(4, 4)], [(2, 2), (2, 3), (1, 7)], [(5, 5)]]


def module(**options: Any) -> GenerativeModule:
    return training_module(small_nit(), **{"label_drop": 0.1, "weight": "token", **options})


def item(number: int, weight_sum: float) -> Any:
    sizes = PACKS[number]
    batch = Packed(1, 40, 4, filler_label=10).to_batch(latents(sizes, seed=number), torch.arange(len(sizes)))
    return batch, MicroBatch(number, (), (), 0, 0, weight_sum, 0)


@pytest.mark.parametrize("weight", EXPONENTS)
@pytest.mark.parametrize(("micro_batches", "ranks"), [(4, 1), (2, 2), (1, 4)])
def test_loss_of_a_step_is_the_weighted_mean_over_all_its_images(weight: str, micro_batches: int, ranks: int) -> None:
    tokens = torch.tensor([h * w for sizes in PACKS for h, w in sizes])
    weights = image_weight(tokens.float(), weight)
    trained = module(weight=weight)
    trainer: Any = SimpleNamespace(world_size=ranks, accumulate_grad_batches=micro_batches)
    trained.trainer = trainer
    trained.on_fit_start()
    trained.logs_losses = False  # that needs all of a trainer
    parts, losses = [], []
    for number in range(4):
        step = trained.training_step(item(number, weights.sum().item()), number)
        parts.append(step["loss"])
        losses.append(step["losses"].total[: len(PACKS[number])])
    expected = (weights * torch.cat(losses)).sum() / weights.sum()
    torch.testing.assert_close(torch.stack(parts).mean(), expected)  # Lightning averages over both


def test_a_micro_batch_draws_the_same_wherever_it_is_computed() -> None:
    first, second = module(), module()
    one = [first.training_step(item(number, 1.0), number) for number in range(3)][-1]["losses"]
    other = second.training_step(item(2, 1.0), 0)["losses"]
    assert torch.equal(one.total, other.total) and torch.equal(one.t, other.t)


@pytest.mark.parametrize(("label_drop", "low", "high"), [(1.0, 1, 1), (0.3, 0.2, 0.4), (0.0, 0, 0)])
def test_labels_are_dropped_with_the_given_probability(label_drop: float, low: float, high: float) -> None:
    trained, seen = module(label_drop=label_drop), []
    trained.net.register_forward_pre_hook(lambda _module, arguments: seen.append(arguments[0].y))
    batch = Packed(1).to_batch(latents([(1, 1)] * 400), torch.full((400,), 3))
    trained.evaluate(batch, Rng(0))
    assert low <= (seen[0] == 10).float().mean() <= high
    assert set(seen[0].tolist()) <= {3, 10}
    assert (batch.y == 3).all()


@pytest.mark.parametrize(
    ("kind", "images_seen", "factor"),
    [
        ("constant", 0, 1 / 101), ("constant", 50, 51 / 101), ("constant", 100, 1), ("constant", 900, 1),
        ("cosine", 50, 51 / 101), ("cosine", 100, 1), ("cosine", 550, 0.5), ("cosine", 1000, 0),
        ("cosine", 5000, 0),
    ],
)  # fmt: skip
def test_schedules(kind: str, images_seen: int, factor: float) -> None:
    assert schedule({"schedule": kind, "warmup_images": 100}, images_seen, 1000) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    ("kind", "images_seen", "factor"),
    [
        ("constant", 0, 0), ("constant", 25, 0.25), ("constant", 100, 1), ("cosine", 100, 1), ("cosine", 550, 0.55),
        ("cosine", 1000, 0.1), ("linear", 50, 0.5), ("linear", 100, 0.91), ("linear", 500, 0.55), ("linear", 2000, 0.1),
    ],
)  # fmt: skip
def test_a_warm_up_from_zero_and_a_least_learning_rate(kind: str, images_seen: int, factor: float) -> None:
    """JiT's util/lr_sched.py; half of the way down from 1 to 0.1 is 0.55."""
    settings = {"schedule": kind, "warmup_images": 100, "warmup_start": 0.0, "lr": 2e-3, "min_lr": 2e-4}
    assert schedule(settings, images_seen, 1000) == pytest.approx(factor, abs=1e-12)


@pytest.mark.parametrize(
    ("overrides", "rate"),
    [
        (["model=jit_b"], 2e-4),
        (["model=jit_b", "batch.images=256"], 5e-5),
        (["model=jit_b", "optimizer.images_per_step=512", "optimizer.base_lr=1e-4"], 2e-4),
        (["model=jit_b", "layout=packed"], 2e-4),
        (["model=jit_b", "layout=packed", "data.max_tokens=16384", "batch.packs=2"], 2.5e-5),
        (["model=jit_b", "optimizer.lr=3e-4"], 3e-4),
        (["model=nit_tiny"], 3e-3),
    ],
)
def test_learning_rates_grow_with_the_step_where_a_recipe_says_so(overrides: list[str], rate: float) -> None:
    assert learning_rate(composed(*overrides)) == pytest.approx(rate)


def test_a_warm_up_from_a_rate() -> None:
    settings = {"schedule": "constant", "warmup_images": 100, "warmup_start": 0.2, "lr": 1.0}
    assert [schedule(settings, n, 1000) for n in (0, 50, 100)] == pytest.approx([0.2, 0.6, 1.0])


def test_an_unknown_schedule_is_refused() -> None:
    with pytest.raises(ValueError, match=r"optimizer\.schedule=step is unknown; choose constant .*, cosine or linear"):
        schedule({"schedule": "step", "warmup_images": 0}, 0, 10)
