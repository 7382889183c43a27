"""NiT, the native-resolution diffusion transformer (arXiv 2506.03131).

Images of any size are packed along one token axis. A token is embedded, passes through blocks of attention
and MLP that are modulated by time and class (adaLN-Zero), and is projected back to its patch.
What differs from DiT: attention stays inside each image of the pack, positions are rotary and
two-dimensional, queries and keys are normalised, and time runs from 0 (data) to 1 (noise).

Modulations are computed once per image and gathered to its tokens; the official code computes them for
every token, a third of its arithmetic, with the same result.

Legend: B images, T packed tokens, D width, H heads, d = D / H, P = patch_size^2 * channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genfound.backbones.base import Backbone, TokenSpec
from genfound.batch import Batch
from genfound.config.checks import one_of
from genfound.layers.adaln import autocast_off, gate_residual, modulation, modulations, norm_modulate, zero_init_
from genfound.layers.attention import packed_attention, with_block_mask
from genfound.layers.embed import LabelEmbedder, PatchEmbedder, TimestepEmbedder
from genfound.layers.mlp import Mlp
from genfound.layers.rope import Rope, apply_rope, head_size, row_major
from genfound.rng import Rng


class NiT(Backbone):
    """The velocity of every token, given the time and the class of its image.

    Args:
        channels, num_classes, patch_size, depth, mlp_ratio, label_drop, activation_checkpointing: as of `DiT`.
        width, heads: D and H; D / H must be divisible by four.
        qk_norm: LayerNorm on each head's queries and keys.
        adaln_rank: rank of the modulation's projection; `None` is a full matrix. The paper's XXL uses 512.
        rope_theta: base of the rotary frequencies.
        rope_coords: `row_major` gives a token its row and column. `official` is the grid of
            nit_model.py:NiT.get_rope, (n mod rows, n div rows) for token n, on which released weights were
            trained; neighbours in a non-square image are not neighbours on it.
        rope_scaling: {rule, trained, target, decouple} of `Rope`.
        learn_sigma: also predict a variance, in channels C .. 2C of the output; never in the paper.
        attention: backend of `packed_attention`.
        residual: `fp32` or `bf16`, see `Backbone.residual_stream`; released code is bf16 under autocast.
    """

    layouts = ("packed",)
    time = "data0"

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        patch_size: int,
        width: int,
        depth: int,
        heads: int,
        mlp_ratio: float,
        qk_norm: bool,
        adaln_rank: int | None,
        label_drop: float,
        rope_theta: float,
        rope_coords: str,
        rope_scaling: Mapping[str, Any],
        learn_sigma: bool,
        attention: str,
        activation_checkpointing: bool | int,
        residual: str = "fp32",
    ) -> None:
        super().__init__()
        self.null_label = num_classes if label_drop > 0 else None
        self.token_spec = TokenSpec(channels, patch_size)
        self.rope_coords = check_coordinates(rope_coords)
        self.rope = Rope.of(head_size(width, heads), rope_theta, rope_scaling)
        self.attention = attention
        self.activation_checkpointing = activation_checkpointing
        self.residual = one_of("model.residual", residual, ("fp32", "bf16"))
        token = channels * patch_size**2
        self.x_embedder = PatchEmbedder(token, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width, null_class=label_drop > 0)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, qk_norm, adaln_rank, attention) for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, 2 * token if learn_sigma else token)
        self.initialise()

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """Packed `batch.x` (T, P) at times t (B,) -> velocity (T, P), with learn_sigma (T, 2 P)."""
        x = self.x_embedder(batch.x)  # (T, D)
        batch = with_block_mask(batch, x, self.attention)
        x = self.residual_stream(x)
        with autocast_off(x):
            c = nn.functional.silu(self.t_embedder(t) + self.y_embedder(batch.y))  # (B, D)
            rope = self.rope(coordinates(batch, self.rope_coords), batch.sizes, batch.per_token)  # (T, 1, d / 2, 2)
        for block in self.blocks:
            x = self.run_block(block, x, c, batch, rope)  # (T, D)
        return self.final_layer(x, c, batch)  # (T, P)

    def initialise(self, rng: Rng | None = None) -> None:
        """As in `Backbone`; zeros where adaLN-Zero starts as identity."""
        super().initialise(rng)
        for block in self.blocks:
            assert isinstance(block, Block)
            zero_init_(block.adaLN_modulation[-1])
        zero_init_(self.final_layer)


class Block(nn.Module):
    """x + gate * attention(modulated x), then x + gate * MLP(modulated x)."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, adaln_rank: int | None, attention: str
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm, attention)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = modulation(width, *([] if adaln_rank is None else [adaln_rank]), 6 * width, silu=False)

    def forward(self, x: Tensor, c: Tensor, batch: Batch, rope: Tensor) -> Tensor:
        """x (T, D), c (B, D) after its SiLU -> (T, D)."""
        with autocast_off(x):
            per_image = self.adaLN_modulation(c)  # (B, 6 D), of which (B, D) each
            shift_a, factor_a, gate_a, shift_m, factor_m, gate_m = modulations(per_image, 6, x.dtype, batch)
        x = gate_residual(x, self.attn(norm_modulate(x, shift_a, factor_a, batch), batch, rope), gate_a, batch)
        return gate_residual(x, self.mlp(norm_modulate(x, shift_m, factor_m, batch)), gate_m, batch)


class Attention(nn.Module):
    """Multi-head self-attention inside each image, with normalised, rotated queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, batch: Batch, rope: Tensor) -> Tensor:
        """(T, D) -> (T, D)."""
        assert batch.cu_seqlens is not None
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(1)  # (T, H, d) each
        q, k = apply_rope(self.q_norm(q.float()), rope), apply_rope(self.k_norm(k.float()), rope)
        mixed = packed_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, self.backend, batch.block_mask)
        return self.proj(mixed.flatten(1))


class FinalLayer(nn.Module):
    """Modulated norm and a projection to the patch."""

    def __init__(self, width: int, token: int) -> None:
        super().__init__()
        self.adaLN_modulation = modulation(width, 2 * width, silu=False)
        self.linear = nn.Linear(width, token)

    def forward(self, x: Tensor, c: Tensor, batch: Batch) -> Tensor:
        """x (T, D), c (B, D) after its SiLU -> (T, P)."""
        with autocast_off(x):
            shift, factor = modulations(self.adaLN_modulation(c), 2, torch.float32, batch)
            return self.linear(norm_modulate(x.float(), shift, factor, batch))


def check_coordinates(order: str) -> str:
    """`model.rope_coords`, if there is such an order; see `NiT`."""
    return one_of("model.rope_coords", order, ("row_major", "official"))


def coordinates(batch: Batch, order: str) -> Tensor:
    """(T, 2) integer grid positions of the packed tokens; see `NiT` for `order`."""
    rows, columns = batch.sizes[batch.image_of].unbind(1)
    if order == "official":
        return row_major(batch.positions, rows).flip(1)
    return row_major(batch.positions, columns)
