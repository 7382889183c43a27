"""FiT and FiTv2: steps of the official training on padded rows; the learning rates are those that a fixture remarks."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from genfound.backbones.fit import FiT
from genfound.batch import Batch
from genfound.modules.fit import FiTModule
from genfound.objectives.base import Losses
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.dit import Draws
from tests.golden.adapters.fit import Fixture, by_row, official, to_batch
from tests.golden.adapters.gaussian import respaced
from tests.golden.adapters.sit_transport import flow
from tests.golden.adapters.training import Drawn, Training
from tests.golden.fill import inputs, unit


class DrawnFiT(Drawn, FiTModule):
    """The training module with the draws of a fixture."""


class Steps:
    """What each step of a fixture is given."""

    def __init__(self, fixture: Fixture) -> None:
        self.given, self.shape = inputs(fixture), fixture["call"]["x_shape"]
        self.network, self.whole = fixture["config"]["network"], "diffusion" in fixture["config"]
        config = fixture["config"]
        self.objective: Any = respaced(config["diffusion"]) if self.whole else self._flow(dict(config["transport"]))

    @staticmethod
    def _flow(transport: dict[str, Any]) -> Any:
        return flow(transport, time={"lognorm": "logit_normal", "uniform": "uniform"}[transport.pop("snr_type")])

    def of(self, step: int) -> tuple[Batch, Draws]:
        real = (self.given["mask"] != 0).float()
        x = by_row(torch.from_numpy(unit(f"input.x.{step}", self.shape)), self.network) * real[..., None]
        batch = to_batch({**self.given, "y": self._turn("y", step)}, x)
        count = 2 if self.whole else 3
        noise, *others = (f"noise.{count * step + k}" for k in range(count))
        drop = torch.from_numpy(unit(others[-1], [len(x)])) / (2 * 3**0.5) + 0.5
        drawn = by_row(torch.from_numpy(unit(noise, self.shape)), self.network)
        if self.whole:
            time = (self._turn("t", step) + 0.5) / len(self.objective.process)
        else:
            time = -torch.from_numpy(unit(others[0], [len(x)]))  # officially times run from noise to data
        return batch, Draws(time=time, noise=drawn, label_drop=drop)

    def _turn(self, name: str, step: int) -> Tensor:
        every = [value for key, value in sorted(self.given.items()) if key.partition(".")[0] == name]
        return every[step % len(every)]

    def terms(self, losses: Losses, out: Tensor, batch: Batch, draws: Draws) -> dict[str, Tensor]:
        """The bound is officially a mean over padding too, where images are 0, over the share of real tokens."""
        if not self.whole:
            return {"losses": losses.total}
        assert batch.mask is not None
        everything, share = replace(batch, mask=torch.ones_like(batch.mask)), batch.mask.float().mean(dim=1)
        bound = self.objective.loss(lambda b, t: out, everything, draws).terms["vb"] / share
        return {"mse": losses.terms["mse"], "vb": bound}


@adapter("fit", "train_steps")
def train(fixture: Fixture) -> Results:
    """Losses, gradient norms, and weights and their average after some optimizer steps."""
    call, steps = fixture["call"], Steps(fixture)
    net: FiT = official(fixture, steps.network).train()
    recipe = {**{k: call[k] for k in ("lr", "betas", "eps", "weight_decay")}, "clip": call["max_grad_norm"],
              "schedule": "constant", "warmup_images": 0}  # fmt: skip
    module = DrawnFiT(net, steps.objective, recipe, steps.network["class_dropout_prob"], 0, 1)
    training, outputs, terms = Training(module, call["ema_decay"]), list[Tensor](), list[dict[str, Tensor]]()
    net.register_forward_hook(lambda m, i, out: outputs.append(out.detach()))
    for step, rate in enumerate(fixture["remarks"]["lr"]):
        batch, draws = steps.of(step)
        losses = training.step(batch, draws, rate)
        terms.append(steps.terms(losses, outputs[-1], batch, draws))
    results = {name: torch.stack([of_step[name].detach() for of_step in terms]) for name in terms[0]}
    results["grad_norms"] = torch.stack(training.norms)
    states = {"grad0": training.gradients, "param": dict(module.named_parameters()), "ema": training.average}
    for name, state in states.items():
        own = {key.removeprefix("net."): value.detach() for key, value in state.items()}
        results |= {f"{name}:{key}": own[key] for key in call["report"]}
    return results
