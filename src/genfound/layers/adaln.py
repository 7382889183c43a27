"""Adaptive layer norm: the parts that every backbone shares, in float32."""

from collections.abc import Callable
from itertools import pairwise

import torch
from torch import Tensor, nn


def norm_modulate(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """LayerNorm without affine parameters (eps 1e-6), then a factor and a shift that broadcast against x (..., D)."""
    return torch.addcmul(shift, nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6), factor)


def modulations(
    per_image: Tensor, count: int, per_token: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> list[Tensor]:
    """What `modulation` has made of each image (B, n D) -> shift, factor 1 + scale and gate of its tokens, in a dtype.

    One is added, and it is rounded, for each image, not for each of its tokens.
    """
    parts = per_image.chunk(count, dim=1)
    return [per_token((1 + part if number % 3 == 1 else part).to(dtype)) for number, part in enumerate(parts)]


def modulation(*widths: int, silu: bool) -> nn.Sequential:
    """From an image's condition to its shifts, scales and gates: SiLU, then linear layers between these widths.

    Where `silu` is false the condition comes with its SiLU, which is computed once for all blocks; the linear layers
    are numbered from 1, as in the released checkpoints, all the same.
    """
    return nn.Sequential(nn.SiLU() if silu else nn.Identity(), *(nn.Linear(a, b) for a, b in pairwise(widths)))


def autocast_off(x: Tensor) -> torch.autocast:
    """A context without autocast on x's device, for the small float32 parts."""
    return torch.autocast(x.device.type, enabled=False)


def zero_init_(layer: nn.Module | Tensor) -> None:
    """Set every parameter of a layer to zero, as adaLN-Zero starts its gates and its output."""
    assert isinstance(layer, nn.Module)
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
