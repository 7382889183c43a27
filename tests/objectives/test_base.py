from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.base import TimeAdapter
from genfound.objectives.predictions import PREDICTIONS
from genfound.rng import Rng
from tests.helpers import linear_flow, packed


class Net:
    """Answers with a function of the state and of time as it counts it."""

    def __init__(self, time: str | None) -> None:
        if time is not None:
            self.time = time
        self.seen: list[Any] = []

    def __call__(self, batch: Batch, t: Any) -> Tensor:
        self.seen.append(t)
        return batch.x * 2


@pytest.mark.parametrize(("time", "reversed_"), [(None, False), ("data0", False), ("index", False), ("data1", True)])
@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_only_data1_is_turned_round_and_only_a_velocity_negated(
    time: str | None, reversed_: bool, prediction: str
) -> None:
    net, batch = Net(time), packed([(2, 2)])
    out = TimeAdapter(net, 1.0, velocity=prediction == "velocity")(batch, 0.25)
    assert net.seen[0].tolist() == [0.75 if reversed_ else 0.25]
    sign = -1 if reversed_ and prediction == "velocity" else 1
    assert torch.equal(out, sign * 2 * batch.x)


def test_small_times_of_such_a_network_keep_their_digits() -> None:
    """1 - t is formed in float64 and rounded once."""
    net, u = Net("data1"), torch.tensor([1e-3, 1.2345e-5])
    batch = packed([(1, 1), (1, 1)])
    TimeAdapter(net, 1.0)(batch, 1 - u.double())
    TimeAdapter(net, 1.0)(batch, 1 - 1.2345e-5)
    assert torch.equal(net.seen[0], u)
    assert torch.equal(net.seen[1], torch.full((2,), 1.2345e-5))


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", ["linear", "vp", "triangle"])
def test_training_is_the_same_in_both_directions(prediction: str, path: str) -> None:
    """A network and its mirror have the same losses."""
    flow, batch = linear_flow(prediction=prediction, path=path), packed([(3, 5), (4, 4)])

    def forward(b: Batch, t: Tensor) -> Tensor:
        return torch.tanh(b.x) * b.expand(1 + t)

    class Mirror:
        time = "data1"

        def __call__(self, b: Batch, u: Tensor) -> Tensor:
            out = forward(b, flow.path.end - u)
            return -out if prediction == "velocity" else out

    plain, mirrored = flow.loss(forward, batch, Rng(0)), flow.loss(Mirror(), batch, Rng(0))
    torch.testing.assert_close(plain.total, mirrored.total, atol=1e-5, rtol=1e-5)
    assert torch.equal(plain.t, mirrored.t)
