"""NiT's released checkpoints: shapes and options (github.com/WZDTHU/NiT, nit/models/c2i/nit_model.py)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genfound.checkpoints.official import dit
from genfound.checkpoints.official.projectors import is_projector


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of WZDTHU/NiT without the projector of its alignment loss; its patch embedding is a convolution."""
    if state.get("x_embedder.proj.weight", torch.empty(0)).ndim != 4:
        raise ValueError("this is no state dict of NiT: it has no convolution x_embedder.proj.weight")
    ours = {name: tensor for name, tensor in state.items() if not is_projector(name)}
    return ours | {"x_embedder.proj.weight": ours["x_embedder.proj.weight"].flatten(1)}


def to_official(state: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    weight = state["x_embedder.proj.weight"].unflatten(1, (-1, patch_size, patch_size))
    return {**state, "x_embedder.proj.weight": weight}


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options that an official state dict tells, as of DiT: the heads only where q and k are normalised."""
    ranked = "blocks.0.adaLN_modulation.2.weight" in state
    norm = state.get("blocks.0.attn.q_norm.weight")
    options = dit.official_options(state) | {
        "qk_norm": norm is not None,
        "adaln_rank": len(state["blocks.0.adaLN_modulation.1.weight"]) if ranked else None,
    }
    return options if norm is None else options | {"heads": options["width"] // len(norm)}
