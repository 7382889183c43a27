"""How much each image counts in the loss of a global step, and each time in the loss of an image."""

from typing import TypeVar

import numpy as np
import torch
from torch import Tensor

from genfound.objectives.interpolants import Coefficients

N = TypeVar("N", float, np.ndarray, Tensor)

EXPONENTS = {"image": 0.0, "sqrt": 0.5, "token": 1.0}

WEIGHTINGS = ("none", "velocity", "likelihood", "min_snr")


def image_weight(tokens: N, rule: str) -> N:
    """Weight of an image with this many tokens (number, array or tensor): 1, sqrt(tokens) or tokens.

    The loss is sum(weight * loss) / sum(weight) over all images of the global step.
    """
    return tokens ** EXPONENTS[rule]


def time_weight(weighting: str, prediction: str, point: Coefficients, gamma: float, floor: float = 0.0) -> Tensor:
    """Factor of the squared error of a prediction, shaped like the point's coefficients.

    Each weighting is one function of time, whatever is predicted: `velocity` makes the error that of the
    velocity, `likelihood` that of the score times the half diffusion (both SiT), `min_snr` that of the data
    times min(signal-to-noise, gamma) (Hang et al. 2023). The error of a score is that of sigma times it. That of data
    is divided by a sigma of at least `floor`.
    """
    alpha, sigma, speed = point.alpha, point.sigma, point.wronskian
    above = {
        "velocity": lambda: speed**2,
        "likelihood": lambda: speed * alpha / sigma,
        "min_snr": lambda: torch.minimum(alpha**2, gamma * sigma**2),
    }[weighting]()
    below = {"noise": alpha, "score": alpha, "velocity": speed, "x0": sigma.clamp(min=floor)}[prediction]
    return above / below**2
