from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts import Packed
from genfound.samplers.sde import DIFFUSIONS, sde_grid
from tests.helpers import SAMPLERS, latents, linear_flow, packed, sampler_of
from tests.samplers.toys import MEAN, STD, SeededNoise, exact, moments, sampled_moments

SIZES = [(3, 5), (4, 4), (2, 1)]


def walk(steps: int, batch: Batch | None = None, **options: Any) -> tuple[Tensor, list[float], SeededNoise]:
    """End state, times at which the network was asked, and the noise."""
    flow, field, net = exact()
    batch = packed(SIZES) if batch is None else batch
    rng = SeededNoise(batch)
    return SAMPLERS["sde"](field, batch, flow.times(steps), rng, **options).x, net.asked, rng


def test_samples_have_the_moments_of_the_data() -> None:
    many = Packed(1).to_batch([torch.randn(4, 64, 64)], torch.zeros(1))
    out, _, _ = walk(100, many)
    assert out.mean().item() == pytest.approx(MEAN, abs=0.01)
    assert out.std().item() == pytest.approx(STD, abs=0.02)


@pytest.mark.parametrize(
    ("options", "calls", "draws"),
    [({}, 10, 9), ({"last": "tweedie"}, 10, 9), ({"last": "euler"}, 10, 9), ({"last": "none"}, 10, 10),
     ({"method": "heun"}, 19, 9)],
)  # fmt: skip
def test_one_network_call_a_drift_and_one_draw_a_noisy_step(options: dict[str, str], calls: int, draws: int) -> None:
    _, asked, rng = walk(10, **options)
    assert len(asked) == calls
    assert rng.drawn == list(range(draws))


def test_the_last_step_begins_where_it_is_told() -> None:
    _, asked, _ = walk(5, last_step_size=0.1)
    assert asked == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1])
    grid = sde_grid(torch.linspace(1, 0, 6, dtype=torch.float64), 0.1)
    assert grid.tolist() == pytest.approx([1.0, 0.775, 0.55, 0.325, 0.1, 0.0])
    assert walk(4, last="none")[1] == [1.0, 0.75, 0.5, 0.25]


def test_last_steps_without_noise() -> None:
    """From the same state they end at nearly the same place: steps of size 0.04, or the predicted data."""
    ends = {last: walk(60, last=last)[0] for last in ("mean", "euler", "tweedie")}
    assert (ends["mean"] - ends["euler"]).abs().max() < 0.05
    assert (ends["mean"] - ends["tweedie"]).abs().max() < 0.05
    assert not torch.equal(ends["mean"], ends["tweedie"])


def test_without_diffusion_it_is_eulers_method() -> None:
    flow, field, _ = exact()
    batch = packed(SIZES)
    euler = SAMPLERS["euler"](field, batch, flow.times(12), SeededNoise(batch)).x
    torch.testing.assert_close(walk(12, norm=0.0, last="none")[0], euler)


def test_where_the_diffusion_is_infinite_the_walk_begins_a_little_later() -> None:
    out, asked, _ = walk(20, diffusion="sbdm")
    assert asked[0] == pytest.approx(0.999)
    assert out.isfinite().all()


def test_diffusion_coefficients() -> None:
    t = torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    path = linear_flow().path
    values = {name: form(path, t, 2.0) for name, form in DIFFUSIONS.items()}
    torch.testing.assert_close(values["constant"], torch.full_like(t, 2))
    torch.testing.assert_close(values["sigma"], 2 * t)
    torch.testing.assert_close(values["linear"], 2 * t)
    torch.testing.assert_close(values["sbdm"], 2 * t / (1 - t))
    torch.testing.assert_close(values["kl"], values["sbdm"])
    torch.testing.assert_close(values["decreasing"], 0.25 * (1 - 2 * torch.cos(torch.pi * t)) ** 2)
    torch.testing.assert_close(values["increasing_decreasing"], 2 * torch.sin(torch.pi * t) ** 2)


def test_a_last_step_must_fit_and_heun_needs_one() -> None:
    with pytest.raises(ValueError, match=r"sampler\.last_step_size=1\.5 must be at least 0 and less than 1"):
        walk(4, last_step_size=1.5)
    with pytest.raises(
        ValueError, match=r"sampler\.method=heun needs the score at pure data .* set sampler\.last=mean"
    ):
        walk(4, method="heun", last="none")


def test_each_image_is_what_it_would_be_alone() -> None:
    batch = packed(SIZES)
    together, _, rng = walk(8, batch)
    start = 0
    for i, (h, w) in enumerate(SIZES):
        own = slice(start, start + h * w)
        alone = Packed(1).to_batch(latents(SIZES)[i : i + 1], torch.tensor([i]))
        flow, field, _ = exact()
        noise = type("Own", (), {"normal": lambda _, step, own=own: rng.normal(step)[own]})()
        out = SAMPLERS["sde"](field, alone, flow.times(8), noise).x
        torch.testing.assert_close(out, together[own])
        start += h * w


@pytest.mark.parametrize("method", ["euler", "heun"])
def test_progress_sees_every_step(method: str) -> None:
    seen: list[tuple[int, Tensor]] = []
    out, _, _ = walk(5, method=method, progress=lambda i, b: seen.append((i, b.x)))
    assert [i for i, _ in seen] == [0, 1, 2, 3, 4]
    assert torch.equal(seen[-1][1], out)
    assert out.dtype == torch.float32


@pytest.mark.parametrize("key", ["method", "diffusion", "last"])
def test_an_unknown_name_lists_the_choices(key: str) -> None:
    with pytest.raises(ValueError, match=rf"sampler\.{key}=wrong is unknown; choose one of \w+"):
        sampler_of("sde", **{key: "wrong"})


def test_the_input_is_left_alone_and_has_no_gradient() -> None:
    batch = packed(SIZES)
    before, weight = batch.x.clone(), torch.ones((), requires_grad=True)
    flow = linear_flow()
    out = SAMPLERS["sde"](flow.field(lambda b, t: b.x * weight), batch, flow.times(3), SeededNoise(batch))
    assert torch.equal(batch.x, before)
    assert not out.x.requires_grad


@pytest.mark.parametrize("path", ["linear", "gvp", "cosine", "triangle"])
@pytest.mark.parametrize("diffusion", ["kl", "sbdm"])
def test_an_infinite_diffusion_at_noise_is_avoided_on_every_path(path: str, diffusion: str) -> None:
    flow, field, _ = exact(path=path)
    times = flow.times(250)
    found = sampled_moments(field, "sde", times, moments(flow, times[0].item()), diffusion=diffusion)
    assert found == pytest.approx((MEAN, STD**2), abs=0.02)


def test_the_factor_of_the_diffusion_is_not_negative() -> None:
    with pytest.raises(ValueError, match=r"sampler\.norm=-1 must be a finite number of at least 0"):
        sampler_of("sde", norm=-1)
