"""JiT, "just image transformers" that predict clean pixels (arXiv 2511.13720).

What differs from LightningDiT: large patches of pixels are embedded through a bottleneck, queries and keys are
normalised, and from some block on every image has class tokens before its own.

Class tokens are added to each image of any layout, so rows of a pack grow by as many tokens.

Legend: as in `lightningdit`, and K class tokens.
"""

from typing import Any

import torch
from torch import Tensor, nn

from genfound.backbones.base import Flops
from genfound.backbones.fit import Block
from genfound.backbones.lightningdit import LightningDiT
from genfound.batch import Batch
from genfound.config.checks import integer, number
from genfound.layers.initial import Draw
from genfound.layers.tokens import Prefix, behind_prefix
from genfound.rng import Rng


class JiT(LightningDiT):
    """The clean image, or what else an objective wants, given time and class.

    Args:
        bottleneck_dim: width between the two layers that embed a patch.
        in_context_len: K, class tokens of an image; 0 for none.
        in_context_start: the block before which they are added.
        dropout: probability, on the outputs of attention and inside the feed-forward network, of the middle half of
            the blocks.
        options: all others of `LightningDiT`.
    """

    def __init__(
        self, *, bottleneck_dim: int, in_context_len: int, in_context_start: int, dropout: float, **options: Any
    ) -> None:
        integer("model.bottleneck_dim", bottleneck_dim, 1)
        integer("model.in_context_len", in_context_len, 0)
        depth = options["depth"]
        if in_context_len and not 0 <= in_context_start < depth:
            raise ValueError(f"model.in_context_start={in_context_start} must be less than model.depth={depth}")
        self.start = in_context_start if in_context_len else depth
        super().__init__(**options)
        width, token = options["width"], options["channels"] * options["patch_size"] ** 2
        self.x_embedder = BottleneckEmbedder(token, bottleneck_dim, width)
        self.in_context_posemb = nn.Parameter(torch.empty(1, in_context_len, width)) if in_context_len else None
        self.dropout = number("model.dropout", dropout, 0, 1)
        if dropout:
            for block in self.blocks[depth // 4 : 3 * (depth // 4)]:
                assert isinstance(block, Block)
                block.attn.dropout, block.mlp.dropout = nn.Dropout(dropout), nn.Dropout(dropout)
        self.initialise()

    def run_blocks(self, x: Tensor, c: Tensor, labels: Tensor, batch: Batch, rope: Tensor | None) -> Tensor:
        """As of `LightningDiT`, with class tokens, which no position turns, from a block on."""
        for block in self.blocks[: self.start]:
            x = self.run_block(block, x, c, 0.0, batch, rope)
        if self.in_context_posemb is None:
            return x
        count = self.in_context_posemb.shape[1]
        prefix = Prefix(batch, count)
        x = prefix.add(x, labels[:, None] + self.in_context_posemb)
        if rope is not None:
            rows = len(batch.y) if batch.image_of is not None else len(rope)
            still = rope.new_zeros(rows, count, *rope.shape[-3:])
            still[..., 0] = 1
            rope = prefix.add(rope, still)
        for block in self.blocks[self.start :]:
            x = self.run_block(block, x, c, 0.0, prefix.batch, rope)
        return prefix.remove(x)

    def initialise(self, rng: Rng | None = None) -> None:
        """As of `LightningDiT`; positions of class tokens are N(0, 0.02^2)."""
        super().initialise(rng)
        if (positions := getattr(self, "in_context_posemb", None)) is not None:
            Draw(self, rng)(nn.init.normal_, positions, std=0.02)

    def image_tokens(self, hidden: Tensor, block: int, batch: Batch) -> Tensor:
        """Without the class tokens, where they have entered."""
        if self.in_context_posemb is None or block < self.start:
            return hidden
        count = self.in_context_posemb.shape[1]
        if batch.image_of is None:
            return hidden[:, count:]
        return hidden.index_select(0, behind_prefix(batch.image_of, count))

    def flops(self) -> Flops:
        """As of `Backbone`, with the class tokens of each image."""
        every = super().flops()
        if self.in_context_posemb is None:
            return every
        count, late = self.in_context_posemb.shape[1], self.blocks[self.start :]
        layers = [(name, layer) for name, layer in late.named_modules() if isinstance(layer, nn.Linear)]
        per_token = sum(2 * layer.weight.numel() for name, layer in layers if "adaLN" not in name)
        per_pair = sum(4 * layer.in_features for name, layer in layers if name.endswith("attn.proj"))
        return Flops(
            every.per_image + count * per_token + count**2 * per_pair,
            every.per_token + 2 * count * per_pair,
            every.per_pair,
        )


class BottleneckEmbedder(nn.Module):
    """Two linear layers from the numbers of a patch (C, p, p) to its token."""

    def __init__(self, patch: int, bottleneck: int, width: int) -> None:
        super().__init__()
        self.proj1 = nn.Linear(patch, bottleneck, bias=False)
        self.proj2 = nn.Linear(bottleneck, width)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C p p) -> (..., D)."""
        return self.proj2(self.proj1(x))
