"""DiT-MoE's released checkpoints: names, stacked experts and options (github.com/feizc/DiT-MoE, models.py)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genfound.checkpoints.official import dit
from genfound.checkpoints.official.dit import block_count


def official_keys(depth: int, qk_norm: bool, shared: bool) -> dict[str, str]:
    """Official name -> our name of every tensor but `pos_embed` and the experts, which are stacked here."""
    names = {a: b for a, b in dit.official_keys(depth).items() if ".mlp." not in b}
    inner = {"moe.gate.weight": "mlp.router.weight"}
    if qk_norm:
        names = {a.replace("attn.qkv", "attn.Wqkv").replace("attn.proj", "attn.out_proj"): b for a, b in names.items()}
        inner |= {key: key for n in "qk" for key in (f"attn.{n}_norm.weight", f"attn.{n}_norm.bias")}
    if shared:
        matrices = {"gate_proj": "fc1_g", "up_proj": "fc1_x", "down_proj": "fc2"}
        inner |= {f"moe.shared_experts.{a}.weight": f"mlp.shared.{b}.weight" for a, b in matrices.items()}
    return names | {f"blocks.{i}.{a}": f"blocks.{i}.{b}" for i in range(depth) for a, b in inner.items()}


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options that an official state dict tells; the heads only where q and k are normalised.

    It does not tell top_k, norm_topk, the balance loss and the probability of label dropout. A label table of n
    rows is taken for n - 1 classes and the null class. Two outputs per channel are taken for a learned variance,
    but with normalised q and k for the unused half of a rectified flow, as they were released.
    """
    first = state["blocks.0.moe.experts.0.gate_proj.weight"]
    options = dit.official_options({**state, "blocks.0.mlp.fc1.weight": first})
    norm, shared = (state.get(f"blocks.0.{name}.weight") for name in ("attn.q_norm", "moe.shared_experts.gate_proj"))
    two = options["learn_sigma"]
    options |= {
        "qk_norm": "none" if norm is None else "layernorm",
        "experts": len(state["blocks.0.moe.gate.weight"]),
        "shared_experts": 0 if shared is None else len(shared) // options["width"],
        "unused_half": two and norm is not None,
        "learn_sigma": two and norm is None,
    }
    return options if norm is None else options | {"heads": options["width"] // len(norm)}


def from_official(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict of feizc/DiT-MoE in our names, with stacked experts; unknown names are left as they are.

    Raises:
        ValueError: it is no state dict of DiT-MoE, an expert is missing, or its position table is not the
            sine-cosine one.
    """
    if "blocks.0.moe.gate.weight" not in state:
        raise ValueError("this is no state dict of DiT-MoE: it has no router blocks.0.moe.gate.weight")
    qk_norm, shared = (f"blocks.0.{name}.weight" in state for name in ("attn.q_norm", "moe.shared_experts.gate_proj"))
    return dit.from_official(stack_experts(state), official_keys(block_count(state), qk_norm, shared))


def to_official(state: Mapping[str, Tensor], patch_size: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The inverse of `from_official`; the experts are views of the stacked weights."""
    depth = block_count(state)
    qk_norm, shared = (f"blocks.0.{name}.weight" in state for name in ("attn.q_norm", "mlp.shared.fc2"))
    official = dit.to_official(state, patch_size, grid, official_keys(depth, qk_norm, shared))
    return official | unstack_experts(state)


def stack_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the official experts of every block stacked under our names, the rest as it is.

    Raises:
        ValueError: the router knows an expert that is missing.
    """
    rest = dict(state)
    for i in range(block_count(state)):
        experts = range(len(state[f"blocks.{i}.moe.gate.weight"]))
        for name, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
            keys = [f"blocks.{i}.moe.experts.{e}.{part}_proj.weight" for e in experts for part in parts]
            missing = [key for key in keys if key not in rest]
            if missing:
                raise ValueError(f"these weights of DiT-MoE lack {missing[0]}")
            stacked = torch.cat([rest.pop(key) for key in keys])
            rest[f"blocks.{i}.mlp.experts.{name}"] = stacked.unflatten(0, (len(experts), -1))
    return rest


def unstack_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The experts of every block, in our names, under their official ones: views of the stacked weights."""
    official = {}
    for i in range(block_count(state)):
        gate_up, down = (state[f"blocks.{i}.mlp.experts.{name}"] for name in ("gate_up", "down"))
        for e, (enter, leave) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
            for part, tensor in zip(("gate", "up", "down"), (*enter.chunk(2), leave), strict=True):
                official[f"blocks.{i}.moe.experts.{e}.{part}_proj.weight"] = tensor
    return official
