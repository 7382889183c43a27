"""NiT: steps of the official training, with its alignment to a teacher."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.callbacks.ema import Ema
from genfound.checkpoints.official import projectors
from genfound.checkpoints.official.nit import to_official
from genfound.data.packing.batch_plan import MicroBatch
from genfound.modules.nit import NiTModule
from genfound.objectives.base import Losses
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.nit import Fixture, Official, to_batch
from tests.golden.adapters.nit_flow import NamedDraws, flow
from tests.golden.fill import inputs, unit


class Drawn(NiTModule):
    """The training module with the draws of a fixture."""

    draws: Rng

    def evaluate(self, batch: Batch, rng: Rng) -> Losses:
        return super().evaluate(batch, self.draws)

    def outwards(self, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
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
    recipe = config.pop("optimizer") | {"clip": config.pop("max_grad_norm")}
    objective = flow(config.pop("transport"), directional=float(fixture["options"].get("use_dir_loss", True)))
    ema = Ema([config.pop("ema_decay")])
    if config:
        raise NotImplementedError(f"unknown arguments {sorted(config)}")
    module = Drawn(official.net, objective, recipe, 0.0, seed=0, budget=1, alignment=official.alignment).train()
    optimizer: Any = module.configure_optimizers()
    trainer: Any = SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, module)
    found: dict[str, list[Tensor]] = {"loss": [], "proj_loss": [], "grad_norm_before_clip": []}
    for step in range(fixture["options"]["steps"]):
        latent, sizes = given[f"latent.{step}"], given[f"hw_list.{step}"].tolist()
        batch = replace(to_batch(latent, sizes, given[f"y.{step}"]), features=(given[f"z.{step}"],))
        noise = torch.from_numpy(unit(f"noise.{2 * step}", latent.shape)).flatten(1)
        time = torch.from_numpy(unit(f"noise.{2 * step + 1}", [len(sizes)]))
        module.draws = NamedDraws({"noise": noise, "time": time})
        weights = image_weight(batch.tokens, objective.weight)
        out = module.training_step((batch, MicroBatch(step, (), (), 0, 0, float(weights.sum()), 0)), step)
        optimizer.zero_grad()
        out["loss"].backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module)
        aligned = (weights * out["losses"].terms["alignment"]).sum().detach() / weights.sum()
        found["loss"].append(out["loss"].detach() - aligned)
        found["proj_loss"].append(aligned / official.alignment.weight)
        assert module.grad_norm is not None
        found["grad_norm_before_clip"].append(module.grad_norm)
    results: dict[str, Any] = {name: torch.stack(values) for name, values in found.items()}
    (average,) = ema.averages.values()
    return results | module.outwards(dict(module.named_parameters()), "model") | module.outwards(average, "ema")
