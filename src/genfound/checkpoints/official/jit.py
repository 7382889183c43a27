"""JiT's released checkpoints: shapes and options (github.com/LTH14/JiT, model_jit.py)."""

from collections.abc import Mapping
from typing import Any

from einops import rearrange
from torch import Tensor

from genfound.backbones.dit import position_table
from genfound.checkpoints.official import dit
from genfound.checkpoints.official.lightningdit import gated_ratio

PREFIX = "net."
"""Of the names in a training checkpoint, whose model also holds the loss."""
PARTS = ("model", "model_ema1", "model_ema2")


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `JiT` that an official state dict tells; not the block where class tokens begin."""
    bottleneck, channels, p, _ = state["x_embedder.proj1.weight"].shape
    width, hidden = state["blocks.0.mlp.w3.weight"].shape
    context = state.get("in_context_posemb")
    return {
        "channels": channels,
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "patch_size": p,
        "width": width,
        "depth": dit.block_count(state),
        "heads": width // len(state["blocks.0.attn.q_norm.weight"]),
        "mlp_ratio": gated_ratio(hidden, width),
        "bottleneck_dim": bottleneck,
        **({"in_context_len": 0, "in_context_start": 0} if context is None else {"in_context_len": context.shape[1]}),
    }


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of LTH14/JiT in our shapes and orders; the position table is computed here."""
    p, width = state["x_embedder.proj1.weight"].shape[-1], len(state["x_embedder.proj2.weight"])
    ours = dit.channels_first(dit.without_table(state, width), p)
    return ours | {name: ours[name].flatten(1) for name in ("x_embedder.proj1.weight", "x_embedder.proj2.weight")}


def to_official(state: Mapping[str, Tensor], patch_size: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The inverse of `from_official`, with the position table of a grid of (rows, columns) tokens."""
    p, first, second = patch_size, state["x_embedder.proj1.weight"], state["x_embedder.proj2.weight"]
    official = {"pos_embed": position_table(*grid, len(second))[None], **dit.channels_last(state, p)}
    official["x_embedder.proj1.weight"] = rearrange(first, "b (c p q) -> b c p q", p=p, q=p)
    return official | {"x_embedder.proj2.weight": second[..., None, None]}


def training_checkpoint(state: Mapping[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """A state dict as the official code loads it: live weights and two averages, here the same."""
    return {part: {PREFIX + name: tensor for name, tensor in state.items()} for part in PARTS}
