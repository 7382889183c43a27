"""The one type that knows where images begin and end.

Everything that handles latents of several images goes through `Batch`: objectives, samplers and
backbones never ask which memory layout they are given.

Letters used for shapes: B rows (images), N tokens of the longest row, T packed tokens, C channels,
H and W latent height and width, D values of one token, L text tokens, E values of one text token.
"""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask


@dataclass(frozen=True)
class Batch:
    """Latents of B images in one memory layout.

    A row that is not `real` is filler of a static shape: it has no loss and its values are never read.
    """

    x: Tensor  # dense (B, C, H, W) | padded (B, N, D) | packed (T, D); float
    y: Tensor  # (B,) conditions, one per image; for class-conditional training the label
    sizes: Tensor  # (B, 2) int, token rows and token columns of each image
    real: Tensor  # (B,) bool, False on filler rows
    mask: Tensor | None = None  # padded only, (B, N) bool, True on real tokens
    image_of: Tensor | None = None  # packed only, (T,) int, the row each token belongs to
    cu_seqlens: Tensor | None = None  # packed only, (B + 1,) int32, where each row begins and ends
    max_seqlen: int = 0  # packed only, a bound on the tokens of one row, known on the host
    sides: int = 0  # packed only, a bound on rows and columns of all real images together, known on the host
    block_mask: "BlockMask | None" = None  # packed only, which blocks of tokens meet, where attention needs it
    text: Tensor | None = None  # (B, L, E) what a text encoder makes of each caption, zeros beyond its end
    text_tokens: Tensor | None = None  # (B,) int, the length of each caption
    features: tuple[Tensor, ...] = ()  # what teachers see, where a loss aligns to it: packed (T, Z), others (B, N, Z)

    @property
    def layout(self) -> str:
        """`dense`, `padded` or `packed`."""
        if self.image_of is not None:
            return "packed"
        return "dense" if self.mask is None else "padded"

    @property
    def tokens(self) -> Tensor:
        """(B,) tokens of each row."""
        return self.sizes.prod(dim=1)

    @property
    def slots(self) -> int:
        """Tokens that the layout has room for, real or not."""
        if self.image_of is not None:
            return len(self.image_of)
        return int(self.tokens.sum()) if self.mask is None else self.mask.numel()

    @property
    def positions(self) -> Tensor:
        """Packed only: (T,) number of each token within its own image."""
        assert self.cu_seqlens is not None and self.image_of is not None
        return torch.arange(len(self.image_of), device=self.x.device) - self.cu_seqlens[self.image_of]

    def expand(self, v: Tensor) -> Tensor:
        """(B,) values, one per image -> a tensor that broadcasts against `x`."""
        if self.image_of is not None:
            v = v[self.image_of]
        return v.reshape(-1, *[1] * (self.x.ndim - 1))

    def per_token(self, v: Tensor) -> Tensor:
        """(B, D) vectors, one per image -> packed (T, D), otherwise (B, 1, D)."""
        return v[:, None] if self.image_of is None else v.index_select(0, self.image_of)

    def sum_per_image(self, values: Tensor) -> Tensor:
        """Sum of an x-shaped tensor over each image's own elements -> (B,), 0 where not real."""
        if self.image_of is not None:
            assert self.cu_seqlens is not None
            of_tokens = values.flatten(1).sum(dim=1)
            if values.device.type == "mps":  # for which PyTorch has no segment_reduce
                total = of_tokens.new_zeros(len(self.y)).index_add(0, self.image_of, of_tokens)
            else:
                total = torch.segment_reduce(of_tokens, "sum", offsets=self.cu_seqlens.long())
        elif self.mask is not None:
            total = (values.flatten(2).sum(dim=2) * self.mask).sum(dim=1)
        else:
            total = values.flatten(1).sum(dim=1)
        return torch.where(self.real, total, torch.zeros_like(total))

    def per_image(self, error: Tensor) -> Tensor:
        """Mean of an x-shaped tensor over each image's own elements -> (B,), 0 where not real."""
        return self.sum_per_image(error) / self.numbers(error).clamp(min=1)

    def numbers(self, values: Tensor) -> Tensor:
        """(B,) how many numbers of an x-shaped tensor each image has."""
        if self.layout == "dense":
            return torch.full_like(self.tokens, values[0].numel())
        tokens = self.tokens if self.mask is None else self.mask.sum(dim=1)
        return tokens * values.shape[-1]

    def with_text(self, text: Sequence[Tensor], tokens: int) -> "Batch":
        """The batch with the text (n, E) of its first rows, each of at most L = `tokens` tokens; others have none."""
        device, width = self.x.device, text[0].shape[1]
        whole = torch.zeros(len(self.y), tokens, width, dtype=text[0].dtype, device=device)
        for row, own in zip(whole, text, strict=False):
            row[: len(own)] = own
        lengths = [len(own) for own in text] + [0] * (len(self.y) - len(text))
        return replace(self, text=whole, text_tokens=torch.tensor(lengths).to(device, non_blocking=True))

    def join(self, other: "Batch") -> "Batch":
        """The rows of this batch followed by the rows of another one of the same layout."""
        assert self.layout == other.layout
        joined = {name: torch.cat([getattr(self, name), getattr(other, name)]) for name in ("x", "y", "sizes", "real")}
        for name in ("mask", "text", "text_tokens"):
            if (own := getattr(self, name)) is not None:
                joined[name] = torch.cat([own, getattr(other, name)])
        if self.image_of is not None and self.cu_seqlens is not None:
            assert other.image_of is not None and other.cu_seqlens is not None
            joined["image_of"] = torch.cat([self.image_of, other.image_of + len(self.y)])
            joined["cu_seqlens"] = torch.cat([self.cu_seqlens, other.cu_seqlens[1:] + self.cu_seqlens[-1]])
        longest, sides = max(self.max_seqlen, other.max_seqlen), self.sides + other.sides
        return replace(self, max_seqlen=longest, sides=sides, **joined)  # type: ignore[arg-type]

    def to(self, device: torch.device | str, non_blocking: bool = False) -> "Batch":
        """The same batch on another device."""
        tensors = {f.name: v for f in fields(self) if isinstance(v := getattr(self, f.name), Tensor)}
        moved: dict[str, Any] = {name: v.to(device, non_blocking=non_blocking) for name, v in tensors.items()}
        return replace(self, **moved)
