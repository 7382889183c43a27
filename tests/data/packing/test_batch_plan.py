from __future__ import annotations

from collections import Counter
from itertools import islice
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.image_sizes import token_counts
from genfound import build
from genfound.data.packing import budget
from genfound.data.packing.batch_plan import MicroBatch, Plan
from genfound.data.packing.loader import TrainLoader
from genfound.data.packing.order import Order
from genfound.data.packing.packer import FixedBatcher, Packer
from genfound.objectives.weighting import EXPONENTS
from genfound.tokenizers import LatentSpec
from tests.helpers import composed

BUDGET = 512


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(0, 5))
def test_the_order_has_every_image_once_in_each_pass(images: int, seed: int) -> None:
    order = Order(images, seed)
    for number in range(3):
        seen = [order[k] for k in range(number * images, (number + 1) * images)]
        assert sorted(seen) == list(range(images))


def test_passes_and_seeds_differ() -> None:
    order, other = Order(100, 0), Order(100, 1)
    passes = [tuple(order[k] for k in range(n * 100, (n + 1) * 100)) for n in range(3)]
    assert len({*passes, tuple(other[k] for k in range(100))}) == 4


def test_any_position_can_be_looked_up_first() -> None:
    walked = Order(37, 3)
    sequence = [walked[k] for k in range(200)]
    for k in (199, 0, 74, 36, 37, 150):
        assert Order(37, 3)[k] == sequence[k]


def test_the_order_is_shuffled() -> None:
    order = Order(1000, 0)
    first = Counter(order[k] < 500 for k in range(200))
    assert 70 < first[True] < 130


def test_anchor_of_the_order() -> None:
    """A change of these numbers changes every run that continues."""
    assert [Order(8, 7)[k] for k in range(12)] == [0, 6, 4, 7, 5, 1, 3, 2, 1, 5, 4, 0]


def packed_plan(per_step: int = 8, weight: str = "token", images: int = 700, seed: int = 3) -> Plan:
    tokens = np.random.default_rng(1).integers(4, 120, images)
    order = Order(images, seed)
    return Plan(order, tokens, Packer(lambda k: int(tokens[order[k]]), BUDGET, 40), per_step, weight, seed)


def dense_plan(per_step: int = 4, images: int = 50) -> Plan:
    return Plan(Order(images, 0), np.full(images, 16), FixedBatcher(3), per_step, "image", 0)


PLANS = {"packed": packed_plan, "dense": dense_plan}


def first(plan: Plan, steps: int) -> list[list[MicroBatch]]:
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
def test_weight_sum_is_the_sum_over_all_images_of_the_step(rule: str) -> None:
    plan = packed_plan(weight=rule)
    for micros in first(plan, 5):
        tokens = np.concatenate([plan.tokens[list(m.indices)] for m in micros]).astype(float)
        expected = {"image": len(tokens), "sqrt": np.sqrt(tokens).sum(), "token": tokens.sum()}[rule]
        for m in micros:
            assert m.weight_sum == pytest.approx(expected)


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
    assert len(state["left"]) == 5 * 8  # three of the eight steps of a window have been read
    assert len(state["grouper"]["waiting"]) <= 256
    assert len(plan._windows) <= 2  # older records are dropped


def thirty_images(per_step: int, budget: int, images: int) -> Plan:
    """Packs of a budget of tokens, or for 0 chunks of so many images, of the same images in the same order."""
    tokens = np.random.default_rng(1).integers(4, 60, 30)
    order = Order(30, 3)
    packer = Packer(lambda k: int(tokens[order[k]]), budget, 20, lookahead=20)
    packer.window = 6  # type: ignore[misc]
    return Plan(order, tokens, packer if budget else FixedBatcher(images), per_step, "image", 3)


def parts_of_a_run() -> Any:
    """Micro-batches of a step, their budget or images, steps until the run is killed, steps read ahead of it."""
    micro = st.tuples(st.integers(1, 9), st.sampled_from([0, 128, 128, 200]), st.integers(1, 5))
    return st.lists(st.tuples(micro, st.integers(0, 12), st.integers(0, 3)), min_size=2, max_size=5)


