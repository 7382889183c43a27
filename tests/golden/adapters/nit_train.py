"""NiT: steps of the official training, with its alignment to a teacher as a loss that comes with the network."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from genfound.backbones.base import Backbone
from genfound.batch import Batch
from genfound.callbacks.ema import Ema
from genfound.checkpoints.official.nit import to_official
from genfound.data.packing.batch_plan import MicroBatch
from genfound.modules.base import GenerativeModule
from genfound.objectives.base import Losses
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.nit import Fixture, Official, to_batch
from tests.golden.adapters.nit_flow import NamedDraws, flow
from tests.golden.fill import inputs, unit


class Aligned(Backbone):
    """The backbone and the projector of its alignment loss, whose features are set before each call."""

    def __init__(self, official: Official, weight: float) -> None:
        super().__init__()
        self.official, self.weight = official, weight
        self.null_label, self.token_spec = official.net.null_label, official.net.token_spec
        self.features = self.projection = torch.empty(0)

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        with self.official.watched():
            out: Tensor = self.official.net(batch, t)
        self.projection = 1 - nn.functional.cosine_similarity(self.official.zs(), self.features, dim=-1).mean()
        return out


class Drawn(GenerativeModule):
    """The training module with the draws of a fixture."""

    draws: Rng
    net: Aligned

    def extra_losses(self) -> dict[str, Tensor]:
        return {"projection": self.net.weight * self.net.projection}

    def evaluate(self, batch: Batch, rng: Rng) -> Losses:
        return super().evaluate(batch, self.draws)


def outwards(net: Aligned, state: dict[str, Tensor], name: str) -> dict[str, Tensor]:
    """Weights under official names."""
    own = {key.removeprefix("official.net."): value for key, value in state.items() if "official.net." in key}
    aligned = {key.replace("official.align.", "projector."): value for key, value in state.items() if "align" in key}
    both = to_official(own, net.token_spec.patch_size) | aligned
    return {f"{name}.{key}": value.detach().clone() for key, value in both.items()}


@adapter("nit", "nit_train")
def train(fixture: Fixture) -> Results:
    """Losses, gradient norms, and weights and their average after some optimizer steps."""
    config, given = dict(fixture["config"]), inputs(fixture)
    official = Official(fixture, config.pop("network"))
    net = Aligned(official, config.pop("proj_coeff")).train()
    recipe = config.pop("optimizer") | {"clip": config.pop("max_grad_norm")}
    objective = flow(config.pop("transport"), directional=float(fixture["options"].get("use_dir_loss", True)))
    ema = Ema([config.pop("ema_decay")])
    if config:
        raise NotImplementedError(f"unknown arguments {sorted(config)}")
    module = Drawn(net, objective, recipe, label_drop=0.0, seed=0, budget=1)
    optimizer: Any = module.configure_optimizers()
    trainer: Any = SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, module)
    losses, projections, norms = [], [], []
    for step in range(fixture["options"]["steps"]):
        latent, sizes = given[f"latent.{step}"], given[f"hw_list.{step}"].tolist()
        batch = to_batch(latent, sizes, given[f"y.{step}"])
        noise = torch.from_numpy(unit(f"noise.{2 * step}", latent.shape)).flatten(1)
        time = torch.from_numpy(unit(f"noise.{2 * step + 1}", [len(sizes)]))
        net.features, module.draws = given[f"z.{step}"], NamedDraws({"noise": noise, "time": time})
        weight = float(image_weight(batch.tokens, objective.weight).sum())
        loss = module.training_step((batch, MicroBatch(step, (), (), 0, 0, weight, 0)), step)["loss"]
        optimizer.zero_grad()
        loss.backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module, None, None, step)
        losses.append(loss.detach() - net.weight * net.projection.detach())
        projections.append(net.projection.detach())
        norms.append(module.grad_norm)
    results: dict[str, Any] = {"loss": torch.stack(losses), "proj_loss": torch.stack(projections)}
    results["grad_norm_before_clip"] = torch.stack([norm for norm in norms if norm is not None])
    (average,) = ema.averages.values()
    return results | outwards(net, dict(net.named_parameters()), "model") | outwards(net, average, "ema")
