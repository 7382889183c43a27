from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.flow import Flow
from genfound.objectives.paths import PATHS
from genfound.objectives.times import TIME_LAWS, time_grid
from genfound.objectives.weighting import EXPONENTS, image_weight
from genfound.rng import Rng
from tests.helpers import linear_flow, three_layouts

SIZES = [(3, 5), (4, 4), (1, 7), (1, 1)]
SQUARES = [(4, 4)] * 3


def toy(batch: Batch, t: Tensor) -> Tensor:
    """Any function of the state, the time and the label."""
    return torch.tanh(batch.x) * batch.expand(1 + t) - batch.expand(torch.sin(batch.y.float()))


@pytest.mark.parametrize("sizes", [SIZES, SQUARES], ids=["ragged", "square"])
@pytest.mark.parametrize("law", ["uniform", "logit_normal"])
def test_loss_is_the_mean_squared_error_of_the_velocity(sizes: list[tuple[int, int]], law: str) -> None:
    rng = Rng(0, "train", 5)
    for name, batch in three_layouts(sizes).items():
        losses = linear_flow(time=law).loss(toy, batch, rng)
        noise = rng.normal("noise", batch.x.shape)
        t = batch.expand(losses.t)
        x_t = (1 - t) * batch.x + t * noise
        wave = torch.sin(batch.y.float())
        out = torch.tanh(x_t) * (1 + t) - batch.expand(wave)
        error = (out - (noise - batch.x)) ** 2
        for i in torch.nonzero(batch.real).flatten().tolist():
            own = error[i] if batch.image_of is None else error[batch.image_of == i]
            own = own[batch.mask[i]] if batch.mask is not None else own
            torch.testing.assert_close(losses.total[i], own.mean(), msg=name)


def test_filler_rows_have_no_loss_and_time_zero() -> None:
    batch = three_layouts(SIZES)["packed3"]
    losses = linear_flow().loss(toy, batch, Rng(0))
    assert batch.real.tolist() == [True] * 4 + [False] * 9
    assert (losses.total[:4] > 0).all()
    assert (losses.t[:4] > 0).all()
    assert (losses.total[4:] == 0).all()
    assert (losses.t[4:] == 0).all()


def test_filler_has_no_gradient() -> None:
    batch = three_layouts(SIZES)["packed3"]
    scale = torch.ones(len(batch.x), 1, requires_grad=True)
    linear_flow().loss(lambda b, t: b.x * scale, batch, Rng(0)).total.sum().backward()
    assert (scale.grad[:39] != 0).all()
    assert (scale.grad[39:] == 0).all()


def test_a_perfect_velocity_network_has_no_loss() -> None:
    """Data at one point m: noise - m = (x_t - m) / t."""
    for batch in three_layouts(SIZES).values():
        batch.x.fill_(0.7)
        losses = linear_flow().loss(lambda b, t: (b.x - 0.7) / b.expand(t.clamp(min=1e-6)), batch, Rng(0))
        assert (losses.total < 1e-10).all()


def test_the_network_sees_the_state_between_data_and_noise() -> None:
    seen: list[Tensor] = []
    batch = three_layouts(SQUARES)["dense4"]

    def spy(b: Batch, t: Tensor) -> Tensor:
        seen.extend([b.x, t])
        return b.x

    losses = linear_flow(time_mean=-30.0).loss(spy, batch, Rng(0))
    torch.testing.assert_close(seen[0], batch.x)  # t = 0 is data
    linear_flow(time_mean=30.0).loss(spy, batch, Rng(0))
    torch.testing.assert_close(seen[2], Rng(0).normal("noise", batch.x.shape))  # t = 1 is noise
    assert torch.equal(seen[1], losses.t)


