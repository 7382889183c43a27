from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest

from genfound import build
from genfound.data.loader import TrainLoader
from genfound.data.order import Order
from genfound.data.packing import Chunker, Packer
from genfound.data.plan import Micro, Plan
from genfound.data.sizes import token_counts
from genfound.objectives.weighting import EXPONENTS
from genfound.tokenizers import Spec
from tests.helpers import composed

BUDGET = 512


def packed_plan(per_step: int = 8, weight: str = "token", images: int = 700, seed: int = 3) -> Plan:
    tokens = np.random.default_rng(1).integers(4, 120, images)
    order = Order(images, seed)
    return Plan(order, tokens, Packer(lambda k: int(tokens[order[k]]), BUDGET, 40), per_step, weight, seed)


def dense_plan(per_step: int = 4, images: int = 50) -> Plan:
    return Plan(Order(images, 0), np.full(images, 16), Chunker(3), per_step, "image", 0)


PLANS = {"packed": packed_plan, "dense": dense_plan}


def first(plan: Plan, steps: int) -> list[list[Micro]]:
    return list(islice(plan.steps(), steps))


@pytest.mark.parametrize("make", PLANS.values(), ids=PLANS.keys())
def test_no_position_is_used_twice_and_none_is_lost(make: Any) -> None:
    positions = [k for step in first(make(), 40) for micro in step for k in micro.positions]
    assert len(positions) == len(set(positions))
    missing = set(range(max(positions))) - set(positions)
    assert len(missing) < 64 * 40  # only images of the current window, or waiting


def test_every_image_exactly_once_in_each_pass() -> None:
    plan = dense_plan(per_step=5, images=30)
    for steps in (first(plan, 2), first(dense_plan(5, 30), 6)[4:]):
        assert sorted(i for step in steps for micro in step for i in micro.indices) == list(range(30))


def test_packed_passes_are_complete() -> None:
    """Whole windows use every position up to what still waits, so every image of a finished pass exactly once."""
    plan = packed_plan()
    steps = first(plan, 64)
    indices = {k: i for step in steps for micro in step for k, i in zip(micro.positions, micro.indices, strict=True)}
    finished = min(set(range(max(indices) + 1)) - indices.keys()) // 700
    assert finished >= 2
    for number in range(finished):
        seen = Counter(indices[k] for k in range(number * 700, (number + 1) * 700))
        assert seen == Counter(range(700))


def test_numbers_and_totals_of_a_step() -> None:
    plan, seen = packed_plan(per_step=8), 0
    for number, micros in enumerate(first(plan, 30)):
        seen += sum(len(m.positions) for m in micros)
        assert [m.number for m in micros] == list(range(8 * number, 8 * number + 8))
        for m in micros:
            assert m.step == number
            assert m.images_seen == seen
            assert m.tokens == sum(plan.tokens[i] for i in m.indices) <= BUDGET
            assert [plan.order[k] for k in m.positions] == list(m.indices)


@pytest.mark.parametrize("rule", EXPONENTS)
def test_step_weight_is_the_sum_over_all_images_of_the_step(rule: str) -> None:
    plan = packed_plan(weight=rule)
    for micros in first(plan, 5):
        tokens = np.concatenate([plan.tokens[list(m.indices)] for m in micros]).astype(float)
        expected = {"image": len(tokens), "sqrt": np.sqrt(tokens).sum(), "token": tokens.sum()}[rule]
        for m in micros:
            assert m.step_weight == pytest.approx(expected)


@pytest.mark.parametrize("make", PLANS.values(), ids=PLANS.keys())
@pytest.mark.parametrize("consumed", [0, 1, 7, 8, 13, 21])
def test_a_restored_plan_continues_identically(make: Any, consumed: int) -> None:
    expected = first(make(), consumed + 20)[consumed:]
    plan = make()
    steps = plan.steps()
    for _ in range(consumed + 3):  # workers read ahead of the training
        next(steps)
    state = plan.state(consumed)
    resumed = make()
    resumed.restore(state)
    assert first(resumed, 20) == expected
    resumed.restore(state)
    assert first(resumed, 20) == expected


def test_a_plan_can_be_resumed_again_and_again() -> None:
    expected = first(packed_plan(), 30)
    state, got = packed_plan().state(0), []
    for start in range(0, 30, 5):
        plan = packed_plan()
        plan.restore(state)
        got += first(plan, 5)
        state = plan.state(start + 5)
    assert got == expected


