"""NiT for text (arXiv 2506.03131, appendix A): NiT whose images are described by captions.

From the paper: a block is self-attention, cross-attention to the tokens of the caption, and MLP; all three are
modulated by the time alone, through a matrix of low rank; the caption is what a frozen Gemma3-1B-it makes of it,
at most 256 tokens of 1152 values; with NiT-XL's width, depth and heads there are 673 M parameters.

Chosen here, since no code was published: the text is normalised (RMSNorm) and projected by one linear layer, as by
Lumina-Image 2.0, which reads Gemma too; queries and keys of cross-attention are normalised as those of self-attention
and not rotated; the null caption is one learned token; the rank is 224, with which the network has 673 M
parameters as NiT-XL has 675 M: without the projector of the alignment and the text encoder.

Legend: B images, T packed tokens, L text tokens of an image, S = B L packed ones, D width, H heads, d = D / H,
E values of a text token, P = patch_size^2 * channels.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genfound.backbones.base import Backbone, Flops, TokenSpec
from genfound.backbones.nit import Attention, FinalLayer, check_coordinates, coordinates
from genfound.batch import Batch
from genfound.config.checks import one_of
from genfound.layers.adaln import autocast_off, gate_residual, modulation, modulations, norm_modulate, zero_init_
from genfound.layers.attention import Keys, document_mask, packed_attention, with_block_mask
from genfound.layers.embed import PatchEmbedder, TimestepEmbedder
from genfound.layers.mlp import Mlp
from genfound.layers.rope import Rope, head_size
from genfound.rng import Rng


class NiTT2I(Backbone):
    """The velocity of every token, given the time and the caption of its image, `batch.text`.

    A row whose label is `null_label` has the null caption, whatever its text is; other labels have no meaning.

    Args:
        adaln_rank: r, of the modulation's projection; `None` is a full matrix.
        text_width, text_tokens: E and L, those of the text encoder.
        num_classes: of the data; decides the null label alone.

    All others are those of `NiT`.
    """

    layouts = ("packed",)
    time = "data0"

    def __init__(
        self, *, channels: int, num_classes: int, patch_size: int, width: int, depth: int, heads: int, mlp_ratio: float,
        qk_norm: bool, adaln_rank: int | None, label_drop: float, rope_theta: float, rope_coords: str,
        rope_scaling: Mapping[str, Any], learn_sigma: bool, attention: str, activation_checkpointing: bool | int,
        text_width: int, text_tokens: int, residual: str = "fp32",
    ) -> None:  # fmt: skip
        super().__init__()
        self.null_label = max(num_classes, 1) if label_drop > 0 else None
        self.token_spec = TokenSpec(channels, patch_size)
        self.text_width, self.text_tokens = text_width, text_tokens
        self.rope_coords = check_coordinates(rope_coords)
        self.rope = Rope.of(head_size(width, heads), rope_theta, rope_scaling)
        self.attention = attention
        self.activation_checkpointing = activation_checkpointing
        self.residual = one_of("model.residual", residual, ("fp32", "bf16"))
        token = channels * patch_size**2
        self.x_embedder = PatchEmbedder(token, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = CaptionEmbedder(text_width, width, self.null_label)
        self.blocks = nn.ModuleList(
            Block(width, heads, mlp_ratio, qk_norm, adaln_rank, attention) for _ in range(depth)
        )
        self.final_layer = FinalLayer(width, 2 * token if learn_sigma else token)
        self.initialise()

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """Packed `batch.x` (T, P) at times t (B,) -> velocity (T, P), with learn_sigma (T, 2 P).

        Raises:
            ValueError: the batch has no text.
        """
        x = self.x_embedder(batch.x)  # (T, D)
        batch = with_block_mask(batch, x, self.attention)
        text, keys = self.y_embedder(batch)  # (S, D)
        if batch.block_mask is not None and batch.image_of is not None:
            rows = torch.searchsorted(keys.cu_seqlens, torch.arange(len(text), device=x.device), right=True) - 1
            keys = keys._replace(block_mask=document_mask(batch.image_of, rows))
        x = self.residual_stream(x)
        with autocast_off(x):
            c = nn.functional.silu(self.t_embedder(t))  # (B, D)
            rope = self.rope(coordinates(batch, self.rope_coords), batch.sizes, batch.per_token)  # (T, 1, d / 2, 2)
        for block in self.blocks:
            x = self.run_block(block, x, c, text, batch, rope, keys)  # (T, D)
        return self.final_layer(x, c, batch)  # (T, P)

    def initialise(self, rng: Rng | None = None) -> None:
        """As in `Backbone`; zeros where adaLN-Zero starts as identity."""
        super().initialise(rng)
        for block in self.blocks:
            assert isinstance(block, Block)
            zero_init_(block.adaLN_modulation[-1])
        zero_init_(self.final_layer)

    def flops(self) -> Flops:
        """As in `Backbone`, with captions of L tokens."""
        per_image, per_token, per_pair = super().flops()
        of_text = [m for name, m in self.named_modules() if name.endswith("cross.kv") or name == "y_embedder.proj"]
        weights = 2 * sum(layer.weight.numel() for layer in of_text)  # type: ignore[union-attr, operator]
        across = 4 * sum(block.cross.proj.in_features for block in self.blocks)  # type: ignore[union-attr, misc]
        return Flops(per_image + self.text_tokens * weights, per_token - weights + self.text_tokens * across, per_pair)


class CaptionEmbedder(nn.Module):
    """The text of all images, packed; RMSNorm and a linear layer. A null caption is a learned token of its own."""

    def __init__(self, text_width: int, width: int, null_label: int | None) -> None:
        super().__init__()
        self.null_label = null_label
        self.norm = nn.RMSNorm(text_width, eps=1e-6)
        self.proj = nn.Linear(text_width, width)
        self.null_caption = None if null_label is None else nn.Embedding(1, text_width)

    def forward(self, batch: Batch) -> tuple[Tensor, Keys]:
        """-> (S, D), the tokens of each image one after another, then what is of none; and where the images are."""
        if batch.text is None or batch.text_tokens is None:
            raise ValueError("this network reads captions: a batch needs text, see Batch.with_text")
        text, lengths = batch.text.float(), batch.text_tokens
        if self.null_caption is not None:
            null = batch.y.eq(self.null_label or 0)  # (B,)
            first = torch.where(null[:, None], self.null_caption.weight, text[:, 0])  # (B, E)
            text = torch.cat([first[:, None], text[:, 1:]], dim=1)  # (B, L, E)
            lengths = lengths.masked_fill(null, 1)
        lengths = lengths.clamp(min=1) * (batch.tokens > 0)  # (B,)
        places = torch.arange(text.shape[1], device=text.device)
        order = (places >= lengths[:, None]).flatten().int().argsort(stable=True)  # (S,), those of a caption first
        with autocast_off(text):
            text = self.norm(text.flatten(0, 1).index_select(0, order))
        bounds = nn.functional.pad(lengths.cumsum(0), (1, 0)).int()
        return self.proj(text), Keys(bounds, len(places))


class Block(nn.Module):
    """Self-attention, cross-attention to the caption, and MLP, each x + gate * layer(modulated x)."""

    def __init__(
        self, width: int, heads: int, mlp_ratio: float, qk_norm: bool, adaln_rank: int | None, attention: str
    ) -> None:
        super().__init__()
        self.attn = Attention(width, heads, qk_norm, attention)
        self.cross = CrossAttention(width, heads, qk_norm, attention)
        self.mlp = Mlp(width, int(width * mlp_ratio))
        self.adaLN_modulation = modulation(width, *([] if adaln_rank is None else [adaln_rank]), 9 * width, silu=False)

    def forward(self, x: Tensor, c: Tensor, text: Tensor, batch: Batch, rope: Tensor, keys: Keys) -> Tensor:
        """x (T, D), c (B, D) after its SiLU, text (S, D) -> (T, D)."""
        with autocast_off(x):  # shift, factor and gate of the three layers, (B, D) each
            m = modulations(self.adaLN_modulation(c), 9, x.dtype, batch)
        x = gate_residual(x, self.attn(norm_modulate(x, m[0], m[1], batch), batch, rope), m[2], batch)
        x = gate_residual(x, self.cross(norm_modulate(x, m[3], m[4], batch), text, batch, keys), m[5], batch)
        return gate_residual(x, self.mlp(norm_modulate(x, m[6], m[7], batch)), m[8], batch)


class CrossAttention(nn.Module):
    """Multi-head attention from the tokens of each image to those of its caption, with normalised queries and keys."""

    def __init__(self, width: int, heads: int, qk_norm: bool, backend: str) -> None:
        super().__init__()
        self.heads = heads
        self.backend = backend
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.q_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.k_norm = nn.LayerNorm(width // heads, eps=1e-5) if qk_norm else nn.Identity()
        self.proj = nn.Linear(width, width)

    def forward(self, x: Tensor, text: Tensor, batch: Batch, keys: Keys) -> Tensor:
        """x (T, D), text (S, D) -> (T, D)."""
        assert batch.cu_seqlens is not None
        q = self.q_norm(self.q(x).unflatten(-1, (self.heads, -1)).float())  # (T, H, d)
        k, v = self.kv(text).unflatten(-1, (2, self.heads, -1)).unbind(1)  # (S, H, d) each
        k = self.k_norm(k.float())
        mixed = packed_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, self.backend, keys=keys)
        return self.proj(mixed.flatten(1))
