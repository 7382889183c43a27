"""Muon for the matrices inside the blocks and AdamW for everything else, as the one optimizer that Lightning drives."""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from torch import Tensor


class Muon(torch.optim.Optimizer):
    """`torch.optim.Muon` over `matrices`, fused AdamW over the others of `groups`, whose state it shares.

    Muon's updates are scaled to the size of AdamW's (0.2 sqrt(max(rows, columns)), Liu et al. 2025, arXiv 2502.16982),
    so both go by one learning rate and weight decay. Once a step the host reads whether all gradients were finite.
    `settings`: lr and weight_decay of both, momentum and ns_steps of Muon, betas and eps of AdamW.
    """

    found_inf: Tensor | None = None  # (): 1 where a gradient is not finite, and nothing is to change

    def __init__(self, groups: list[dict[str, Any]], matrices: Collection[Tensor], settings: Mapping[str, Any]) -> None:
        chosen, both = set(map(id, matrices)), {key: settings[key] for key in ("lr", "weight_decay")}
        muon = {"adjust_lr_fn": "match_rms_adamw", **{key: settings[key] for key in ("momentum", "ns_steps")}, **both}
        adamw = {"betas": tuple(settings["betas"]), "eps": settings["eps"], **both}
        self.muon = torch.optim.Muon(_divided(groups, chosen, True), **muon)
        self.adamw = torch.optim.AdamW(_divided(groups, chosen, False), fused=True, **adamw)
        super().__init__([*self.muon.param_groups, *self.adamw.param_groups], {})
        self.__setstate__({})

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        count = len(self.muon.param_groups)
        self.muon.param_groups, self.adamw.param_groups = self.param_groups[:count], self.param_groups[count:]
        self.muon.state = self.adamw.state = self.state

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """A step of both, or of neither; what the closure returns."""
        loss = None if closure is None else closure()
        self.adamw.found_inf, self.adamw.grad_scale = self.found_inf, None  # type: ignore[attr-defined]
        self.adamw.step()
        if not self.found_inf:
            self.muon.step()
        return loss


def _divided(groups: list[dict[str, Any]], chosen: set[int], inside: bool) -> list[dict[str, Any]]:
    parts = ({**group, "params": [p for p in group["params"] if (id(p) in chosen) == inside]} for group in groups)
    return [part for part in parts if part["params"]]