def test_states_are_small_and_plain() -> None:
    plan = packed_plan()
    list(islice(plan.steps(), 100))
    state = plan.state(99)
    assert state["step"] == 99
    assert state["window"]["step"] <= 99 < state["window"]["step"] + 8
    assert len(state["window"]["grouper"]["waiting"]) <= 256
    assert len(plan._windows) <= 2  # older records are dropped


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_the_same_micro_batches(ranks: int) -> None:
    steps = 12
    alone = [micro for step in first(packed_plan(per_step=8), steps) for micro in step]
    loaders = [TrainLoader(None, packed_plan(per_step=8), rank, ranks, 0, False) for rank in range(ranks)]
    shares = [list(islice(loader.share(), steps * 8 // ranks)) for loader in loaders]
    assert sorted((m for share in shares for m in share), key=lambda m: m.number) == alone
    for share in shares:
        assert [m.step for m in share] == [n for n in range(steps) for _ in range(8 // ranks)]


def photographs() -> Plan:
    tokens = token_counts(60_000)
    order = Order(len(tokens), 0)
    return Plan(order, tokens, Packer(lambda k: int(tokens[order[k]]), 16_384, 300), 8, "token", 0)


def layer_costs(plan: Plan, steps: int) -> np.ndarray:
    """(steps, 8) cost of each micro-batch in a layer of width D: 12 D^2 tokens + 2 D pairs of tokens."""
    width = 1152
    costs = [
        [12 * width**2 * m.tokens + 2 * width * int((plan.tokens[list(m.indices)] ** 2).sum()) for m in step]
        for step in first(plan, steps)
    ]
    return np.array(costs, dtype=float)


def slowest(costs: np.ndarray) -> float:
    """Work of the slowest rank over the mean, on average over the steps."""
    return float((costs.max(1) / costs.mean(1)).mean())


def test_ranks_have_equal_work() -> None:
    costs = layer_costs(photographs(), 64)
    shuffled = np.random.default_rng(0).permutation(costs.ravel()).reshape(costs.shape)
    assert slowest(shuffled) > 1.05  # what chance would give
    assert slowest(costs) <= 1.02
    assert slowest(costs) - 1 < 0.3 * (slowest(shuffled) - 1)


def test_cost_does_not_drift_over_a_window() -> None:
    steps = layer_costs(photographs(), 64).sum(1).reshape(8, 8)  # windows of eight steps
    assert not any((np.diff(window) > 0).all() for window in steps)
    assert abs(np.corrcoef(np.arange(64) % 8, steps.ravel())[0, 1]) < 0.5


class Source:
    """Sizes without images."""

    def __init__(self, *sizes: tuple[int, int]) -> None:
        self.sizes = np.array(sizes)


def built(source: Source, *overrides: str, ranks: int = 1) -> Plan:
    config = composed("model=nit_tiny", "data.max_tokens=256", "data.batch_size=32", *overrides)
    return build.plan(config, source, Spec(3, 1), "image", ranks, 0)  # type: ignore[arg-type]


def test_a_step_is_the_recipes_unless_chosen() -> None:
    source = Source((16, 16), (16, 32))
    assert built(source, "optimizer.tokens_per_step=2048").per_step == 2048 // 256
    assert built(source, "batch.packs=3").per_step == 3
    assert built(source, "layout=dense", "batch.images=64").per_step == 2
    assert built(source, "layout=dense", "optimizer.images_per_step=96").per_step == 3


@pytest.mark.parametrize("ranks", [2, 5])
def test_a_step_that_ranks_cannot_share_is_refused(ranks: int) -> None:
    with pytest.raises(ValueError, match=rf"3 micro-batches.*trainer\.devices={ranks}.*batch\.packs"):
        built(Source((16, 16)), "batch.packs=3", ranks=ranks)


def test_an_image_over_the_budget_is_refused() -> None:
    with pytest.raises(ValueError, match=r"1024 tokens, more than data\.max_tokens=256"):
        built(Source((16, 16), (64, 64)))


@pytest.mark.parametrize("images", [40, 16])
def test_a_dense_step_is_whole_micro_batches(images: int) -> None:
    with pytest.raises(ValueError, match=r"batch\.images must be a multiple of data\.batch_size=32"):
        built(Source((16, 16)), "layout=dense", f"batch.images={images}")


def test_rows_of_a_static_pack() -> None:
    assert build.max_images(np.array([10, 20, 30]), 100) == 10
    assert build.max_images(np.array([3]), 100) == 67
