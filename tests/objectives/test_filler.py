"""Filler rows of a static shape stand at a harmless time: they change no loss and no gradient."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from genfound.backbones.base import TokenSpec
from genfound.batch import Batch
from genfound.layouts import Dense, Layout, Packed, Padded
from genfound.objectives.base import Objective
from genfound.objectives.gaussian import Gaussian
from genfound.objectives.interpolants import INTERPOLANTS
from genfound.objectives.predictions import PREDICTIONS
from genfound.objectives.times import TIME_LAWS
from genfound.objectives.weighting import WEIGHTINGS
from genfound.rng import Rng
from tests.helpers import latents, linear_flow

SQUARES, RAGGED = [(4, 4)] * 3, [(3, 5), (4, 4), (1, 7), (1, 1)]
FILLED: dict[str, tuple[list[tuple[int, int]], Layout, Layout]] = {
    "packed": (RAGGED, Packed(1), Packed(1, 60, 12, filler_label=9)),
    "full": (RAGGED, Packed(1), Packed(1, 39, 4)),  # a filler row without a token
    "dense": (SQUARES, Dense(1), Dense(1, 8, filler_label=9)),
    "padded": (RAGGED, Padded(1), Padded(1, 30)),
}

FLOWS = list(itertools.product(INTERPOLANTS, PREDICTIONS, WEIGHTINGS, [None, 0.0, 0.01]))


class Toy(nn.Module):
    """Any function of state, time and label with two parameters; `outputs` numbers per channel."""

    token_spec = TokenSpec(4, 1)

    def __init__(self, outputs: int = 1) -> None:
        super().__init__()
        self.outputs = outputs
        self.weights = nn.Parameter(torch.tensor([0.7, -0.4]))

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        scale, shift = self.weights
        out = scale * torch.tanh(batch.x) * batch.expand(torch.cos(t.float())) + shift * batch.expand(batch.y.float())
        return torch.cat([out, out.sin()][: self.outputs], dim=1 if batch.layout == "dense" else -1)


def losses_and_gradient(objective: Objective, layout: Layout, sizes: Any, outputs: int) -> tuple[Tensor, Tensor]:
    """Of each row, and of the sum for the parameters; draws are those of the real rows, and 0 on filler."""
    net, count = Toy(outputs), len(sizes)
    batch = layout.to_batch(latents(sizes), torch.arange(count))
    noise = layout.to_batch(latents(sizes, seed=1), torch.arange(count)).x
    part = objective.time_law(Rng(0), count, torch.device("cpu"))
    part = nn.functional.pad(part, (0, len(batch.y) - count))  # a pole, if it were believed
    losses = objective.loss_at(net, batch, part, noise)
    losses.total.sum().backward()
    assert net.weights.grad is not None
    assert all(term.isfinite().all() for term in losses.terms.values())
    return losses.total.detach(), net.weights.grad


def assert_filler_has_no_influence(objective: Objective, filled: str, outputs: int = 1) -> None:
    sizes, plain, static = FILLED[filled]
    losses, gradient = losses_and_gradient(objective, plain, sizes, outputs)
    with_filler, other = losses_and_gradient(objective, static, sizes, outputs)
    assert losses.isfinite().all() and gradient.isfinite().all()
    torch.testing.assert_close(with_filler[: len(sizes)], losses)
    assert (with_filler[len(sizes) :] == 0).all()
    torch.testing.assert_close(other, gradient)


@pytest.mark.parametrize("filled", FILLED)
@pytest.mark.parametrize("path", INTERPOLANTS)
def test_filler_has_no_influence_on_any_flow(path: str, filled: str) -> None:
    for name, prediction, weighting, eps in FLOWS:
        if name == path:
            options = {"path": path, "prediction": prediction, "weighting": weighting, "train_eps": eps}
            assert_filler_has_no_influence(linear_flow(time="uniform", **options), filled)


@pytest.mark.parametrize("filled", FILLED)
@pytest.mark.parametrize(
    "options",
    [*[{"time": law} for law in TIME_LAWS], {"directional": 0.5}, {"time_shift": "auto"}, {"time_window": [0.0, 0.3]}],
    ids=str,
)
def test_filler_has_no_influence_on_other_options_of_a_flow(options: dict[str, Any], filled: str) -> None:
    assert_filler_has_no_influence(linear_flow(train_eps=0.0, **options), filled)


@pytest.mark.parametrize("filled", FILLED)
@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_filler_has_no_influence_on_any_gaussian_objective(schedule: str, filled: str) -> None:
    settings = itertools.product(
        ("epsilon", "x0"), ("learned_range", "fixed_small", "fixed_large"), ("hybrid", "rescaled_mse", "kl", "mse")
    )
    for prediction, variance, loss in settings:
        if (variance, loss) == ("learned_range", "mse"):
            continue
        objective = Gaussian(
            timesteps=1000, schedule=schedule, prediction=prediction, variance=variance, loss=loss, clip_x0=False,
            weight="image",
        )  # fmt: skip
        assert_filler_has_no_influence(objective, filled, outputs=1 + objective.learned_variance)
