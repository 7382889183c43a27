"""Training curves: loss, loss by time, gradient norm, speed; nothing waits for the device between two lines."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from genfound.batch import Batch
from genfound.callbacks.throughput import Throughput
from genfound.data.packing.loader import Item
from genfound.loggers.base import log, note
from genfound.modules.base import GenerativeModule
from genfound.objectives.weighting import image_weight

BINS = 4
BY_TIME = "by time"
"""(2, BINS) losses of images by their time, and number of images."""

USUAL = 5.0
"""Mean and standard deviation of normalised latents are within this, and its inverse."""


def add_to(sums: dict[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Add values to the sums of their names."""
    for name, value in values.items():
        sums[name] = sums.get(name, 0.0) + value.detach().float()


class TrainLog(Callback):
    """Averages over `trainer.log_every_n_steps` steps and hands them to the loggers.

    A step that the optimizer skips, since its gradient is not finite, is left out as a whole and counted in
    `train/skipped`.
    """

    speed: Throughput

    def setup(self, trainer: Trainer, module: GenerativeModule, stage: str) -> None:
        """Measure the data of the run."""
        self.speed = Throughput(trainer.datamodule)  # type: ignore[attr-defined]

    def on_train_start(self, trainer: Trainer, module: GenerativeModule) -> None:
        """Begin an empty window."""
        module.logs_losses = False
        self._logged = trainer.global_step
        self._clear(module)
        self.speed.begin()
        self._started = False

    def _clear(self, module: GenerativeModule) -> None:
        self._taken = torch.zeros((), device=module.device)  # steps that were not skipped
        self._grad_norm = torch.full((), math.nan, device=module.device)  # of the last of them
        self._window = {BY_TIME: torch.zeros(2, BINS, device=module.device)}
        self._step: dict[str, Tensor] = {}

    def on_train_batch_start(self, trainer: Trainer, module: GenerativeModule, batch: Item, *_: Any) -> None:
        """Look at the first micro-batch, and measure the machine; neither is part of the training."""
        if not self._started:
            self._started = True
            assert isinstance(batch[0], Batch)
            with self.speed.paused(module.device):
                for remark in filter(None, [first_batch(batch[0]), self.speed.calibrate(module)]):
                    note(trainer, remark)

    def on_train_batch_end(
        self, trainer: Trainer, module: GenerativeModule, outputs: Any, batch: Item, *_: Any
    ) -> None:
        """Add a micro-batch to its step, and a whole step to the window; write a line when it is time."""
        losses, (images, micro) = outputs["losses"], batch
        assert isinstance(images, Batch)
        weights = image_weight(images.tokens, module.objective.weight) * images.real
        parts = {"loss": losses.total, **losses.terms}
        add_to(self._step, {name: (weights * part).sum() / micro.weight_sum for name, part in parts.items()})
        add_to(self._step, {name: value / module.loss_scale for name, value in module.extra_losses().items()})
        low, high = module.objective.time_range
        index = ((losses.t.float() - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
        by_time = self._step.setdefault(BY_TIME, torch.zeros(2, BINS, device=module.device))
        own = losses.total - losses.terms.get("alignment", 0.0)  # of the objective
        for row, value in enumerate((own.detach() * images.real, images.real.float())):
            by_time[row].index_add_(0, index, value.float())
        self.speed.add(micro, images)
        if trainer.global_step > micro.step:
            self._end_step(module)
        if trainer.global_step >= self._logged + trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._write(trainer, module)

    def _end_step(self, module: GenerativeModule) -> None:
        """Add the step to the window unless it was skipped, without asking the device."""
        assert module.grad_norm is not None
        norm = module.grad_norm.detach()
        finite = norm.isfinite()
        self._taken += finite
        self._grad_norm = torch.where(finite, norm, self._grad_norm)
        add_to(self._window, {name: torch.where(finite, value, 0.0) for name, value in self._step.items()})
        self._step = {}

    def on_train_end(self, trainer: Trainer, module: GenerativeModule) -> None:
        """The last, shorter window."""
        if trainer.global_step > self._logged:
            self._write(trainer, module)

    def _write(self, trainer: Trainer, module: GenerativeModule) -> None:
        said = {name: value / trainer.world_size for name, value in module.diagnostics().items()}
        by_time = self._window.pop(BY_TIME).flatten()
        averaged = {name: value / self._taken for name, value in self._window.items()}
        named = torch.stack([value.float() for value in (*averaged.values(), *said.values())])
        packed = torch.cat([named, by_time, self.speed.sums(module)])
        total = trainer.strategy.reduce(packed, reduce_op="sum")
        assert isinstance(total, Tensor)
        of_loss, sums, counts, speed = total.split([len(named), BINS, BINS, len(total) - len(named) - 2 * BINS])
        metrics: dict[str, float] = {"images_seen": module.images_seen}
        metrics |= zip((f"train/{name}" for name in (*averaged, *said)), of_loss.tolist(), strict=True)
        for i, (value, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            if count:
                metrics[f"train/loss_t/{i / BINS:.2f}-{(i + 1) / BINS:.2f}"] = value / count
        metrics["train/skipped"] = trainer.global_step - self._logged - int(self._taken)
        metrics["train/grad_norm"] = float(self._grad_norm)
        metrics["train/lr"] = module.trainer.optimizers[0].param_groups[0]["lr"]
        metrics |= self.speed.metrics(speed.tolist(), trainer.world_size)
        log(trainer, metrics)
        self._logged = trainer.global_step
        self._clear(module)


def first_batch(batch: Batch) -> str:
    """What a wrongly scaled latent would show: mean and standard deviation of the first batch."""
    real = batch.expand(batch.real.float()).expand_as(batch.x).bool()
    if batch.mask is not None:
        real = real & batch.mask[..., None]
    mean, std = batch.x[real].mean().item(), batch.x[real].std().item()
    if not math.isfinite(mean) or not math.isfinite(std):
        raise ValueError(f"the latents of the first batch are not finite (mean {mean}, std {std}); check data.root")
    odd = "" if abs(mean) < USUAL and 1 / USUAL < std < USUAL else "; warning: normalised latents are near 0 and 1"
    return f"first batch: {int(batch.real.sum())} images, latents of mean {mean:.3f} and std {std:.3f}{odd}"
