from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts import Dense, Layout, Packed, Padded
from genfound.objectives.gaussian import Gaussian
from genfound.objectives.process import (
    SCHEDULES,
    Process,
    linear,
    space_timesteps,
)
from genfound.objectives.vlb import variational_bound
from genfound.objectives.weighting import EXPONENTS
from genfound.rng import Rng
from tests.helpers import latents, three_layouts

SQUARES, RAGGED = [(4, 4)] * 4, [(4, 6), (4, 4), (2, 6), (2, 2)]
LABELS = torch.arange(4)


def gaussian(**options: Any) -> Gaussian:
    defaults: dict[str, Any] = {
        "timesteps": 1000, "schedule": "linear", "prediction": "epsilon", "variance": "learned_range",
        "loss": "hybrid", "clip_x0": False, "weight": "image",
    }  # fmt: skip
    return Gaussian(**{**defaults, **options})


def channels(batch: Batch) -> int:
    return 1 if batch.layout == "dense" else -1


def toy(batch: Batch, t: Tensor) -> Tensor:
    """Noise and v: any functions of the state, the time and the label."""
    epsilon = torch.tanh(batch.x) * batch.expand(1 + t / 500) - batch.expand(torch.sin(batch.y.float()))
    return torch.cat([epsilon, torch.cos(3 * batch.x)], dim=channels(batch))


