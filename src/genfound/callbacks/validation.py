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
from genfound.data.workers import read_ahead
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
        workers: processes that read; 0 reads in this one.
    """

    def __init__(
        self, batches: MicroBatches, micros: Sequence[Micro], every: int, ema: Ema, metrics: Metrics, workers: int
    ) -> None:
        super().__init__(every)
        self.batches = batches
        self.micros = micros
        self.ema = ema
        self.metrics = metrics
        self.workers = workers

    @torch.no_grad()
    def act(self, trainer: lightning.Trainer, module: GenerativeModule) -> None:
        """Both losses of each batch, reduced over ranks, to the sinks."""
        module.eval()
        sums = torch.zeros(3, device=module.device, dtype=torch.float64)  # of live weights, of the average, of images
        for item in read_ahead(self.batches, self.micros[trainer.global_rank :: trainer.world_size], self.workers):
            batch, micro = module.transfer_batch_to_device(item, module.device, 0)
            assert isinstance(batch, Batch)
            weights = image_weight(batch.tokens, module.objective.weight) * batch.real
            live = self._loss(trainer, module, batch, micro)
            with self.ema.swapped(module):
                average = self._loss(trainer, module, batch, micro)
            sums += torch.stack([(weights * live).sum(), (weights * average).sum(), weights.sum()]).double()
        module.train()
        total = trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        values = (total[:2] / total[2]).tolist()
        metrics = {"images_seen": module.images_seen, **dict(zip(("val/loss", "val/loss_ema"), values, strict=True))}
        for sink in self.metrics.sinks:
            sink.log(metrics, trainer.global_step)

    def _loss(self, trainer: lightning.Trainer, module: GenerativeModule, batch: Batch, micro: Micro) -> Tensor:
        """(B,) losses of the images of a batch."""
        with trainer.precision_plugin.forward_context():
            return module.objective.loss(module.net, batch, Rng(0, "val", micro.number)).total
