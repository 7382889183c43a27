"""DiT's and SiT's released checkpoints: shapes and options (github.com/facebookresearch/DiT, models.py)."""

from collections.abc import Mapping
from math import isqrt
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from genfound.backbones.dit import EMA_DRIFT, position_table
from genfound.checkpoints.official import projectors


def block_count(state: Mapping[str, Tensor]) -> int:
    """Blocks of a state dict, official or ours."""
    return len({name.split(".")[1] for name in state if name.startswith("blocks.")})


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options that an official state dict tells; not the number of heads.

    A label table of n rows is taken for n - 1 classes and the null class.
    """
    width, channels, p, _ = state["x_embedder.proj.weight"].shape
    return {
        "channels": channels,
        "num_classes": len(state["y_embedder.embedding_table.weight"]) - 1,
        "patch_size": p,
        "width": width,
        "depth": block_count(state),
        "mlp_ratio": len(state["blocks.0.mlp.fc1.weight"]) / width,
        "learn_sigma": len(state["final_layer.linear.weight"]) == 2 * channels * p * p,
    }


def options_of_sit(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """As `official_options`, of SiT (github.com/willisma/SiT, models.py), which leaves half of its outputs unused."""
    options = official_options(state)
    aligned = any(map(projectors.is_projector, state))  # by REPA, whose time runs from data to noise
    return {
        **options,
        "unused_half": options["learn_sigma"],
        "learn_sigma": False,
        "time": "data0" if aligned else "data1",
        "qk_norm": "blocks.0.attn.q_norm.weight" in state,
    }


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of facebookresearch/DiT in our shapes and orders; unknown names are left as they are.

    The official patch projection is a convolution, its last layer orders a patch as (p, p, channels), and its table
    of positions is computed here. Projectors of an alignment are no part of the network.
    """
    if state.get("x_embedder.proj.weight", torch.empty(0)).ndim != 4:
        raise ValueError("this is no state dict of DiT: it has no convolution x_embedder.proj.weight")
    width, _, p, _ = state["x_embedder.proj.weight"].shape
    ours = channels_first(without_table(state, width), p)
    return ours | {"x_embedder.proj.weight": ours["x_embedder.proj.weight"].flatten(1)}


def to_official(state: Mapping[str, Tensor], patch_size: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The inverse of `from_official`, with the position table of a grid of (rows, columns) tokens."""
    p, weight = patch_size, state["x_embedder.proj.weight"]
    official = {"pos_embed": position_table(*grid, len(weight))[None], **channels_last(state, p)}
    return official | {"x_embedder.proj.weight": rearrange(weight, "d (c p q) -> d c p q", p=p, q=p)}


def without_table(state: Mapping[str, Tensor], width: int) -> dict[str, Tensor]:
    """A state dict without its position table, which must be DiT's, and without projectors of an alignment."""
    if (table := state.get("pos_embed")) is not None:
        side = isqrt(table.shape[1])
        same = tuple(table.shape) == (1, side * side, width)
        if not same or (table[0] - position_table(side, side, width)).abs().max() > EMA_DRIFT:
            text = "pos_embed is not DiT's sine-cosine table of a square"
            raise ValueError(f"{text}, so these weights are of another model")
    return {name: state[name] for name in state if name != "pos_embed" and not projectors.is_projector(name)}


def channels_first(state: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """A state dict whose last layer makes patches (C, p, p), from one of patches (p, p, C)."""
    return _reordered(state, "(p q c) ... -> (c p q) ...", patch_size)


def channels_last(state: Mapping[str, Tensor], patch_size: int) -> dict[str, Tensor]:
    """The inverse of `channels_first`."""
    return _reordered(state, "(c p q) ... -> (p q c) ...", patch_size)


def _reordered(state: Mapping[str, Tensor], pattern: str, p: int) -> dict[str, Tensor]:
    names = [name for name in ("final_layer.linear.weight", "final_layer.linear.bias") if name in state]
    return {**state, **{name: rearrange(state[name], pattern, p=p, q=p) for name in names}}
