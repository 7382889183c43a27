"""Loss on images that are never trained on, at fixed times and noise."""

from __future__ import annotations

from collections.abc import Sequence

import lightning
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.callbacks.ema import Ema
from genfound.callbacks.metrics import Metrics
from genfound.callbacks.periodic import Periodic
from genfound.data.loader import MicroBatches
from genfound.data.plan import Micro
from genfound.module import GenerativeModule
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng


class Validation(Periodic):
    """`val/loss` of the live weights and `val/loss_ema` of the average.

    The same images meet the same times and noise every time, so that two values differ only by the weights.

    Args:
        batches: reads micro-batches of the held-out images.
        micros: which; shared out over the ranks.
        every: images between two evaluations.
        ema: holds the average.
        metrics: whose sinks receive the result.
    """

    def __init__(self, batches: MicroBatches, micros: Sequence[Micro], every: int, ema: Ema, metrics: Metrics) -> None:
        super().__init__(every)
        self.batches = batches
        self.micros = micros
        self.ema = ema
        self.metrics = metrics

    def act(self, trainer: lightning.Trainer, module: GenerativeModule) -> None:
        """Both losses, reduced over ranks, to the sinks."""
        metrics = {"images_seen": module.images_seen, "val/loss": self._loss(trainer, module)}
        with self.ema.swapped(module):
            metrics["val/loss_ema"] = self._loss(trainer, module)
        for sink in self.metrics.sinks:
            sink.log(metrics, trainer.global_step)

    @torch.no_grad()
    def _loss(self, trainer: lightning.Trainer, module: GenerativeModule) -> float:
        module.eval()
        sums = torch.zeros(2, device=module.device, dtype=torch.float64)
        for micro in self.micros[trainer.global_rank :: trainer.world_size]:
            batch = module.transfer_batch_to_device(self.batches[micro], module.device, 0)[0]
            assert isinstance(batch, Batch)
            with trainer.precision_plugin.forward_context():
                losses = module.objective.loss(module.net, batch, Rng(0, "val", micro.number))
            weights = image_weight(batch.tokens, module.objective.weight) * batch.real
            sums += torch.stack([(weights * losses.total).sum(), weights.sum()]).double()
        module.train()
        total = trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        return float(total[0] / total[1])
