"""DiT-MoE: started from a dense DiT."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from genfound.backbones.dit_moe import ROUTER_STD


def upcycle(state: Mapping[str, Tensor], experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of a model of many experts from those of the same model with one (upcycle.py), both in our names.

    Every expert begins as a copy of the one, routers are drawn from N(0, 0.02^2).

    Raises:
        ValueError: the model has no experts, or several. The MLP of a plain DiT (GELU, biases) equals no SwiGLU.
    """
    counts = {len(tensor) for name, tensor in state.items() if name.endswith("mlp.router.weight")}
    if counts != {1}:
        found = f"blocks of {min(counts)} experts" if counts else "no experts, and a GELU MLP cannot become a SwiGLU"
        raise ValueError(f"upcycling begins with a DiT-MoE of one expert (model.experts=1); this one has {found}")
    new = dict(state)
    for name, tensor in state.items():
        if name.endswith("mlp.router.weight"):
            new[name] = torch.randn(experts, tensor.shape[1], generator=generator) * ROUTER_STD
        elif ".mlp.experts." in name:
            new[name] = tensor.repeat(experts, 1, 1)
    return new
