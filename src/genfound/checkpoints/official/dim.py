"""DiM's released checkpoints: shapes and options (github.com/tyshiwo1/DiM-DiffusionMamba, models/mamba_2d.py)."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

from einops import rearrange
from torch import Tensor

PATCHES, BLOCKS = "pos_embed.proj.weight", "transformer_blocks."
OUTPUTS = ("proj_out_2.weight", "proj_out_2.bias")


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options of `DiM` that an official state dict tells; not how the padding lies, nor the orders of its blocks.

    Positions are taken for those of a square, or of the nearest taller grid.
    """
    width, channels, p, _ = state[PATCHES].shape
    depth = len({name.split(".")[1] for name in state if name.startswith(BLOCKS)})
    count = state["additional_embed"].shape[1] - 2
    padded = "a4m_adapter.pad_token" in state
    inner, states = state[f"{BLOCKS}0.attn1.A_log"].shape
    return {
        "channels": channels,
        "num_classes": len(state["label_emb.weight"]) - 1,
        "patch_size": p,
        "width": width,
        "depth": depth,
        "states": states,
        "conv": state[f"{BLOCKS}0.attn1.conv1d.weight"].shape[2],
        "expand": inner // width,
        "table": [count // isqrt(count), isqrt(count)],
        "smooth": "a4m_adapter.first_smoother.weight" in state,
        "long_skips": any("skip_linear" in name for name in state),
        "learn_sigma": len(state[OUTPUTS[0]]) == 2 * channels * p * p,
        **({} if padded else {"pad": "none"}),
    }


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of tyshiwo1/DiM-DiffusionMamba in our shapes and orders; unknown names are left as they are."""
    p = state[PATCHES].shape[-1]
    ours = {name: rearrange(state[name], "(p q c) ... -> (c p q) ...", p=p, q=p) for name in OUTPUTS}
    return {**state, **ours, PATCHES: state[PATCHES].flatten(1)}


def to_official(state: Mapping[str, Tensor], patch_size: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The inverse of `from_official`."""
    p = patch_size
    theirs = {name: rearrange(state[name], "(c p q) ... -> (p q c) ...", p=p, q=p) for name in OUTPUTS if name in state}
    return {**state, **theirs, PATCHES: rearrange(state[PATCHES], "d (c p q) -> d c p q", p=p, q=p)}
