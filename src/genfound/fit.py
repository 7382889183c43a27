"""Training one run, from its directory: `config.yaml` in, checkpoints, curves and pictures out."""

from __future__ import annotations

import json
import logging
import os
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
import torch

from genfound import build, checkpoints, paths
from genfound.callbacks.ema import Ema
from genfound.callbacks.metrics import Metrics
from genfound.callbacks.nonfinite import NonFinite
from genfound.callbacks.preview import Preview
from genfound.callbacks.saving import AtomicCheckpointIO, Saving
from genfound.callbacks.validation import Validation
from genfound.data.base import ImageSource
from genfound.data.loader import MicroBatches, TrainLoader
from genfound.data.plan import Micro, Plan
from genfound.module import GenerativeModule
from genfound.reporting.provenance import provenance
from genfound.reporting.sinks import JsonLines, Sink
from genfound.reporting.terminal import Terminal
from genfound.rng import Rng
from genfound.sampling import Request, Sampling

LABELS_IN_PREVIEW = 10


def fit(folder: Path) -> None:
    """Train the run of a directory, continuing from its newest checkpoint.

    Raises:
        ValueError: the configuration does not fit together, or not the data of the run.
        FloatingPointError: too many steps in a row were not finite.
    """
    config = paths.read_config(folder)
    trainer_config = config["trainer"]
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    say = print if rank == 0 else _silent
    _quiet_lightning()
    device = build.device(trainer_config["accelerator"])

    tokenizer = build.tokenizer(config)
    images, held_out = (build.source(config, tokenizer.spec, split) for split in ("train", "val"))
    net = build.net(config, tokenizer.spec, len(images.class_names))
    objective = build.objective(config)
    layout = build.layout(config, net, images, tokenizer.spec)
    plan = build.plan(config, images, tokenizer.spec, objective.weight, ranks, config["seed"])
    workers = config["data"]["num_workers"]
    flips = Rng(config["seed"], "train") if config["data"]["flip"] else None
    loader = TrainLoader(
        MicroBatches(images, tokenizer, layout, flips), plan, rank, ranks, workers, device.type == "cuda"
    )
    micro_batches = plan.per_step // ranks
    budget = config["budget"]["images"] or config["optimizer"]["budget_images"]

    newest = checkpoints.newest(folder / "checkpoints")
    start = {"global_step": 0, "images_seen": 0} if newest is None else checkpoints.read(newest)
    _announce(say, config, images, net, plan, layout, device, ranks, newest)
    if start["images_seen"] >= budget or start["global_step"] >= (trainer_config["max_steps"] or np.inf):
        say(f"{folder} has already reached its end: {start['images_seen']:,} images, {start['global_step']:,} steps")
        return

    module = GenerativeModule(
        net, objective, config["optimizer"], config["model"]["label_drop"], config["seed"], budget, micro_batches, ranks
    )
    if trainer_config["compile"]:
        net.compile()
    sinks = _sinks(folder, config, budget, start) if rank == 0 else []
    ema = Ema(config["ema"]["decays"] or [config["optimizer"]["ema_decay"]])
    metrics = Metrics(sinks, trainer_config["log_every"], loader)
    sizes = typical_sizes(images.sizes)
    facts = {"class_names": images.class_names, "sizes": sizes, "fingerprint": images.fingerprint}
    callbacks: list[lightning.Callback] = [
        ema,
        metrics,
        NonFinite(folder / "nonfinite.jsonl", trainer_config["log_every"], trainer_config["nonfinite_limit"]),
    ]
    if len(held_out.labels):
        batches = MicroBatches(held_out, tokenizer, layout)
        micros = validation_micros(config, held_out, tokenizer.spec, objective.weight, trainer_config["val_images"])
        callbacks.append(Validation(batches, micros, trainer_config["val_every"], ema, metrics))
    requests = preview_requests(images.class_names, sizes)
    sampling = Sampling.of(config, objective, tokenizer, device, config["sample"]["batch"], trainer_config["precision"])
    callbacks += [
        Preview(
            folder / "samples", trainer_config["preview_every"], sampling, requests, images.class_names, ema, metrics
        ),
        Saving(folder / "checkpoints", trainer_config["checkpoint_every"], trainer_config["keep"], loader, facts),
    ]
    trainer = _trainer(config, folder, device, ranks, micro_batches, callbacks)
    try:
        trainer.fit(module, loader, ckpt_path=newest, weights_only=True)
    finally:
        for sink in sinks:
            sink.close()
    if rank == 0:
        if trainer.interrupted:
            raise KeyboardInterrupt
        result = {"images": module.images_seen, "steps": trainer.global_step, "loss": _last_loss(folder)}
        paths.mark_done(folder, result)
        say(f"done: {module.images_seen:,} images in {trainer.global_step:,} steps; everything is in {folder}")


