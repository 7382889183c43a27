"""Mixture of experts: a router sends every token to a few of many feed-forward networks.

The weights of all experts are stacked, and tokens are sorted by expert, so that a kernel (`KERNELS`)
sees S sorted rows and where each expert's rows end. All kernels give the same numbers; experts without a token get
gradients of zero.

Legend: B images, N tokens per image, D width, E experts, k choices per token, I hidden size of an expert,
S = B N k rows.
"""

from collections.abc import Callable
from math import sqrt
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu

from genfound.layers.adaln import autocast_off
from genfound.layers.expert_kernels import KERNELS, choose_kernel
from genfound.layers.initial import Draw, local


class Routing(NamedTuple):
    """What a router decided."""

    scores: Tensor  # (B, N, E) float32, a probability for each expert
    choices: Tensor  # (B, N, k) the chosen experts, in no particular order
    weights: Tensor  # (B, N, k) float32, of their outputs
    counts: Tensor  # (B, E) how often the tokens of an image chose each expert


class Router(nn.Module):
    """Softmax over experts in float32; the k largest scores are the choices and their weights.

    If they are normalised and k > 1, the weights of a token are divided by their sum (plus 1e-20).
    """

    def __init__(self, width: int, experts: int, top_k: int, normalise: bool) -> None:
        super().__init__()
        if not 1 <= top_k <= experts:
            raise ValueError(f"model.top_k={top_k} must lie between 1 and model.experts={experts}")
        self.top_k = top_k
        self.normalise = normalise and top_k > 1
        self.weight = nn.Parameter(torch.empty(experts, width))
        self.initialise(Draw(self))

    def initialise(self, draw: Draw) -> None:
        """Uniform in 1 / sqrt(D), as a linear layer of torch."""
        bound = 1 / sqrt(self.weight.shape[1])
        draw(nn.init.uniform_, self.weight, a=-bound, b=bound)

    def forward(self, x: Tensor) -> Routing:
        """Route the tokens x (B, N, D)."""
        with autocast_off(x):
            scores = linear(x.float(), self.weight.float()).softmax(dim=-1)
        weights, choices = scores.topk(self.top_k, dim=-1, sorted=False)
        if self.normalise:
            weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        numbers = torch.arange(scores.shape[-1], device=x.device)
        return Routing(scores, choices, weights, (choices.flatten(1)[..., None] == numbers).sum(dim=1))


def expert_load(routing: Routing) -> Tensor:
    """(E,) the fraction of all choices that fell on each expert; 1 / E where they are balanced."""
    return routing.counts.sum(dim=0) / routing.choices.numel()


def balance_loss(routing: Routing, over: str) -> Tensor:
    """E sum_e f_e P_e, a scalar: f_e is the fraction of choices of expert e, P_e its mean score (Switch, eq. 4).

    A uniform router has a loss of 1. Only P has a gradient. Over `tokens`, fractions and means are those of all tokens;
    over `sequence` those of each image, averaged at the end.
    """
    fractions = routing.counts / routing.choices[0].numel()  # (B, E)
    means = routing.scores.mean(dim=1)  # (B, E)
    if over == "tokens":
        fractions, means = fractions.mean(dim=0, keepdim=True), means.mean(dim=0, keepdim=True)
    return routing.counts.shape[1] * (fractions * means).sum(dim=1).mean()


