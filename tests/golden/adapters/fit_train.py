"""FiT and FiTv2: steps of the official training on padded rows; the learning rates are those that a fixture remarks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from genfound.backbones.fit import FiT
from genfound.batch import Batch
from genfound.callbacks.ema import Ema
from genfound.data.packing.batch_plan import MicroBatch
from genfound.modules.fit import FiTModule
from genfound.objectives.base import Losses
from genfound.rng import Rng
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.dit import Draws
from tests.golden.adapters.fit import Fixture, by_row, official, to_batch
from tests.golden.adapters.gaussian import respaced
from tests.golden.adapters.sit_transport import flow
from tests.golden.fill import inputs, unit


class Drawn(FiTModule):
    """The training module with the draws of a fixture."""

    draws: Rng

    def evaluate(self, batch: Batch, rng: Rng) -> Losses:
        return super().evaluate(batch, self.draws)


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
    recipe = {"clip": call["max_grad_norm"], **{k: call[k] for k in ("lr", "betas", "eps", "weight_decay")}}
    module = Drawn(net, steps.objective, recipe, steps.network["class_dropout_prob"], 0, 1)
    optimizer: Any = module.configure_optimizers()
    ema, trainer = Ema([call["ema_decay"]]), SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, module)  # type: ignore[arg-type]
    outputs: list[Tensor] = []
    net.register_forward_hook(lambda m, i, out: outputs.append(out.detach()))
    found: dict[str, list[Tensor]] = {}
    results: dict[str, Any] = {}
    for step, rate in enumerate(fixture["remarks"]["lr"]):
        optimizer.param_groups[0]["lr"] = rate
        batch, module.draws = steps.of(step)
        out = module.training_step((batch, MicroBatch(step, (), (), 0, 0, float(len(batch.y)), 0)), step)
        optimizer.zero_grad()
        out["loss"].backward()
        if step == 0:
            gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
            results |= {f"grad0:{key}": gradients[key].clone() for key in call["report"]}
        module.configure_gradient_clipping(optimizer)
        assert module.grad_norm is not None
        optimizer.step()
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module)  # type: ignore[arg-type]
        terms = steps.terms(out["losses"], outputs[-1], batch, module.draws) | {"grad_norms": module.grad_norm}
        for name, value in terms.items():
            found.setdefault(name, []).append(value.detach())
    for name, state in (("param", dict(net.named_parameters())), ("ema", ema.averages[call["ema_decay"]])):
        results |= {f"{name}:{key}": state[key].detach() for key in call["report"]}
    return results | {name: torch.stack(values) for name, values in found.items()}
