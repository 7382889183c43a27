from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.backbones.base import TokenSpec
from genfound.batch import Batch
from genfound.layouts import Packed
from genfound.objectives.flow import Flow, cosine_loss
from genfound.objectives.interpolants import INTERPOLANTS
from genfound.objectives.predictions import PREDICTIONS
from genfound.objectives.times import TIME_LAWS, time_grid
from genfound.objectives.weighting import EXPONENTS, WEIGHTINGS
from genfound.rng import Rng
from tests.helpers import SAMPLERS, linear_flow, packed, three_layouts, times_of

SIZES = [(3, 5), (4, 4), (1, 7), (1, 1)]
SQUARES = [(4, 4)] * 3


def toy(batch: Batch, t: Tensor) -> Tensor:
    """Any function of the state, the time and the label."""
    return torch.tanh(batch.x) * batch.expand(1 + t) - batch.expand(torch.sin(batch.y.float()))


def training_times(flow: Flow, batch: Batch) -> Tensor:
    return flow.training_times(batch, flow.time_law(Rng(0), len(batch.y), batch.x.device))


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


def test_filler_rows_have_no_loss_and_the_middle_time() -> None:
    batch = three_layouts(SIZES)["packed3"]
    losses = linear_flow().loss(toy, batch, Rng(0))
    assert batch.real.tolist() == [True] * 4 + [False] * 9
    assert (losses.total[:4] > 0).all()
    assert (losses.t[:4] > 0).all()
    assert (losses.total[4:] == 0).all()
    assert (losses.t[4:] == 0.5).all()


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


@pytest.mark.parametrize("sampler", [name for name, sampler in SAMPLERS.items() if sampler.needs in Flow.gives])
def test_samplers_walk_from_noise_to_data(sampler: str) -> None:
    assert torch.equal(times_of(sampler, linear_flow(), 5), time_grid(5, 1.0, 0.0))


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("path", INTERPOLANTS),
        ("prediction", PREDICTIONS),
        ("weighting", WEIGHTINGS),
        ("time", TIME_LAWS),
        ("weight", EXPONENTS),
    ],
)
def test_an_unknown_name_lists_the_choices(key: str, choices: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key}=wrong is unknown") as error:
        linear_flow(**{key: "wrong"})
    assert all(choice in str(error.value) for choice in choices)


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("path", INTERPOLANTS)
@pytest.mark.parametrize("weighting", WEIGHTINGS)
def test_a_perfect_network_has_no_loss(prediction: str, path: str, weighting: str) -> None:
    """Data at one point: state, time and prediction determine each other."""
    flow = linear_flow(prediction=prediction, path=path, weighting=weighting, time="uniform", train_eps=0.05)

    def perfect(batch: Batch, t: Tensor) -> Tensor:
        p = flow.path.point(t.double()).of(batch)
        noise = (batch.x - p.alpha * 0.7) / p.sigma.clamp(min=1e-4)
        score = -noise / p.sigma.clamp(min=1e-4)
        x0 = torch.full_like(noise, 0.7)
        return {"noise": noise, "x0": x0, "score": score, "velocity": p.velocity(x0, noise)}[prediction]

    for batch in three_layouts(SIZES).values():
        batch.x.fill_(0.7)
        losses = flow.loss(perfect, batch, Rng(0))
        assert (losses.total < 1e-6).all()


