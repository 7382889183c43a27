"""The variational bound on the likelihood of data under a Gaussian diffusion."""

from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.objectives.base import Net
from genfound.objectives.bits import kl_bits
from genfound.objectives.gaussian import Gaussian, vlb_bits
from genfound.rng import Rng


class VariationalBound(NamedTuple):
    """Bits per dimension of each image; columns go from the last step to the first."""

    total: Tensor  # (B,), of vb and prior
    prior: Tensor  # (B,), what x_T still tells of the data
    vb: Tensor  # (B, T)
    x0_mse: Tensor  # (B, T)
    noise_mse: Tensor  # (B, T)


@torch.no_grad()
def variational_bound(objective: Gaussian, net: Net, batch: Batch, rng: Rng) -> VariationalBound:
    """One draw of the bound of every step, with T network calls; clips data as the objective's sampling does."""
    tables = objective.process.on(batch.x.device)
    columns: list[tuple[Tensor, Tensor, Tensor]] = []
    for step in reversed(range(len(objective.process))):
        steps = torch.full((len(batch.y),), step, device=batch.x.device)
        c = tables.at(batch, steps)
        noise = rng.at(len(columns)).normal("noise", batch.x.shape, batch.x.device)
        noised = replace(batch, x=c.q_sample(batch.x, noise))
        prediction, v = objective.split(noised, net(noised, tables.timesteps[steps]).float())
        reverse = objective.reverse(c, noised, prediction, v, objective.clip_x0)
        implied = c.noise_from_x0(noised.x, reverse.x0)
        vb = vlb_bits(c, batch, noised, reverse)
        columns.append((vb, batch.per_image((reverse.x0 - batch.x) ** 2), batch.per_image((implied - noise) ** 2)))
    bits, x0_mse, noise_mse = (torch.stack(column, dim=1) for column in zip(*columns, strict=True))
    c = tables.at(batch, torch.full((len(batch.y),), len(objective.process) - 1, device=batch.x.device))
    zero = torch.zeros((), device=batch.x.device)  # KL(q(x_T | x_0) || N(0, 1))
    prior = batch.per_image(kl_bits(c.sqrt_alphas_cumprod * batch.x, c.log_one_minus_alphas_cumprod, zero, zero))
    return VariationalBound(bits.sum(dim=1) + prior, prior, bits, x0_mse, noise_mse)
