"""Training curves: loss, loss by time, gradient norm, speed; nothing waits for the device between two lines."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import lightning
import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.callbacks.speed import Speed
from genfound.data.loader import Item, TrainLoader
from genfound.module import GenerativeModule
from genfound.objectives.weighting import image_weight
from genfound.reporting.sinks import Sink

BINS = 4
USUAL = 5.0
"""Mean and standard deviation of normalised latents are within this, and its inverse."""


class Metrics(lightning.Callback):
    """Averages over `every` steps and hands them to the sinks on rank 0.

    Args:
        sinks: where the numbers go.
        every: steps between two lines.
        loader: knows how long training waited for data.
    """

    def __init__(self, sinks: Sequence[Sink], every: int, loader: TrainLoader) -> None:
        self.sinks = list(sinks)
        self.every = every
        self.speed = Speed(loader)

    def on_train_start(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """Begin an empty window."""
        assert isinstance(module, GenerativeModule)
        self._logged = trainer.global_step
        self._clear(module)
        self.speed.begin()
        self._started = False

    def _clear(self, module: GenerativeModule) -> None:
        self._loss = torch.zeros((), device=module.device)
        self._bins = torch.zeros(2, BINS, device=module.device)  # summed loss, number of images
        self._named: dict[str, Tensor] = {}  # parts of the loss, and what the network adds to it

    def on_train_batch_start(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, batch: Item, batch_idx: int
    ) -> None:
        """Look at the first micro-batch, and measure the machine; neither is part of the training."""
        if self._started:
            return
        self._started = True
        assert isinstance(module, GenerativeModule) and isinstance(batch[0], Batch)
        with self.speed.paused(module.device):
            remarks = [first_batch(batch[0]), self.speed.calibrate(module)]
            for sink in self.sinks:
                for remark in filter(None, remarks):
                    sink.note(remark)

    def on_train_batch_end(
        self, trainer: lightning.Trainer, module: lightning.LightningModule, outputs: Any, batch: Item, batch_idx: int
    ) -> None:
        """Add a micro-batch; write a line after `every` steps."""
        assert isinstance(module, GenerativeModule) and module.losses is not None
        losses, (images, micro) = module.losses, batch
        assert isinstance(images, Batch)
        weights = image_weight(images.tokens, module.objective.weight) * images.real
        self._loss += (weights * losses.total.detach()).sum() / micro.step_weight
        self._add_named({name: (weights * term).sum() / micro.step_weight for name, term in losses.terms.items()})
        self._add_named({name: value / module.share for name, value in module.net.extra_losses().items()})
        low, high = module.objective.time_range
        index = ((losses.t.float() - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
        for row, value in enumerate((losses.total.detach() * images.real, images.real.float())):
            self._bins[row].index_add_(0, index, value.float())
        self.speed.add(micro, images)
        if trainer.global_step >= self._logged + self.every:
            self._write(trainer, module)

    def _add_named(self, values: Mapping[str, Tensor]) -> None:
        for name, value in values.items():
            self._named[name] = self._named.get(name, 0.0) + value.detach().float()

    def on_train_end(self, trainer: lightning.Trainer, module: lightning.LightningModule) -> None:
        """The last, shorter window."""
        assert isinstance(module, GenerativeModule)
        if trainer.global_step > self._logged:
            self._write(trainer, module)

    def _write(self, trainer: lightning.Trainer, module: GenerativeModule) -> None:
        steps = trainer.global_step - self._logged
        said = {name: value / trainer.world_size for name, value in module.net.diagnostics().items()}
        averaged = {name: value / steps for name, value in {"loss": self._loss, **self._named}.items()}
        named = torch.stack([value.float() for value in (*averaged.values(), *said.values())])
        packed = torch.cat([named, self._bins.flatten(), self.speed.sums(module)])
        total = trainer.strategy.reduce(packed, reduce_op="sum")
        assert isinstance(total, Tensor) and module.grad_norm is not None
        of_loss, sums, counts, speed = total.split([len(named), BINS, BINS, len(total) - len(named) - 2 * BINS])
        names = (*averaged, *said)
        metrics: dict[str, float] = {"images_seen": module.images_seen}
        metrics |= {f"train/{name}": value for name, value in zip(names, of_loss.tolist(), strict=True)}
        for i, (value, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            if count:
                metrics[f"train/loss_t/{i / BINS:.2f}-{(i + 1) / BINS:.2f}"] = value / count
        metrics["train/grad_norm"] = float(module.grad_norm)
        metrics["train/lr"] = module.trainer.optimizers[0].param_groups[0]["lr"]
        metrics |= self.speed.metrics(speed.tolist(), trainer.world_size)
        for sink in self.sinks:
            sink.log(metrics, trainer.global_step)
        self._logged = trainer.global_step
        self._clear(module)


def first_batch(batch: Batch) -> str:
    """What a wrongly scaled latent would show: mean and standard deviation of the first batch.

    Raises:
        ValueError: latents that are not finite.
    """
    real = batch.expand(batch.real.float()).expand_as(batch.x).bool()
    if batch.mask is not None:
        real = real & batch.mask[..., None]
    mean, std = batch.x[real].mean().item(), batch.x[real].std().item()
    if not math.isfinite(mean) or not math.isfinite(std):
        raise ValueError(f"the latents of the first batch are not finite (mean {mean}, std {std}); check data.root")
    odd = "" if abs(mean) < USUAL and 1 / USUAL < std < USUAL else "; warning: normalised latents are near 0 and 1"
    return f"first batch: {int(batch.real.sum())} images, latents of mean {mean:.3f} and std {std:.3f}{odd}"
