"""NiT: conditions are repeated to the tokens before the blocks, rotary tables are gathered on the host."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention

from benchmarks.reference.parts import FinalLayer, Mlp, PatchEmbed, modulate, turn
from genfound.layers.embed import LabelEmbedder, TimestepEmbedder


class Rope:
    """Angles of the first 1,024 positions of an axis."""

    def __init__(self, head: int, theta: float) -> None:
        axis = head // 2
        frequencies = 1 / theta ** (torch.arange(0, axis, 2).float() / axis)
        self.table = (torch.arange(1024).float()[:, None] * frequencies).repeat_interleave(2, dim=-1)

    def __call__(self, sizes: list[list[int]], device: torch.device) -> tuple[Tensor, Tensor]:
        """(N, 1, d) twice, row by row of each image."""
        grids = []
        for rows, columns in sizes:
            grid = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
            grids.append(torch.stack(grid).flatten(1))
        first, second = torch.cat(grids, dim=1)
        angles = torch.cat([self.table[first], self.table[second]], dim=-1)[:, None]
        return angles.cos().to(device), angles.sin().to(device)


class Attention(nn.Module):
    """Within each image of a pack."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm, self.k_norm = nn.LayerNorm(width // heads), nn.LayerNorm(width // heads)
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, lengths: list[int], cos: Tensor, sin: Tensor) -> Tensor:
        """(N, D) -> (N, D)."""
        n, d = x.shape
        q, k, v = self.qkv(x).reshape(n, 3, self.heads, d // self.heads).unbind(1)
        q, k = turn(self.q_norm(q), cos, sin).to(v.dtype), turn(self.k_norm(k), cos, sin).to(v.dtype)
        images = zip(*(a.split(lengths) for a in (q, k, v)), strict=True)
        mixed = [scaled_dot_product_attention(*(a.transpose(0, 1)[None] for a in image)) for image in images]
        return self.proj(torch.cat([image[0].transpose(0, 1) for image in mixed]).reshape(n, d))


class Block(nn.Module):
    """Attention and MLP with adaLN-Zero of every token."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.attn = Attention(width, heads)
        self.norm2 = nn.LayerNorm(width, elementwise_affine=False, eps=1e-6)
        self.mlp = Mlp(width, 4 * width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))

    def forward(self, x: Tensor, c: Tensor, lengths: list[int], cos: Tensor, sin: Tensor) -> Tensor:
        """x, c (N, D) -> (N, D)."""
        shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = self.adaLN_modulation(c).chunk(6, dim=-1)
        x = x + gate_a * self.attn(modulate(self.norm1(x), shift_a, scale_a), lengths, cos, sin)
        return x + gate_m * self.mlp(modulate(self.norm2(x), shift_m, scale_m))


class NiT(nn.Module):
    """Patches (N, C, p, p) of images of `sizes` tokens."""

    def __init__(self, channels: int, patch: int, width: int, depth: int, heads: int, classes: int, theta: float):
        super().__init__()
        self.x_embedder = PatchEmbed(channels, patch, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(classes, width, null_class=True)
        self.rope = Rope(width // heads, theta)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(depth))
        self.final_layer = FinalLayer(width, patch**2 * channels)

    def forward(self, x: Tensor, t: Tensor, y: Tensor, sizes: Tensor) -> Tensor:
        """(N, C, p, p), (B,), (B,), (B, 2) -> (N, C p p)."""
        x = self.x_embedder(x).squeeze(1)
        c = self.t_embedder(t) + self.y_embedder(y)
        cos, sin = self.rope(sizes.tolist(), x.device)
        lengths = [int(rows * columns) for rows, columns in sizes]
        c = torch.cat([image[None].repeat(length, 1) for image, length in zip(c, lengths, strict=True)])
        for block in self.blocks:
            x = block(x, c, lengths, cos, sin)
        return self.final_layer(x, c)
