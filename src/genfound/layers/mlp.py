"""Feed-forward networks of a transformer block."""

from torch import Tensor, nn
from torch.nn.functional import gelu, silu


class Mlp(nn.Module):
    """Linear -> GELU (tanh) -> Linear."""

    def __init__(self, width: int, hidden: int, bias: bool = True) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden, bias=bias)
        self.fc2 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.fc2(gelu(self.fc1(x), approximate="tanh"))


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


class FusedSwiGLU(nn.Module):
    """`SwiGLU` whose first two matrices are one, the gate's rows first (DINOv2, LightningDiT, JiT)."""

    def __init__(self, width: int, hidden: int, bias: bool) -> None:
        super().__init__()
        self.w12 = nn.Linear(width, 2 * hidden, bias=bias)
        self.dropout: nn.Module = nn.Identity()
        self.w3 = nn.Linear(hidden, width, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(self.dropout(silu(gate) * value))


def feed_forward(kind: str, width: int, ratio: float, bias: bool) -> nn.Module:
    """The network of a block, from D to D, with a hidden size of ratio * D; `swiglu` has two thirds of it.

    So `swiglu` has as many parameters as `mlp`; `swiglu_large` has the whole hidden size. `swiglu_fused` is `swiglu`
    under other names.
    """
    hidden = int(width * ratio)
    if kind == "mlp":
        return Mlp(width, hidden, bias)
    if kind in ("swiglu", "swiglu_large"):
        return SwiGLU(width, 2 * hidden // 3 if kind == "swiglu" else hidden, width, bias)
    if kind == "swiglu_fused":
        return FusedSwiGLU(width, 2 * hidden // 3, bias)
    raise ValueError(f"model.ffn={kind} is unknown; choose mlp, swiglu, swiglu_large or swiglu_fused")
