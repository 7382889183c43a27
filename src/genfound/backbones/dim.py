"""DiM, a diffusion network of Mamba blocks (arXiv 2405.14224).

What differs from DiT: each block is one recurrence over all tokens, in another order from block to block, and has no
MLP. Time and class come in twice, as the modulation of all blocks and as tokens of their own. The grid of an image is
framed by learned tokens, so that the recurrence knows where rows and columns end, and convolved before and after the
blocks. Long skips go from each of the first blocks to one of the last. Steps are counted from 1.

The tokens of an image are time and class, P tokens of the split, and a grid of (H + P, W + P): the image's own, then P
columns and P rows of padding. Images of any size can be packed: frames, orders, recurrence and convolutions end where
an image ends.

Legend: B images, (H, W) tokens of an image, N of them, D width, P tokens of padding, L tokens of a sequence; T and S, N
and L of all images of a pack. "..." is B, N or L, or T or S alone.
"""

from collections.abc import Sequence
from dataclasses import replace
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.functional import silu

from genfound.backbones.base import Backbone, Flops, TokenSpec
from genfound.batch import Batch
from genfound.config.checks import integer, number, one_of
from genfound.layers.adaln import autocast_off, multiply_add
from genfound.layers.embed import FREQUENCIES, LabelEmbedder, PatchEmbedder, sinusoid
from genfound.layers.frames import Frame, Framed
from genfound.layers.initial import Draw
from genfound.layers.scans import ORDERS, Scans
from genfound.layers.ssm import Mamba
from genfound.layers.tokens import shaped_like, tokens_of
from genfound.rng import Rng

CONDITIONS, EPS = 2, 1e-5
"""Tokens of time and class; of norms."""

WIDEST_PAIR = 512
"""Largest width at which a skip is concatenated; beyond, it has a linear layer of its own."""

PADDINGS = ("lateral", "cycled", "none")


