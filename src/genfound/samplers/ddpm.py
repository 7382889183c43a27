"""Samplers of discrete diffusion, step by step; the state is float32, as in the official code."""

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.config.checks import number, one_of
from genfound.objectives.gaussian import GaussianField
from genfound.samplers.base import Progress, StepRng, sampler, walk


@sampler(needs="gaussian")
def ddpm(field: GaussianField, batch: Batch, times: Tensor, rng: StepRng, progress: Progress | None = None) -> Batch:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): draw from p(x_{t-1} | x_t), at the last step its mean."""
    field = field.respaced(times)

    def move(step: int, state: Batch, t: float) -> Tensor:
        reverse = field.mean_logvar(state, t)
        if step == len(times) - 1:
            return reverse.mean
        return reverse.mean + (0.5 * reverse.log_variance).exp() * rng.normal(step).to(state.x.device)

    return walk(batch, times.tolist(), move, progress, torch.float32)


def _check_ddim(eta: float, spacing: str, quantize_x0: bool) -> None:
    number("sampler.eta", eta, 0, 1)
    one_of("sampler.spacing", spacing, ("even", "leading", "quadratic"))


@sampler(needs="gaussian", check=_check_ddim)
def ddim(
    field: GaussianField,
    batch: Batch,
    times: Tensor,
    rng: StepRng,
    progress: Progress | None = None,
    *,
    eta: float = 0.0,
    spacing: str = "even",
    quantize_x0: bool = False,
) -> Batch:
    """Song et al. 2020, eq. 12: eta = 0 draws no noise, eta = 1 as much as ddpm with the small variance.

    Args:
        spacing: of the kept steps: `even`, from the last one to no noise at all; or, as LDM released it, `leading` or
            `quadratic`, whose last step ends at the noise of the first step of the process.
        quantize_x0: predicted data are replaced by the nearest of the field's `quantise` (LDM).
    """
    field, whole = field.respaced(times), field

    def move(step: int, state: Batch, t: float) -> Tensor:
        x0, c = field.x0(state, t), field.at(state, t)
        noise, a, a_prev = c.noise_from_x0(state.x, x0), c.alphas_cumprod, c.alphas_cumprod_prev
        to_data = step == len(times) - 1 and spacing == "even"
        if step == len(times) - 1 and not to_data:
            a_prev = whole.at(state, 0).alphas_cumprod
        if quantize_x0:
            assert field.quantise is not None
            x0 = field.quantise(x0, state)
        sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()
        x = x0 * a_prev.sqrt() + (1 - a_prev - sigma**2).sqrt() * noise
        return x + sigma * rng.normal(step).to(x.device) if eta and not to_data else x

    return walk(batch, times.tolist(), move, progress, torch.float32)


@torch.no_grad()
def ddim_invert(field: GaussianField, batch: Batch, times: Tensor) -> Batch:
    """The noise from which `ddim` with eta = 0 would draw this data; times from data to noise."""
    field = field.respaced(times)

    def move(_: int, state: Batch, t: float) -> Tensor:
        x0, c = field.x0(state, t), field.at(state, t)
        a_next = c.alphas_cumprod_next
        return x0 * a_next.sqrt() + (1 - a_next).sqrt() * c.noise_from_x0(state.x, x0)

    return walk(batch, times.tolist(), move, None, torch.float32)