@pytest.mark.parametrize(
    ("options", "train", "sample"),
    [
        ({}, (0, 1), (0, 1)),
        ({"weighting": "min_snr"}, (0, 1), (0, 1)),
        ({"weighting": "likelihood"}, (1e-3, 1 - 1e-3), (0, 1)),
        ({"prediction": "score"}, (1e-3, 1 - 1e-3), (1e-3, 1 - 1e-3)),
        ({"prediction": "noise", "path": "gvp", "sample_eps": 0.02}, (1e-3, 1 - 1e-3), (0.02, 0.98)),
        ({"path": "vp"}, (1e-5, 1), (1e-3, 1)),
        ({"path": "vp", "prediction": "noise", "train_eps": 0.01}, (0.01, 1), (1e-3, 1)),
        ({"path": "triangle", "prediction": "x0"}, (1e-3, math.pi / 2 - 1e-3), (1e-3, math.pi / 2 - 1e-3)),
    ],
)
def test_distances_from_singular_ends(
    options: dict[str, Any], train: tuple[float, float], sample: tuple[float, float]
) -> None:
    """SiT's rules, but for given distances that it ignores."""
    flow = linear_flow(time="uniform", **options)
    assert flow.train_interval == pytest.approx(train)
    assert flow.sample_interval == pytest.approx(sample)
    t = training_times(flow, packed([(1, 1)] * 500))
    assert train[0] - 1e-7 <= t.min() < train[0] + 0.02
    assert train[1] - 0.02 < t.max() <= train[1] + 1e-7
    assert flow.times(3)[[0, -1]].tolist() == pytest.approx(sample[::-1])


@pytest.mark.parametrize("key", ["train_eps", "sample_eps"])
@pytest.mark.parametrize("value", [-0.1, 0.5])
def test_a_distance_that_leaves_nothing_is_refused(key: str, value: float) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key}={value} must be at least 0"):
        linear_flow(**{key: value})


def test_a_bad_time_shift_is_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.time_shift=wide must be a positive number or auto"):
        linear_flow(time_shift="wide")


def test_larger_latents_may_be_trained_at_more_noise() -> None:
    batch = three_layouts([(2, 2), (8, 8)])["packed2"]
    small, large = training_times(linear_flow(time_shift="auto"), batch).tolist()
    plain_small, plain_large = training_times(linear_flow(), batch).tolist()
    for moved, plain, numbers in ((small, plain_small, 16), (large, plain_large, 256)):
        assert moved / (1 - moved) == pytest.approx((numbers / 4096) ** 0.5 * plain / (1 - plain))


class Tokens:
    """A network that says of what its tokens are made."""

    token_spec = TokenSpec(4, 1)

    def __call__(self, batch: Batch, t: Tensor) -> Tensor:
        return toy(batch, t)


@pytest.mark.parametrize("sizes", [SIZES, SQUARES], ids=["ragged", "square"])
def test_the_directional_loss_is_one_minus_cosine_similarity_along_channels(sizes: list[tuple[int, int]]) -> None:
    rng, wanted = Rng(0, "train", 5), {}
    for name, batch in three_layouts(sizes).items():
        losses = linear_flow(directional=0.5).loss(Tokens(), batch, rng)
        plain = linear_flow().loss(toy, batch, rng)
        assert torch.equal(losses.terms["mse"], plain.total)
        torch.testing.assert_close(losses.total, losses.terms["mse"] + losses.terms["directional"])
        assert (losses.terms["directional"][: len(sizes)] > 0).all()
        assert (losses.terms["directional"][len(sizes) :] == 0).all()
        noise, t = rng.normal("noise", batch.x.shape), batch.expand(losses.t)
        out, target = toy(replace(batch, x=(1 - t) * batch.x + t * noise), losses.t), noise - batch.x
        axis = 1 if batch.layout == "dense" else -1
        turned = 1 - torch.nn.functional.cosine_similarity(out, target, dim=axis)
        own = turned[0] if batch.image_of is None else turned[batch.image_of == 0]
        own = own[batch.mask[0]] if batch.mask is not None else own
        wanted[name] = 0.5 * own.mean()
        torch.testing.assert_close(losses.terms["directional"][0], wanted[name], msg=name)


