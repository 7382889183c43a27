"""LightningDiT, a diffusion transformer with the parts of language models (arXiv 2501.01423).

What differs from DiT: a gated feed-forward network (SwiGLU), RMSNorm with weights, and rotary positions beside the
fixed sine-cosine ones. It predicts the velocity of a flow whose time runs from 0 (noise) to 1 (data), in the latents
of VA-VAE.

Blocks, attention and the last layer are those of FiT, so that images of any size can be padded or packed too.

Legend: as in `fit`.
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from genfound.backbones.base import Backbone, TokenSpec
from genfound.backbones.fit import Attention, Block, FinalLayer
from genfound.batch import Batch
from genfound.config.checks import one_of
from genfound.layers.adaln import autocast_off, modulation, zero_init_
from genfound.layers.attention import with_block_mask
from genfound.layers.embed import LabelEmbedder, PatchEmbedder, TimestepEmbedder, grid_sinusoid
from genfound.layers.mlp import feed_forward
from genfound.layers.rope import Rope, head_size
from genfound.layers.tokens import coordinates, shaped_like, tokens_of
from genfound.rng import Rng

POSITIONS = {"both": ("table", "rope"), "rope": ("rope",), "table": ("table",)}


class LightningDiT(Backbone):
    """The velocity of every latent pixel, given time and class.

    Args:
        channels, num_classes, patch_size, width, depth, heads, mlp_ratio, label_drop, learn_sigma, unused_half,
            activation_checkpointing: as of `DiT`.
        ffn: `swiglu_fused`, or another name of `feed_forward`.
        norm: of the tokens, a name of `NORMS`.
        qk_norm: of each head's queries and keys, before the rotation; likewise.
        shift: modulate by scale and shift; false by scales alone (`wo_shift` of the released code).
        positions: `both`, a fixed sine-cosine table and rotary ones, as published; `rope` or `table` alone.
        rope_theta, rope_scaling, attention: as of `FiT`.
    """

    layouts = ("dense", "padded", "packed")
    time = "data1"

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
        ffn: str,
        norm: str,
        qk_norm: str,
        shift: bool,
        label_drop: float,
        learn_sigma: bool,
        unused_half: bool,
        attention: str,
        activation_checkpointing: bool | int,
        **positions: Any,
    ) -> None:
        super().__init__()
        if width % 4 or width % heads:
            raise ValueError(f"model.width={width} must be a multiple of 4 and of model.heads={heads}")
        self.null_label = num_classes if label_drop > 0 else None
        self.token_spec, self.unused_half = TokenSpec(channels, patch_size), unused_half and not learn_sigma
        self.attention, self.activation_checkpointing = attention, activation_checkpointing
        self._place(width, heads, **positions)
        token = channels * patch_size**2
        self.x_embedder: nn.Module = PatchEmbedder(token, width)
        self.t_embedder, self.y_embedder = TimestepEmbedder(width), LabelEmbedder(num_classes, width, label_drop > 0)

        def block() -> Block:
            attn = Attention(width, heads, qk_norm, qk_norm, True, False, attention)
            adaln = modulation(width, 6 * width, silu=True) if shift else Shiftless(width)
            return Block(width, norm, attn, feed_forward(ffn, width, mlp_ratio, bias=True), adaln)

        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self.final_layer = FinalLayer(width, 2 * token if learn_sigma or unused_half else token, norm, None)
        self.initialise()

    def _place(
        self, width: int, heads: int, *, positions: str, rope_theta: float, rope_scaling: Mapping[str, Any]
    ) -> None:
        chosen = POSITIONS[one_of("model.positions", positions, POSITIONS)]
        self.table_width = width if "table" in chosen else None
        self.rope = Rope.of(head_size(width, heads), rope_theta, rope_scaling) if "rope" in chosen else None

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """`batch.x` at times t (B,) -> a tensor of its shape, 2 C channels where a variance is learned.

        Padding may hold any finite numbers and comes out as 0.
        """
        patch, where = self.token_spec.patch_size, coordinates(batch, self.token_spec.patch_size)
        x = self.x_embedder(tokens_of(batch, patch))  # (..., D)
        batch = with_block_mask(batch, x, self.attention)
        x = x.float()
        with autocast_off(x):
            if self.table_width is not None:
                x = x + grid_sinusoid(where, self.table_width)
            labels = self.y_embedder(batch.y)  # (B, D)
            c = self.t_embedder(t) + labels
            sizes = batch.sizes[:1] if batch.layout == "dense" else batch.sizes
            rope = None if self.rope is None else self.rope(where, sizes, batch.per_token)  # (..., 1, d / 2, 2)
        out = self.final_layer(self.run_blocks(x, c, labels, batch, rope), c, batch)  # (..., P) or (..., 2 P)
        return shaped_like(batch, out.chunk(2, dim=-1)[0] if self.unused_half else out, patch)

    def run_blocks(self, x: Tensor, c: Tensor, labels: Tensor, batch: Batch, rope: Tensor | None) -> Tensor:
        """x (..., D), condition c and labels alone (B, D), cosines and sines (..., 1, d / 2, 2) -> (..., D)."""
        for block in self.blocks:
            x = self.run_block(block, x, c, 0.0, batch, rope)
        return x

    def initialise(self, rng: Rng | None = None) -> None:
        """As in `Backbone`; zeros where adaLN-Zero starts as identity."""
        super().initialise(rng)
        for block in self.blocks:
            assert isinstance(block, Block)
            zero_init_(block.adaLN_modulation)
        zero_init_(self.final_layer.adaLN_modulation)
        zero_init_(self.final_layer.linear)


class Shiftless(nn.Sequential):
    """`modulation` of a block to scale and gate of attention, then of the feed-forward network, with shifts of 0."""

    def __init__(self, width: int) -> None:
        super().__init__(*modulation(width, 4 * width, silu=True))

    def forward(self, c: Tensor) -> Tensor:
        """(B, D) -> (B, 6 D)."""
        pairs = self[1](self[0](c)).unflatten(1, (2, -1))  # (B, 2, 2 D)
        return nn.functional.pad(pairs, (c.shape[1], 0)).flatten(1)
