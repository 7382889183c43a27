from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts import Packed
from genfound.objectives.gaussian import Gaussian, GaussianField
from genfound.rng import Rng
from genfound.samplers.ddpm import ddim, ddim_invert, ddpm
from tests.helpers import SAMPLERS, latents, sampler_of, times_of

MEAN, STD = 0.3, 0.5
SIZES = [(3, 5), (4, 4), (2, 1)]


def objective(**options: Any) -> Gaussian:
    defaults: dict[str, Any] = {
        "timesteps": 1000, "schedule": "linear", "prediction": "epsilon", "variance": "fixed_small",
        "loss": "hybrid", "clip_x0": False, "weight": "image",
    }  # fmt: skip
    return Gaussian(**{**defaults, **options})


PROCESS = objective().process


def signal(t: float) -> Tensor:
    """alpha_bar at any real t."""
    return torch.tensor(PROCESS.log_signal(t)[0], dtype=torch.float64).exp()


def exact(batch: Batch, t: Tensor) -> Tensor:
    """E[noise | x_t = x] for data N(MEAN, STD^2)."""
    a = signal(t[0].item())
    return ((1 - a).sqrt() / (a * STD**2 + 1 - a) * (batch.x.double() - a.sqrt() * MEAN)).float()


def solution(x: Tensor) -> Tensor:
    """Where the probability-flow ODE carries x from the last timestep."""
    a = signal(999)
    return MEAN + STD * (x.double() - a.sqrt() * MEAN) / (a * STD**2 + 1 - a).sqrt()


def noise_batch() -> Batch:
    return Packed(1).to_batch(latents(SIZES), torch.arange(3))


class Steps:
    """Noise of each step; counts the draws."""

    def __init__(self, batch: Batch) -> None:
        self.shape, self.drawn = batch.x.shape, list[int]()

    def normal(self, step: int) -> Tensor:
        self.drawn.append(step)
        return Rng(0).at(step).normal("noise", self.shape)


def walk(name: str, steps: int | str, field: GaussianField | None = None, **options: Any) -> tuple[Tensor, Steps]:
    batch = noise_batch()
    rng = Steps(batch)
    times = times_of(name, objective(), steps)
    field = field or objective().field(exact)
    return SAMPLERS[name](field, batch, times, rng, **options).x, rng


@pytest.mark.parametrize("variance", ["fixed_small", "fixed_large"])
def test_ddpm_draws_the_data(variance: str) -> None:
    many = Packed(1).to_batch([torch.randn(4, 32, 32)], torch.zeros(1))
    times = objective().times(250, "gaussian")
    out = ddpm(objective(variance=variance).field(exact), many, times, Steps(many)).x
    assert out.mean().item() == pytest.approx(MEAN, abs=0.03)
    assert out.std().item() == pytest.approx(STD, abs=0.05)
    assert (out - solution(many.x)).std() > 0.3  # not the deterministic answer


@pytest.mark.parametrize(("name", "steps"), [("ddim", 1000), ("ddim", "ddim500"), ("euler", 1000), ("heun", 200)])
def test_deterministic_samplers_solve_the_probability_flow(name: str, steps: int | str) -> None:
    out, rng = walk(name, steps)
    expected = solution(noise_batch().x).float()
    torch.testing.assert_close(out, expected, atol=0.01, rtol=0.01)
    assert rng.drawn == []


@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("euler", 1), ("heun", 2)])
def test_order_of_convergence(name: str, order: int) -> None:
    expected = solution(noise_batch().x)
    coarse, fine = ((walk(name, n)[0] - expected).abs().mean().item() for n in (50, 100))
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("ddim", {"eta": 0.5})])
def test_noise_is_drawn_for_every_step_but_the_last(name: str, options: dict[str, float]) -> None:
    assert walk(name, 7, **options)[1].drawn == [0, 1, 2, 3, 4, 5]


def test_ddim_with_eta_one_is_ddpm_with_the_small_variance() -> None:
    torch.testing.assert_close(walk("ddim", 20, eta=1.0)[0], walk("ddpm", 20)[0], atol=1e-4, rtol=1e-4)


def test_inversion_undoes_ddim() -> None:
    batch = noise_batch()
    field, times = objective().field(exact), objective().times(500, "gaussian")
    data = ddim(field, batch, times, Steps(batch))
    torch.testing.assert_close(ddim_invert(field, data, times.flip(0)).x, batch.x, atol=0.02, rtol=0.02)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_the_network_is_told_the_kept_timesteps(name: str) -> None:
    told: list[float] = []

    def spy(batch: Batch, t: Tensor) -> Tensor:
        told.append(t[0].item())
        return exact(batch, t)

    walk(name, 5, objective().field(spy))
    assert told == [999, 749, 500, 250, 0]


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_one_step_gives_the_predicted_data(name: str) -> None:
    batch = noise_batch()
    out = SAMPLERS[name](objective().field(exact), batch, torch.tensor([600.0]), Steps(batch)).x
    torch.testing.assert_close(out, objective().field(exact).x0(batch, 600), atol=1e-5, rtol=1e-5)


