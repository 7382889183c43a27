"""Samplers of discrete diffusion, step by step; the state is float32, as in the official code."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.config.checks import number
from genfound.objectives.base import Field
from genfound.objectives.gaussian import GaussianField
from genfound.objectives.process import noise_from_x0
from genfound.samplers.base import Progress, StepRng


@torch.no_grad()
def ddpm(field: Field, batch: Batch, times: Tensor, rng: StepRng, progress: Progress | None = None) -> Batch:
    """Ancestral sampling (Ho et al. 2020, algorithm 2): draw from p(x_{t-1} | x_t), at the last step its mean."""
    assert isinstance(field, GaussianField)
    field = field.respaced(times)
    last = len(times) - 1
    for step, t in enumerate(times.tolist()):
        reverse = field.mean_logvar(batch, t)
        x = reverse.mean
        if step < last:
            x = x + (0.5 * reverse.log_variance).exp() * rng.normal(step).to(x.device)
        batch = replace(batch, x=x)
        if progress is not None:
            progress(step, batch)
    return batch


@torch.no_grad()
def ddim(
    field: Field, batch: Batch, times: Tensor, rng: StepRng, progress: Progress | None = None, eta: float = 0.0
) -> Batch:
    """Song et al. 2020, eq. 12: eta = 0 draws no noise, eta = 1 as much as ddpm with the small variance."""
    assert isinstance(field, GaussianField)
    check(eta)
    field = field.respaced(times)
    last = len(times) - 1
    for step, t in enumerate(times.tolist()):
        x0, c = field.x0(batch, t), field.at(batch, t)
        a, a_prev = c.alphas_cumprod, c.alphas_cumprod_prev
        sigma = eta * ((1 - a_prev) / (1 - a)).sqrt() * (1 - a / a_prev).sqrt()
        x = x0 * a_prev.sqrt() + (1 - a_prev - sigma**2).sqrt() * noise_from_x0(c, batch.x, x0)
        if eta and step < last:
            x = x + sigma * rng.normal(step).to(x.device)
        batch = replace(batch, x=x)
        if progress is not None:
            progress(step, batch)
    return batch


def check(eta: float, **others: object) -> None:
    """Raise a ValueError for an option that `ddim` does not take."""
    number("sampler.eta", eta, 0, 1)


@torch.no_grad()
def ddim_invert(field: GaussianField, batch: Batch, times: Tensor) -> Batch:
    """The noise from which `ddim` with eta = 0 would draw this data; times from data to noise."""
    field = field.respaced(times)
    for t in times.tolist():
        x0, c = field.x0(batch, t), field.at(batch, t)
        a_next = c.alphas_cumprod_next
        x = x0 * a_next.sqrt() + (1 - a_next).sqrt() * noise_from_x0(c, batch.x, x0)
        batch = replace(batch, x=x)
    return batch
