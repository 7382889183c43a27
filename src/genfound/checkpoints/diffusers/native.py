"""Diffusers' own DiT: the names of its parameters and its configuration (diffusers, models/transformers).

Its embedders of time and class are stored once for every block. Its time frequencies are 10000^(-i / 127) where the
official DiT and ours have i / 128, so that pictures of `DiTPipeline` are plausible, but not those of `genfound.sample`.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfound.backbones.dit import position_table
from genfound.checkpoints.official.dit import block_count

CLASSES = ("DiTTransformer2DModel", "Transformer2DModel")
"""Names of the class, now and in older folders."""

CLASS_COUNT = 1000
"""Of the pipeline, whose null class has this number whatever the network was trained on."""

OUTER = {
    "x_embedder.proj": "pos_embed.proj",
    "final_layer.adaLN_modulation.1": "proj_out_1",
    "final_layer.linear": "proj_out_2",
}
SHARED = {
    "t_embedder.mlp.0": "norm1.emb.timestep_embedder.linear_1",
    "t_embedder.mlp.2": "norm1.emb.timestep_embedder.linear_2",
    "y_embedder.embedding_table": "norm1.emb.class_embedder.embedding_table",
}
INNER = {
    "adaLN_modulation.1": "norm1.linear",
    "attn.proj": "attn1.to_out.0",
    "mlp.fc1": "ff.net.0.proj",
    "mlp.fc2": "ff.net.2",
}
"""Official modules -> those of diffusers: outside of blocks, once in every block, and of a block."""

QKV = ("attn1.to_q", "attn1.to_k", "attn1.to_v")
TABLE = "y_embedder.embedding_table.weight"
LEAVES = ("weight", "bias")


def to_native(official: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Names of diffusers for an official state dict; fewer than 1,000 classes are followed by null classes."""
    depth, native = block_count(official), dict[str, Tensor]()
    table = official[TABLE]
    padded = torch.cat([table, table[-1:].expand(CLASS_COUNT + 1 - len(table), -1)])
    for name, tensor in {**official, TABLE: padded}.items():
        module, _, leaf = name.rpartition(".")
        if module in OUTER:
            native[f"{OUTER[module]}.{leaf}"] = tensor
        elif module in SHARED:
            names = (f"transformer_blocks.{i}.{SHARED[module]}.{leaf}" for i in range(depth))
            native |= {other: tensor.clone() for other in names}
        elif module:
            _, block, inner = module.split(".", 2)
            if inner == "attn.qkv":
                parts = zip(QKV, tensor.chunk(3), strict=True)
                native |= {f"transformer_blocks.{block}.{part}.{leaf}": third.clone() for part, third in parts}
            else:
                native[f"transformer_blocks.{block}.{INNER[inner]}.{leaf}"] = tensor
    return native


def from_native(native: Mapping[str, Tensor], side: int, file: Path) -> dict[str, Tensor]:
    """The inverse, with the position table of latents of `side` pixels; trailing rows of equal classes are one.

    Raises:
        ValueError: a parameter is missing, or the embedders of the blocks differ, as after a training in diffusers.
    """
    rest = {name: tensor for name, tensor in native.items() if name != "pos_embed.pos_embed"}
    depth = len({name.split(".")[1] for name in rest if name.startswith("transformer_blocks.")})

    def take(name: str) -> Tensor:
        if name not in rest:
            raise ValueError(f"{file} has no {name}")
        return rest.pop(name)

    official = {f"{ours}.{leaf}": take(f"{theirs}.{leaf}") for ours, theirs in OUTER.items() for leaf in LEAVES}
    for i in range(depth):
        block = f"transformer_blocks.{i}"
        for leaf in LEAVES:
            of_block = ((ours, f"{block}.{theirs}.{leaf}") for ours, theirs in INNER.items())
            official |= {f"blocks.{i}.{ours}.{leaf}": take(theirs) for ours, theirs in of_block}
            official[f"blocks.{i}.attn.qkv.{leaf}"] = torch.cat([take(f"{block}.{part}.{leaf}") for part in QKV])
        for ours, theirs in SHARED.items():
            for leaf in LEAVES if ours != TABLE.rpartition(".")[0] else LEAVES[:1]:
                tensor = take(f"{block}.{theirs}.{leaf}")
                if not torch.equal(official.setdefault(f"{ours}.{leaf}", tensor), tensor):
                    raise ValueError(f"{file}: {theirs} of block {i} is not that of block 0, and a DiT has one for all")
    table, p = official[TABLE], official["x_embedder.proj.weight"].shape[-1]
    classes = int((table != table[-1]).any(dim=1).nonzero().max()) + 1
    official[TABLE] = table[: classes + 1]
    official["pos_embed"] = position_table(side // p, side // p, table.shape[1])[None]
    return official | rest


def why_not(config: Mapping[str, Any], classes: int, sizes: list[tuple[int, int]]) -> str | None:
    """What keeps a DiT from being one of diffusers, if anything."""
    model, objective = config["model"], config["objective"]
    wanted = {"timesteps": 1000, "schedule": "linear", "prediction": "epsilon"}
    odd = [f"objective.{key}={objective.get(key)}" for key, value in wanted.items() if objective.get(key) != value]
    if odd:
        return f"its scheduler has other steps than {odd[0]}"
    if model["mlp_ratio"] != 4 or model["unused_half"] or model["label_drop"] <= 0:
        return "it needs model.mlp_ratio=4, model.unused_half=false and a null class (model.label_drop above 0)"
    if classes > CLASS_COUNT:
        return f"it has at most {CLASS_COUNT} classes, and these weights {classes}"
    height, width = sizes[0]
    return None if height == width else f"it draws squares, and these images are {height} x {width}"


def config_of(state: Mapping[str, Tensor], heads: int, side: int) -> dict[str, Any]:
    """transformer/config.json of official weights; latents have `side` pixels."""
    width, channels, p, _ = state["x_embedder.proj.weight"].shape
    return {
        "num_attention_heads": heads,
        "attention_head_dim": width // heads,
        "in_channels": channels,
        "out_channels": len(state["final_layer.linear.weight"]) // p**2,
        "num_layers": block_count(state),
        "patch_size": p,
        "sample_size": side,
        "num_embeds_ada_norm": CLASS_COUNT,
        "activation_fn": "gelu-approximate",
        "norm_type": "ada_norm_zero",
        "norm_elementwise_affine": False,
        "norm_eps": 1e-6,
        "attention_bias": True,
        "upcast_attention": False,
        "dropout": 0.0,
        "norm_num_groups": 32,
    }
