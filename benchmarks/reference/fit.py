"""FiTv2: padded rows under a dense mask, rotary positions from the grid of each image."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.reference.parts import FinalLayer, modulate, turn
from genfound.layers.embed import LabelEmbedder, TimestepEmbedder
from genfound.layers.mlp import SwiGLU


class Attention(nn.Module):
    """Of the real tokens of each row."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, elementwise_affine=False, eps=1e-6)
        self.k_norm = nn.LayerNorm(width // heads, elementwise_affine=False, eps=1e-6)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        b, n, d = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, d // self.heads).unbind(2)
        q, k = (turn(norm(a), cos, sin).to(v.dtype) for norm, a in ((self.q_norm, q), (self.k_norm, k)))
        allowed = (mask[:, None] == mask[:, :, None])[:, None].expand(-1, self.heads, n, n)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))
        mixed = scaled_dot_product_attention(q, k, v, allowed)
        return self.proj(mixed.transpose(1, 2).reshape(b, n, d) * mask[..., None])


class Block(nn.Module):
    """Attention and SwiGLU with adaLN of low rank beside a shared one."""

    def __init__(self, width: int, heads: int, hidden: int, rank: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = SwiGLU(width, hidden, width, bias=True)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, rank), nn.Linear(rank, 6 * width))

    def forward(self, x: Tensor, c: Tensor, shared: Tensor, mask: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """x (B, N, D), c (B, D), shared (B, 6 D) -> (B, N, D)."""
        chunks = (self.adaLN_modulation(c) + shared)[:, None].chunk(6, dim=-1)
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = chunks
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a), mask, cos, sin)
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class FiT(nn.Module):
    """Padded tokens (B, N, C p p)."""

    cos: Tensor
    sin: Tensor

    def __init__(self, token: int, width: int, depth: int, heads: int, rank: int, classes: int) -> None:
        super().__init__()
        self.x_embedder = nn.ModuleDict({"proj": nn.Linear(token, width)})
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width, null_class=True)
        self.global_adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        axis = width // heads // 2
        frequencies = 1 / 10000 ** (torch.arange(0, axis, 2).float() / axis)
        angles = (torch.arange(1024).float()[:, None] * frequencies).repeat_interleave(2, dim=-1)
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)
        self.blocks = nn.ModuleList(Block(width, heads, 8 * width // 3, rank) for _ in range(depth))
        self.final_layer = FinalLayer(width, token)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, grid: Tensor, mask: Tensor) -> Tensor:
        """(B, N, P), (B,), (B,), rows and columns (B, 2, N), (B, N) -> (B, N, P)."""
        x = self.x_embedder["proj"](x)
        c = self.t_embedder(t) + self.y_embedder(y)
        cos, sin = (
            torch.cat([table[grid[:, 0]], table[grid[:, 1]]], dim=-1)[:, :, None] for table in (self.cos, self.sin)
        )
        shared = self.global_adaLN_modulation(c)
        for block in self.blocks:
            x = block(x, c, shared, mask, cos, sin)
        return self.final_layer(x, c[:, None]) * mask[..., None]