class DiM(Backbone):
    """The noise of every latent pixel, and its variance where that is learned, given time and class.

    Args:
        channels, num_classes, patch_size, width, depth, label_drop, learn_sigma, activation_checkpointing: as of
            `DiT`. There is a null label, and a row of both tables for it, also without label dropout.
        states, conv, expand, recurrence: as of `Mamba`; `conv` is P, too.
        table: rows and columns of the learned positions; those of other grids are interpolated.
        pad: `lateral`: each column and row of padding is one token (published at 256 pixels); `cycled`: below, tokens
            take turns along the rows (`rho_pad`, at 512); or `none`.
        smooth: convolve the grid before and after the blocks.
        directions: of the orders of `ORDERS`, so many in turn, back again from the middle block on.
        long_skips: from block k to the k-th last.
        skip_tune: None, or [first, last]: factors of skips, which go down from the last block (Training-free
            upsampling); as released they do not depend on the time, and `first` counts for a thousandth.
        freeu: None, or [s1, s2, b1, b2] of FreeU (arXiv 2309.11497), of the first two blocks with skips.
        bf16_inputs: in training round states and times to bfloat16, as the released code does.
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
        conv: int,
        table: Sequence[int],
        pad: str,
        smooth: bool,
        directions: int,
        long_skips: bool,
        skip_tune: Sequence[float] | None,
        freeu: Sequence[float] | None,
        bf16_inputs: bool,
        label_drop: float,
        learn_sigma: bool,
        activation_checkpointing: bool | int,
        **mixer: Any,
    ) -> None:
        super().__init__()
        _check(conv, table, pad, directions, skip_tune, freeu)
        self.null_label = num_classes if label_drop > 0 else None
        self.token_spec, self.activation_checkpointing = TokenSpec(channels, patch_size), activation_checkpointing
        self.width, self.table, self.bf16_inputs = width, (table[0], table[1]), bf16_inputs
        self.orders, self.skip_tune, self.freeu = scan_orders(depth, directions), skip_tune, freeu
        self.senders = range(1, (depth - 1) // 2 + 1) if long_skips else range(0)
        self.additional_embed = nn.Parameter(torch.empty(1, CONDITIONS + prod(table), width))
        self.pos_embed = PatchEmbedder(token := channels * patch_size**2, width)
        self.transformer_blocks = nn.ModuleList(
            Block(width, Mamba(width, conv=conv, **mixer), depth - i in self.senders) for i in range(depth)
        )
        self.norm_out = nn.ModuleDict({"norm": nn.RMSNorm(width, eps=EPS)})
        self.adaln_single, self.label_emb = Modulation(width, num_classes), nn.Embedding(num_classes + 1, width)
        self.a4m_adapter = Frame(width, 0 if pad == "none" else conv, pad == "cycled", smooth)
        self.proj_out_1, self.proj_out_2 = nn.Linear(width, 2 * width), nn.Linear(width, token * (1 + learn_sigma))
        self.initialise()

    @property
    def blocks(self) -> nn.ModuleList:  # type: ignore[override]
        """In their order."""
        return self.transformer_blocks

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """`batch.x` at times t (B,) -> a tensor of its shape, 2 C channels where a variance is learned."""
        patch, t = self.token_spec.patch_size, t.float() + 1
        if self.bf16_inputs and self.training:
            t, batch = t.bfloat16().float(), replace(batch, x=batch.x.bfloat16().float())
        framed = self.framed(batch)
        image = self.pos_embed(tokens_of(batch, patch)).float()  # (..., D)
        with autocast_off(image):
            told = torch.stack([sinusoid(t, self.width), self.label_emb(batch.y)], dim=1)  # (B, 2, D)
            of_conditions, of_image = self.additional_embed[0].split([CONDITIONS, prod(self.table)])
            image = image + interpolated(of_image, self.table, framed.own)
            x = self.a4m_adapter(told + of_conditions, image, framed)
            modulation = self.adaln_single(t, batch.y)
        x = self.run_blocks(x, modulation, framed)
        with autocast_off(x):
            x = self.norm_out["norm"](self.a4m_adapter.image(x, framed))
            shift, scale = map(batch.per_token, self.proj_out_1(silu(told.sum(dim=1))).chunk(2, dim=1))
            return shaped_like(batch, self.proj_out_2(multiply_add(shift, x, 1 + scale)), patch)

    def framed(self, batch: Batch) -> Framed:
        """Where all tokens lie."""
        pads = self.a4m_adapter.count
        return Framed(batch, self.token_spec.patch_size, pads, CONDITIONS + pads)

    def run_blocks(self, x: Tensor, modulation: Tensor, framed: Framed) -> Tensor:
        """All tokens x (..., D), modulation (B, 3 D) of all blocks -> (..., D); first and last they are by rows."""
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            skip = None
            if len(self.blocks) - i in self.senders:
                x, skip = self._tuned(i, x, kept.pop(), framed.batch)
            before, own = self.orders[max(i - 1, 0)], self.orders[i]
            moved = None if before == own else framed.between(before, own)
            x = self.run_block(block, x, modulation, Place(framed.batch, framed.positions, moved), skip)
            if i in self.senders:
                kept.append(x)
        return x

    def _tuned(self, i: int, x: Tensor, skip: Tensor, batch: Batch) -> tuple[Tensor, Tensor]:
        """What block i is given and skips, by `freeu` and `skip_tune`."""
        first, last = len(self.blocks) - len(self.senders), len(self.blocks) - 1
        if self.freeu is not None and i < first + 2:
            x, skip = free_u(x, skip, self.freeu[i - first], self.freeu[2 + i - first], batch)
        if self.skip_tune is not None:
            top, bottom = self.skip_tune
            skip = skip * ((i - first) / max(last - first, 1) * (top - bottom) / 1000 + bottom)
        return x, skip

    def image_tokens(self, hidden: Tensor, block: int, batch: Batch) -> Tensor:
        """Without conditions and padding, by rows."""
        framed = self.framed(batch)
        return framed.reorder(hidden, self.orders[block], ORDERS[0]).index_select(-2, framed.image)

    def initialise(self, rng: Rng | None = None) -> None:
        """As the released code: PyTorch's own laws, biases 0, tables N(0, 0.02^2), Mamba's; no output begins at 0."""
        draw = Draw(self, rng)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                spread = module.weight.shape[1:].numel() ** -0.5
                draw(nn.init.uniform_, module.weight, a=-spread, b=spread)
                if module.bias is not None and not isinstance(module, nn.Linear):
                    draw(nn.init.uniform_, module.bias, a=-spread, b=spread)
                elif module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, nn.Embedding):
                draw(nn.init.normal_, module.weight, std=0.02)
            elif isinstance(module, nn.RMSNorm):
                module.reset_parameters()
        for block in self.blocks:
            assert isinstance(block, Block)
            draw(nn.init.normal_, block.scale_shift_table, std=self.width**-0.5)
            block.attn1.initialise(draw, len(self.blocks))
        spread = self.token_spec.channels**-0.5 / self.token_spec.patch_size  # a convolution, as released
        draw(nn.init.uniform_, self.pos_embed.proj.bias, a=-spread, b=spread)
        for matrix in (p for p in self.adaln_single.emb.timestep_embedder.parameters() if p.ndim == 2):
            draw(nn.init.normal_, matrix, std=0.02)
        for padding in self.a4m_adapter.paddings:
            draw(nn.init.normal_, padding, std=0.02)
        nn.init.zeros_(self.additional_embed)

    def flops(self) -> Flops:
        """Of linear layers, convolutions and recurrences, of which blocks see padding too: that of the table's grid."""
        per_image = per_token = per_block = 0
        for name, layer in self.named_modules():
            own = getattr(layer, "flops_per_token", 0)
            if isinstance(layer, (nn.Linear, nn.Conv1d, nn.Conv2d)):
                own += 2 * layer.weight.numel()
            if name.startswith("transformer_blocks"):
                per_block += own
            elif name.startswith(("adaln_single", "proj_out_1")):
                per_image += own
            else:
                per_token += own
        pads = self.a4m_adapter.count
        more = CONDITIONS + pads + pads * (sum(self.table) + pads)
        return Flops(per_image + more * per_block, per_token + per_block, 0)


