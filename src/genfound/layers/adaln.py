"""Adaptive layer norm: the parts that every backbone shares, in float32."""

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import layer_norm

from genfound.batch import Batch

OWN_CALL = 4096
"""Numbers of an image, on average, from which a call of its own takes less time than passes over all tokens."""


def norm_modulate(
    x: Tensor, shift: Tensor, factor: Tensor, batch: Batch | None = None, norm: nn.Module | None = None
) -> Tensor:
    """A norm of tokens x, then the factor and the shift of their image.

    x is (..., D) in the layout of `batch`, without one (B, N, D); shift and factor are of `modulations`.
    `None` is LayerNorm without affine parameters, eps 1e-6. In float32 on the CPU such a norm takes the factor and the
    shift of an image as its weight and its bias, which saves most passes over the tokens.
    """
    eps = 1e-6
    if isinstance(norm, nn.LayerNorm) and not norm.elementwise_affine:
        eps, norm = norm.eps, None
    if norm is None and _own_calls_pay(x, len(shift)):
        return _norm_each(x, shift, factor, None if batch is None else batch.cu_seqlens, eps)
    x = layer_norm(x, x.shape[-1:], eps=eps) if norm is None else norm(x)
    return multiply_add(_of_tokens(shift, batch), x, _of_tokens(factor, batch))


def _own_calls_pay(x: Tensor, images: int) -> bool:
    """Elsewhere one operation for all images is faster; in bfloat16 the gradients of a norm's weights lose digits."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return False
    return 0 < OWN_CALL * images <= x.numel()


def _norm_each(x: Tensor, shift: Tensor, factor: Tensor, bounds: Tensor | None, eps: float) -> Tensor:
    images = x.unbind() if bounds is None else x.split(bounds.diff().tolist())
    parts = zip(images, factor.flatten(0, -2), shift.flatten(0, -2), strict=True)
    rows = [layer_norm(image, x.shape[-1:], weight, bias, eps) for image, weight, bias in parts if len(image)]
    return torch.stack(rows) if bounds is None else torch.cat(rows)


def gate_residual(x: Tensor, out: Tensor, gate: Tensor, batch: Batch | None = None) -> Tensor:
    """x + gate * out, in the dtype of x, with the gate of each image; shapes as of `norm_modulate`."""
    return multiply_add(x, out.to(x.dtype), _of_tokens(gate, batch))


def _of_tokens(v: Tensor, batch: Batch | None) -> Tensor:
    return batch.per_token(v) if batch is not None and _packed(batch) else v


def _packed(batch: Batch | None) -> bool:
    return batch is not None and batch.layout == "packed"


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


def modulations(per_image: Tensor, count: int, dtype: torch.dtype, batch: Batch | None = None) -> list[Tensor]:
    """What `modulation` has made of each image (B, n D) -> its shift, factor 1 + scale and gate, in a dtype.

    They are (B, D) of a packed batch, otherwise (B, 1, D). One is added, and it is rounded, for each image, not for
    each of its tokens.
    """
    per_image = (
        per_image if _packed(batch) else per_image[:, None]
    )  # parted first, FiT would compile to 10 more kernels
    parts = per_image.chunk(count, dim=-1)
    return [(1 + part if number % 3 == 1 else part).to(dtype) for number, part in enumerate(parts)]


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