def test_a_patch_has_a_direction_in_each_of_its_pixels() -> None:
    """The channels of a token come first: (C, p, p)."""
    batch = Packed(2).to_batch([torch.randn(4, 2, 2)], torch.zeros(1))
    out, target = torch.randn(2, 4, 2, 2)
    net = Tokens()
    net.token_spec = TokenSpec(4, 2)
    ours = cosine_loss(net, batch, out.reshape(1, 16), target.reshape(1, 16))
    wanted = 1 - torch.nn.functional.cosine_similarity(out, target, dim=0).reshape(1, 4)
    torch.testing.assert_close(ours, wanted)


def test_a_directional_loss_needs_a_velocity_and_channels() -> None:
    with pytest.raises(ValueError, match=r"objective\.directional=1\.0 needs objective\.prediction=velocity"):
        linear_flow(directional=1.0, prediction="noise")
    with pytest.raises(ValueError, match=r"objective\.directional needs a network with a token_spec"):
        linear_flow(directional=1.0).loss(toy, three_layouts(SIZES)["packed2"], Rng(0))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        *[("min_snr_gamma", 0), ("min_snr_gamma", None), ("directional", -1), ("time_std", -1), ("time_mean", None)],
        *[("train_eps", "abc"), ("sample_eps", True)],
    ],
)
def test_numbers_out_of_range_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key}={value} must be a finite number"):
        linear_flow(**{key: value})


@pytest.mark.parametrize("share", [-1, 2, None])
def test_the_share_of_a_window_is_one(share: Any) -> None:
    with pytest.raises(ValueError, match=r"objective\.time_window_share=.* at least 0 and at most 1"):
        linear_flow(time_window=[0.2, 0.5], time_window_share=share)
    with pytest.raises(ValueError, match=r"objective\.time_window=0\.5 must be \[low, high\]"):
        linear_flow(time_window=0.5)


def test_more_noise_is_in_the_state_its_velocity_and_the_start_of_a_walk() -> None:
    batch, rng = three_layouts(SQUARES)["dense4"], Rng(0)
    seen: list[Tensor] = []

    def spy(b: Batch, t: Tensor) -> Tensor:
        seen.append(b.x)
        return torch.zeros_like(b.x)

    flow = linear_flow(noise_scale=2.0)
    losses = flow.loss(spy, batch, rng)
    t, noise = batch.expand(losses.t), 2 * rng.normal("noise", batch.x.shape)
    torch.testing.assert_close(seen[0], (1 - t) * batch.x + t * noise)
    torch.testing.assert_close(losses.total, batch.per_image((noise - batch.x) ** 2))
    assert flow.noise_scale == 2 and flow.signature["objective.noise_scale"] == 2
    with pytest.raises(ValueError, match=r"objective\.noise_scale=0 must be a finite number above 0"):
        linear_flow(noise_scale=0)


@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
def test_near_data_the_error_and_the_velocity_of_predicted_data_are_divided_by_the_floor(noise_scale: float) -> None:
    """JiT: (x - x0) / max(1 - t, 0.05) with t = 1 at data, for the target and the prediction."""
    options = {"prediction": "x0", "weighting": "velocity", "train_eps": 0.0, "sample_eps": 0.0}
    flow = linear_flow(**options, sigma_floor=0.05, noise_scale=noise_scale)
    batch, time = three_layouts(SQUARES)["dense4"], torch.tensor([0.01, 0.04, 0.5], dtype=torch.float64)
    zero = torch.zeros_like(batch.x)
    losses = flow.loss_at(lambda b, t: torch.zeros_like(b.x), batch, time, zero)
    expected = batch.per_image(batch.x**2) / time.clamp(min=0.05) ** 2
    torch.testing.assert_close(losses.total, expected.float())
    field = flow.field(lambda b, t: torch.zeros_like(b.x))
    for t in time.tolist():
        torch.testing.assert_close(field.velocity(batch, t), batch.x / max(t, 0.05))
    assert flow.train_interval == flow.sample_interval == (0.0, 1.0)
    with pytest.raises(ValueError, match=r"objective\.sigma_floor=-1 must be a finite number of at least 0"):
        linear_flow(sigma_floor=-1)