class Given(Rng):
    """Times and noise that are the same latents in every layout."""

    def __init__(self, layout: Layout, sizes: Sequence[tuple[int, int]], time: Tensor) -> None:
        super().__init__(0)
        self.layout, self.noise, self.time = layout, latents(sizes, seed=1), time

    def uniform(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return torch.nn.functional.pad(self.time, (0, shape[0] - len(self.time)), value=0.77)

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self.layout.to_batch(self.noise, torch.arange(len(self.noise))).x


@pytest.mark.parametrize("sizes", [RAGGED, SQUARES], ids=["ragged", "square"])
@pytest.mark.parametrize("loss", ["hybrid", "kl"])
@pytest.mark.parametrize("patch_size", [1, 2])
def test_the_loss_of_an_image_does_not_depend_on_the_layout(
    sizes: list[tuple[int, int]], loss: str, patch_size: int
) -> None:
    time = torch.tensor([0.0004, 0.3, 0.0018, 0.9])  # timesteps 0, 300, 1, 900
    objective = gaussian(loss=loss)
    z = [0.5 * latent for latent in latents(sizes)]
    alone = []
    for i, size in enumerate(sizes):
        rng = Given(Dense(patch_size), [size], time[i : i + 1])
        rng.noise = latents(sizes, seed=1)[i : i + 1]
        found = objective.loss(toy, Dense(patch_size).to_batch(z[i : i + 1], LABELS[i : i + 1]), rng)
        assert (found.terms["vb"] > 0).all()
        alone.append(found.total)
    layouts: list[Layout] = [Padded(patch_size), Packed(patch_size), Packed(patch_size, 100, 6)]
    for layout in [*layouts, *([Dense(patch_size)] if sizes is SQUARES else [])]:
        found = objective.loss(toy, layout.to_batch(z, LABELS), Given(layout, sizes, time))
        torch.testing.assert_close(found.total[:4], torch.cat(alone), rtol=1e-4, atol=1e-5, msg=layout.name)
        assert found.t[:4].tolist() == [0, 300, 1, 900]
        assert (found.total[4:] == 0).all()
        assert (found.t[4:] == 500).all()


def test_total_is_the_sum_of_the_terms() -> None:
    batch = three_layouts(RAGGED)["packed2"]
    for options in ({}, {"loss": "rescaled_mse", "timesteps": 50}, {"loss": "kl"}):
        found = gaussian(**options).loss(toy, batch, Rng(0))
        torch.testing.assert_close(found.total, sum(found.terms.values()))
        assert set(found.terms) == ({"vb"} if options.get("loss") == "kl" else {"mse", "vb"})


def test_filler_has_no_gradient() -> None:
    batch = three_layouts(RAGGED)["packed3"]
    scale = torch.ones(len(batch.x), 1, requires_grad=True)
    gaussian().loss(lambda b, t: toy(b, t) * scale, batch, Rng(0)).total.sum().backward()
    real = sum(h * w for h, w in RAGGED)
    assert (scale.grad[:real] != 0).all()
    assert (scale.grad[real:] == 0).all()


def test_times_are_whole_and_uniform() -> None:
    batch = Dense(1).to_batch(list(torch.zeros(20_000, 1, 1, 1)), torch.zeros(20_000))
    found = gaussian(variance="fixed_large", timesteps=10, schedule="cosine").loss(lambda b, t: b.x, batch, Rng(0))
    counts = torch.bincount(found.t.long(), minlength=10)
    assert torch.equal(found.t, found.t.round())
    assert len(counts) == 10
    assert (counts - 2000).abs().max() < 5 * 2000**0.5


def test_randomness_comes_from_the_stream_alone() -> None:
    batch = three_layouts(SQUARES)["dense4"]
    first, again = (gaussian().loss(toy, batch, Rng(0, "train", 5)) for _ in range(2))
    other = gaussian().loss(toy, batch, Rng(0, "train", 6))
    assert torch.equal(first.total, again.total)
    assert not torch.equal(first.t, other.t)


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_a_perfect_network_with_the_posterior_variance_has_no_loss(prediction: str) -> None:
    """Data at one point 0.7, where v = -1 is the true variance; t = 0 is a likelihood, which is never 0."""
    objective = gaussian(prediction=prediction)
    objective.process = objective.process.respaced(range(1, 1000))

    def perfect(batch: Batch, t: Tensor) -> Tensor:
        x0 = torch.full_like(batch.x, 0.7)
        c = gaussian().process.on(batch.x.device).at(batch, t.long())
        out = x0 if prediction == "x0" else c.noise_from_x0(batch.x, x0)
        return torch.cat([out, -torch.ones_like(out)], dim=channels(batch))

    batch = three_layouts(SQUARES)["dense4"]
    batch.x.fill_(0.7)
    rng = Given(Dense(1), SQUARES, torch.tensor([0.1, 0.4, 0.7, 0.99]))
    found = objective.loss(perfect, batch, rng)
    assert (found.terms["mse"] < 1e-5).all()
    assert (found.terms["vb"].abs() < 1e-4).all()


def gradients(objective: Gaussian) -> tuple[Tensor, Tensor]:
    """Of the loss with respect to the two halves of the output."""
    batch = three_layouts(SQUARES)["dense4"]
    output = torch.zeros(4, 8, 4, 4, requires_grad=True)
    objective.loss(lambda b, t: output, batch, Rng(0)).total.sum().backward()
    return output.grad[:, :4], output.grad[:, 4:]


def test_the_bound_trains_the_variance_alone_except_under_kl() -> None:
    mean, variance = gradients(gaussian())
    fixed = torch.zeros(4, 4, 4, 4, requires_grad=True)
    batch = three_layouts(SQUARES)["dense4"]
    gaussian(variance="fixed_large", loss="mse").loss(lambda b, t: fixed, batch, Rng(0)).total.sum().backward()
    torch.testing.assert_close(mean, fixed.grad)
    assert (variance != 0).all()
    assert not torch.allclose(gradients(gaussian(loss="kl"))[0], mean)


@pytest.mark.parametrize("timesteps", [1000, 100])
def test_rescaled_mse_counts_the_bound_in_thousand_steps(timesteps: int) -> None:
    batch = three_layouts(SQUARES)["dense4"]
    plain, rescaled, kl = (
        gaussian(timesteps=timesteps, loss=loss).loss(toy, batch, Rng(0)).terms
        for loss in ("hybrid", "rescaled_mse", "kl")
    )
    torch.testing.assert_close(rescaled["vb"], plain["vb"] * timesteps / 1000)
    torch.testing.assert_close(kl["vb"], plain["vb"] * timesteps)
    assert torch.equal(rescaled["mse"], plain["mse"])


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
@pytest.mark.parametrize("loss", ["hybrid", "rescaled_mse", "mse"])
def test_a_fixed_variance_leaves_the_squared_error(variance: str, loss: str) -> None:
    batch = three_layouts(RAGGED)["packed2"]
    rng = Rng(0)
    found = gaussian(variance=variance, loss=loss).loss(lambda b, t: torch.tanh(b.x), batch, rng)
    c = Process(linear(1000)).on(batch.x.device).at(batch, found.t.long())
    noise = rng.normal("noise", batch.x.shape)
    expected = batch.per_image((noise - torch.tanh(c.q_sample(batch.x, noise))) ** 2)
    torch.testing.assert_close(found.total, expected)
    assert list(found.terms) == ["mse"]


def test_learned_variance_lies_between_the_two_fixed_ones() -> None:
    batch = Dense(1).to_batch(latents(SQUARES), LABELS)
    objective = gaussian()
    c = objective.process.on(batch.x.device).at(batch, torch.tensor([1, 5, 500, 999]))
    wanted: list[tuple[float, Callable[[], Tensor]]] = [
        (-1.0, lambda: c.posterior_log_variance_clipped),
        (1.0, lambda: c.log_betas),
        (0.0, lambda: (c.posterior_log_variance_clipped + c.log_betas) / 2),
    ]
    for v, expected in wanted:
        reverse = objective.reverse(c, batch, batch.x, torch.full_like(batch.x, v), clip=False)
        torch.testing.assert_close(reverse.log_variance, expected().expand_as(batch.x))
        torch.testing.assert_close(reverse.variance, expected().exp().expand_as(batch.x))


def test_clipping_acts_on_the_predicted_data() -> None:
    batch = Dense(1).to_batch(latents(SQUARES), LABELS)
    objective = gaussian(prediction="x0", variance="fixed_small")
    c = objective.process.on(batch.x.device).at(batch, torch.tensor([1, 5, 500, 999]))
    reverse = objective.reverse(c, batch, 3 * batch.x, None, clip=True)
    assert torch.equal(reverse.x0, (3 * batch.x).clamp(-1, 1))
    torch.testing.assert_close(reverse.mean, c.posterior_mean(reverse.x0, batch.x))


def test_the_bound_adds_up_and_prefers_the_better_network() -> None:
    """Data N(0, 0.3^2) under its exact predictor, and under half of it."""
    objective = gaussian(variance="fixed_small")
    objective.process = objective.process.respaced(space_timesteps(20, 1000))
    signals = gaussian().process.tables.alphas_cumprod.float()

    def exact(batch: Batch, t: Tensor) -> Tensor:
        a = batch.expand(signals[t.long()])
        return batch.x * (1 - a).sqrt() / (a * 0.3**2 + 1 - a)

    batch = three_layouts(SQUARES)["dense4"]
    batch = replace(batch, x=0.3 * batch.x)
    good = variational_bound(objective, exact, batch, Rng(0))
    bad = variational_bound(objective, lambda b, t: 0.5 * exact(b, t), batch, Rng(0))
    torch.testing.assert_close(good.total, good.vb.sum(dim=1) + good.prior)
    assert good.vb.shape == good.x0_mse.shape == good.noise_mse.shape == (4, 20)
    assert (good.prior < 1e-4).all()
    assert (good.total < bad.total).all()


@pytest.mark.parametrize(
    ("key", "choices"),
    [
        ("schedule", SCHEDULES),
        ("prediction", ["epsilon", "x0"]),
        ("variance", ["learned_range", "fixed_small", "fixed_large"]),
        ("loss", ["hybrid", "rescaled_mse", "kl", "mse"]),
        ("weight", EXPONENTS),
    ],
)
def test_an_unknown_name_lists_the_choices(key: str, choices: list[str]) -> None:
    with pytest.raises(ValueError, match=rf"objective\.{key}=wrong is unknown") as error:
        gaussian(**{key: "wrong"})
    assert all(choice in str(error.value) for choice in choices)


def test_options_that_cannot_train_are_refused() -> None:
    with pytest.raises(ValueError, match=r"objective\.loss=mse does not train objective\.variance=learned_range"):
        gaussian(loss="mse")
    with pytest.raises(ValueError, match=r"objective\.timesteps=0 must be a whole number of at least 1"):
        gaussian(timesteps=0)


@pytest.mark.parametrize("layout", ["dense4", "padded0", "packed2"])
def test_a_network_with_other_outputs_is_refused(layout: str) -> None:
    batch = three_layouts(SQUARES)[layout]
    with pytest.raises(ValueError, match=r"learned_range needs 2 output\(s\) per channel, but the network has 1; set"):
        gaussian().loss(lambda b, t: b.x, batch, Rng(0))
    with pytest.raises(ValueError, match=r"fixed_small needs 1 output\(s\) per channel, but the network has 2; set"):
        gaussian(variance="fixed_small").loss(toy, batch, Rng(0))


def test_times_go_from_noise_to_data() -> None:
    objective = gaussian()
    assert objective.times(5, "gaussian").tolist() == [999, 749, 500, 250, 0]
    assert objective.times("ddim4", "gaussian").tolist() == [750, 500, 250, 0]
    assert objective.times(4).tolist() == [999, 749, 499, 249, -1]
    assert objective.times(5, "gaussian").dtype == torch.float64
    with pytest.raises(ValueError, match=r"sampler\.steps=ddim50 must be a number for objective=gaussian"):
        objective.times("ddim50")


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
def test_views_agree_with_each_other(prediction: str) -> None:
    objective = gaussian(prediction=prediction, variance="fixed_small")
    batch = Dense(1).to_batch(latents(SQUARES), LABELS)
    field = objective.field(lambda b, t: torch.tanh(b.x) * b.expand(1 + t / 500))
    x0, reverse = field.x0(batch, 300), field.mean_logvar(batch, 300)
    assert torch.equal(x0, reverse.x0)
    torch.testing.assert_close(reverse.mean, field.at(batch, 300).posterior_mean(x0, batch.x))
    if prediction == "epsilon":
        torch.testing.assert_close(field.at(batch, 300).noise_from_x0(batch.x, x0), torch.tanh(batch.x) * 1.6)


@pytest.mark.parametrize("prediction", ["epsilon", "x0"])
@pytest.mark.parametrize("t", [999, 400, 400.25, 3.5])
def test_velocity_is_the_slope_of_the_path_of_fixed_data_and_noise(prediction: str, t: float) -> None:
    """Along x_t of one datum and one noise, an oracle's velocity is the derivative of x_t."""
    x0, noise = latents(SQUARES), latents(SQUARES, seed=3)
    objective = gaussian(prediction=prediction, variance="fixed_small")
    oracle = torch.stack(noise if prediction == "epsilon" else x0)

    def state(t: float) -> Tensor:
        a = torch.tensor(objective.process.log_signal(t)[0], dtype=torch.float64).exp()
        return a.sqrt() * torch.stack(x0).double() + (1 - a).sqrt() * torch.stack(noise).double()

    batch = replace(Dense(1).to_batch(x0, LABELS), x=state(t))
    slope = (state(t) - state(t - 1e-4)) / 1e-4
    ours = objective.field(lambda b, t: oracle).velocity(batch, t)
    torch.testing.assert_close(ours.float(), slope.float(), atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("timesteps", [2, 10, 20])
def test_a_schedule_that_needs_more_timesteps_is_refused(timesteps: int) -> None:
    with pytest.raises(
        ValueError, match=rf"objective\.timesteps={timesteps} is too few for objective\.schedule=linear"
    ):
        gaussian(timesteps=timesteps)
    assert gaussian(timesteps=21).process.tables.alphas_cumprod.min() > 0


@pytest.mark.parametrize("layout", [Dense(1), Packed(1), Padded(1, 20)])
def test_errors_as_the_bound_weighs_them_are_added(layout: Layout) -> None:
    batch = layout.to_batch(latents(SQUARES), LABELS)
    time = torch.tensor([0.0, 0.3, 0.6, 0.999])
    options = {"variance": "fixed_small", "loss": "mse"}
    plain, weighted = (
        gaussian(**options, elbo_weight=weight).loss(half, batch, Given(layout, SQUARES, time)) for weight in (0, 0.5)
    )
    assert plain.terms.keys() == {"mse"}
    c, steps = gaussian().process.tables, torch.tensor([1, 300, 600, 999])  # that of the first is that of the second
    b = c.betas[steps]
    weights = b**2 / (2 * c.posterior_variance[steps] * (1 - b) * (1 - c.alphas_cumprod[steps]))
    torch.testing.assert_close(weighted.terms["vb"], (0.5 * weights * plain.total).float())
    torch.testing.assert_close(weighted.total, plain.total + weighted.terms["vb"])


def half(batch: Batch, t: Tensor) -> Tensor:
    return batch.x / 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"elbo_weight": 0.1},
            r"elbo_weight=0\.1 needs objective\.loss=mse and objective\.prediction=epsilon",
        ),
        ({"elbo_weight": -1}, r"objective\.elbo_weight=-1 must be a finite number of at least 0"),
        ({"betas": [0.1, 0.2], "schedule": "cosine"}, r"objective\.betas=\[0\.1, 0\.2\]: .*cosine has none"),
        ({"betas": [0.2, 0.1]}, r"objective\.betas=\[0\.2, 0\.1\] must be \[low, high\]"),
        ({"betas": 0.1}, r"objective\.betas=0\.1 must be \[low, high\]"),
        ({"betas": [0.1, 1.5]}, r"with objective\.betas=\[0\.1, 1\.5\] does not do for objective\.schedule=linear"),
        ({"betas": [-0.1, 0.5], "schedule": "sqrt"}, r"objective\.betas=\[-0\.1, 0\.5\] does not do"),
    ],
)
def test_options_of_ldm_that_do_not_fit_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        gaussian(**options)


def test_ends_of_the_betas_are_those_that_are_set() -> None:
    process = gaussian(schedule="scaled_linear", betas=[0.0015, 0.0195]).process
    torch.testing.assert_close(process.tables.betas[[0, -1]].tolist(), [0.0015, 0.0195])
    assert gaussian(betas=[1e-4, 0.02]).signature != gaussian(betas=[1e-4, 0.01]).signature
