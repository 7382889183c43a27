"""Feed-forward networks of a transformer block."""

from math import pi, sqrt
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn.functional import gelu, silu

PIECE = 2**16
"""Numbers of which a few copies stay in a processor's cache."""


class Mlp(nn.Module):
    """Linear -> GELU (tanh) -> Linear."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(tanh_gelu(self.fc1(x)))


def tanh_gelu(x: Tensor) -> Tensor:
    """GELU in its tanh form; on the CPU in half the time of PyTorch's two kernels, equal to a few 1e-7."""
    if torch.compiler.is_compiling() or x.device.type != "cpu" or x.dtype != torch.float32:
        return gelu(x, approximate="tanh")
    return _Gelu.apply(x.contiguous())  # type: ignore[no-any-return, no-untyped-call]


class _Gelu(torch.autograd.Function):
    """x s with s = sigmoid(x (a + b x^2)), and its slope s + x s (1 - s) (a + 3 b x^2), piece by piece."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        a, b = 2 * sqrt(2 / pi), 2 * sqrt(2 / pi) * 0.044715
        out, slope = torch.empty_like(x), torch.empty_like(x) if ctx.needs_input_grad[0] else x
        for piece, y, d in zip(*(tensor.view(-1).split(PIECE) for tensor in (x, out, slope)), strict=True):
            square = piece * piece
            s = (square * b).add_(a).mul_(piece).sigmoid_()
            torch.mul(piece, s, out=y)
            if slope is not x:
                torch.addcmul(s, y, (1 - s).mul_(square.mul_(3 * b).add_(a)), out=d)
        ctx.save_for_backward(slope)
        return out

    @staticmethod
    @once_differentiable  # type: ignore[untyped-decorator]
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]  # type: ignore[no-any-return]


class SwiGLU(nn.Module):
    """Linear(SiLU(Linear(x)) * Linear(x)), arXiv 2002.05202."""

    def __init__(self, width: int, hidden: int, out: int, bias: bool) -> None:
        super().__init__()
        self.fc1_g = nn.Linear(width, hidden, bias=bias)
        self.fc1_x = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, out, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., out)."""
        return self.fc2(silu(self.fc1_g(x)) * self.fc1_x(x))


def feed_forward(kind: str, width: int, ratio: float, bias: bool) -> nn.Module:
    """The network of a block, from D to D, with a hidden size of ratio * D; `swiglu` has two thirds of it.

    So `swiglu` has as many parameters as `mlp`; `swiglu_large` has the whole hidden size.
    """
    hidden = int(width * ratio)
    if kind == "mlp":
        return Mlp(width, hidden, bias)
    if kind in ("swiglu", "swiglu_large"):
        return SwiGLU(width, 2 * hidden // 3 if kind == "swiglu" else hidden, width, bias)
    raise ValueError(f"model.ffn={kind} is unknown; choose mlp, swiglu or swiglu_large")