def typical_sizes(sizes: np.ndarray) -> list[tuple[int, int]]:
    """Up to three (height, width): of middle, wide and tall images of a data set."""
    aspect = sizes[:, 1] / sizes[:, 0]
    order = np.lexsort((sizes.prod(axis=1), aspect))
    picks = [sizes[order[int(q * (len(order) - 1))]] for q in (0.5, 0.94, 0.06)]
    return list(dict.fromkeys((int(h), int(w)) for h, w in picks))


def preview_requests(class_names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[Request]:
    """One image of each of the first classes at each size."""
    pairs = [(label, size) for size in sizes for label in range(min(len(class_names), LABELS_IN_PREVIEW))]
    return [Request(label, size, number) for number, (label, size) in enumerate(pairs)]


def validation_micros(config: build.Config, images: ImageSource, spec: Any, weight: str, wanted: int) -> list[Micro]:
    """Micro-batches that hold the first `wanted` held-out images of a fixed order; independent of the ranks."""
    micros: list[Micro] = []
    for step in build.plan(config, images, spec, weight, ranks=1, seed=0).steps():
        micros += step
        if sum(len(m.indices) for m in micros) >= min(wanted, len(images.labels)):
            return micros
    raise AssertionError("a plan has no end")


def _trainer(
    config: build.Config,
    folder: Path,
    device: torch.device,
    ranks: int,
    micro_batches: int,
    callbacks: list[lightning.Callback],
) -> lightning.Trainer:
    return lightning.Trainer(
        accelerator="gpu" if device.type == "cuda" else "cpu",
        devices=config["trainer"]["devices"],
        num_nodes=config["trainer"]["nodes"],
        strategy="ddp" if ranks > 1 else "auto",
        precision=build.precision(config["trainer"]["precision"], device),  # type: ignore[arg-type]
        max_steps=config["trainer"]["max_steps"] or -1,
        max_epochs=-1,
        accumulate_grad_batches=micro_batches,
        deterministic=config["trainer"]["deterministic"],
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO()],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )


def _sinks(folder: Path, config: Mapping[str, Any], budget: int, start: Mapping[str, Any]) -> list[Sink]:
    sinks: list[Sink] = [
        Terminal(budget, start["images_seen"]),
        JsonLines(folder / "metrics.jsonl", start["global_step"]),
    ]
    if config["logger"]["name"] == "wandb":
        from genfound.reporting.dashboard import Dashboard

        sinks.append(Dashboard(folder, {**config, "provenance": provenance()}, config["logger"]["project"]))
    return sinks


def _announce(
    say: Any,
    config: build.Config,
    images: ImageSource,
    net: torch.nn.Module,
    plan: Plan,
    layout: Any,
    device: torch.device,
    ranks: int,
    newest: Path | None,
) -> None:
    """What is about to happen, before it happens."""
    for line in images.report():
        say(line)
    parameters = sum(p.numel() for p in net.parameters())
    precision = build.precision(config["trainer"]["precision"], device)
    say(f"{type(net).__name__}: {parameters:,} parameters, {precision} on {device.type}")
    unit = f"packs of {layout.max_tokens:,} tokens" if layout.name == "packed" else "micro-batches"
    say(f"global step: {plan.per_step} {unit} on {ranks} rank(s), {plan.per_step // ranks} accumulated on each")
    say(f"continuing from {newest}" if newest else "starting from step 0")


def _last_loss(folder: Path) -> float | None:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    return round(losses[-1], 5) if losses and losses[-1] is not None else None


def _quiet_lightning() -> None:
    """Lightning's hints speak of its own loops and loaders, which this project replaces."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


def _silent(*_: Any) -> None:
    """Ranks other than 0 do not speak."""
