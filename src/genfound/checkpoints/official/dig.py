"""DiG's checkpoints: shapes and options (github.com/hustvl/DiG, models_dig.py)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genfound.checkpoints.official import dit

ALIASES = {"norm1.weight": "attn_norm.weight", "norm2.weight": "mlp_norm.weight"}
"""Second names of tensors in the official state dict of a network with RMSNorm."""


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `DiG` that an official state dict tells; not where its convolutions are, nor the order of its scans.

    A label table of n rows is taken for n - 1 classes and the null class.
    """
    width, channels, p, _ = state["x_embedder.proj.weight"].shape
    first = {name.removeprefix("blocks.0."): tensor for name, tensor in state.items() if name.startswith("blocks.0.")}
    table, conv = state.get("y_embedder.embedding_table.weight"), first.get("dw_conv.weight")
    keys, values = (len(first[f"attn.{name}_proj.weight"]) for name in ("k", "v"))
    skips = any("skip_linear" in name for name in state)
    return {
        "channels": channels,
        "num_classes": 0 if table is None else len(table) - 1,
        "patch_size": p,
        "width": width,
        "depth": dit.block_count(state),
        "heads": values // len(first["attn.g_norm_swish_gate.weight"]),
        "mlp_ratio": _ratio(first["mlp.down_proj.weight"].shape[1], width),
        "expand_k": keys / width,
        "expand_v": values / width,
        "gate_rank": len(first["attn.gk_proj.0.weight"]),
        "rms_norm": "attn_norm.weight" in first,
        "learn_sigma": len(state["final_layer.linear.weight"]) == 2 * channels * p * p,
        **({"conv": "none"} if conv is None else {"conv_size": conv.shape[-1]}),
        **({"skip": "xavier"} if skips else {}),
        **({"label_drop": 0.0} if table is None else {}),
    }


def _ratio(hidden: int, width: int) -> float:
    """A `mlp_ratio` of which the MLP has this hidden size; 4 where that does."""
    return 4 if 256 * -(-int(width * 8 / 3) // 256) == hidden else (1.5 * hidden + 0.5) / width


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of hustvl/DiG in our shapes and orders, as of DiT, each tensor under one name."""
    other = {name: name.replace(a, b) for a, b in ALIASES.items() for name in state if name.endswith(f".{a}")}
    for name, alias in other.items():
        if not torch.equal(state[name], state[alias]):
            raise ValueError(f"{name} is not {alias}, of which it is a second name")
    return dit.from_official({name: tensor for name, tensor in state.items() if name not in other})


def to_official(state: Mapping[str, Tensor], patch_size: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The inverse of `from_official`, with the position table of a grid of (rows, columns) tokens."""
    official = dit.to_official(state, patch_size, grid)
    for second, first in ALIASES.items():
        copies = {name.replace(first, second): state[name].clone() for name in state if name.endswith(first)}
        official |= copies  # not the same tensors, which safetensors would not write twice
    return official
