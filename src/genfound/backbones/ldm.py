"""The U-Net of latent diffusion models, LDM (arXiv 2112.10752): ADM's (arXiv 2105.05233) with spatial transformers.

Convolutions see the latent as a feature map. A level halves height and width; a place of the coarsest one is what a
token is elsewhere, so `patch_size` is 2^(levels - 1), and sides are multiples of it.

Legend: B images, C latent channels, (h, w) sides of the latent, D width of the first level, E = 4 D, K = 2 C where the
variance is learned, else C, L = 1 vectors of the context.
"""

from collections.abc import Sequence
from math import sqrt

import torch
from torch import Tensor, nn

from genfound.backbones.base import Backbone, Flops, TokenSpec
from genfound.batch import Batch
from genfound.config.checks import integer, one_of
from genfound.layers.adaln import autocast_off, zero_init_
from genfound.layers.embed import sinusoid
from genfound.layers.initial import Draw
from genfound.layers.unet import (
    GROUPS,
    AttentionBlock,
    Downsample,
    GroupNorm,
    ResBlock,
    SpatialTransformer,
    TransformerBlock,
    UNetBlock,
    Upsample,
    sides_factor,
)  # fmt: skip
from genfound.rng import Rng


class LDM(Backbone):
    """The noise of every latent pixel, and its variance where that is learned, given time and class.

    Args:
        channels: channels of a latent, C.
        num_classes: classes of the data.
        patch_size: 2^(levels - 1).
        width: D, channels of the first level; a multiple of 32.
        channel_mult: channels of each level over D.
        depth: residual blocks of each level on the way down; one more on the way up.
        attention_resolutions: latent pixels a side of a place of the levels that have attention, powers of two.
        heads: of each attention.
        head_width: width of each head, in place of `heads`; `None`: by `heads`.
        conditioning: how the class is seen: `cross_attention`, by spatial transformers; `embedding`, added to that of
            time, with ADM's attention; `none`, which has that too.
        context_width: of the class in cross-attention.
        transformer_depth: blocks of a spatial transformer.
        attention_order: the rows of qkv in ADM's attention: `heads`, those of a head together, or `kinds`, all queries
            first.
        scale_shift_norm: time scales and shifts the norm of a residual block; otherwise it is added before that.
        resblock_updown: residual blocks between the levels; otherwise convolutions.
        conv_resample: these convolutions; `False`: means of four, and nearest values.
        null_class: a row for the null label, which training with label_drop needs.
        label_drop: probability with which training replaces a label by the null label.
        learn_sigma: predict 2 C channels, the second half for the variance.
        activation_checkpointing: recompute each block, or every k-th, in the backward pass.

    Raises:
        ValueError: values that do not fit together.
    """

    layouts = ("dense",)
    time = "index"
    passes_tokens = False

    def __init__(
        self, *, channels: int, num_classes: int, patch_size: int, width: int, channel_mult: Sequence[int], depth: int,
        attention_resolutions: Sequence[int], heads: int, head_width: int | None, conditioning: str,
        context_width: int, transformer_depth: int, attention_order: str, scale_shift_norm: bool,
        resblock_updown: bool, conv_resample: bool, null_class: bool, label_drop: float, learn_sigma: bool,
        activation_checkpointing: bool | int,
    ) -> None:  # fmt: skip
        super().__init__()
        _check_levels(patch_size, channel_mult, attention_resolutions)
        if width % GROUPS:
            raise ValueError(f"model.width={width} must be a multiple of {GROUPS}, the groups of each norm")
        self.null_label = num_classes if null_class and conditioning != "none" else None
        if label_drop and self.null_label is None:
            needed = "null_class=true" if conditioning != "none" else "conditioning=embedding, or cross_attention"
            raise ValueError(f"model.label_drop={label_drop} needs model.{needed}")
        if not isinstance(learn_sigma, bool):
            raise ValueError(f"model.learn_sigma={learn_sigma} is unknown; choose auto, true or false")
        integer("model.head_width", head_width, 1, or_null=True)
        integer("model.transformer_depth", transformer_depth, 1)
        self.token_spec = TokenSpec(channels, patch_size)
        self.activation_checkpointing = activation_checkpointing
        self.width, self.heads, self.head_width = width, heads, head_width
        self.conditioning = one_of("model.conditioning", conditioning, ("cross_attention", "embedding", "none"))
        self.context_width, self.transformer_depth = context_width, transformer_depth
        self.by_kind = one_of("model.attention_order", attention_order, ("heads", "kinds")) == "kinds"
        self.scale_shift, self.updown, self.conv_resample = scale_shift_norm, resblock_updown, conv_resample
        self.time_embed = nn.Sequential(nn.Linear(width, 4 * width), nn.SiLU(), nn.Linear(4 * width, 4 * width))
        rows = num_classes + null_class
        if conditioning == "embedding":
            self.label_emb = nn.Embedding(rows, 4 * width)
        elif conditioning == "cross_attention":
            self.cond_stage_model = ClassEmbedder(rows, context_width)
        self._make_levels(channels, channel_mult, depth, attention_resolutions)
        zeros = channels * (2 if learn_sigma else 1)
        self.out = nn.Sequential(GroupNorm(width), nn.SiLU(), nn.Conv2d(width, zeros, 3, padding=1))
        self.initialise()

    def _make_levels(self, channels: int, mults: Sequence[int], depth: int, attended: Sequence[int]) -> None:
        """The blocks on the way down, at the bottom, and on the way up, which take what has left those."""
        last, now, skipped = len(mults) - 1, self.width, [self.width]
        if unknown := set(attended) - (known := {2**level for level in range(len(mults))}):
            text = f"model.attention_resolutions={list(attended)}: no level is {min(unknown)} times smaller"
            raise ValueError(f"{text}; choose among {', '.join(map(str, sorted(known)))}")
        self.input_blocks = nn.ModuleList([UNetBlock([nn.Conv2d(channels, now, 3, padding=1)])])
        for level, mult in enumerate(mults):
            out = mult * self.width
            for _ in range(depth):
                attention = [self._attention(out)] if 2**level in attended else []
                self.input_blocks.append(UNetBlock([self._residual(now, out), *attention]))
                now = out
                skipped.append(now)
            if level < last:
                down = self._residual(now, now, "down") if self.updown else Downsample(now, self.conv_resample)
                self.input_blocks.append(UNetBlock([down]))
                skipped.append(now)
        bottom = [self._residual(now, now), self._attention(now), self._residual(now, now)]
        self.middle_block, self.output_blocks = UNetBlock(bottom), nn.ModuleList()
        for level, mult in reversed(list(enumerate(mults))):
            out = mult * self.width
            for number in range(depth + 1):
                attention = [self._attention(out)] if 2**level in attended else []
                layers = [self._residual(now + skipped.pop(), out), *attention]
                now = out
                if level and number == depth:
                    layers.append(self._residual(now, now, "up") if self.updown else Upsample(now, self.conv_resample))
                self.output_blocks.append(UNetBlock(layers))

    def _residual(self, channels: int, out: int, resample: str = "") -> nn.Module:
        return ResBlock(channels, out, 4 * self.width, self.scale_shift, resample)

    def _attention(self, channels: int) -> nn.Module:
        key = "heads" if self.head_width is None else "head_width"
        if channels % (divisor := getattr(self, key)):
            raise ValueError(f"model.{key}={divisor} does not divide the {channels} channels of a level")
        heads = self.heads if self.head_width is None else channels // self.head_width
        if self.conditioning == "cross_attention":
            return SpatialTransformer(channels, self.context_width, heads, self.transformer_depth)
        return AttentionBlock(channels, heads, self.by_kind)

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """All of them, in their order."""
        return nn.ModuleList([*self.input_blocks, self.middle_block, *self.output_blocks])

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """Dense `batch.x` (B, C, h, w) at times t (B,) -> (B, K, h, w)."""
        x = batch.x
        with autocast_off(x):
            embedding = self.time_embed(sinusoid(t, self.width))  # (B, E)
            if self.conditioning == "embedding":
                embedding = embedding + self.label_emb(batch.y)
            crossed = self.conditioning == "cross_attention"
            context = self.cond_stage_model(batch.y) if crossed else embedding[:, None]  # (B, L, D'); unused otherwise
        left = []
        for block in self.input_blocks:
            x = self.run_block(block, x, embedding, context)
            left.append(x)
        x = self.run_block(self.middle_block, x, embedding, context)
        for block in self.output_blocks:
            x = self.run_block(block, torch.cat([x, left.pop()], dim=1), embedding, context)
        return self.out(x)

    def initialise(self, rng: Rng | None = None) -> None:
        """Released: PyTorch's own laws; zeros where a residual block, an attention and the network end."""
        draw = Draw(self, rng)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                draw(nn.init.kaiming_uniform_, module.weight, a=sqrt(5))
                bound = 1 / sqrt(module.weight[0].numel())
                if module.bias is not None:
                    draw(nn.init.uniform_, module.bias, a=-bound, b=bound)
            elif isinstance(module, nn.Embedding):
                draw(nn.init.normal_, module.weight)
            elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
                module.reset_parameters()
        for module in self.modules():
            if isinstance(module, ResBlock):
                zero_init_(module.out_layers[-1])
            elif isinstance(module, (AttentionBlock, SpatialTransformer)):
                zero_init_(module.proj_out)
        zero_init_(self.out[-1])

    def flops(self) -> Flops:
        """Of convolutions, linear layers and attention, by the places of a token at each level."""
        per_image = sum(2 * layer.weight.numel() for layer in self.time_embed if isinstance(layer, nn.Linear))
        per_token, per_pair, side = 0, 0, self.token_spec.patch_size
        for layer in (layer for block in self.blocks for layer in block.children()):
            side = int(side * sides_factor(layer))
            for name, part in layer.named_modules():
                if name.startswith("emb_layers") or name.endswith(("attn2.to_k", "attn2.to_v")):
                    per_image += 2 * part.weight.numel() if isinstance(part, nn.Linear) else 0
                elif isinstance(part, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                    per_token += 2 * part.weight.numel() * side**2
                if isinstance(part, TransformerBlock):
                    inner = part.attn1.to_q.out_features
                    per_token += 4 * inner * side**2
                    per_pair += 4 * inner * side**4
                elif isinstance(part, AttentionBlock):
                    per_pair += 4 * part.proj_out.out_channels * side**4
        per_token += 2 * sum(p.numel() for p in self.out[-1:].parameters() if p.ndim > 1) * side**2
        return Flops(per_image, per_token, per_pair)


def _check_levels(patch_size: int, channel_mult: Sequence[int], attention_resolutions: Sequence[int]) -> None:
    for key, own in (("channel_mult", channel_mult), ("attention_resolutions", attention_resolutions)):
        if not isinstance(own, Sequence) or not all(type(n) is int and n > 0 for n in own):
            raise ValueError(f"model.{key}={own} must be whole numbers of at least 1, such as [1,2,4]")
    if patch_size != 2 ** (len(channel_mult) - 1):
        levels = f"model.channel_mult={list(channel_mult)} has {len(channel_mult)} levels"
        raise ValueError(f"{levels}; set model.patch_size={2 ** (len(channel_mult) - 1)}")


class ClassEmbedder(nn.Module):
    """A table of classes, as a context of one vector."""

    def __init__(self, rows: int, width: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(rows, width)

    def forward(self, y: Tensor) -> Tensor:
        """(B,) int -> (B, 1, D')."""
        return self.embedding(y)[:, None]
