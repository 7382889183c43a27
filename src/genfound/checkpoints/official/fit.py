"""FiT's and FiTv2's released checkpoints: options (github.com/whlzy/FiT, fit/model)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genfound.checkpoints.official.dit import block_count


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of whlzy/FiT, which is ours."""
    if state.get("x_embedder.proj.weight", torch.empty(0)).ndim != 2:
        raise ValueError("this is no state dict of FiT: it has no matrix x_embedder.proj.weight")
    return dict(state)


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `FiT` that names and shapes of an official state dict tell.

    The last label is taken for the null label, and a weighted norm for a layer norm. Not told, and left out:
    channels and patch_size (only their product C p^2), heads, norms without weights (FiTv2 has them on queries and
    keys, FiT has none there), everything of positions and time, and the probability of label dropout.
    """
    ours = from_official(state)
    width, token = ours["x_embedder.proj.weight"].shape
    rank = len(ours["blocks.0.adaLN_modulation.1.weight"]) if "global_adaLN_modulation.1.weight" in ours else None
    gated = "blocks.0.adaLN_modulation.fc2.weight" in ours
    weighted = {"norm": "norm1", "q_norm": "attn.q_norm", "k_norm": "attn.k_norm"}
    return {
        "num_classes": len(ours["y_embedder.embedding_table.weight"]) - 1,
        "width": width,
        "depth": block_count(ours),
        **_ffn_options(ours, width),
        **{key: "w_layernorm" for key, name in weighted.items() if f"blocks.0.{name}.weight" in ours},
        "qkv_bias": "blocks.0.attn.qkv.bias" in ours,
        "ffn_bias": "blocks.0.mlp.fc2.bias" in ours,
        "adaln": "swiglu" if gated else "normal" if rank is None else "lora",
        "adaln_rank": rank,
        "learn_sigma": len(ours["final_layer.linear.weight"]) == 2 * token,
    }


def _ffn_options(ours: Mapping[str, Tensor], width: int) -> dict[str, Any]:
    """`ffn` and `mlp_ratio` that give the hidden size; of two readings of a SwiGLU, the one with ratio 4."""
    kind = "swiglu_large" if "blocks.0.mlp.fc1_g.weight" in ours else "mlp"
    hidden = ours["blocks.0.mlp.fc2.weight"].shape[1]
    if kind == "swiglu_large" and hidden == 2 * 4 * width // 3:
        return {"ffn": "swiglu", "mlp_ratio": 4.0}
    ratio = hidden / width
    return {"ffn": kind, "mlp_ratio": ratio if int(width * ratio) == hidden else (hidden + 0.5) / width}
