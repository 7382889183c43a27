"""FiT and FiTv2, the flexible vision transformers (arXiv 2402.12376 and 2410.13925).

Images of any size up to a budget of tokens, with two-dimensional rotary positions that are stretched for larger
images. What differs from DiT: SwiGLU instead of an MLP; in FiTv2 also normalised queries and keys, and a modulation
of low rank per block beside one that all blocks share. FiT learns noise and variance of Gaussian diffusion, FiTv2 the
velocity of a flow whose time runs from 0 (noise) to 1 (data).

One forward serves three layouts: rows of tokens with padding, as published; packed images; and images of one size.

Legend: B images, N tokens of a row, T packed tokens, D width, H heads, d = D / H, C latent channels, p patch side,
P = p^2 C; "..." is B, N or, packed, T.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from genfound.backbones.base import Backbone, TokenSpec
from genfound.batch import Batch
from genfound.config.checks import one_of
from genfound.layers.adaln import autocast_off, gate_residual, modulation, modulations, norm_modulate, zero_init_
from genfound.layers.attention import packed_attention, sdpa, with_block_mask
from genfound.layers.embed import LabelEmbedder, PatchEmbedder, TimestepEmbedder
from genfound.layers.mlp import SwiGLU, feed_forward
from genfound.layers.norm import norm_layer
from genfound.layers.rope import Rope, apply_rope, head_size
from genfound.layers.tokens import coordinates, shaped_like, tokens_of
from genfound.rng import Rng


class FiT(Backbone):
    """FiT or FiTv2, as its options say.

    Args:
        channels, num_classes, patch_size, depth, label_drop, learn_sigma, activation_checkpointing: as of `DiT`.
        width, heads: D and H; D / H must be divisible by four.
        mlp_ratio: hidden size of the feed-forward network over D.
        ffn: `mlp`, `swiglu` or `swiglu_large`; see `feed_forward`.
        norm: of the tokens, a name of `NORMS`.
        q_norm, k_norm: of each head's queries and keys, before the rotation.
        qkv_bias, ffn_bias: whether these layers have biases.
        adaln: `normal`, a full matrix per block; `lora`, one of rank `adaln_rank` per block and a full one that all
            blocks share; or `swiglu`, a gated network per block.
        adaln_rank: rank of `lora`, D / 4 in the paper; else None.
        positions: `rope`, or `none` for no positions at all.
        rope_theta: base of the rotary frequencies.
        rope_scaling: {rule, trained, target, decouple} of `Rope`.
        rope_on_values: rotate values too.
        time: `index`, integer steps, or `data1`, from 0 (noise) to 1 (data).
        time_shifting: s of t -> s t / (1 + (s - 1) t), applied to every t.
        clamp_time: embed times above 1 as 1 (fit_model.py of the released code, which so takes all steps of FiT v1
            but the first for one).
        attention: backend of `packed_attention`, for the packed layout.
        residual: `fp32` or `bf16`, see `Backbone.residual_stream`; released code is bf16 under autocast.
    """

    layouts = ("padded", "packed", "dense")

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
        q_norm: str,
        k_norm: str,
        qkv_bias: bool,
        ffn_bias: bool,
        adaln: str,
        adaln_rank: int | None,
        positions: str,
        rope_theta: float,
        rope_scaling: Mapping[str, Any],
        rope_on_values: bool,
        time: str,
        time_shifting: float,
        clamp_time: bool,
        label_drop: float,
        learn_sigma: bool,
        attention: str,
        activation_checkpointing: bool | int,
        residual: str = "fp32",
    ) -> None:
        super().__init__()
        head = head_size(width, heads)
        self.time = one_of("model.time", time, ("index", "data1"))
        self.null_label = num_classes if label_drop > 0 else None
        self.token_spec = TokenSpec(channels, patch_size)
        with_rope = one_of("model.positions", positions, ("rope", "none")) == "rope"
        self.rope = Rope.of(head, rope_theta, rope_scaling) if with_rope else None
        self.time_shifting = time_shifting
        self.clamp_time = clamp_time
        self.attention = attention
        self.activation_checkpointing = activation_checkpointing
        self.residual = one_of("model.residual", residual, ("fp32", "bf16"))
        token = channels * patch_size**2
        self.x_embedder = PatchEmbedder(token, width)
        self.t_embedder = TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width, null_class=label_drop > 0)
        self.global_adaLN_modulation = modulation(width, 6 * width, silu=True) if adaln == "lora" else None

        def block() -> "Block":
            attn = Attention(width, heads, q_norm, k_norm, qkv_bias, rope_on_values, attention)
            mlp = feed_forward(ffn, width, mlp_ratio, ffn_bias)
            return Block(width, norm, attn, mlp, block_modulation(adaln, width, adaln_rank))

        self.blocks = nn.ModuleList(block() for _ in range(depth))
        final_adaln = SwiGLU(width, width // 2, 2 * width, bias=True) if adaln == "swiglu" else None
        self.final_layer = FinalLayer(width, 2 * token if learn_sigma else token, norm, final_adaln)
        self.initialise()

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """`batch.x` at times t (B,) -> a tensor of its shape, 2 C channels where the variance is learned.

        Padding may hold any finite numbers and comes out as 0.
        """
        patch = self.token_spec.patch_size
        x = self.x_embedder(tokens_of(batch, patch))  # (..., D)
        batch = with_block_mask(batch, x, self.attention)
        x = self.residual_stream(x)
        with autocast_off(x):
            c = self.t_embedder(self._embedded_time(t)) + self.y_embedder(batch.y)  # (B, D)
            shared = 0.0 if self.global_adaLN_modulation is None else self.global_adaLN_modulation(c)  # (B, 6 D)
            rope = self._rotation(batch)  # (..., 1, d / 2, 2)
        for block in self.blocks:
            x = self.run_block(block, x, c, shared, batch, rope)  # (..., D)
        return shaped_like(batch, self.final_layer(x, c, batch), patch)

    def initialise(self, rng: Rng | None = None) -> None:
        """As in `Backbone`; zeros where adaLN-Zero starts as identity."""
        super().initialise(rng)
        for name, module in self.named_modules():
            if name.endswith("adaLN_modulation"):
                zero_init_(module.fc2 if isinstance(module, SwiGLU) else list(module.children())[-1])
        zero_init_(self.final_layer.linear)

    def _embedded_time(self, t: Tensor) -> Tensor:
        """(B,) float32."""
        t, s = t.float(), self.time_shifting
        t = s * t / (1 + (s - 1) * t)
        return t.clamp(max=1) if self.clamp_time else t

    def _rotation(self, batch: Batch) -> Tensor | None:
        if self.rope is None:
            return None
        sizes = batch.sizes[:1] if batch.layout == "dense" else batch.sizes
        return self.rope(coordinates(batch, self.token_spec.patch_size), sizes, batch.per_token)


class Block(nn.Module):
    """x + gate * attention(modulated x), then x + gate * FFN(modulated x)."""

    def __init__(self, width: int, norm: str, attn: "Attention", mlp: nn.Module, adaln: nn.Module) -> None:
        super().__init__()
        self.norm1 = norm_layer("norm", norm, width)
        self.attn = attn
        self.norm2 = norm_layer("norm", norm, width)
        self.mlp = mlp
        self.adaLN_modulation = adaln

    def forward(self, x: Tensor, c: Tensor, shared: Tensor | float, batch: Batch, rope: Tensor | None) -> Tensor:
        """x (..., D), condition c (B, D), the modulation that blocks share (B, 6 D) -> (..., D)."""
        with autocast_off(x):
            per_image = self.adaLN_modulation(c) + shared  # (B, 6 D)
            shift_a, factor_a, gate_a, shift_m, factor_m, gate_m = modulations(per_image, 6, x.dtype, batch)
        mixed = self.attn(norm_modulate(x, shift_a, factor_a, batch, self.norm1), batch, rope)
        x = gate_residual(x, mixed, gate_a, batch)
        return gate_residual(x, self.mlp(norm_modulate(x, shift_m, factor_m, batch, self.norm2)), gate_m, batch)


class Attention(nn.Module):
    """Multi-head self-attention inside each image; padding comes out as the bias of the projection."""

    def __init__(
        self, width: int, heads: int, q_norm: str, k_norm: str, qkv_bias: bool, rope_on_values: bool, backend: str
    ) -> None:
        super().__init__()
        self.heads = heads
        self.rope_on_values = rope_on_values
        self.backend = backend
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.q_norm = norm_layer("q_norm", q_norm, width // heads)
        self.k_norm = norm_layer("k_norm", k_norm, width // heads)
        self.proj = nn.Linear(width, width)
        self.dropout: nn.Module = nn.Identity()

    def forward(self, x: Tensor, batch: Batch, rope: Tensor | None) -> Tensor:
        """(..., D) -> (..., D)."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).unbind(-3)  # (..., H, d) each
        q, k = self.q_norm(q.float()), self.k_norm(k.float())
        if rope is not None:
            q, k = apply_rope(q, rope), apply_rope(k, rope)
            v = apply_rope(v, rope).to(v.dtype) if self.rope_on_values else v
        return self.dropout(self.proj(self._mix(q, k, v, batch).flatten(-2)))

    def _mix(self, q: Tensor, k: Tensor, v: Tensor, batch: Batch) -> Tensor:
        """Attention in the layout of the batch, (..., H, d)."""
        if batch.cu_seqlens is not None:
            return packed_attention(q, k, v, batch.cu_seqlens, batch.max_seqlen, self.backend, batch.block_mask)
        q, k, v = (a.transpose(1, 2) for a in (q, k, v))  # (B, H, N, d)
        if batch.mask is None:
            return sdpa(q, k, v).transpose(1, 2)
        mixed = sdpa(q, k, v, batch.mask[:, None, None]).transpose(1, 2)
        return mixed * batch.mask[..., None, None]


