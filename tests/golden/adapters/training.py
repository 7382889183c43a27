"""Steps of training as `lightning.Trainer` takes them, of a module whose draws are those of a fixture."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from torch import Tensor

from genfound.batch import Batch
from genfound.callbacks.ema import Ema
from genfound.data.packing.batch_plan import MicroBatch
from genfound.modules.base import GenerativeModule
from genfound.objectives.base import Losses
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng


class Drawn(GenerativeModule):
    """A training module with the draws of a fixture; comes before the module of a family among the bases of a class."""

    draws: Rng
    logs_losses = False

    def evaluate(self, batch: Batch, rng: Rng) -> Losses:
        """Whatever the number of the micro-batch."""
        return super().evaluate(batch, self.draws)


class Training:
    """The optimizer and the averages of a module, and what its steps leave."""

    def __init__(self, module: Drawn, *decays: float) -> None:
        self.module = module
        self.optimizer: Any = module.configure_optimizers()
        loop = SimpleNamespace(
            epoch_loop=SimpleNamespace(batch_progress=SimpleNamespace(current=SimpleNamespace(ready=1)))
        )
        self.trainer: Any = SimpleNamespace(global_step=0, fit_loop=loop, accumulate_grad_batches=1)
        module.trainer, module.logs_losses = self.trainer, False
        module.optimizers = lambda: self.optimizer  # type: ignore[method-assign,assignment,misc]
        self.ema = Ema(list(decays))
        self.ema.on_train_start(self.trainer, module)
        self.losses: list[Tensor] = []  # of each step
        self.norms: list[Tensor] = []  # of its gradient, before clipping
        self.gradients: dict[str, Tensor] = {}  # of the first step

    def step(self, batch: Batch, draws: Rng, rate: float | None = None) -> Losses:
        """One step on a batch, at the rate of the module's schedule or at a given one; the losses of its images."""
        module, number = self.module, self.trainer.global_step
        weight = float((image_weight(batch.tokens, module.objective.weight) * batch.real).sum())
        item = (batch, MicroBatch(number, (), (), 0, number, weight, 0))
        module.on_train_batch_start(item, number)
        if rate is not None:
            self.optimizer.param_groups[0]["lr"] = rate
        module.draws = draws
        out = module.training_step(item, number)
        self.optimizer.zero_grad()
        out["loss"].backward()
        self.gradients = self.gradients or {
            name: p.grad.clone() for name, p in module.named_parameters() if p.grad is not None
        }
        module.configure_gradient_clipping(self.optimizer)
        assert module.grad_norm is not None
        self.optimizer.step()
        self.trainer.global_step += 1
        self.ema.on_train_batch_end(self.trainer, module)
        self.losses.append(out["loss"].detach())
        self.norms.append(module.grad_norm)
        found: Losses = out["losses"]
        return found

    @property
    def average(self) -> dict[str, Tensor]:
        """The first one."""
        return next(iter(self.ema.averages.values()))