def _check(
    conv: int, table: Sequence[int], pad: str, directions: int, skip_tune: Sequence[float] | None,
    freeu: Sequence[float] | None,
) -> None:  # fmt: skip
    integer("model.conv", conv, 1)
    one_of("model.pad", pad, PADDINGS)
    if directions not in range(1, len(ORDERS) + 1):
        raise ValueError(f"model.directions={directions} must be 1, 2, 3 or 4")
    if not isinstance(table, Sequence) or len(table) != 2 or not all(type(n) is int and n > 0 for n in table):
        raise ValueError(f"model.table={table} must be [rows,columns], in tokens")
    for key, value, count in (("skip_tune", skip_tune, 2), ("freeu", freeu, 4)):
        if value is not None and (not isinstance(value, Sequence) or isinstance(value, str) or len(value) != count):
            raise ValueError(f"model.{key}={value} must be {count} numbers, or null")
        for own in value or ():
            number(f"model.{key}", own)


def scan_orders(depth: int, directions: int) -> list[str]:
    """The order that each block sees: one after the other up to the middle block, then back."""
    return [ORDERS[min(i, depth - 1 - i) % directions] for i in range(depth)]


def resized(table: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Positions (1, 2 + H W, D) of a grid, of which those of the image are interpolated to another grid."""
    conditions, image = table[0].split([CONDITIONS, prod(grid)])
    return torch.cat([conditions, interpolated(image, grid, Scans.of_grid(*wanted, table.device))])[None]


def interpolated(table: Tensor, grid: tuple[int, int], wanted: Scans) -> Tensor:
    """Values (H W, D) of a grid, bilinear between its centres, at each token of other grids: (N or T, D)."""
    if isinstance(wanted.rows, int) and (wanted.rows, wanted.columns) == grid:
        return table
    top, bottom, down = _between(wanted.place // wanted.columns, wanted.rows, grid[0])
    left, right, across = _between(wanted.place % wanted.columns, wanted.columns, grid[1])

    def row(number: Tensor) -> Tensor:
        first, second = (table.index_select(0, number * grid[1] + column) for column in (left, right))
        return torch.lerp(first, second, across)

    return torch.lerp(row(top), row(bottom), down)


def _between(place: Tensor, size: Tensor | int, known: int) -> tuple[Tensor, Tensor, Tensor]:
    """Of places on a side of a size: the two of a side of `known` around them, and the share (..., 1) of the second."""
    at = ((place + 0.5) * (known / size) - 0.5).clamp(min=0)
    first = at.long()
    return first, (first + 1).clamp(max=known - 1), (at - first)[..., None]


def free_u(x: Tensor, skip: Tensor, less: float, more: float, batch: Batch) -> tuple[Tensor, Tensor]:
    """Strengthens tokens (..., D) where those of an image are large, and weakens the slowest waves of the skip."""
    if batch.cu_seqlens is not None:
        rows = batch.cu_seqlens.diff().tolist()
        images = zip(x[None].split(rows, dim=1), skip[None].split(rows, dim=1), strict=True)
        found = [_free_u(own, skipped, less, more) for own, skipped in images]
        return torch.cat([own for own, _ in found], dim=1)[0], torch.cat([skipped for _, skipped in found], dim=1)[0]
    return _free_u(x, skip, less, more)


def _free_u(x: Tensor, skip: Tensor, less: float, more: float) -> tuple[Tensor, Tensor]:
    """Of images of one size, (B, L, D)."""
    if x.shape[1] == CONDITIONS:
        return x, skip
    own, means = x[:, CONDITIONS:], x[:, CONDITIONS:].mean(dim=2, keepdim=True)
    low, high = means.aminmax(dim=1, keepdim=True)
    own = own * ((more - 1) * (means - low) / (high - low) + 1)
    tokens = skip[:, CONDITIONS:].float()
    waves, middle = torch.fft.fftshift(torch.fft.fft(tokens, dim=1), dim=1), tokens.shape[1] // 2
    factors = torch.ones(tokens.shape[1], 1, device=x.device)
    factors[middle - 1 : middle + 1] = less
    slow = torch.fft.ifft(torch.fft.ifftshift(waves * factors, dim=1), dim=1).real
    return torch.cat([x[:, :CONDITIONS], own], dim=1), torch.cat([skip[:, :CONDITIONS], slow], dim=1)


class Place(NamedTuple):
    """Where the tokens that a block sees lie."""

    batch: Batch
    positions: Tensor | None  # (S,) of each token within its image, in a pack
    moved: Tensor | None  # (L or S,) where those that come next stand in the order before, if it is another


class Block(nn.Module):
    """x + (1 + gate) * recurrence(modulated x), of x with what it skips, in the block's own order."""

    def __init__(self, width: int, mixer: Mamba, skips: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(3, width))
        self.norm1, self.attn1 = nn.ModuleDict({"norm": nn.RMSNorm(width, eps=EPS)}), mixer
        both = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        joined = nn.Linear(2 * width, width) if width <= WIDEST_PAIR else both
        self.skip_linear = joined if skips else None

    def forward(self, x: Tensor, modulation: Tensor, place: Place, skip: Tensor | None) -> Tensor:
        """x and what it skips (..., D) in the order before, modulation (B, 3 D) -> x."""
        if skip is not None and isinstance(self.skip_linear, nn.ModuleList):
            x = (self.skip_linear[0](x) + self.skip_linear[1](skip)).float()
        elif skip is not None and self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=-1)).float()
        x = x if place.moved is None else x.index_select(-2, place.moved)
        with autocast_off(x):
            parts = self.scale_shift_table + modulation.unflatten(1, (3, -1))
            shift, scale, gate = map(place.batch.per_token, parts.unbind(1))
            mixed = multiply_add(shift, self.norm1["norm"](x), 1 + scale)
        return x + (1 + gate) * self.attn1(mixed, place.positions)


class Modulation(nn.Module):
    """From time and class to shift, scale and gate of all blocks."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        self.emb, self.linear = Embedder(width, num_classes), nn.Linear(width, 3 * width)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """t, y (B,) -> (B, 3 D)."""
        return self.linear(silu(self.emb(t, y)))


class Embedder(nn.Module):
    """The sum of what is made of the time and of a table of classes."""

    def __init__(self, width: int, num_classes: int) -> None:
        super().__init__()
        layers = {"linear_1": nn.Linear(FREQUENCIES, width), "linear_2": nn.Linear(width, width)}
        self.timestep_embedder = nn.ModuleDict(layers)
        self.class_embedder = LabelEmbedder(num_classes, width, null_class=True)

    def forward(self, t: Tensor, y: Tensor) -> Tensor:
        """t, y (B,) -> (B, D)."""
        layers = self.timestep_embedder
        return layers["linear_2"](silu(layers["linear_1"](sinusoid(t)))) + self.class_embedder(y)
