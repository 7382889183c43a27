"""DiT-MoE's released checkpoints: experts and options (github.com/feizc/DiT-MoE, models.py)."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from genfound.checkpoints.official import dit


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
    """A state dict of feizc/DiT-MoE with stacked experts and the shapes of `dit`; unknown names stay as they are."""
    if "blocks.0.moe.gate.weight" not in state:
        raise ValueError("this is no state dict of DiT-MoE: it has no router blocks.0.moe.gate.weight")
    return dit.from_official(stack_experts(state))


def to_official(state: Mapping[str, Tensor], patch_size: int, grid: tuple[int, int]) -> dict[str, Tensor]:
    """The inverse of `from_official`; the experts are views of the stacked weights."""
    return unstack_experts(dit.to_official(state, patch_size, grid))


def stack_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the experts of every block stacked, the rest as it is."""
    rest = dict(state)
    for i in range(dit.block_count(state)):
        experts = range(len(state[f"blocks.{i}.moe.gate.weight"]))
        for name, parts in (("gate_up", ("gate", "up")), ("down", ("down",))):
            keys = [f"blocks.{i}.moe.experts.{e}.{part}_proj.weight" for e in experts for part in parts]
            missing = [key for key in keys if key not in rest]
            if missing:
                raise ValueError(f"these weights of DiT-MoE lack {missing[0]}")
            stacked = torch.cat([rest.pop(key) for key in keys])
            rest[f"blocks.{i}.moe.experts.{name}"] = stacked.unflatten(0, (len(experts), -1))
    return rest


def unstack_experts(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `stack_experts`: its experts are views of the stacked weights."""
    rest = dict(state)
    for i in range(dit.block_count(state)):
        gate_up, down = (rest.pop(f"blocks.{i}.moe.experts.{name}") for name in ("gate_up", "down"))
        for e, (enter, leave) in enumerate(zip(gate_up.unbind(), down.unbind(), strict=True)):
            for part, tensor in zip(("gate", "up", "down"), (*enter.chunk(2), leave), strict=True):
                rest[f"blocks.{i}.moe.experts.{e}.{part}_proj.weight"] = tensor
    return rest
