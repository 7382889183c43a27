from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from genfound.data.packing.order import Order


@settings(max_examples=30)
@given(st.integers(1, 60), st.integers(0, 5))
def test_every_image_exactly_once_in_each_pass(images: int, seed: int) -> None:
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


def test_anchor() -> None:
    """A change of these numbers changes every run that continues."""
    assert [Order(8, 7)[k] for k in range(12)] == [0, 6, 4, 7, 5, 1, 3, 2, 1, 5, 4, 0]