@given(parts_of_a_run())
def test_a_run_that_continues_with_another_global_step_repeats_and_loses_no_image(parts: list[Any]) -> None:
    state, read = None, list[MicroBatch]()
    for micro, steps, ahead in parts:
        plan = thirty_images(*micro)
        if state is not None:
            plan.restore(state)
        begin = len({m.step for m in read})
        read += [m for step in first(plan, steps + ahead)[:steps] for m in step]
        state = plan.state(begin + steps)
    plan.restore(state)
    end = max((k for m in read for k in m.positions), default=0) // 30 + 2
    missing = set(range(30 * end)) - {k for m in read for k in m.positions}
    for step in islice(plan.steps(), 60 * end):
        if not missing:
            break
        read += step
        missing -= {k for m in step for k in m.positions}
    assert not missing
    positions = [k for m in read for k in m.positions]
    assert len(positions) == len(set(positions))
    indices = {k: i for m in read for k, i in zip(m.positions, m.indices, strict=True)}
    for number in range(end):
        assert sorted(indices[k] for k in range(number * 30, number * 30 + 30)) == list(range(30))
    assert [m.number for m in read] == list(range(len(read)))
    assert [m.step for m in read] == sorted(m.step for m in read)
    seen = np.cumsum([len(m.positions) for m in read])
    ends = [i for i, m in enumerate(read) if i + 1 == len(read) or read[i + 1].step != m.step]
    assert [read[i].images_seen for i in ends] == seen[ends].tolist()


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_share_what_is_left_of_a_window(ranks: int) -> None:
    """Of 64 packs in steps of four, 44 are left after five steps: they are the next 22 steps of two."""
    before = packed_plan(per_step=4)
    list(islice(before.steps(), 5))
    shares = []
    for rank in range(ranks):
        plan = packed_plan(per_step=2)
        plan.restore(before.state(5))
        shares.append(list(islice(TrainLoader(None, plan, rank, ranks, 0, False).share(), 44 // ranks)))  # type: ignore
    numbers = sorted(m.number for share in shares for m in share)
    assert numbers == list(range(20, 64))
    left = {k for step in first(packed_plan(per_step=4), 16)[5:] for m in step for k in m.positions}
    taken = {k for share in shares for m in share for k in m.positions}
    assert taken == left


def test_other_images_are_grouped_anew() -> None:
    """A larger image may have come to a place of a pack that was made and not read."""
    before = packed_plan(images=700)
    list(islice(before.steps(), 3))
    plan = packed_plan(images=701, per_step=8)
    plan.restore(before.state(3))
    steps = first(plan, 30)
    assert all(m.tokens <= BUDGET for step in steps for m in step)
    old = {k for step in first(packed_plan(images=700), 3) for m in step for k in m.positions}
    assert not old & {k for step in steps for m in step for k in m.positions}


def test_a_state_of_an_earlier_version_is_refused() -> None:
    with pytest.raises(ValueError, match=r"as earlier versions of genfound did.*init_from="):
        packed_plan().restore({"window": {"step": 0, "images_seen": 0, "grouper": {}}, "step": 3})


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
    return build.plan(config, source, LatentSpec(3, 1), "image", ranks, 0)  # type: ignore[arg-type]


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
    with pytest.raises(ValueError, match=rf"batch\.images={images} must be a multiple of data\.batch_size=32; set"):
        built(Source((16, 16)), "layout=dense", f"batch.images={images}")


@pytest.mark.parametrize(("most", "images"), [(32, 30), (40, 40), (7, 6), (2000, 1200)])
def test_the_step_of_a_recipe_is_cut_evenly(most: int, images: int) -> None:
    source = Source(*[(64, 64)] * 1500)
    options = ("model=ldm_4", f"data.batch_size={most}")
    step = next(built(source, *options).steps())
    assert [len(micro.indices) for micro in step] == [images] * (1200 // images)
    assert len(next(built(source, *options, f"batch.images={3 * most}").steps())) == 3


def test_rows_of_a_static_pack() -> None:
    assert budget.max_images(np.array([10, 20, 30]), 100) == 10
    assert budget.max_images(np.array([3]), 100) == 67


@pytest.mark.parametrize("layout", [("batch.packs=2",), ("model=dit_tiny", "batch.images=64")])
def test_the_first_packs_are_repeated_to_overfit_them(layout: tuple[str, ...]) -> None:
    source = Source(*[(8, 8)] * 300) if len(layout) > 1 else Source(*[(8, 8), (16, 8), (12, 12), (16, 16)] * 50)
    grouper = built(source, *layout).grouper
    wanted = {tuple(grouper.take()) for _ in range(3)}

    def overfitting() -> Plan:
        return built(source, *layout, "trainer.overfit_batches=3")

    plan = overfitting()
    steps = list(islice(plan.steps(), 30))
    assert {micro.positions for step in steps for micro in step} == wanted
    numbers = [micro.number for step in steps for micro in step]
    assert numbers == list(range(60))  # their noise and times are drawn anew
    assert steps[-1][-1].images_seen == sum(len(micro.indices) for step in steps for micro in step)
    resumed = overfitting()
    resumed.restore(plan.state(10))
    assert list(islice(resumed.steps(), 20)) == steps[10:]
    switched = built(source, *layout)
    switched.restore(plan.state(10))
    later = {k for step in islice(switched.steps(), 40) for micro in step for k in micro.positions}
    assert len(later) > 100  # without the option the run goes on to other images
