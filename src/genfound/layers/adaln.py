"""Adaptive layer norm: the parts that every backbone shares, in float32."""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor, nn


def norm_modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine parameters (eps 1e-6), then shift and scale, which broadcast against x (..., D)."""
    normed = nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6)
    return torch.addcmul(shift, normed, 1 + scale)


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
