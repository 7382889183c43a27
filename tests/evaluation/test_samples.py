from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from genfound.evaluation.samples import PART, SampleStore
from genfound.runtime.progress import Progress
from genfound.sampling.requests import SampleRequest, requests_by_rule
from tests.image_sets import Pictures


class Sampler:
    """Images that tell their request; counts them."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, net: Any, requests: list[SampleRequest], seed: int, progress: Progress) -> list[np.ndarray]:
        assert len({request.size for request in requests}) == 1 and len(requests) <= PART
        self.drawn += len(requests)
        return [np.full((*r.size, 3), (r.number + r.label + seed) % 256, dtype=np.uint8) for r in requests]


def requests(n: int = 150, size: Any = (4, 6)) -> list[SampleRequest]:
    return requests_by_rule(n, "random", size, 10, 0, None)


def test_the_rules_of_labels() -> None:
    data = Pictures([(4, 6), (8, 2), (5, 5)] * 10)
    uniform = [r.label for r in requests_by_rule(2000, "random", (4, 4), 10, 0, None)]
    assert min(Counter(uniform).values()) > 150 and max(Counter(uniform).values()) < 250
    balanced = [r.label for r in requests_by_rule(2000, "balanced", (4, 4), 10, 0, None)]
    assert set(Counter(balanced).values()) == {200} and balanced[:20] != sorted(balanced[:20])
    as_data = requests_by_rule(60, "data", "data", 10, 0, data)
    pairs = Counter((r.label, r.size) for r in as_data)
    wanted = Counter((int(y), (int(h), int(w))) for y, (h, w) in zip(data.labels, data.sizes, strict=True))
    assert pairs == Counter({pair: 2 * count for pair, count in wanted.items()})


def test_random_labels_of_fewer_images_are_the_first_of_more() -> None:
    assert requests(20) == requests(150)[:20]
    assert requests_by_rule(50, "random", (4, 6), 10, 1, None) != requests(50)


def test_wrong_rules_are_refused() -> None:
    for options, message in (
        ((10, "sorted", (4, 4)), "labels=sorted is unknown; choose one of random, balanced, data"),
        ((0, "random", (4, 4)), "n=0 must be a whole number of at least 1"),
        ((10, "data", (4, 4)), "need the data set"),
    ):
        with pytest.raises(ValueError, match=message):
            requests_by_rule(*options, 10, 0, None)  # type: ignore[arg-type]


def test_any_number_of_processes_and_an_interruption_give_the_same_images(tmp_path: Path) -> None:
    sizes = [(4, 6), (2, 2), (4, 6), (6, 4)] * 80
    asked = [SampleRequest(k % 10, size, k) for k, size in enumerate(sizes)]
    sampler: Any = Sampler()
    net: Any = nn.Identity()
    alone, shared, again = (
        SampleStore(tmp_path / name, asked, net, sampler, 3) for name in ("alone", "shared", "shared")
    )
    alone.draw()
    shared.draw(rank=1, ranks=2)
    assert 0 < shared.missing < len(asked)
    sampler.drawn, first = 0, shared.missing
    for rank in range(3):
        shared.draw(rank, ranks=3)
    assert sampler.drawn == first and shared.missing == 0
    for k, request in enumerate(asked):
        assert np.array_equal(alone[k], again[k]) and again[k].shape == (*request.size, 3)
        assert again[k][0, 0, 0] == (k + request.label + 3) % 256
