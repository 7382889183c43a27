"""DiT-MoE, a diffusion transformer with sparse experts (arXiv 2407.11633).

What differs from DiT: every block's MLP is a mixture of experts (SwiGLU, no biases), of which a router picks the
best few for each token, beside a shared expert that every token passes; the large released models normalise
queries and keys and are rectified flows; a loss keeps the choices of the router balanced.

Legend: as in `dit`, and E experts, k choices per token, I hidden size of an expert, L blocks.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from genfound.backbones.base import Flops
from genfound.backbones.dit import Attention, DiT
from genfound.batch import Batch
from genfound.config.checks import one_of
from genfound.layers.adaln import autocast_off, gate_residual, modulation, modulations, norm_modulate
from genfound.layers.attention import sdpa
from genfound.layers.moe import MixtureOfExperts, Routing, balance_loss, expert_load

ROUTER_STD = 0.02
"""Of a router's weights after upcycling (upcycle.py)."""

QK_NORMS = ("none", "layernorm", "layernorm_half")


class DiTMoE(DiT):
    """The noise or velocity of every latent pixel, given time and class; t comes in the objective's own unit.

    Args:
        qk_norm: of queries and keys: `none`; `layernorm`; or `layernorm_half`, whose result is rounded to float16
            as in the released code of XL and G.
        experts: E, in every block; their hidden size I is mlp_ratio * D.
        top_k: k, experts that a token passes.
        norm_topk: let the weights of a token's experts sum to 1.
        shared_experts: hidden size of the shared expert over D; 0 for none.
        balance: weight of the balance loss, summed over blocks; 0 for none.
        balance_over: what is balanced: `tokens`, all tokens of the batch; or `sequence`, those of each image.
        eval_gradients: in evaluation mode, let gradients through the routed experts; the released code does not.
        options: all others of `DiT`.
    """

    def __init__(
        self,
        *,
        qk_norm: str,
        experts: int,
        top_k: int,
        norm_topk: bool,
        shared_experts: int,
        balance: float,
        balance_over: str,
        eval_gradients: bool,
        **options: Any,
    ) -> None:
        one_of("model.qk_norm", qk_norm, QK_NORMS)
        if balance_over not in ("tokens", "sequence"):
            raise ValueError(f"model.balance_over={balance_over} is unknown; choose tokens or sequence")

        def block(width: int, heads: int, mlp_ratio: float) -> "Block":
            half = qk_norm == "layernorm_half"
            attn = Attention(width, heads) if qk_norm == "none" else NormedAttention(width, heads, half)
            hidden, shared = int(width * mlp_ratio), shared_experts * width
            moe = MixtureOfExperts(width, hidden, experts, top_k, norm_topk, shared, eval_gradients)
            return Block(width, attn, moe, balance_over)

        super().__init__(make_block=block, **options)
        self.balance = balance
        self.balances: Tensor | None = None  # (L,) weighted balance loss of each block in the last training forward
        self.loads: Tensor | None = None  # (L, E) fraction of choices in the last forward

    @property
    def mixtures(self) -> list[MixtureOfExperts]:
        """The experts of every block."""
        return [cast(MixtureOfExperts, block.moe) for block in self.blocks]

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        """As in `DiT`; keeps the balance and the load of every block."""
        balances, loads = [], []
        for block in self.blocks:
            x, balance, load = self.run_block(block, x, c)
            balances.append(balance)
            loads.append(load)
        keep = self.training and self.balance != 0 and bool(balances)
        self.balances = self.balance * torch.stack(balances) if keep else None
        self.loads = torch.stack(loads) if loads else None
        return x

    def flops(self) -> Flops:
        """As in `Backbone`, and of the routers and the experts that a token meets."""
        routers = sum(2 * mixture.gate.weight.numel() for mixture in self.mixtures)
        experts = sum(6 * mixture.gate.top_k * mixture.experts.down[0].numel() for mixture in self.mixtures)
        known = super().flops()
        return known._replace(per_token=known.per_token + routers + experts)

    def __getstate__(self) -> dict[str, Any]:
        """Without what belongs to the last forward, whose graph cannot be copied."""
        return {**self.__dict__, "balances": None, "loads": None}


