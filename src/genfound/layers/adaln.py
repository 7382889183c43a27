"""Adaptive layer norm: the parts that every backbone shares, in float32."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn


def norm_modulate(x: Tensor, shift: Tensor, factor: Tensor) -> Tensor:
    """LayerNorm without affine parameters (eps 1e-6), then a factor and a shift that broadcast against x (..., D)."""
    return multiply_add(shift, nn.functional.layer_norm(x, x.shape[-1:], eps=1e-6), factor)


def multiply_add(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
    """base + x * factor, which broadcast, as `torch.addcmul`, whose gradients take two more products by one."""
    if torch.compiler.is_compiling():  # which leaves these out
        return torch.addcmul(base, x, factor)
    return _MultiplyAdd.apply(base, x, factor)  # type: ignore[no-any-return, no-untyped-call]


class _MultiplyAdd(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        return torch.addcmul(base, x, factor)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs[1:])
        ctx.save_for_forward(*inputs[1:])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        x, factor = ctx.saved_tensors
        return grad, grad * factor, grad * x  # autograd sums over what was broadcast

    @staticmethod
    def jvp(ctx: Any, base: Tensor, x: Tensor, factor: Tensor) -> Tensor:
        return base + x * ctx.saved_tensors[1] + ctx.saved_tensors[0] * factor


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
