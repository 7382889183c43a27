"""Log-density of data by the instantaneous change of variables along the ODE (Chen et al. 2018; Song et al. 2021)."""

import math
from dataclasses import replace
from itertools import count

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.base import Field
from genfound.samplers.base import StepRng
from genfound.samplers.dopri5 import integrate


def log_likelihood(
    field: Field,
    batch: Batch,
    times: Tensor,
    rng: StepRng,
    method: str = "dopri5",
    atol: float = 1e-6,
    rtol: float = 1e-3,
) -> tuple[Tensor, Batch]:
    """(B,) nats of each latent, 0 on rows that are not real, and the noise that it comes from.

    The divergence is estimated with one random sign per number, drawn anew in every evaluation (Hutchinson), which
    is unbiased and exact where numbers do not mix. Noise is taken for standard normal.

    Args:
        field: the network; it is differentiated, and its parameters need no gradients.
        batch: data.
        times: from data to noise; the steps of a fixed method.
        rng: of the signs, those of standard normal numbers; `normal(k)` for evaluation k.
        method: one of torchdiffeq's.
        atol, rtol: error that a step may make in the state, absolute and relative.
    """
    evaluations = count()

    def slope(t: Tensor, state: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        signs = torch.where(rng.normal(next(evaluations)).to(batch.x) > 0, 1.0, -1.0)
        with torch.enable_grad():
            x = state[0].detach().requires_grad_()
            velocity = field.velocity(replace(batch, x=x), t.item())
            (gradient,) = torch.autograd.grad((velocity * signs).sum(), x)
        return velocity.detach(), batch.sum_per_image(gradient * signs)

    start = (batch.x.float(), torch.zeros(len(batch.y), device=batch.x.device))
    with torch.no_grad():
        options = {"method": method, "atol": [atol] * 2, "rtol": [rtol] * 2}
        noise, gained = (states[-1] for states in integrate(slope, start, times.to(batch.x.device), **options))
        prior = -0.5 * (batch.numbers(batch.x) * math.log(2 * math.pi) + batch.sum_per_image(noise**2))
    return torch.where(batch.real, prior + gained, 0.0), replace(batch, x=noise)
