"""DiG, a diffusion transformer of gated linear attention (arXiv 2405.18428).

What differs from DiT: a recurrence in place of attention, which visits the tokens of an image in another order in each
block, and a depth-wise convolution of their grid. Gated feed-forward networks have no biases.

The tokens lie in the order that the next block wants. Images of any size can be packed: orders, recurrence and
convolution end where an image ends.

Legend: B images, N tokens of an image, T packed tokens, D width, H heads, k and v head sizes of keys and of values,
P = p^2 C numbers of a patch; "..." is B, N or, packed, T.
"""

from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from genfound.backbones.base import Backbone, TokenSpec
from genfound.batch import Batch
from genfound.config.checks import integer, one_of
from genfound.layers.adaln import autocast_off, gate_residual, modulation, modulations, norm_modulate, zero_init_
from genfound.layers.embed import LabelEmbedder, PatchEmbedder, TimestepEmbedder, grid_sinusoid
from genfound.layers.gla import GatedLinearAttention, Rows
from genfound.layers.initial import Draw
from genfound.layers.norm import EPS
from genfound.layers.scans import ORDERS, Grid, Scans, depthwise
from genfound.layers.tokens import coordinates, shaped_like, tokens_of
from genfound.rng import Rng

SKIPS, CONVOLUTIONS = ("none", "xavier", "identity"), ("none", "after", "inside")


