"""NiT's released checkpoints: shapes and options (github.com/WZDTHU/NiT, nit/models/c2i/nit_model.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of WZDTHU/NiT without the projector of its alignment loss; its patch embedding is a convolution.

    Raises:
        ValueError: it is no state dict of NiT.
    """
    if state.get("x_embedder.proj.weight", torch.empty(0)).ndim != 4:
        raise ValueError("this is no state dict of NiT: it has no convolution x_embedder.proj.weight")
    ours = {name: tensor for name, tensor in state.items() if not name.startswith("projector.")}
    return ours | {"x_embedder.proj.weight": ours["x_embedder.proj.weight"].flatten(1)}


def to_official(state: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    weight = state["x_embedder.proj.weight"].unflatten(1, (-1, patch_size, patch_size))
    return {**state, "x_embedder.proj.weight": weight}


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
