"""Training curves: loss, loss by time, gradient norm, speed; nothing waits for the device between two lines."""

import math
from typing import Any

import torch
from lightning import Callback, Trainer
from torch import Tensor

from genfound.batch import Batch
from genfound.callbacks.throughput import Throughput
from genfound.data.packing.batch_plan import MicroBatch
from genfound.data.packing.loader import Item
from genfound.loggers.base import log, note
from genfound.modules.base import GenerativeModule
from genfound.objectives.weighting import image_weight

BINS = 4

USUAL = 5.0
"""Mean and standard deviation of normalised latents are within this, and its inverse."""


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
        self._clear()
        self.speed.begin()
        self._started = False

    def _clear(self) -> None:
        self._micros: list[tuple[MicroBatch, list[Tensor], dict[str, Tensor]]] = []  # of images, and extra losses
        self._norms: dict[int, Tensor] = {}  # of the gradient of each step

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
        """Keep the losses of a micro-batch until a line is written, and write it when it is time."""
        losses, (images, micro) = outputs["losses"], batch
        assert isinstance(images, Batch)
        self._names = ("loss", *losses.terms)
        values = [v.detach() for v in (losses.t, losses.total, *losses.terms.values())]
        extra = {name: value.detach() / module.loss_scale for name, value in module.extra_losses().items()}
        self._micros.append((micro, [images.tokens, images.real, *values], extra))
        self.speed.add(micro, images)
        if trainer.global_step > micro.step:
            assert module.grad_norm is not None
            self._norms[micro.step] = module.grad_norm.detach()
        if trainer.global_step >= self._logged + trainer.log_every_n_steps:  # type: ignore[attr-defined]
            self._write(trainer, module)

    def on_train_end(self, trainer: Trainer, module: GenerativeModule) -> None:
        """The last, shorter window."""
        if trainer.global_step > self._logged:
            self._write(trainer, module)

    def _write(self, trainer: Trainer, module: GenerativeModule) -> None:
        norms = torch.stack([*self._norms.values()])
        taken = norms.isfinite()
        averaged, by_time = self._sums(module, taken)
        said = {name: value / trainer.world_size for name, value in module.diagnostics().items()}
        named = torch.stack([value.float() for value in (*averaged.values(), *said.values())])
        packed = torch.cat([named, by_time.flatten(), self.speed.sums(module)])
        total = trainer.strategy.reduce(packed, reduce_op="sum")
        assert isinstance(total, Tensor)
        of_loss, sums, counts, speed = total.split([len(named), BINS, BINS, len(total) - len(named) - 2 * BINS])
        metrics: dict[str, float] = {"images_seen": module.images_seen}
        metrics |= zip((f"train/{name}" for name in (*averaged, *said)), of_loss.tolist(), strict=True)
        for i, (value, count) in enumerate(zip(sums.tolist(), counts.tolist(), strict=True)):
            if count:
                metrics[f"train/loss_t/{i / BINS:.2f}-{(i + 1) / BINS:.2f}"] = value / count
        metrics["train/skipped"] = int((~taken).sum())
        metrics["train/grad_norm"] = float(norms[taken][-1]) if taken.any() else math.nan
        metrics["train/lr"] = module.trainer.optimizers[0].param_groups[0]["lr"]
        metrics |= self.speed.metrics(speed.tolist(), trainer.world_size)
        log(trainer, metrics)
        self._logged = trainer.global_step
        self._clear()

    def _sums(self, module: GenerativeModule, taken: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        """Of the steps that were taken: averages, and (2, BINS) losses of images by their time and their number."""
        number = {step: place for place, step in enumerate(self._norms)}
        micros = [part for part in self._micros if part[0].step in number]
        of_micros = taken[[number[micro.step] for micro, _, _ in micros]]
        columns = [torch.cat(column).float() for column in zip(*(images for _, images, _ in micros), strict=True)]
        per_micro = torch.tensor([len(images[0]) for _, images, _ in micros], device=taken.device)
        sums = torch.tensor([micro.weight_sum for micro, _, _ in micros], device=taken.device)
        tokens, real, t, *losses = torch.where(of_micros.repeat_interleave(per_micro), torch.stack(columns), 0.0)
        share = image_weight(tokens, module.objective.weight) * real / sums.repeat_interleave(per_micro)
        averaged = {name: (share * value).sum() for name, value in zip(self._names, losses, strict=True)}
        for name in micros[0][2]:
            values = torch.stack([extra[name].float() for _, _, extra in micros])
            averaged[name] = torch.where(of_micros, values, 0.0).sum()
        low, high = module.objective.time_range
        index = ((t - low) / (high - low) * BINS).long().clamp(0, BINS - 1)
        own = losses[0] - (losses[self._names.index("alignment")] if "alignment" in self._names else 0.0)
        by_time = torch.zeros(2, BINS, device=taken.device).index_add_(1, index, torch.stack([own * real, real]))
        return {name: value / taken.sum() for name, value in averaged.items()}, by_time


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
