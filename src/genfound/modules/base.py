"""GenerativeModule: one training step of any backbone under any objective."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from genfound.backbones.base import Backbone
from genfound.batch import Batch
from genfound.data.packing.batch_plan import MicroBatch
from genfound.data.packing.collate import Collate, RawImages
from genfound.data.packing.loader import Item
from genfound.objectives.base import Losses, Objective
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from genfound.runtime.stopwatch import Stopwatch


class GenerativeModule(lightning.LightningModule):
    """Trains a backbone.

    All randomness of a micro-batch is a function of (seed, number of the micro-batch), and the loss of a
    global step is sum(w_i l_i) / sum(w_i) over all its images, wherever they are computed.

    Args:
        net: backbone.
        objective: its loss.
        optimizer: lr, betas, eps, weight_decay, schedule, warmup_images, clip, trainable.
        label_drop: probability of the null label, per image.
        seed: seed of the run.
        budget: images of the run; the end of a cosine schedule.
        micro_batches: of a global step on this rank.
        ranks: number of ranks.
        assembly: encodes the images that data workers leave to the training device, if they do.
    """

    def __init__(
        self,
        net: Backbone,
        objective: Objective,
        optimizer: Mapping[str, Any],
        label_drop: float,
        seed: int,
        budget: int,
        micro_batches: int,
        ranks: int,
        assembly: Collate | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        if trainable := optimizer.get("trainable"):
            for name, parameter in net.named_parameters():
                parameter.requires_grad_(any(part in name for part in trainable))
            if not any(parameter.requires_grad for parameter in net.parameters()):
                raise ValueError(f"optimizer.trainable={trainable}: no parameter has one of these in its name")
        self.objective = objective
        self.settings = optimizer
        self.label_drop = label_drop
        self.seed = seed
        self.budget = budget
        self.loss_scale = micro_batches * ranks  # Lightning averages over both; the loss of a step is a sum
        self.assembly = assembly
        self.encoding = Stopwatch()  # of the tokenizer, in training
        self.images_seen = 0
        self.grad_norm: Tensor | None = None
        self.losses: Losses | None = None
        self.micro: MicroBatch | None = None

    def training_step(self, item: Item, batch_idx: int) -> Tensor:
        """This micro-batch's part of the loss of the global step; a scalar."""
        batch, micro = item
        assert isinstance(batch, Batch)
        self.micro = micro
        self.losses = self.evaluate(batch, Rng(self.seed, "train", micro.number))
        weights = image_weight(batch.tokens, self.objective.weight) * batch.real
        loss = (weights * self.losses.total).sum()
        for value in self.net.extra_losses().values():
            loss = loss + weights.sum() * value  # each micro-batch's value counts as much as its images do
        return loss / micro.weight_sum * self.loss_scale

    def evaluate(self, batch: Batch, rng: Rng) -> Losses:
        """Losses of a batch with the training law of labels, times and noise."""
        if self.label_drop > 0:
            dropped = rng.uniform("label_drop", batch.y.shape, batch.y.device) < self.label_drop
            assert self.net.null_label is not None
            null = torch.full_like(batch.y, self.net.null_label)
            batch = replace(batch, y=torch.where(dropped, null, batch.y))
        return self.objective.loss(self.net, batch, rng)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Fused AdamW over the backbone's parameter groups."""
        s = self.settings
        return torch.optim.AdamW(
            self.net.param_groups(),
            lr=s["lr"],
            betas=tuple(s["betas"]),
            eps=s["eps"],
            weight_decay=s["weight_decay"],
            fused=True,
        )

    def on_train_batch_start(self, item: Item, batch_idx: int) -> None:
        """Set the learning rate of the step from the images seen before it."""
        rate = self.settings["lr"] * schedule(self.settings, self.images_seen, self.budget)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = rate

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Measure the norm, clip at `optimizer.clip`, and let the fused step skip itself if it is not finite."""
        limit = self.settings["clip"]
        parameters = [p for p in self.net.parameters() if p.grad is not None]
        self.grad_norm = nn.utils.clip_grad_norm_(parameters, float("inf") if limit is None else limit)
        optimizer.found_inf = (~self.grad_norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]

    def transfer_batch_to_device(self, item: Item, device: torch.device, dataloader_idx: int) -> Item:
        """Encode what is not encoded yet; the plan of the micro-batch stays on the host."""
        batch, micro = item
        if isinstance(batch, RawImages):
            assert self.assembly is not None
            with self.encoding.running(device) if self.training else nullcontext():
                return self.assembly(batch, micro.positions, device), micro
        return batch.to(device, non_blocking=True), micro

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Finish a global step: count its images, and stop when the budget has been seen."""
        super().optimizer_step(*args, **kwargs)
        assert self.micro is not None
        self.images_seen = self.micro.images_seen
        self.trainer.should_stop = self.images_seen >= self.budget

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The number of images seen, on which data, schedules and budgets depend."""
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the number of images seen back; the optimizer's settings are those of the configuration."""
        self.images_seen = checkpoint["images_seen"]
        groups = zip(checkpoint["optimizer_states"][0]["param_groups"], self._settings_of_groups(), strict=True)
        for saved, own in groups:
            saved.update(own)

    def _settings_of_groups(self) -> list[dict[str, Any]]:
        names = ("betas", "eps", "weight_decay")
        return [{name: group[name] for name in names} for group in self.configure_optimizers().param_groups]


def schedule(settings: Mapping[str, Any], images_seen: int, budget: int) -> float:
    """Factor of the learning rate: constant, warmup (then constant) or cosine (warmup, then to zero at the budget).

    Raises:
        ValueError: unknown schedule.
    """
    kind, warmup = settings["schedule"], settings["warmup_images"]
    if kind not in ("constant", "warmup", "cosine"):
        raise ValueError(f"optimizer.schedule={kind} is unknown; choose constant, warmup or cosine")
    if kind == "constant":
        return 1.0
    if images_seen < warmup:
        return (images_seen + 1) / (warmup + 1)
    if kind == "warmup":
        return 1.0
    progress = min((images_seen - warmup) / max(budget - warmup, 1), 1.0)
    return 0.5 * (1 + math.cos(math.pi * progress))
