"""LightningDiT's released checkpoints: options and tables (github.com/hustvl/LightningDiT, lightningdit.py)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genfound.checkpoints.official import dit
from genfound.layers.rope import Rope, head_size, row_major

TABLES = ("feat_rope.freqs_cos", "feat_rope.freqs_sin")


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `LightningDiT` that an official state dict tells; not the heads where q and k are neither normalised
    nor rotated."""
    fused, weighted = "blocks.0.mlp.w12.weight" in state, "blocks.0.norm1.weight" in state
    first = state["blocks.0.mlp.w12.weight" if fused else "blocks.0.mlp.fc1.weight"]
    options = dit.official_options({**state, "blocks.0.mlp.fc1.weight": first})
    norm, table, width = state.get("blocks.0.attn.q_norm.weight"), state.get(TABLES[0]), options["width"]
    if fused:
        options["mlp_ratio"] = gated_ratio(len(first) // 2, width)
    options |= {
        "ffn": "swiglu_fused" if fused else "mlp",
        "norm": "w_rmsnorm" if weighted else "layernorm",
        "qk_norm": "none" if norm is None else "wb_layernorm" if "blocks.0.attn.q_norm.bias" in state else "w_rmsnorm",
        "shift": len(state["blocks.0.adaLN_modulation.1.weight"]) == 6 * width,
        "positions": "table" if table is None else "both",
        "unused_half": options["learn_sigma"],
        "learn_sigma": False,
    }
    head = len(norm) if norm is not None else 0 if table is None else table.shape[1]
    return options | ({"heads": width // head} if head else {})


def gated_ratio(hidden: int, width: int) -> float:
    """A `mlp_ratio` that gives a SwiGLU this hidden size, of which two thirds are rounded down; 4 where that does."""
    return 4.0 if 8 * width // 3 == hidden else (-(-3 * hidden // 2) + 0.5) / width


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of hustvl/LightningDiT in our shapes and orders, as of DiT; tables are computed here."""
    return dit.from_official({name: tensor for name, tensor in state.items() if name not in TABLES})


def tables(model: Mapping[str, Any], grid: tuple[int, int]) -> dict[str, Tensor]:
    """The rotary tables (rows * columns, d) that the official state dict of a configuration holds."""
    if model["positions"] == "table":
        return {}
    rope = Rope.of(head_size(model["width"], model["heads"]), model["rope_theta"], model["rope_scaling"])
    places = row_major(torch.arange(grid[0] * grid[1]), grid[1])
    waves = rope(places, torch.tensor([grid]), lambda v: v)[:, 0]  # (N, d / 2, 2)
    return dict(zip(TABLES, waves.repeat_interleave(2, dim=1).unbind(-1), strict=True))
