"""DiM, a diffusion network of Mamba blocks (arXiv 2405.14224).

What differs from DiT: each block is one recurrence over all tokens, in another order from block to block, and has no
MLP. Time and class come in twice, as the modulation of all blocks and as tokens of their own. The grid of an image is
framed by learned tokens, so that the recurrence knows where rows and columns end, and convolved before and after the
blocks. Long skips go from each of the first blocks to one of the last. Steps are counted from 1.

The tokens of an image are time and class, P tokens of the split, and a grid of (H + P, W + P): the image's own, then P
columns and P rows of padding.

Legend: B images, (H, W) tokens of an image, D width, P tokens of padding, L tokens of a sequence, K classes.
"""

from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, silu

from genfound.backbones.base import Backbone, Flops, TokenSpec
from genfound.batch import Batch
from genfound.config.checks import integer, one_of
from genfound.layers.adaln import autocast_off
from genfound.layers.embed import FREQUENCIES, LabelEmbedder, PatchEmbedder, sinusoid
from genfound.layers.initial import Draw
from genfound.layers.scans import ORDERS, Scans, depthwise
from genfound.layers.ssm import Mamba
from genfound.layers.tokens import from_tokens, to_tokens
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
        """Dense `batch.x` (B, C, h, w) at times t (B,) -> (B, C, h, w), or 2 C channels with a variance."""
        patch, t, image = self.token_spec.patch_size, t.float() + 1, batch.x
        if self.bf16_inputs and self.training:
            t, image = t.bfloat16().float(), image.bfloat16().float()
        rows, columns = (side // patch for side in image.shape[2:])
        tokens = self.pos_embed(to_tokens(image, patch)).float()  # (B, H W, D)
        with autocast_off(tokens):
            told = torch.stack([sinusoid(t, self.width), self.label_emb(batch.y)], dim=1)  # (B, 2, D)
            x = torch.cat([told, tokens], dim=1) + resized(self.additional_embed, self.table, (rows, columns))
            x = self.a4m_adapter(x, rows, columns)
            modulation = self.adaln_single(t, batch.y)
        x = self.run_blocks(x, modulation, rows, columns)
        with autocast_off(x):
            x = self.norm_out["norm"](self.a4m_adapter.image(x, rows, columns))
            shift, scale = self.proj_out_1(silu(told.sum(dim=1)))[:, None].chunk(2, dim=2)
            return from_tokens(self.proj_out_2(torch.addcmul(shift, x, 1 + scale)), rows, patch)

    def run_blocks(self, x: Tensor, modulation: Tensor, rows: int, columns: int) -> Tensor:
        """x (B, L, D) with the modulation (B, 3 D) of all blocks -> (B, L, D); the first and last order is by rows."""
        scans = self._scans(rows, columns, x.device)
        kept: list[Tensor] = []
        for i, block in enumerate(self.blocks):
            skip = None
            if len(self.blocks) - i in self.senders:
                x, skip = self._tuned(i, x, kept.pop())
            index = None
            if i and self.orders[i - 1] != self.orders[i]:
                grid = scans.between(self.orders[i - 1], self.orders[i])
                index = torch.cat([torch.arange(self._fixed, device=x.device), grid + self._fixed])
            x = self.run_block(block, x, modulation, index, skip)
            if i in self.senders:
                kept.append(x)
        return x

    @property
    def _fixed(self) -> int:
        """Tokens before those of the grid, which are in no order."""
        return CONDITIONS + self.a4m_adapter.count

    def _scans(self, rows: int, columns: int, device: torch.device) -> Scans:
        return Scans.of_grid(rows + self.a4m_adapter.count, columns + self.a4m_adapter.count, device)

    def _tuned(self, i: int, x: Tensor, skip: Tensor) -> tuple[Tensor, Tensor]:
        """What block i is given and skips, by `freeu` and `skip_tune`."""
        first, last = len(self.blocks) - len(self.senders), len(self.blocks) - 1
        if self.freeu is not None and i < first + 2:
            x, skip = free_u(x, skip, self.freeu[i - first], self.freeu[2 + i - first])
        if self.skip_tune is not None:
            top, bottom = self.skip_tune
            skip = skip * ((i - first) / max(last - first, 1) * (top - bottom) / 1000 + bottom)
        return x, skip

    def image_tokens(self, hidden: Tensor, block: int, batch: Batch) -> Tensor:
        """Without conditions and padding, by rows."""
        rows, columns = (side // self.token_spec.patch_size for side in batch.x.shape[2:])
        scans = self._scans(rows, columns, hidden.device)
        grid = scans.reorder(hidden[:, self._fixed :], self.orders[block], ORDERS[0])
        return grid.unflatten(1, (rows + self.a4m_adapter.count, -1))[:, :rows, :columns].flatten(1, 2)

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
        more = self._fixed + pads * (sum(self.table) + pads)
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


def scan_orders(depth: int, directions: int) -> list[str]:
    """The order that each block sees: one after the other up to the middle block, then back."""
    return [ORDERS[min(i, depth - 1 - i) % directions] for i in range(depth)]


def resized(table: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Positions (1, 2 + H W, D) of a grid, of which those of the image are interpolated to another grid."""
    if grid == wanted:
        return table
    conditions, image = table.split([CONDITIONS, prod(grid)], dim=1)
    image = interpolate(image.mT.unflatten(2, grid), wanted, mode="bilinear", align_corners=False)
    return torch.cat([conditions, image.flatten(2).mT], dim=1)


def free_u(x: Tensor, skip: Tensor, less: float, more: float) -> tuple[Tensor, Tensor]:
    """Strengthens the tokens (B, L, D) where they are large, and weakens the slowest waves of the skip."""
    own, means = x[:, CONDITIONS:], x[:, CONDITIONS:].mean(dim=2, keepdim=True)
    low, high = means.aminmax(dim=1, keepdim=True)
    own = own * ((more - 1) * (means - low) / (high - low) + 1)
    tokens = skip[:, CONDITIONS:].float()
    waves, middle = torch.fft.fftshift(torch.fft.fft(tokens, dim=1), dim=1), tokens.shape[1] // 2
    factors = torch.ones(tokens.shape[1], 1, device=x.device)
    factors[middle - 1 : middle + 1] = less
    slow = torch.fft.ifft(torch.fft.ifftshift(waves * factors, dim=1), dim=1).real
    return torch.cat([x[:, :CONDITIONS], own], dim=1), torch.cat([skip[:, :CONDITIONS], slow], dim=1)


class Block(nn.Module):
    """x + (1 + gate) * recurrence(modulated x), of x with what it skips, in the block's own order."""

    def __init__(self, width: int, mixer: Mamba, skips: bool) -> None:
        super().__init__()
        self.scale_shift_table = nn.Parameter(torch.empty(3, width))
        self.norm1, self.attn1 = nn.ModuleDict({"norm": nn.RMSNorm(width, eps=EPS)}), mixer
        both = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        joined = nn.Linear(2 * width, width) if width <= WIDEST_PAIR else both
        self.skip_linear = joined if skips else None

    def forward(self, x: Tensor, modulation: Tensor, index: Tensor | None, skip: Tensor | None) -> Tensor:
        """x and what it skips (B, L, D) in the order before, modulation (B, 3 D), places of the new order -> x."""
        if skip is not None and isinstance(self.skip_linear, nn.ModuleList):
            x = (self.skip_linear[0](x) + self.skip_linear[1](skip)).float()
        elif skip is not None and self.skip_linear is not None:
            x = self.skip_linear(torch.cat([x, skip], dim=2)).float()
        x = x if index is None else x.index_select(1, index)
        with autocast_off(x):
            parts = self.scale_shift_table + modulation.unflatten(1, (3, -1))
            shift, scale, gate = parts[:, :, None].unbind(1)  # (B, 1, D) each
            mixed = torch.addcmul(shift, self.norm1["norm"](x), 1 + scale)
        return x + (1 + gate) * self.attn1(mixed)


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


class Frame(nn.Module):
    """Convolutions of the grid of an image, and P tokens of padding at its right, below it and before it."""

    def __init__(self, width: int, count: int, cycled: bool, smooth: bool) -> None:
        super().__init__()
        self.count, self.cycled = count, cycled
        self.pad_token_dec_split = nn.Parameter(torch.empty(1, count, width)) if count else None
        self.pad_token = nn.Parameter(torch.empty(1, width, count)) if count else None
        self.first_smoother = nn.Conv2d(width, width, 3, padding=1, groups=width) if smooth else None
        self.last_smoother = nn.Conv2d(width, width, 3, padding=1, groups=width) if smooth else None

    @property
    def paddings(self) -> list[nn.Parameter]:
        """Learned tokens."""
        return [p for p in (self.pad_token_dec_split, self.pad_token) if p is not None]

    def forward(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """Conditions and grid (B, 2 + H W, D) -> all tokens (B, L, D), by rows."""
        conditions, grid = x.split([CONDITIONS, rows * columns], dim=1)
        if self.first_smoother is not None:
            grid = depthwise(self.first_smoother, grid, (rows, columns))
        if self.pad_token is None or self.pad_token_dec_split is None:
            return torch.cat([conditions, grid], dim=1)
        split, pads = (p.expand(len(x), -1, -1) for p in (self.pad_token_dec_split, self.pad_token.mT))
        framed = torch.cat([grid, pads], dim=1).index_select(1, self._index(rows, columns, x.device))
        return torch.cat([conditions, split, framed], dim=1)

    def image(self, x: Tensor, rows: int, columns: int) -> Tensor:
        """All tokens (B, L, D), by rows -> those of the image (B, H W, D)."""
        grid = x[:, CONDITIONS + self.count :].unflatten(1, (rows + self.count, -1))[:, :rows, :columns].flatten(1, 2)
        return grid if self.last_smoother is None else depthwise(self.last_smoother, grid, (rows, columns))

    def _index(self, rows: int, columns: int, device: torch.device) -> Tensor:
        """The token of the image, or after them of the padding, at each place of the framed grid."""
        own, count = rows * columns, self.count
        inside = torch.arange(own, device=device).view(rows, columns)
        right = own + torch.arange(count, device=device).expand(rows, -1)
        below = torch.arange(count * (columns + count), device=device)
        below = own + (below % count if self.cycled else below // (columns + count))
        return torch.cat([torch.cat([inside, right], dim=1).flatten(), below])
