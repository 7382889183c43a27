"""DiT-MoE: a loop over experts, each on the tokens that chose it."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from benchmarks.reference.dit import DiT
from genfound.layers.moe import Expert


class Gate(nn.Module):
    """The scores of the experts."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(experts, width))


class AddBalance(torch.autograd.Function):
    """The output, with the gradient of the balance loss beside it."""

    @staticmethod
    def forward(ctx, x: Tensor, loss: Tensor) -> Tensor:  # type: ignore[no-untyped-def]  # noqa: D102
        return x

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[no-untyped-def]  # noqa: D102
        return grad, torch.ones(1, device=grad.device)


class SparseMoe(nn.Module):
    """Two of E experts for each token, and a shared one."""

    def __init__(self, width: int, experts: int) -> None:
        super().__init__()
        self.gate = Gate(width, experts)
        self.experts = nn.ModuleList(Expert(width, 4 * width) for _ in range(experts))
        self.shared_experts = Expert(width, 2 * width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        flat = x.flatten(0, 1)
        scores = linear(flat, self.gate.weight).softmax(dim=-1)
        weights, chosen = torch.topk(scores, 2, dim=-1, sorted=False)
        rows, choice = flat.repeat_interleave(2, dim=0), chosen.flatten()
        y = torch.empty_like(rows)
        for number, expert in enumerate(self.experts):
            y[choice == number] = expert(rows[choice == number]).to(y.dtype)
        y = (y.view(*weights.shape, -1) * weights[..., None]).sum(dim=1).view_as(x)
        if self.training:
            one_hot = nn.functional.one_hot(choice, len(self.experts)).float()
            balance = (scores.mean(0) * one_hot.mean(0) * len(self.experts)).sum() * 0.01
            y = AddBalance.apply(y, balance)  # type: ignore[no-untyped-call]
        return y + self.shared_experts(x)


class DiTMoE(DiT):
    """DiT with experts in every block."""

    def __init__(self, experts: int, **options: int) -> None:
        self.count = experts
        super().__init__(**options)

    def feed_forward(self, width: int) -> nn.Module:
        """Of a block."""
        return SparseMoe(width, self.count)


def separate(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stacked experts to one set of matrices each."""
    found = {}
    for name, value in state.items():
        base, _, last = name.rpartition(".")
        if not base.endswith("experts") or base.endswith("shared_experts"):
            found[name] = value
            continue
        for number, matrix in enumerate(value):
            parts = (
                {"down_proj": matrix}
                if last == "down"
                else dict(zip(("gate_proj", "up_proj"), matrix.chunk(2), strict=True))
            )
            found |= {f"{base}.{number}.{part}.weight": weight for part, weight in parts.items()}
    return found