def test_the_learned_variance_decides_how_much_noise_is_added() -> None:
    def with_v(v: float) -> Tensor:
        field = objective(variance="learned_range").field(
            lambda b, t: torch.cat([exact(b, t), torch.full_like(b.x, v)], dim=-1)
        )
        return walk("ddpm", 10, field)[0]

    torch.testing.assert_close(with_v(-1.0), walk("ddpm", 10)[0], atol=1e-4, rtol=1e-4)
    large = walk("ddpm", 10, objective(variance="fixed_large").field(exact))[0]
    torch.testing.assert_close(with_v(1.0), large, atol=0.02, rtol=0.02)  # they differ in the last noise, a little


def test_clipped_data_stay_in_range() -> None:
    far = objective(clip_x0=True).field(lambda b, t: -3 * torch.ones_like(b.x))
    for name in ("ddpm", "ddim"):
        assert walk(name, 10, far)[0].max() == 1
        assert walk(name, 10, replace_clip(far))[0].max() > 1


def replace_clip(field: GaussianField) -> GaussianField:
    return objective(clip_x0=False).field(field.net)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_a_classifier_pulls_the_samples(name: str) -> None:
    """p(y | x) ~ exp(3 x) pulls data N(m, s^2) to N(m + 3 s^2, s^2)."""
    field = objective().field(exact)
    plain = walk(name, 200, field)[0]

    def gradient(batch: Batch, t: float) -> Tensor:
        a = signal(t)
        return (3 * a.sqrt() * STD**2 / (a * STD**2 + 1 - a)).float().expand_as(batch.x)

    field.gradient = gradient
    assert (walk(name, 200, field)[0] - plain).mean().item() == pytest.approx(3 * STD**2, rel=0.15)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_each_image_is_what_it_would_be_alone(name: str) -> None:
    options = {"eta": 1.0} if name == "ddim" else {}
    batch, times, field = noise_batch(), times_of(name, objective(), 8), objective().field(exact)
    together = SAMPLERS[name](field, batch, times, Steps(batch), **options).x
    start = 0
    for i, (h, w) in enumerate(SIZES):
        tokens = slice(start, start + h * w)
        alone = Packed(1).to_batch(latents(SIZES)[i : i + 1], torch.tensor([i]))
        rng = Steps(batch)
        rng_of_image = type("Own", (), {"normal": lambda _, step, rng=rng, own=tokens: rng.normal(step)[own]})()
        out = SAMPLERS[name](field, alone, times, rng_of_image, **options).x
        torch.testing.assert_close(out, together[tokens], atol=1e-5, rtol=1e-5)
        start += h * w


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_progress_sees_every_step(name: str) -> None:
    seen: list[tuple[int, Tensor]] = []
    out, _ = walk(name, 5, progress=lambda i, b: seen.append((i, b.x)))
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], out)


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_the_input_is_left_alone_and_has_no_gradient(name: str) -> None:
    batch = noise_batch()
    before = batch.x.clone()
    weight = torch.ones((), requires_grad=True)
    field = objective().field(lambda b, t: b.x * weight)
    out = SAMPLERS[name](field, batch, times_of(name, objective(), 3), Steps(batch))
    assert torch.equal(batch.x, before)
    assert not out.x.requires_grad
    assert torch.equal(replace(out, x=before).y, batch.y)


@pytest.mark.parametrize("eta", [-1, 2, float("nan"), None])
def test_eta_is_a_share(eta: float) -> None:
    with pytest.raises(ValueError, match=r"sampler\.eta=.* must be a finite number of at least 0 and at most 1"):
        sampler_of("ddim", eta=eta)


@pytest.mark.parametrize("spacing", ["leading", "quadratic"])
def test_ldms_ddim_ends_at_the_noise_of_the_first_step(spacing: str) -> None:
    """The exact network of one value draws it, and what is left around it is that noise of the state."""
    chosen, data = sampler_of("ddim", steps=20, spacing=spacing), 0.7
    batch = noise_batch()

    def one_value(batch: Batch, t: Tensor) -> Tensor:
        a = objective().process.tables.alphas_cumprod[int(t[0])].float()
        return (batch.x - a.sqrt() * data) / (1 - a).sqrt()

    times, field = chosen.times(objective()), objective().field(one_value)
    assert times.min() == 1
    first, a = objective().process.tables.alphas_cumprod[0], objective().process.tables.alphas_cumprod[int(times[0])]
    out = chosen(field, batch, times, Steps(batch)).x
    expected = first.sqrt() * data + (1 - first).sqrt() * (batch.x - a.sqrt() * data) / (1 - a).sqrt()
    torch.testing.assert_close(out, expected.float(), atol=1e-4, rtol=1e-4)
    even = sampler_of("ddim", steps=20)
    assert (even(field, batch, even.times(objective()), Steps(batch)).x - data).abs().max() < 1e-4


def test_predicted_data_are_replaced_by_those_of_a_codebook() -> None:
    chosen, batch = sampler_of("ddim", steps=5, quantize_x0=True), noise_batch()
    field = objective().field(exact)
    field.quantise = lambda x0, state: x0.sign()
    out = chosen(field, batch, chosen.times(objective()), Steps(batch)).x
    torch.testing.assert_close(out.abs(), torch.ones_like(out))


def test_an_unknown_spacing_is_refused() -> None:
    with pytest.raises(ValueError, match=r"sampler\.spacing=log is unknown; choose one of even, leading, quadratic"):
        sampler_of("ddim", spacing="log")