class MixtureOfExperts(nn.Module):
    """y = sum over choices of weight * expert(x), plus a shared expert that every token passes.

    Without `eval_gradients` the routed experts let none through in evaluation mode, as in the released code
    (models.py:SparseMoeBlock.moe_infer). A shared expert of hidden size 0 is none.
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        experts: int,
        top_k: int,
        normalise: bool,
        shared_hidden: int,
        eval_gradients: bool,
    ) -> None:
        super().__init__()
        self.gate = Router(width, experts, top_k, normalise)
        self.experts = Experts(width, hidden, experts)
        self.shared_experts = Expert(width, shared_hidden) if shared_hidden else None
        self.eval_gradients = eval_gradients

    def forward(self, x: Tensor) -> tuple[Tensor, Routing]:
        """x (B, N, D) -> (B, N, D), and how it was routed."""
        routing: Routing = self.gate(x)
        out: Tensor = self.experts(x, routing)
        if not (self.training or self.eval_gradients):
            out = out.detach()
        return out if self.shared_experts is None else out + self.shared_experts(x), routing


class Expert(nn.Module):
    """down(SiLU(gate(x)) * up(x)) without biases."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, hidden, bias=False)
        self.up_proj = nn.Linear(width, hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


class Experts(nn.Module):
    """E times `Expert`, their weights stacked: gate and up (E, 2 I, D), down (E, D, I).

    `exchange`, where several processes share the experts, calls a kernel with what this one has of the stacks.
    """

    exchange: Callable[..., Tensor] | None = None

    def __init__(self, width: int, hidden: int, experts: int) -> None:
        super().__init__()
        self.gate_up = nn.Parameter(torch.empty(experts, 2 * hidden, width))
        self.down = nn.Parameter(torch.empty(experts, width, hidden))
        self.initialise(Draw(self))

    def initialise(self, draw: Draw) -> None:
        """Xavier-uniform as separate matrices."""
        bound = sqrt(6 / sum(self.down.shape[1:]))
        for parameter in self.parameters():
            draw(nn.init.uniform_, parameter, a=-bound, b=bound)

    def forward(self, x: Tensor, routing: Routing) -> Tensor:
        """x (B, N, D) -> (B, N, D), the weighted sum of the chosen experts, in float32 where the weights are."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        order = routing.choices.flatten().argsort(stable=True)  # (S,) choices sorted by expert
        token = order // routing.choices.shape[-1]  # (S,)
        row = torch.arange(len(order), device=order.device)
        place = torch.empty_like(order).scatter_(0, order, row).view(-1, routing.choices.shape[-1])  # (B N, k) its rows
        ends = routing.counts.sum(dim=0).cumsum(dim=0, dtype=torch.int32)  # (E,)
        rows = _Dispatch.apply(x.flatten(0, 1), token, place, dtype)  # type: ignore[no-untyped-call]
        kernel = KERNELS[choose_kernel(device, dtype, *self.down.shape[1:])]
        stacks = (local(weights).to(dtype) for weights in (self.gate_up, self.down))
        given = (rows, ends, *stacks)
        out = kernel(*given) if self.exchange is None else self.exchange(kernel, *given)  # (S, D)
        weighted = out * routing.weights.flatten()[order, None]
        return _Combine.apply(weighted, token, place).view_as(x)  # type: ignore[no-untyped-call]

    def accompany(self) -> None:
        """Compute what the tokens of other processes need, with which this one, without its own, exchanges rows."""
        experts, width, _ = self.down.shape
        x = torch.empty(1, 0, width, device=self.down.device)
        choices, counts = (torch.zeros(1, n, 1, dtype=torch.int64, device=x.device) for n in (0, experts))
        self.forward(x, Routing(x, choices, choices.float(), counts[..., 0]))


class _Dispatch(torch.autograd.Function):
    """Tokens -> a row for each of their choices, in the dtype of the arithmetic.

    Its gradient is `_Combine`: no scatter, no random order of sums, and these in float32.
    """

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, token: Tensor, place: Tensor, dtype: torch.dtype) -> Tensor:
        ctx.save_for_backward(place)
        ctx.dtype = tokens.dtype
        return tokens.to(dtype).index_select(0, token)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (place,) = ctx.saved_tensors
        return _sum_of_rows(grad, place, ctx.dtype), None, None, None


class _Combine(torch.autograd.Function):
    """Rows -> the sum of every token's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, token: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(token)
        return _sum_of_rows(rows, place)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        return grad.index_select(0, *ctx.saved_tensors), None, None


def _sum_of_rows(rows: Tensor, place: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    return rows.index_select(0, place.flatten()).unflatten(0, place.shape).sum(dim=1, dtype=dtype)
