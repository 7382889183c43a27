"""DiT, the diffusion transformer (arXiv 2212.09748).

A latent is cut into patches, each patch becomes a token with a fixed sine-cosine position, and blocks of
attention and MLP are modulated by time and class (adaLN-Zero). Positions are whole numbers computed for the
rows and columns of the batch, so that any size works; on squares they are the official table.

Legend: B images, N tokens per image, D width, H heads, d = D / H, C latent channels, p patch side,
K = 2 C where the variance is learned, else C.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from genfound.backbones.base import Backbone, TokenSpec
from genfound.batch import Batch
from genfound.layers.adaln import autocast_off, gate_residual, modulation, modulations, norm_modulate, zero_init_
from genfound.layers.attention import sdpa
from genfound.layers.embed import LabelEmbedder, PatchEmbedder, TimestepEmbedder, grid_sinusoid
from genfound.layers.mlp import Mlp
from genfound.layers.rope import row_major
from genfound.layers.tokens import from_tokens, to_tokens
from genfound.rng import Rng

EMA_DRIFT = 1e-3
"""How far an averaged, saved position table may be from the true one (float32 averaging drifts by 2e-4)."""


class DiT(Backbone):
    """The noise of every latent pixel, and its variance where that is learned, given time and class.

    Args:
        channels: channels of a latent, C.
        num_classes: classes of the data.
        patch_size: side of a patch in latent pixels, p.
        width: D, divisible by four and by `heads`.
        depth: number of blocks.
        heads: H.
        mlp_ratio: hidden size of the MLP over D.
        label_drop: probability with which training replaces a label by the null label; 0 has no null label.
        learn_sigma: predict 2 C channels, the second half for the variance.
        unused_half: make 2 C channels and drop the second half, as released flows do (SiT, DiT-MoE); its rows never
            get a gradient. Without effect where `learn_sigma` uses them.
        activation_checkpointing: recompute each block, or every k-th, in the backward pass.
        make_block: from width, heads and mlp_ratio to a block, for relatives of DiT; `None` is its own.
    """

    layouts = ("dense",)
    time = "index"

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
        label_drop: float,
        learn_sigma: bool,
        unused_half: bool,
        activation_checkpointing: bool | int,
        make_block: Callable[[int, int, float], nn.Module] | None = None,
    ) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise ValueError(f"model.width={width} must be a multiple of 4 and of model.heads={heads}")
        if not isinstance(learn_sigma, bool):
            raise ValueError(f"model.learn_sigma={learn_sigma} is unknown; choose auto, true or false")
        self.null_label = num_classes if label_drop > 0 else None
        self.token_spec = TokenSpec(channels, patch_size)
        self.width = width
        self.unused_half = unused_half and not learn_sigma
        self.activation_checkpointing = activation_checkpointing
        token = channels * patch_size**2
        self.x_embedder = PatchEmbedder(token, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width, null_class=label_drop > 0)
        self.blocks = nn.ModuleList((make_block or Block)(width, heads, mlp_ratio) for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token if learn_sigma or unused_half else token)
        self.initialise()

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """Dense `batch.x` (B, C, h, w) at times t (B,) -> (B, K, h, w)."""
        p = self.token_spec.patch_size
        rows, columns = (side // p for side in batch.x.shape[2:])
        tokens = to_tokens(batch.x, p)  # (B, N, C p p)
        x = self.x_embedder(tokens).float() + position_table(rows, columns, self.width, tokens.device)  # (B, N, D)
        with autocast_off(x):
            c = nn.functional.silu(self.t_embedder(t) + self.y_embedder(batch.y))  # (B, D)
        out = from_tokens(self.final_layer(self.run_blocks(x, c), c), rows, p)  # (B, K, h, w)
        return out[:, : self.token_spec.channels] if self.unused_half else out

    def run_blocks(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) after its SiLU -> (B, N, D)."""
        for block in self.blocks:
            x = self.run_block(block, x, c)
        return x

    def initialise(self, rng: Rng | None = None) -> None:
        """As in `Backbone`; zeros where adaLN-Zero starts as identity."""
        super().initialise(rng)
        for block in self.blocks:
            zero_init_(block.adaLN_modulation)
        zero_init_(self.final_layer)


class Block(nn.Module):
    """x + gate * attention(modulated x), then x + gate * MLP(modulated x)."""

    def __init__(self, width: int, heads: int, mlp_ratio: float, qk_norm: bool = False) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = modulation(width, 6 * width, silu=False)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) after its SiLU -> (B, N, D)."""
        with autocast_off(x):
            per_image = self.adaLN_modulation(c)  # (B, 6 D), of which (B, 1, D) each
            shift_a, factor_a, gate_a, shift_m, factor_m, gate_m = modulations(per_image, 6, x.dtype)
        x = gate_residual(x, self.attn(norm_modulate(x, shift_a, factor_a)), gate_a)
        return gate_residual(x, self.mlp(norm_modulate(x, shift_m, factor_m)), gate_m)


class Attention(nn.Module):
    """Multi-head self-attention over the tokens of each image."""

    def __init__(self, width: int, heads: int, qk_norm: bool = False) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, D) -> (B, N, D)."""
        q, k, v = self.qkv(x).unflatten(2, (3, self.heads, -1)).transpose(1, 3).unbind(2)  # (B, H, N, d) each
        return self.proj(sdpa(self.q_norm(q), self.k_norm(k), v).transpose(1, 2).flatten(2))


class FinalLayer(nn.Module):
    """Modulated norm and a projection to the patch."""

    def __init__(self, width: int, token: int) -> None:
        super().__init__()
        self.adaLN_modulation = modulation(width, 2 * width, silu=False)
        self.linear = nn.Linear(width, token)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """x (B, N, D), c (B, D) after its SiLU -> (B, N, K p p)."""
        with autocast_off(x):
            shift, factor = modulations(self.adaLN_modulation(c), 2, x.dtype)  # (B, 1, D) each
            return self.linear(norm_modulate(x, shift, factor))


def position_table(rows: int, columns: int, width: int, device: torch.device | str = "cpu") -> Tensor:
    """(rows * columns, width) float32, row-major; the official table on squares, see `grid_sinusoid`."""
    return grid_sinusoid(row_major(torch.arange(rows * columns, device=device), columns), width)