class DiG(Backbone):
    """The noise of every latent pixel, and its variance where that is learned, given time and class.

    Args:
        channels, num_classes, patch_size, width, depth, heads, mlp_ratio, label_drop, learn_sigma,
            activation_checkpointing: as of `DiT`; without classes (0) nor label it is given the time alone. Two thirds
            of the hidden size of the MLP are rounded up to a multiple of 256.
        expand_k, expand_v: widths of all keys and of all values, over D.
        gate_rank, gate_normalizer, recurrence: as of `GatedLinearAttention`.
        flip: reverse the order after every block.
        transpose: from rows to columns, or back, after every second block.
        restore_order: bring the tokens to rows before the last layer; false, as released, leaves them where a depth
            that is no multiple of 4 has brought them.
        conv: a depth-wise convolution `after` each block, `inside` it, before its recurrence, or `none`.
        conv_size: its side, odd.
        rms_norm: RMSNorm with weights in place of LayerNorm without.
        skip: `none`; or from each of the first blocks to one of the last a long skip, whose linear layer starts as any
            other (`xavier`) or without effect of the skip (`identity`).
        align_skips: bring a skip to the order of its receiver; false, as released, leaves it in its own.
    """

    layouts = ("dense", "packed")
    time = "index"

    def __init__(
        self,
        *,
        channels: int,
        num_classes: int,
        patch_size: int,
        width: int,
        depth: int,
        label_drop: float,
        learn_sigma: bool,
        flip: bool,
        transpose: bool,
        restore_order: bool,
        conv: str,
        conv_size: int,
        skip: str,
        align_skips: bool,
        activation_checkpointing: bool | int,
        **block: Any,
    ) -> None:
        super().__init__()
        self._check(width, depth, conv, conv_size, skip, **block)
        self.token_spec, self.null_label = TokenSpec(channels, patch_size), num_classes if label_drop > 0 else None
        self.orders = scan_orders(depth, flip, transpose)
        self.width, self.restore_order, self.align_skips = width, restore_order, align_skips
        self.skip, self.activation_checkpointing = skip, activation_checkpointing
        token = channels * patch_size**2
        self.x_embedder, self.t_embedder = PatchEmbedder(token, width), TimestepEmbedder(width)
        self.y_embedder = LabelEmbedder(num_classes, width, label_drop > 0) if num_classes else None
        self.conv_size = conv_size if conv != "none" else 0
        received = [skip != "none" and i > depth // 2 for i in range(depth)]
        self.blocks = nn.ModuleList(Block(width, self.conv_size, conv == "inside", own, **block) for own in received)
        self.final_layer = FinalLayer(width, 2 * token if learn_sigma else token, modulated=num_classes > 0)
        self.initialise()

    @staticmethod
    def _check(width: int, depth: int, conv: str, conv_size: int, skip: str, **block: Any) -> None:
        one_of("model.conv", conv, CONVOLUTIONS)
        one_of("model.skip", skip, SKIPS)
        integer("model.conv_size", conv_size, 1)
        if conv_size % 2 == 0:
            raise ValueError(f"model.conv_size={conv_size} must be odd")
        if skip != "none" and depth % 2:
            raise ValueError(f"model.depth={depth} must be even with model.skip={skip}")
        for key in ("expand_k", "expand_v"):
            if width % 4 or width * block[key] % block["heads"]:
                text = f"must be a multiple of 4, and times model.{key}={block[key]}"
                raise ValueError(f"model.width={width} {text} of model.heads={block['heads']}")

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """`batch.x` at times t (B,) -> a tensor of its shape, 2 C channels where a variance is learned."""
        patch = self.token_spec.patch_size
        x = self.x_embedder(tokens_of(batch, patch)).float()  # (..., D)
        with autocast_off(x):
            x = x + grid_sinusoid(coordinates(batch, patch), self.width)
            c = self.t_embedder(t)
            c = silu(c if self.y_embedder is None else c + self.y_embedder(batch.y))  # (B, D)
        scans, rows = Scans.of(batch, patch), Rows.of(batch)
        kept: list[tuple[Tensor, str]] = []
        for i, block in enumerate(self.blocks):
            order, after, skip = self.orders[i], self.orders[i + 1], None
            if self.skip != "none" and i > len(self.blocks) // 2:
                skip, sent = kept.pop()
                skip = scans.reorder(skip, sent, order) if self.align_skips else skip
            grid = scans.grid(order, self.conv_size) if self.conv_size else (0, 0)
            x = self.run_block(block, x, c, Place(batch, rows, grid), skip)
            x = scans.reorder(x, order, after)
            if self.skip != "none" and i < len(self.blocks) // 2 - 1:
                kept.append((x, after))
        if self.restore_order:
            x = scans.reorder(x, self.orders[-1], ORDERS[0])
        return shaped_like(batch, self.final_layer(x, c, batch), patch)

    def image_tokens(self, hidden: Tensor, block: int, batch: Batch) -> Tensor:
        """By rows."""
        return Scans.of(batch, self.token_spec.patch_size).reorder(hidden, self.orders[block], ORDERS[0])

    def initialise(self, rng: Rng | None = None) -> None:
        """As in `Backbone`; small projections of the recurrence, convolutions as identity, zeros of adaLN-Zero."""
        super().initialise(rng)
        draw = Draw(self, rng)
        for block in self.blocks:
            assert isinstance(block, Block)
            for matrix in (p for p in block.attn.parameters() if p.ndim == 2):
                draw(nn.init.xavier_uniform_, matrix, gain=2**-2.5)
            if block.dw_conv is not None:
                zero_init_(block.dw_conv)
                draw(central_, block.dw_conv.weight)
            if block.skip_linear is not None and self.skip == "identity":
                draw(eye_, block.skip_linear.weight)
            zero_init_(block.adaLN_modulation)
        zero_init_(self.final_layer)


class Place(NamedTuple):
    """Where the tokens that a block sees lie."""

    batch: Batch
    rows: Rows | None
    grid: Grid


def scan_orders(depth: int, flip: bool, transpose: bool) -> list[str]:
    """The order that each block sees, and the one in which the tokens leave the last block."""
    found = []
    for i in range(depth + 1):
        reversed_, columns = flip and i % 2 == 1, transpose and i // 2 % 2 == 1
        found.append(("columns" if columns else "rows") + ("_reversed" if reversed_ else ""))
    return found


class Block(nn.Module):
    """x + gate * recurrence(modulated x), then x + gate * MLP(modulated x), and a convolution of the sum, or before.

    Args:
        width: D.
        conv_size: side of the convolution, 0 for none.
        inside: whether it is before the recurrence.
        skip: whether the block receives a long skip.
        rms_norm, heads, others: as of `DiG`.
    """

    def __init__(
        self, width: int, conv_size: int, inside: bool, skip: bool, *, heads: int, mlp_ratio: float,
        expand_k: float, expand_v: float, gate_rank: int, gate_normalizer: float, rms_norm: bool, recurrence: str,
    ) -> None:  # fmt: skip
        super().__init__()
        self.inside = inside
        self.skip_linear = nn.Linear(2 * width, width) if skip else None
        self.attn_norm = nn.RMSNorm(width, eps=EPS) if rms_norm else None
        self.mlp_norm = nn.RMSNorm(width, eps=EPS) if rms_norm else None
        keys, values = int(width * expand_k), int(width * expand_v)
        self.attn = GatedLinearAttention(width, heads, keys, values, gate_rank, gate_normalizer, recurrence)
        self.mlp = GatedMlp(width, 256 * -(-int(width * mlp_ratio * 2 / 3) // 256))
        self.adaLN_modulation = modulation(width, 6 * width, silu=False)
        convolution = partial(nn.Conv2d, padding=conv_size // 2, groups=width)
        self.dw_conv = convolution(width, width, conv_size) if conv_size else None

    def forward(self, x: Tensor, c: Tensor, place: Place, skip: Tensor | None) -> Tensor:
        """x and what it skips (..., D) in the block's order, c (B, D) after its SiLU -> (..., D)."""
        if self.skip_linear is not None and skip is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1)).float()
        with autocast_off(x):
            per_image = self.adaLN_modulation(c)  # (B, 6 D)
            shift_a, factor_a, gate_a, shift_m, factor_m, gate_m = modulations(per_image, 6, x.dtype, place.batch)
            mixed = norm_modulate(x, shift_a, factor_a, place.batch, self.attn_norm)
            if self.dw_conv is not None and self.inside:
                mixed = depthwise(self.dw_conv, mixed, place.grid)
        x = gate_residual(x, self.attn(mixed, place.rows), gate_a, place.batch)
        mixed = norm_modulate(x, shift_m, factor_m, place.batch, self.mlp_norm)
        x = gate_residual(x, self.mlp(mixed), gate_m, place.batch)
        if self.dw_conv is None or self.inside:
            return x
        with autocast_off(x):
            return depthwise(self.dw_conv, x, place.grid)


class GatedMlp(nn.Module):
    """Linear(SiLU(gate) * value) of the two halves of one linear layer."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(width, 2 * hidden, bias=False)
        self.down_proj = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        gate, value = self.gate_proj(x).chunk(2, dim=-1)
        return self.down_proj(silu(gate) * value)


class FinalLayer(nn.Module):
    """Norm, modulated where there are classes, and a projection to the patch."""

    def __init__(self, width: int, token: int, modulated: bool) -> None:
        super().__init__()
        self.adaLN_modulation = modulation(width, 2 * width, silu=False) if modulated else None
        self.linear = nn.Linear(width, token)

    def forward(self, x: Tensor, c: Tensor, batch: Batch) -> Tensor:
        """x (..., D), c (B, D) after its SiLU -> (..., P)."""
        with autocast_off(x):
            if self.adaLN_modulation is None:
                return self.linear(nn.functional.layer_norm(x, x.shape[-1:], eps=EPS))
            shift, factor = modulations(self.adaLN_modulation(c), 2, x.dtype, batch)
            return self.linear(norm_modulate(x, shift, factor, batch))


def central_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """A depth-wise convolution (D, 1, s, s) that gives what it is given; nothing is drawn."""
    with torch.no_grad():
        weight.zero_()[..., weight.shape[2] // 2, weight.shape[3] // 2] = 1
    return weight


def eye_(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The identity (D, D), then zeros; nothing is drawn."""
    return nn.init.eye_(weight)
