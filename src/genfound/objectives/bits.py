"""Terms of the variational bound, element by element, in bits."""

import math

import torch
from torch import Tensor

HALF_LEVEL = 1 / 255
"""Half the distance of neighbouring 8-bit values on [-1, 1]."""


def kl_bits(mean: Tensor, log_variance: Tensor, other_mean: Tensor, other_log_variance: Tensor) -> Tensor:
    """KL(N(mean, ..) || N(other_mean, ..)) of each element, over ln 2."""
    ratio, shift = (log_variance - other_log_variance).exp(), (mean - other_mean) ** 2 * (-other_log_variance).exp()
    return 0.5 * (-1 + other_log_variance - log_variance + ratio + shift) / math.log(2)


def discretised_bits(x: Tensor, mean: Tensor, log_variance: Tensor) -> Tensor:
    """-log2 of the mass that N(mean, ..) gives to the 8-bit value x in [-1, 1]; the outermost bins are open.

    Ho et al. 2020, eq. 13, with diffusion_utils.py:approx_standard_normal_cdf. Official DiT applies it to
    latents as they are.
    """
    precision = (-0.5 * log_variance).exp()
    below = _normal_cdf(precision * (x - mean - HALF_LEVEL))
    above = _normal_cdf(precision * (x - mean + HALF_LEVEL))
    mass = torch.where(x < -0.999, above, torch.where(x > 0.999, 1 - below, above - below))
    return -mass.clamp(min=1e-12).log() / math.log(2)


def _normal_cdf(z: Tensor) -> Tensor:
    """The standard normal distribution function by its tanh approximation."""
    return 0.5 * (1 + (math.sqrt(2 / math.pi) * (z + 0.044715 * z**3)).tanh())
