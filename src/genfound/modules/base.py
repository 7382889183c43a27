"""GenerativeModule: training and validation of any backbone under any objective.

Validation is at fixed times and noise. `val/loss` is the objective's own loss; `val/velocity_mse` compares objectives,
see `Objective.velocity_error`: the mean over images at times uniform on `TIMES`, without any weight. Noise and times
of an image depend on its place among the held-out images alone, so both are the same for any packing, layout and
number of ranks.
"""

import importlib
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import lightning
import torch
from torch import Tensor, nn

from genfound import build
from genfound.alignment import Alignment
from genfound.backbones.base import Backbone
from genfound.batch import Batch
from genfound.config import compose
from genfound.data.packing.batch_plan import MicroBatch
from genfound.data.packing.loader import HeldOut
from genfound.layers.float64 import double, float64_device
from genfound.modules.muon import Muon
from genfound.objectives.base import Losses, Objective
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from genfound.runtime import fsdp

TrainItem = tuple[Batch, MicroBatch]
Named = list[tuple[str, nn.Parameter]]

TIMES = (0.02, 0.98)
"""Ends of the times of the velocity error: every published process has these ratios of noise to signal."""

GOLDEN = (5**0.5 - 1) / 2


class GenerativeModule(lightning.LightningModule):
    """Trains a backbone.

    All randomness of a micro-batch is a function of (seed, number of the micro-batch), and the loss of a
    global step is sum(w_i l_i) / sum(w_i) over all its images, wherever they are computed. Ranks and accumulated
    micro-batches are those of the trainer.

    A family overrides what only it knows: `parameter_groups`, `extra_losses`, `diagnostics`, `starting_weights`.

    Args:
        net: backbone.
        objective: its loss.
        optimizer: lr, betas, eps, weight_decay, schedule, warmup_images, clip, trainable; Muon's matrices, ...
        label_drop: probability of the null label, per image.
        seed: seed of the run.
        budget: images of the run; the end of a cosine schedule.
        alignment: to the features of a teacher, which are in the batches.
    """

    backbone: type[Backbone] = Backbone

    def __init__(
        self,
        net: Backbone,
        objective: Objective,
        optimizer: Mapping[str, Any],
        label_drop: float,
        seed: int,
        budget: int,
        alignment: Alignment | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        if trainable := optimizer.get("trainable"):
            train_only(net, trainable)
        self.alignment = alignment
        self.objective = objective
        self.settings = optimizer
        self.label_drop = label_drop
        self.seed = seed
        self.budget = budget
        self.loss_scale = 1  # Lightning averages over micro-batches and ranks; the loss of a step is a sum
        self.images_seen = 0  # up to the last global step
        self.grad_norm: Tensor | None = None  # of the last global step, before clipping
        self.logs_losses = True  # of each micro-batch; `TrainLog`, which logs averages of steps, turns it off
        self._micro: MicroBatch | None = None

    @classmethod
    def from_config(cls, overrides: Sequence[str] = ()) -> "GenerativeModule":
        """The module of conf/train.yaml with overrides, e.g. `NiTModule.from_config(["model=nit_tiny"])`.

        The groups trainer, callbacks and logger are left to your `lightning.Trainer`.

        Raises:
            ValueError: the configuration does not fit together, or its model is of another family.
        """
        config = compose.compose("train", overrides)
        if config["init_from"]:
            raise ValueError("init_from: call genfound.checkpoints.initialise.initialise(module, path) instead")
        parts = build.build_run(config, 1)
        if not isinstance(parts.net, cls.backbone):
            name = type(parts.net).__name__
            raise ValueError(f"{cls.__name__} trains {cls.backbone.__name__}; this model is {name}: choose model=...")
        return module_of(parts)

    def extra_losses(self) -> dict[str, Tensor]:
        """Named scalars of the last training forward that are added to the loss, once for each global step."""
        return {}

    def diagnostics(self) -> dict[str, Tensor]:
        """Named scalars of the last forward for the loggers."""
        return {}

    def parameter_groups(self) -> Iterable[Any]:
        """Parameters of the optimizer, or groups of them with settings of their own."""
        return self.parameters()

    def trained(self) -> list[tuple[str, nn.Parameter]]:
        """What is trained, by name: the network's parameters, and the projectors' under `alignment.`."""
        named = ((name.removeprefix("net."), p) for name, p in self.named_parameters())
        return [(name, p) for name, p in named if p.requires_grad]

    def starting_weights(self, state: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], list[str]]:
        """Weights of another model, in our names, as this network can start from; remarks for the user."""
        return dict(state), []

    def configure_model(self) -> None:
        """Shard the network where the strategy of the trainer has a mesh of devices; give it values if it has none."""
        if self.device_mesh is not None:
            options = [getattr(self.trainer.strategy, name, None) for name in ("reduce_dtype", "expert_mesh")]
            for part in filter(None, (self.net, self.alignment)):
                fsdp.shard(part, self.device_mesh["data_parallel"], *options)
        if any(p.is_meta for p in self.net.parameters()):  # no process has held all of it
            with self.trainer.strategy.root_device:
                self.net.materialise(Rng(self.seed, "initialise"))

    def on_train_start(self) -> None:
        """Train no more where the budget has been seen; what is done at the end of a run still is."""
        self.trainer.should_stop |= self.images_seen >= self.budget

    def on_fit_start(self) -> None:
        """Take ranks and accumulation from the trainer."""
        self.loss_scale = self.trainer.world_size * self.trainer.accumulate_grad_batches
        self._micro = None

    def training_step(self, item: TrainItem, batch_idx: int) -> dict[str, Any]:
        """`loss`: this micro-batch's part of that of the global step, a scalar; `losses`: of its images."""
        batch, micro = item
        losses = self.evaluate(batch, Rng(self.seed, "train", micro.number))
        weights = image_weight(batch.tokens, self.objective.weight) * batch.real
        loss = (weights * losses.total).sum()
        for value in self.extra_losses().values():
            loss = loss + weights.sum() * value  # each micro-batch's value counts as much as its images do
        loss = loss / micro.weight_sum * self.loss_scale
        if self.logs_losses:
            self.log("train/loss", loss.detach(), prog_bar=True, batch_size=len(micro.indices))
            self.log("images_seen", float(micro.images_seen), batch_size=len(micro.indices))
        return {"loss": loss, "losses": losses}

    def on_validation_epoch_start(self) -> None:
        """Begin at zero."""
        self._validated = self._no_sums()

    def validation_step(self, item: HeldOut, batch_idx: int) -> None:
        """Add a micro-batch of held-out images, see `validation_sums`."""
        self._validated += validation_sums(self.net, self.objective, item)

    def on_validation_epoch_end(self) -> None:
        """Log the metrics of all ranks."""
        self.log_dict(validation_metrics(self._reduced(self._validated)))

    def validate(self) -> dict[str, float]:
        """What `trainer.validate` logs, of the weights as they are, within training or another validation."""
        trainer: Any = self.trainer
        sums = self._no_sums()
        for item in trainer.datamodule.val_dataloader():
            on_device = trainer.strategy.batch_to_device(item)
            with trainer.precision_plugin.val_step_context():
                sums += validation_sums(self.net, self.objective, on_device)
        return validation_metrics(self._reduced(sums))

    def _no_sums(self) -> Tensor:
        return torch.zeros(4, dtype=torch.float64, device=float64_device(self.device))

    def _reduced(self, sums: Tensor) -> Tensor:
        return self.trainer.strategy.reduce(sums, reduce_op="sum")  # type: ignore[return-value]

    def evaluate(self, batch: Batch, rng: Rng) -> Losses:
        """Losses of a batch with the training law of labels, times and noise."""
        if self.label_drop > 0:
            dropped = rng.uniform("label_drop", batch.y.shape, batch.y.device) < self.label_drop
            assert self.net.null_label is not None
            batch = replace(batch, y=batch.y.masked_fill(dropped, self.net.null_label))
        if self.alignment is None:
            return self.objective.loss(self.net, batch, rng)
        with self.alignment.watching(self.net, batch):
            losses = self.objective.loss(self.net, batch, rng)
        return self.alignment.added(losses, batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Fused AdamW over the parameter groups; Muon over the matrices that `optimizer.matrices` names."""
        groups = list(self.parameter_groups())
        if matrices := self.settings.get("matrices"):
            named = parts_of("matrices", [(n, p) for n, p in self.net.named_parameters() if p.ndim == 2], matrices)
            groups = groups if isinstance(groups[0], dict) else [{"params": groups}]
            return Muon(groups, [p for _, p in named], self.settings)
        own, betas = {key: self.settings[key] for key in ("lr", "eps", "weight_decay")}, tuple(self.settings["betas"])
        return torch.optim.AdamW(groups, betas=betas, fused=True, **own)

    def on_train_batch_start(self, item: TrainItem, batch_idx: int) -> None:
        """Set the learning rate of the step from the images seen before it."""
        micro = item[1]
        if self._micro is None or micro.step != self._micro.step:
            # Lightning steps by its own count of micro-batches, and the plan says where a global step begins. They
            # differ after resuming with another number of ranks, or from a checkpoint in the middle of a step.
            count = self.trainer.fit_loop.epoch_loop.batch_progress.current
            count.ready -= (count.ready - 1) % self.trainer.accumulate_grad_batches
        self._micro = micro
        rate = self.settings["lr"] * schedule(self.settings, self.images_seen, self.budget)
        for group in self.optimizers().param_groups:  # type: ignore[union-attr]
            group["lr"] = rate

    def configure_gradient_clipping(self, optimizer: torch.optim.Optimizer, *_: Any, **__: Any) -> None:
        """Measure the norm, clip at `optimizer.clip`, and let the fused step skip itself if it is not finite."""
        limit = self.settings["clip"]
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        self.grad_norm = fsdp.total_norm(p.grad for p in parameters if p.grad is not None)
        if limit is not None:
            fsdp.clip(parameters, limit, self.grad_norm)
        if self.device.type == "mps" and not self.grad_norm.isfinite():  # where fused AdamW may not look at found_inf
            optimizer.zero_grad()
        optimizer.found_inf = (~self.grad_norm.isfinite()).float()  # type: ignore[attr-defined]
        optimizer.grad_scale = None  # type: ignore[attr-defined]

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, *closure: Any) -> None:
        """Finish a global step: free its gradients, count its images, and stop when the budget has been seen."""
        super().optimizer_step(epoch, batch_idx, optimizer, *closure)
        optimizer.zero_grad()
        assert self._micro is not None
        self.images_seen = self._micro.images_seen
        self.trainer.should_stop = self.images_seen >= self.budget

    def optimizer_zero_grad(self, *_: Any) -> None:
        """Nothing: Lightning would free them after the next forward pass, which needs the memory."""

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """The number of images seen, on which data, schedules and budgets depend."""
        checkpoint["images_seen"] = self.images_seen

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Put the number of images seen back; the optimizer's settings are those of the configuration."""
        self.images_seen = checkpoint["images_seen"]
        saved, own = checkpoint["optimizer_states"][0]["param_groups"], self.configure_optimizers().param_groups
        if [len(group["params"]) for group in saved] != [len(group["params"]) for group in own]:
            raise ValueError("optimizer: a run keeps the parameters of Muon and of AdamW; choose another name=...")
        for group, now in zip(saved, own, strict=True):
            group.update({key: value for key, value in now.items() if key not in ("params", "lr")})


def module_of(parts: build.RunComponents) -> GenerativeModule:
    """The module of a run; of the family of its network."""
    config, optimizer = parts.config, {**parts.config["optimizer"], "lr": learning_rate(parts.config)}
    budget = config["budget"]["images"] or optimizer["budget_images"]
    kind, label_drop = module_class(type(parts.net)), config["model"]["label_drop"]
    return kind(parts.net, parts.objective, optimizer, label_drop, config["seed"], budget, parts.alignment)


def module_class(backbone: type[Backbone]) -> type[GenerativeModule]:
    """`<Name>Module` of modules/<file>.py, for a class `<Name>` of backbones/<file>.py or one that it inherits from."""
    for kind in backbone.__mro__:
        package, _, file = kind.__module__.rpartition(".")
        if package == "genfound.backbones" and file != "base" and find_spec(f"genfound.modules.{file}"):
            found = getattr(importlib.import_module(f"genfound.modules.{file}"), f"{kind.__name__}Module", None)
            if found is not None:
                return found  # type: ignore[no-any-return]
    return GenerativeModule


def train_only(net: nn.Module, parts: Sequence[str]) -> None:
    """Freeze every parameter but those with one of these parts in their names."""
    net.requires_grad_(False)
    for _, parameter in parts_of("trainable", list(net.named_parameters()), parts):
        parameter.requires_grad_()


def parts_of(key: str, named: Named, parts: Sequence[str]) -> Named:
    """Those with one of these parts in their names, for a key of `optimizer`."""
    for part in parts:
        if not any(part in name for name, _ in named):
            raise ValueError(f"optimizer.{key}={list(parts)}: no parameter for it has {part} in its name")
    return [(name, parameter) for name, parameter in named if any(part in name for part in parts)]


def schedule(settings: Mapping[str, Any], images_seen: int, budget: int) -> float:
    """Factor of the learning rate: after a warmup `constant`, or down to `min_lr` at the budget.

    `cosine` falls from the end of the warmup on, `linear` to where a straight line from the first image is (LDM).
    A warmup begins as if one image had been seen, or at the factor `warmup_start`.
    """
    kind, warmup, start = settings["schedule"], settings["warmup_images"], settings.get("warmup_start")
    if kind not in ("constant", "cosine", "linear"):
        raise ValueError(f"optimizer.schedule={kind} is unknown; choose constant (after a warmup), cosine or linear")
    if images_seen < warmup:
        if start is None:
            return (images_seen + 1) / (warmup + 1)
        return float(start + (1 - start) * images_seen / warmup)
    if kind == "constant":
        return 1.0
    least = settings.get("min_lr", 0.0)
    lowest = least / settings["lr"] if least else 0.0
    if kind == "linear":
        return lowest + (1 - lowest) * max(1 - images_seen / budget, 0.0)
    progress = min((images_seen - warmup) / max(budget - warmup, 1), 1.0)
    return lowest + (1 - lowest) * 0.5 * (1 + math.cos(math.pi * progress))


def learning_rate(config: Mapping[str, Any]) -> float:
    """`optimizer.lr`, or `base_lr` for each 256 images of a global step, of which packs have one in 256 tokens."""
    settings, batch = config["optimizer"], config["batch"]
    if settings["lr"] is not None:
        return float(settings["lr"])
    if settings.get("base_lr") is None:
        raise ValueError("optimizer.lr is missing; give optimizer.lr=...")
    if config["layout"]["name"] == "dense":
        images = batch["images"] or settings["images_per_step"]
    else:
        packs = batch["packs"]
        images = (packs * config["data"]["max_tokens"] if packs else settings["tokens_per_step"]) / 256
    return float(settings["base_lr"]) * images / 256


def validation_sums(net: Backbone, objective: Objective, item: HeldOut) -> Tensor:
    """(4,) float64 of a micro-batch, zeros if it does not count: weighted losses, weights, velocity errors, images."""
    batch, noise, positions = item.images, item.noise, item.micro.positions
    assert isinstance(batch, Batch) and noise is not None
    part = torch.cat([objective.time_law(Rng(0, "val", k), 1, torch.device("cpu")) for k in positions])
    filler = (0, len(batch.y) - len(positions))
    rows = (torch.nn.functional.pad(v, filler, value=0.5) for v in (part, uniform_times(positions)))
    drawn, times = (v.to(float64_device(batch.x.device)) for v in rows)
    weights = image_weight(batch.tokens, objective.weight) * batch.real
    loss = objective.loss_at(net, batch, drawn, noise).total
    error = objective.velocity_error(net, batch, times, noise)
    sums = (weights * loss, weights, error, batch.real)
    return torch.stack([double(values).sum() for values in sums]) * item.counts


def validation_metrics(sums: Tensor) -> dict[str, float]:
    """The metrics from the sums of all micro-batches of all ranks."""
    loss, error = (sums[::2] / sums[1::2]).tolist()
    return {"val/loss": loss, "val/velocity_mse": error}


def uniform_times(positions: Sequence[int]) -> Tensor:
    """(n,) float64 times, spread evenly over `TIMES` by the multiples of the golden ratio, however many there are."""
    low, high = TIMES
    return low + (high - low) * ((torch.tensor(positions, dtype=torch.float64) + 0.5) * GOLDEN % 1)
