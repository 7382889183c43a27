"""Forms of the experts' arithmetic: grouped matmul, and one matmul for each expert."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import grouped_mm, silu
from torch.utils.flop_counter import flop_registry, register_flop_formula

Kernel = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


def choose_kernel(device: str, dtype: torch.dtype, width: int, hidden: int) -> str:
    """The fastest form of a device: a grouped kernel where there is one, else slices.

    The kernel exists for bfloat16 from CUDA capability 9.0, for sizes that are multiples of 16 bytes; elsewhere
    PyTorch's grouped_mm is a loop that waits for the device, as `slices` does, without its savings of memory.
    """
    fits = dtype == torch.bfloat16 and width % 8 == 0 and hidden % 8 == 0
    return "grouped" if device == "cuda" and fits and _has_grouped_kernel() else "slices"


@torch.compiler.assume_constant_result  # type: ignore[untyped-decorator]
def _has_grouped_kernel() -> bool:
    return torch.cuda.get_device_capability() >= (9, 0)


def grouped(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """All experts in one kernel per product, without a synchronisation."""
    used = ends.diff(prepend=ends.new_zeros(1))[:, None, None] > 0  # (E, 1, 1)
    gate_up, down = (_OfUsed.apply(weight, used) for weight in (gate_up, down))  # type: ignore[no-untyped-call]
    gate, up = grouped_mm(rows, gate_up.mT, offs=ends).chunk(2, dim=1)
    return grouped_mm(silu(gate) * up, down.mT, offs=ends)


class _OfUsed(torch.autograd.Function):
    """A stack as it is, with gradients of zero for experts without rows.

    On some devices (capability 10.0) the kernel leaves these undefined.
    """

    @staticmethod
    def forward(ctx: Any, stack: Tensor, used: Tensor) -> Tensor:
        ctx.save_for_backward(used)
        return stack.view_as(stack)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (used,) = ctx.saved_tensors
        return torch.where(used, grad, 0), None


def sliced(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """Expert after expert, each on its own rows; the host reads their numbers once.

    One opaque operation, so that a compiled block has no graph break. Its gradient is written out: autograd would
    gather the experts' gradients into the stack by one more copy of all weights.
    """
    return _slices_op(rows, ends, gate_up, down)[0]  # type: ignore[no-any-return]


KERNELS: dict[str, Kernel] = {"grouped": grouped, "slices": sliced}
"""(rows (S, D) sorted by expert, ends (E,) int32 of each expert's rows, gate_up, down) -> (S, D)."""


def _lengths(ends: Tensor) -> list[int]:
    return ends.diff(prepend=ends.new_zeros(1)).tolist()


@torch.library.custom_op("genfound::expert_slices", mutates_args=())
def _slices_op(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    """The output (S, D), and for the backward pass what gate and up made of the rows (S, 2 I)."""
    out, hidden = rows.new_empty(rows.shape), rows.new_empty(len(rows), gate_up.shape[1])
    lengths = _lengths(ends)
    pieces = zip(*(a.split(lengths) for a in (rows, hidden, out)), gate_up.unbind(), down.unbind(), strict=True)
    for x, h, y, enter, leave in pieces:
        gate, up = torch.mm(x, enter.T, out=h).chunk(2, dim=1)
        torch.mm(silu(gate).mul_(up), leave.T, out=y)
    return out, hidden


@_slices_op.register_fake
def _(rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor) -> tuple[Tensor, Tensor]:
    return rows.new_empty(rows.shape), rows.new_empty(len(rows), gate_up.shape[1])


@torch.library.custom_op("genfound::expert_slices_grad", mutates_args=())
def _slices_grad_op(
    grad: Tensor, rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of rows, gate_up and down, each written where it belongs."""
    d_rows, d_gate_up, d_down = (a.new_empty(a.shape) for a in (rows, gate_up, down))
    lengths = _lengths(ends)
    pieces = zip(*(a.split(lengths) for a in (grad, rows, hidden, d_rows)), strict=True)
    weights = zip(*(a.unbind() for a in (gate_up, down, d_gate_up, d_down)), strict=True)
    for (g, x, h, d_x), (enter, leave, d_enter, d_leave) in zip(pieces, weights, strict=True):
        gate, up = h.chunk(2, dim=1)
        active = silu(gate)
        torch.mm(g.T, active * up, out=d_leave)
        d_product = g @ leave  # (n, I)
        d_hidden = torch.empty_like(h)
        d_gate, d_up = d_hidden.chunk(2, dim=1)
        torch.mul(d_product, active, out=d_up)
        torch.ops.aten.silu_backward(d_product.mul_(up), gate, grad_input=d_gate)
        torch.mm(d_hidden.T, x, out=d_enter)
        torch.mm(d_hidden, enter, out=d_x)
    return d_rows, d_gate_up, d_down


@_slices_grad_op.register_fake
def _(
    grad: Tensor, rows: Tensor, ends: Tensor, gate_up: Tensor, down: Tensor, hidden: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return rows.new_empty(rows.shape), gate_up.new_empty(gate_up.shape), down.new_empty(down.shape)


def _slices_setup(ctx, inputs, output) -> None:  # type: ignore[no-untyped-def]
    ctx.save_for_backward(*inputs, output[1])


def _slices_backward(ctx, grad, _):  # type: ignore[no-untyped-def]
    d_rows, d_gate_up, d_down = _slices_grad_op(grad.contiguous(), *ctx.saved_tensors)
    return d_rows, None, d_gate_up, d_down


_slices_op.register_autograd(_slices_backward, setup_context=_slices_setup)


@register_flop_formula(torch.ops.genfound.expert_slices)
def _slices_flops(rows, ends, gate_up, down, **kwargs) -> int:  # type: ignore[no-untyped-def]
    """Every row meets the three matrices of one expert."""
    return 6 * int(rows[0]) * int(down[1]) * int(down[2])


@register_flop_formula(torch.ops.genfound.expert_slices_grad)
def _slices_grad_flops(grad, rows, ends, gate_up, down, hidden, **kwargs) -> int:  # type: ignore[no-untyped-def]
    return 2 * _slices_flops(rows, ends, gate_up, down)


if torch.ops.aten._grouped_mm not in flop_registry:

    @register_flop_formula(torch.ops.aten._grouped_mm)
    def _grouped_flops(a, b, *args, **kwargs) -> int:  # type: ignore[no-untyped-def]
        """(S, D) rows times a stack (E, D, I), or the gradient of the stack, (D, S) times (S, I)."""
        return 2 * int(a[0]) * int(a[1]) * int(b[-1])
