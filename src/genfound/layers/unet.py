"""The parts of a U-Net of diffusion: ADM's residual and attention blocks, and LDM's spatial transformer.

Names of parameters are those of the released code (CompVis/latent-diffusion, openaimodel.py and attention.py).

Legend: B images, C channels, (H, W) height and width of a feature map, N = H W, L vectors of the context, heads of d.
"""

from collections.abc import Sequence

from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, gelu, interpolate

from genfound.layers.adaln import autocast_off
from genfound.layers.attention import sdpa

GROUPS = 32


class GroupNorm(nn.GroupNorm):
    """Of 32 groups, in float32."""

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__(GROUPS, channels, eps)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, ...) -> the same, in the dtype of x."""
        with autocast_off(x):
            return super().forward(x.float()).to(x.dtype)


class Downsample(nn.Module):
    """Half the height and width: by a convolution, or by the mean of four."""

    def __init__(self, channels: int, learned: bool = True) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1) if learned else nn.AvgPool2d(2)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H / 2, W / 2)."""
        return self.op(x)


class Upsample(nn.Module):
    """Twice the height and width: the nearest value, and a convolution."""

    def __init__(self, channels: int, learned: bool = True) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1) if learned else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, 2 H, 2 W)."""
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class ResBlock(nn.Module):
    """Two convolutions beside a skip; the embedding of time is added between them, or scales and shifts the norm.

    Args:
        channels, out: of what comes in and goes out.
        embedding: width of the embedding.
        scale_shift: the embedding scales and shifts.
        resample: `down` or `up`: half or twice the height and width, of both ways; `""`: neither.
    """

    def __init__(self, channels: int, out: int, embedding: int, scale_shift: bool, resample: str = "") -> None:
        super().__init__()
        self.scale_shift, self.resample = scale_shift, resample
        self.in_layers = nn.Sequential(GroupNorm(channels), nn.SiLU(), nn.Conv2d(channels, out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embedding, 2 * out if scale_shift else out))
        # The released code has a dropout of 0 in the third place.
        self.out_layers = nn.Sequential(GroupNorm(out), nn.SiLU(), nn.Identity(), nn.Conv2d(out, out, 3, padding=1))
        self.skip_connection = nn.Identity() if channels == out else nn.Conv2d(channels, out, 1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """x (B, C, H, W), embedding (B, E) -> (B, out, H, W), with `resample` of other height and width."""
        norm, activation, convolution = self.in_layers
        h, x = (self._resampled(value) for value in (activation(norm(x)), x))
        h = convolution(h)
        with autocast_off(x):
            per_image = self.emb_layers(embedding)[..., None, None]  # (B, out or 2 out, 1, 1)
        if self.scale_shift:
            scale, shift = per_image.chunk(2, dim=1)
            h = self.out_layers[1:](self.out_layers[0](h) * (1 + scale) + shift)
        else:
            h = self.out_layers(h + per_image)
        return self.skip_connection(x) + h

    def _resampled(self, x: Tensor) -> Tensor:
        if self.resample == "down":
            return avg_pool2d(x, 2)
        return interpolate(x, scale_factor=2.0, mode="nearest") if self.resample else x


class AttentionBlock(nn.Module):
    """Self-attention over the places of a feature map.

    Args:
        channels: C.
        heads: number of them.
        by_kind: the rows of `qkv` are all queries, all keys, all values; otherwise those of each head are together.
    """

    def __init__(self, channels: int, heads: int, by_kind: bool) -> None:
        super().__init__()
        self.heads = heads
        self.order = "b (three h d) n -> three b h n d" if by_kind else "b (h three d) n -> three b h n d"
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = nn.Conv1d(channels, channels, 1)

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        flat = x.flatten(2)
        q, k, v = rearrange(self.qkv(self.norm(flat)), self.order, three=3, h=self.heads)
        mixed = rearrange(sdpa(q, k, v), "b h n d -> b (h d) n")
        return (flat + self.proj_out(mixed)).view_as(x)


class CrossAttention(nn.Module):
    """Attention to the context; to the tokens themselves where there is none."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context, width, bias=False)
        self.to_v = nn.Linear(context, width, bias=False)
        self.to_out = nn.Sequential(nn.Linear(width, width))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, D), context (B, L, D') -> (B, N, D)."""
        split = (self.to_q(x), self.to_k(context), self.to_v(context))
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in split)  # (B, heads, N or L, d)
        return self.to_out(sdpa(q, k, v).transpose(1, 2).flatten(2))


class GEGLU(nn.Module):
    """Linear(x) * GELU(Linear(x)), both of one matrix; arXiv 2002.05202."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.proj = nn.Linear(width, 2 * hidden)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., hidden)."""
        value, gate = self.proj(x).chunk(2, dim=-1)
        return value * gelu(gate)


class FeedForward(nn.Module):
    """GEGLU of four times the width, and back."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) -> (..., D)."""
        return self.net(x)


class TransformerBlock(nn.Module):
    """Self-attention, attention to the context, and a feed-forward network, each after a norm and beside a skip."""

    def __init__(self, width: int, context: int, heads: int) -> None:
        super().__init__()
        self.attn1 = CrossAttention(width, width, heads)
        self.ff = FeedForward(width)
        self.attn2 = CrossAttention(width, context, heads)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, N, D), context (B, L, D') -> (B, N, D)."""
        own = self.norm1(x)
        x = x + self.attn1(own, own)
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer blocks over the places of a feature map, beside a skip."""

    def __init__(self, channels: int, context: int, heads: int, depth: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels, eps=1e-6)
        self.proj_in = nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(TransformerBlock(channels, context, heads) for _ in range(depth))
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), context (B, L, D') -> (B, C, H, W)."""
        tokens = self.proj_in(self.norm(x)).flatten(2).transpose(1, 2)  # (B, N, D)
        for block in self.transformer_blocks:
            tokens = block(tokens, context)
        return x + self.proj_out(tokens.transpose(1, 2).unflatten(2, x.shape[2:]))


class UNetBlock(nn.ModuleList):
    """Layers one after another, of which some see the embedding and some the context."""

    def __init__(self, layers: Sequence[nn.Module]) -> None:
        super().__init__(layers)

    def forward(self, x: Tensor, embedding: Tensor, context: Tensor) -> Tensor:
        """x (B, C, H, W), embedding (B, E), context (B, L, D') -> (B, C', H', W')."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x = layer(x, embedding)
            else:
                x = layer(x, context) if isinstance(layer, SpatialTransformer) else layer(x)
        return x


def sides_factor(layer: nn.Module) -> float:
    """By how much a layer of a `UNetBlock` changes height and width."""
    if isinstance(layer, Downsample) or getattr(layer, "resample", "") == "down":
        return 0.5
    return 2.0 if isinstance(layer, Upsample) or getattr(layer, "resample", "") == "up" else 1.0
