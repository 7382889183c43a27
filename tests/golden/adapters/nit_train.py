"""NiT: steps of the official training, with its alignment to a teacher."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genfound.checkpoints.official import projectors
from genfound.checkpoints.official.nit import to_official
from genfound.modules.nit import NiTModule
from genfound.objectives.weighting import image_weight
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.nit import Fixture, Official, to_batch
from tests.golden.adapters.nit_flow import NamedDraws, flow
from tests.golden.adapters.training import Drawn, Training
from tests.golden.fill import inputs, unit


class DrawnNiT(Drawn, NiTModule):
    """The training module with the draws of a fixture."""

    def outwards(self, state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        """Weights under official names."""
        own = {key.removeprefix("net."): value for key, value in state.items() if "alignment." not in key}
        aligned = {key.removeprefix("alignment."): value for key, value in state.items() if "alignment." in key}
        both = to_official(own, self.net.token_spec.patch_size) | projectors.to_official(aligned, "nit")
        return {f"{name}.{key}": value.detach().clone() for key, value in both.items()}


@adapter("nit", "nit_train")
def train(fixture: Fixture) -> Results:
    """Losses, gradient norms, and weights and their average after some optimizer steps."""
    config, given = dict(fixture["config"]), inputs(fixture)
    official = Official(fixture, config.pop("network"))
    official.alignment.weight = config.pop("proj_coeff")
    recipe = config.pop("optimizer") | {"clip": config.pop("max_grad_norm"), "schedule": "constant", "warmup_images": 0}
    objective = flow(config.pop("transport"), directional=float(fixture["options"].get("use_dir_loss", True)))
    decay = config.pop("ema_decay")
    if config:
        raise NotImplementedError(f"unknown arguments {sorted(config)}")
    module = DrawnNiT(official.net, objective, recipe, 0.0, seed=0, budget=1, alignment=official.alignment).train()
    training, aligned = Training(module, decay), []
    for step in range(fixture["options"]["steps"]):
        latent, sizes = given[f"latent.{step}"], given[f"hw_list.{step}"].tolist()
        batch = replace(to_batch(latent, sizes, given[f"y.{step}"]), features=(given[f"z.{step}"],))
        noise = torch.from_numpy(unit(f"noise.{2 * step}", latent.shape)).flatten(1)
        time = torch.from_numpy(unit(f"noise.{2 * step + 1}", [len(sizes)]))
        losses = training.step(batch, NamedDraws({"noise": noise, "time": time}))
        weights = image_weight(batch.tokens, objective.weight)
        aligned.append((weights * losses.terms["alignment"]).sum().detach() / weights.sum())
    found = torch.stack(aligned)
    results: dict[str, Any] = {
        "loss": torch.stack(training.losses) - found,
        "proj_loss": found / official.alignment.weight,
        "grad_norm_before_clip": torch.stack(training.norms),
    }
    return (
        results | module.outwards(dict(module.named_parameters()), "model") | module.outwards(training.average, "ema")
    )