class Block(nn.Module):
    """x + gate * attention(modulated x), then x + gate * experts(modulated x)."""

    def __init__(self, width: int, attn: nn.Module, moe: MixtureOfExperts, balance_over: str) -> None:
        super().__init__()
        self.attn = attn
        self.moe = moe
        self.adaLN_modulation = modulation(width, 6 * width, silu=False)
        self.balance_over = balance_over

    def forward(self, x: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (B, N, D), c (B, D) after its SiLU -> (B, N, D), the balance loss and the load (E,) of its experts."""
        with autocast_off(x):
            per_image = self.adaLN_modulation(c)  # (B, 6 D), of which (B, 1, D) each
            shift_a, factor_a, gate_a, shift_m, factor_m, gate_m = modulations(per_image, 6, x.dtype)
        x = gate_residual(x, self.attn(norm_modulate(x, shift_a, factor_a)), gate_a)
        out, routing = self.moe(norm_modulate(x, shift_m, factor_m))
        return gate_residual(x, out, gate_m), balance_loss(routing, self.balance_over), expert_load(routing)


class NormedAttention(nn.Module):
    """Attention with normalised queries and keys, `Wqkv` and `out_proj` as in the released XL and G; see `HeadNorm`."""

    def __init__(self, width: int, heads: int, half: bool) -> None:
        super().__init__()
        self.heads = heads
        self.Wqkv = nn.Linear(width, 3 * width)
        self.q_norm = HeadNorm(width // heads, half)
        self.k_norm = HeadNorm(width // heads, half)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.Wqkv(x).unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # (B, H, N, d) each
        mixed = sdpa(self.q_norm(q), self.k_norm(k), v)  # (B, H, N, d)
        return self.out_proj(mixed.transpose(1, 2).flatten(2))


class HeadNorm(nn.LayerNorm):
    """LayerNorm of each head's queries or keys in float32; `half` rounds the result to float16."""

    def __init__(self, size: int, half: bool) -> None:
        super().__init__(size, eps=1e-6)
        self.half_precision = half

    def forward(self, x: Tensor) -> Tensor:
        """(..., d) -> (..., d) float32."""
        out = super().forward(x.float())
        return out.half().float() if self.half_precision else out


class RoutingCounts:
    """How often each expert is chosen, by class, time and place, counted while any sampler runs.

    Each of a token's k choices counts one. Rows with the null label, the second half of a guided batch, are not
    counted; copies that fill up a micro-batch are, so ask for whole micro-batches.

    Args:
        net: the network whose routers are watched.
        times: the times that count apart, usually those of the sampler in its order; a call counts for the nearest.
        num_classes: classes of the data.
    """

    def __init__(self, net: DiTMoE, times: Tensor, num_classes: int) -> None:
        self.net = net
        device = next(net.parameters()).device
        layers, experts = len(net.blocks), len(net.mixtures[0].gate.weight)
        self.times = times.to(device, torch.float32)
        self.per_class = torch.zeros(num_classes, layers, experts, dtype=torch.int64, device=device)
        self.per_time = torch.zeros(layers, len(times), experts, dtype=torch.int64, device=device)
        self.per_token = torch.zeros(layers, 0, experts, dtype=torch.int64, device=device)  # N, row-major

    @contextmanager
    def counting(self) -> "Iterator[RoutingCounts]":
        """Within this context every forward pass of the network is counted."""
        with ExitStack() as stack:
            stack.enter_context(self.net.register_forward_pre_hook(self._begin))
            for layer, mixture in enumerate(self.net.mixtures):
                stack.enter_context(mixture.gate.register_forward_hook(partial(self._count, layer)))
            yield self

    def _begin(self, net: nn.Module, inputs: tuple[Batch, Tensor]) -> None:
        batch, t = inputs
        tokens = batch.x[0, 0].numel() // self.net.token_spec.patch_size**2
        if not self.per_token.shape[1]:
            self.per_token = self.per_token.new_zeros(self.per_token.shape[0], tokens, self.per_token.shape[2])
        if tokens != self.per_token.shape[1]:
            raise ValueError(f"an image of {tokens} tokens after images of {self.per_token.shape[1]}; count one size")
        self._counted = (batch.y != self.net.null_label) & batch.real  # (B,)
        self._label = torch.where(self._counted, batch.y, 0)
        self._step = (t.float()[:, None] - self.times).abs().argmin(dim=1)  # (B,)

    def _count(self, layer: int, router: nn.Module, inputs: tuple[Tensor], routing: Routing) -> None:
        numbers = torch.arange(routing.counts.shape[1], device=routing.counts.device)
        chosen = (routing.choices[..., None] == numbers).sum(dim=2) * self._counted[:, None, None]  # (B, N, E)
        per_image = chosen.sum(dim=1)  # (B, E)
        self.per_class[:, layer].index_add_(0, self._label, per_image)
        self.per_time[layer].index_add_(0, self._step, per_image)
        self.per_token[layer] += chosen.sum(dim=0)


def active_parameters(net: DiTMoE) -> int:
    """Parameters that one token passes: all but those of the experts it does not choose."""
    idle = 0
    for mixture in net.mixtures:
        one = sum(p[0].numel() for p in mixture.experts.parameters())
        idle += one * (len(mixture.gate.weight) - mixture.gate.top_k)
    return sum(p.numel() for p in net.parameters()) - idle
