"""DiT: the modulation of an image is computed once, positions are a fixed table."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from benchmarks.reference.parts import Attention, FinalLayer, Mlp, PatchEmbed, modulate
from genfound.backbones.dit import position_table
from genfound.layers.embed import LabelEmbedder, TimestepEmbedder


class Block(nn.Module):
    """Attention and a feed-forward network with adaLN-Zero."""

    def __init__(self, width: int, heads: int, feed_forward: nn.Module) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.add_module("moe" if hasattr(feed_forward, "experts") else "mlp", feed_forward)
        self.feed_forward = (feed_forward,)  # a tuple, so that it has one name
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) -> (B, N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c)[:, None].chunk(6, dim=-1)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a))
        return x + gate_m * self.feed_forward[0](modulate(self.norm2(x), shift_m, scale_m))


class DiT(nn.Module):
    """Square latents (B, C, S, S)."""

    def __init__(
        self, side: int, channels: int, patch: int, width: int, depth: int, heads: int, classes: int, out: int
    ):
        super().__init__()
        self.patch, self.grid = patch, side // patch
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width, null_class=True)
        table = position_table(self.grid, self.grid, width)
        self.register_buffer("pos_embed", table[None], persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, self.feed_forward(width)) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * out)

    def feed_forward(self, width: int) -> nn.Module:
        """Of a block."""
        return Mlp(width, 4 * width)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """(B, C, S, S), (B,), (B,) -> (B, out, S, S)."""
        x = self.x_embedder(x) + self.pos_embed
        c = self.t_embedder(t) + self.y_embedder(y)
        for block in self.blocks:
            x = block(x, c)
        x = self.final_layer(x, c[:, None])
        x = x.reshape(len(x), self.grid, self.grid, -1, self.patch, self.patch)
        return torch.einsum("bhwcpq->bchpwq", x).flatten(4).flatten(2, 3)