def test_randomness_comes_from_the_stream_alone() -> None:
    batch = three_layouts(SIZES)["packed2"]
    first, again = (linear_flow().loss(toy, batch, Rng(0, "train", 5)) for _ in range(2))
    other = linear_flow().loss(toy, batch, Rng(0, "train", 6))
    assert torch.equal(first.total, again.total)
    assert not torch.equal(first.t, other.t)


def test_uniform_times() -> None:
    t = TIME_LAWS["uniform"](9.0, 9.0)(Rng(0), 100_000, torch.device("cpu"))
    assert 0 <= t.min() < 1e-4
    assert 1 - 1e-4 < t.max() < 1
    assert abs(t.mean() - 1 / 2) < 3e-3
    assert abs(t.var() - 1 / 12) < 1e-3


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 1.0), (-0.4, 1.2)])
def test_logit_normal_times(mean: float, std: float) -> None:
    t = TIME_LAWS["logit_normal"](mean, std)(Rng(0), 100_000, torch.device("cpu"))
    logits = torch.logit(t.double())
    assert ((t > 0) & (t < 1)).all()
    assert abs(logits.mean() - mean) < 0.02
    assert abs(logits.std() - std) < 0.02
    assert abs(t.median() - torch.sigmoid(torch.tensor(mean))) < 0.01


def test_time_grid() -> None:
    grid = time_grid(4, 1.0, 0.0)
    assert grid.dtype == torch.float64
    assert grid.tolist() == [1.0, 0.75, 0.5, 0.25, 0.0]
    assert time_grid(1, 1.0, 0.0).tolist() == [1.0, 0.0]


@pytest.mark.parametrize("steps", [0, -3])
def test_a_grid_needs_a_step(steps: int) -> None:
    with pytest.raises(ValueError, match=rf"sampler\.steps={steps} must be at least 1"):
        time_grid(steps, 1.0, 0.0)


@pytest.mark.parametrize("sampler", Flow.samplers)
def test_samplers_walk_from_noise_to_data(sampler: str) -> None:
    assert torch.equal(linear_flow().times(sampler, 5), time_grid(5, 1.0, 0.0))


def test_the_linear_path() -> None:
    t = torch.tensor([0.0, 0.25, 1.0])
    point = PATHS["linear"](t)
    assert point.alpha.tolist() == [1, 0.75, 0]
    assert point.sigma.tolist() == [0, 0.25, 1]
    assert point.d_alpha.tolist() == [-1, -1, -1]
    assert point.d_sigma.tolist() == [1, 1, 1]


@pytest.mark.parametrize("path", PATHS)
def test_paths_join_data_and_noise_and_know_their_derivatives(path: str) -> None:
    t = torch.linspace(0, 1, 11, dtype=torch.float64, requires_grad=True)
    point = PATHS[path](t)
    for value, derivative in ((point.alpha, point.d_alpha), (point.sigma, point.d_sigma)):
        (slope,) = torch.autograd.grad(value.sum(), t, retain_graph=True)
        torch.testing.assert_close(slope, derivative.detach())
    ends = torch.stack([point.alpha[[0, -1]], point.sigma[[0, -1]]]).detach()
    torch.testing.assert_close(ends, torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64))


@pytest.mark.parametrize(
    ("key", "choices"),
    [("path", PATHS), ("prediction", ["velocity"]), ("time", TIME_LAWS), ("weight", EXPONENTS)],
)
def test_an_unknown_name_lists_the_choices(key: str, choices: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key}=wrong is unknown") as error:
        linear_flow(**{key: "wrong"})
    assert all(choice in str(error.value) for choice in choices)


def test_image_weights() -> None:
    tokens = [1, 4, 256]
    expected = {"image": [1, 1, 1], "sqrt": [1, 2, 16], "token": [1, 4, 256]}
    for rule, weights in expected.items():
        assert [image_weight(float(n), rule) for n in tokens] == weights
        assert image_weight(np.array(tokens), rule).tolist() == weights
        assert image_weight(torch.tensor(tokens), rule).tolist() == weights
