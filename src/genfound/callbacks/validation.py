"""Loss and velocity error on images that are never trained on, at fixed times and noise."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import lightning
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.build import RunComponents
from genfound.callbacks.ema import Ema
from genfound.callbacks.every_n_images import EveryNImages
from genfound.data.packing.batch_plan import MicroBatch
from genfound.data.packing.collate import RawImages
from genfound.data.packing.prefetch import read_ahead
from genfound.loggers.base import log
from genfound.modules.base import GenerativeModule
from genfound.objectives.base import Objective
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng

TIMES = (0.02, 0.98)
"""Ends of the times of the velocity error: every published process has these ratios of noise to signal."""

GOLDEN = (5**0.5 - 1) / 2


class Validation(EveryNImages):
    """`val/loss` and `val/velocity_mse` of the live weights, and with the suffix `_ema` of the average.

    `val/loss` is the objective's own loss; `val/velocity_mse` compares objectives, see `Objective.velocity_error`:
    the mean over images at times uniform on `TIMES`, without any weight. Noise and times of an image depend on its
    place among the held-out images alone, so both are the same for any packing, layout and number of ranks.

    Args:
        every: images between two evaluations.
        images: how many held-out images; their micro-batches are shared out over the ranks.
        parts: of the run.
        ema: holds the average.
    """

    def __init__(self, every: int, images: int, parts: RunComponents, ema: Ema) -> None:
        super().__init__(every)
        self.ema = ema
        self.assembly = parts.validation_assembly
        self.batches = parts.batches(parts.held_out, self.assembly)
        self.micros = parts.validation(images) if len(parts.held_out.labels) else []
        self.workers = parts.workers

    def on_interval(self, trainer: lightning.Trainer, module: GenerativeModule) -> None:
        """The four figures, reduced over ranks."""
        if not self.micros:
            return
        sums = self.sums(module, trainer.precision_plugin.forward_context, trainer.global_rank, trainer.world_size)
        total = trainer.strategy.reduce(sums, reduce_op="sum")
        assert isinstance(total, Tensor)
        log(trainer, {"images_seen": module.images_seen, **self.figures(total)})

    def figures(self, sums: Tensor) -> dict[str, float]:
        """The metrics from the sums of all ranks."""
        step = self.micros[0]
        names = ("val/loss", "val/velocity_mse", "val/loss_ema", "val/velocity_mse_ema")
        means = sums / sums.new_tensor([step.weight_sum, step.images_seen])
        return dict(zip(names, means.flatten().tolist(), strict=True))

    @torch.no_grad()
    def sums(
        self, module: GenerativeModule, context: Callable[[], AbstractContextManager[None]], rank: int, ranks: int
    ) -> Tensor:
        """(2, 2) float64 of this rank's images: weighted losses and velocity errors, of live weights and average."""
        module.eval()
        totals = torch.zeros(2, 2, dtype=torch.float64, device=module.device)
        for images, micro in read_ahead(self.batches, self.micros[rank::ranks], self.workers):
            encoded = self.assembly(images, micro.positions, module.device) if isinstance(images, RawImages) else images
            batch = encoded.to(module.device)
            part, times, noise = self._draws(batch, micro, module.objective)
            weights = image_weight(batch.tokens, module.objective.weight) * batch.real
            swaps: tuple[AbstractContextManager[None], ...] = (nullcontext(), self.ema.ema_weights(module))
            for i, swapped in enumerate(swaps):
                with swapped, context():
                    loss = module.objective.loss_at(module.net, batch, part, noise).total
                    error = module.objective.velocity_error(module.net, batch, times, noise)
                totals[i] += torch.stack([(weights * loss).double().sum(), error.double().sum()])
        module.train()
        return totals

    def _draws(self, batch: Batch, micro: MicroBatch, objective: Objective) -> tuple[Tensor, Tensor, Tensor]:
        """(B,) draws of the time law, (B,) times of the velocity error, and noise shaped like the batch."""
        layout, cpu = self.assembly.layout, torch.device("cpu")
        streams = [Rng(0, "val", k) for k in micro.positions]
        shapes = [latent.shape for latent in layout.to_latents(batch.x, batch)]
        drawn = [stream.normal("noise", shape) for stream, shape in zip(streams, shapes, strict=True)]
        noise = layout.to_batch(drawn, torch.zeros(len(drawn), dtype=torch.long)).x
        part = torch.cat([objective.time_law(stream, 1, cpu) for stream in streams])
        filler = (0, len(batch.y) - len(streams))
        rows = (torch.nn.functional.pad(v, filler, value=0.5) for v in (part, uniform_times(micro.positions)))
        return (*(v.to(batch.x.device) for v in rows), noise.to(batch.x.device))  # type: ignore[return-value]


def uniform_times(positions: Sequence[int]) -> Tensor:
    """(n,) float64 times, spread evenly over `TIMES` by the multiples of the golden ratio, however many there are."""
    low, high = TIMES
    return low + (high - low) * ((torch.tensor(positions, dtype=torch.float64) + 0.5) * GOLDEN % 1)
