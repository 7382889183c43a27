"""Float64, which Apple's GPUs do not have: what is computed in it there is computed on the host."""

import torch
from torch import Tensor


def float64_device(device: torch.device) -> torch.device:
    """Where float64 numbers that belong to a device are: on it, or on the host if they cannot be."""
    return torch.device("cpu") if device.type == "mps" else device


def double(x: Tensor, device: torch.device | None = None) -> Tensor:
    """The numbers in float64, where `float64_device` of their device, or of another one, puts them.

    They leave a device without float64 as they are: a copy that also converts would do so on it.
    """
    x = x.to(float64_device(x.device))
    return x.to(x.device if device is None else float64_device(device), torch.float64)
