"""DiT-MoE: a loss that keeps the experts balanced, their loads, and a start from a model of one expert."""

from collections.abc import Mapping
from typing import cast

import torch
from torch import Tensor

from genfound.backbones.dit_moe import ROUTER_STD, DiTMoE
from genfound.modules.base import GenerativeModule
from genfound.rng import Rng

ROUTER = "moe.gate.weight"


class DiTMoEModule(GenerativeModule):
    """Trains a DiT-MoE."""

    backbone = DiTMoE

    def extra_losses(self) -> dict[str, Tensor]:
        """`balance`: the weighted balance loss of the last training forward, summed over blocks.

        The released code adds its gradient, not its value, once for each backward pass (models.py:AddAuxiliaryLoss).
        """
        balances = cast(DiTMoE, self.net).balances
        return {} if balances is None else {"balance": balances.sum()}

    def diagnostics(self) -> dict[str, Tensor]:
        """Largest and smallest load of an expert, in each block of the last forward; 1 / E where balanced."""
        loads = cast(DiTMoE, self.net).loads
        if loads is None:
            return {}
        ends = {"max": loads.amax(dim=1), "min": loads.amin(dim=1)}
        places = ((i, name) for i in range(len(loads)) for name in ends)
        return {f"experts/layer{i:02d}/load_{name}": ends[name][i] for i, name in places}

    def starting_weights(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """A model of one expert becomes one of this many, whose routers are drawn from the seed."""
        own = counts(self.net.state_dict())
        if own == counts(state):
            return super().starting_weights(state)
        generator = Rng(self.seed, "upcycle").generator("routers")
        remark = "  every expert begins as a copy of the one in the file; the routers are new"
        return upcycle(state, max(own), generator), [remark]


def counts(state: Mapping[str, Tensor]) -> set[int]:
    """Numbers of experts that the blocks of a model have."""
    return {len(tensor) for name, tensor in state.items() if name.endswith(ROUTER)}


def upcycle(state: Mapping[str, Tensor], experts: int, generator: torch.Generator) -> dict[str, Tensor]:
    """Weights of a model of many experts from those of the same model with one (upcycle.py), both in our names.

    Every expert begins as a copy of the one, routers are drawn from N(0, 0.02^2).
    """
    if (found := counts(state)) != {1}:
        what = f"blocks of {min(found)} experts" if found else "no experts, and a GELU MLP cannot become a SwiGLU"
        raise ValueError(f"upcycling begins with a DiT-MoE of one expert (model.experts=1); this one has {what}")
    new = dict(state)
    for name, tensor in state.items():
        if name.endswith(ROUTER):
            new[name] = torch.randn(experts, tensor.shape[1], generator=generator) * ROUTER_STD
        elif ".moe.experts." in name:
            new[name] = tensor.repeat(experts, 1, 1)
    return new
