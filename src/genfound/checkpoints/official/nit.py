"""NiT's released checkpoints: names and options (github.com/WZDTHU/NiT, nit/models/c2i/nit_model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

RENAMED = (
    ("x_embedder.proj", "x_embedder"),
    ("t_embedder.mlp.0", "t_embedder.first"),
    ("t_embedder.mlp.2", "t_embedder.second"),
    ("mlp.fc1", "mlp.0"),
    ("mlp.fc2", "mlp.2"),
    ("final_layer.adaLN_modulation.1", "final_layer.adaln"),
    ("adaLN_modulation.1", "adaln.0"),
    ("adaLN_modulation.2", "adaln.1"),
)
"""Parts of official names and of ours, in the order in which they are tried."""


def our_key(official: str) -> str:
    """Where an official tensor lies in our backbone."""
    return next((official.replace(theirs, ours) for theirs, ours in RENAMED if theirs in official), official)


def official_key(ours: str) -> str:
    """The inverse of `our_key`."""
    within = (pair for pair in RENAMED if f".{pair[1]}." in f".{ours}")
    return next((ours.replace(name, theirs) for theirs, name in within), ours)


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of WZDTHU/NiT in our names, without the projector of its alignment loss.

    Raises:
        ValueError: it is no state dict of NiT.
    """
    if state.get("x_embedder.proj.weight", torch.empty(0)).ndim != 4:
        raise ValueError("this is no state dict of NiT: it has no convolution x_embedder.proj.weight")
    ours = {our_key(name): tensor for name, tensor in state.items() if not name.startswith("projector.")}
    return ours | {"x_embedder.weight": ours["x_embedder.weight"].flatten(1)}


def to_official(state: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """The inverse of `from_official`; the patch embedding is officially a convolution."""
    official = {official_key(name): tensor for name, tensor in state.items()}
    weight = official["x_embedder.proj.weight"].unflatten(1, (-1, patch_size, patch_size))
    return official | {"x_embedder.proj.weight": weight}


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options that an official state dict tells: the heads only where q and k are normalised.

    A label table of n rows is taken for n - 1 classes and the null class.
    """
    width, channels, patch_size, _ = state["x_embedder.proj.weight"].shape
    ranked = "blocks.0.adaLN_modulation.2.weight" in state
    norm = state.get("blocks.0.attn.q_norm.weight")
    return {
        "channels": channels,
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "patch_size": patch_size,
        "width": width,
        "depth": len({name.split(".")[1] for name in state if name.startswith("blocks.")}),
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
        "qk_norm": norm is not None,
        "adaln_rank": len(state["blocks.0.adaLN_modulation.1.weight"]) if ranked else None,
        "learn_sigma": len(state["final_layer.linear.weight"]) == 2 * channels * patch_size**2,
    } | ({} if norm is None else {"heads": width // len(norm)})