class FinalLayer(nn.Module):
    """Modulated norm and a projection to the patch."""

    def __init__(self, width: int, token: int, norm: str, adaln: nn.Module | None) -> None:
        super().__init__()
        self.norm_final = norm_layer("norm", norm, width)
        self.adaLN_modulation = modulation(width, 2 * width, silu=True) if adaln is None else adaln
        self.linear = nn.Linear(width, token)

    def forward(self, x: Tensor, c: Tensor, batch: Batch) -> Tensor:
        """x (..., D), c (B, D) -> (..., P)."""
        with autocast_off(x):
            shift, factor = modulations(self.adaLN_modulation(c), 2, torch.float32, batch)
            return self.linear(norm_modulate(x.float(), shift, factor, batch, self.norm_final))


def block_modulation(kind: str, width: int, rank: int | None) -> nn.Module:
    """The network from an image's condition (B, D) to the six modulations of a block (B, 6 D)."""
    one_of("model.adaln", kind, ("normal", "lora", "swiglu"))
    if (rank is None) == (kind == "lora"):
        raise ValueError(f"model.adaln={kind} with model.adaln_rank={rank}: lora needs a rank, the others take null")
    if kind == "swiglu":
        return SwiGLU(width, width // 4 * 3, 6 * width, bias=True)
    return modulation(width, *([] if rank is None else [rank]), 6 * width, silu=True)
