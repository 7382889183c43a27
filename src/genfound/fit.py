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

from genfound import build, checkpoints, paths
from genfound.callbacks.ema import Ema
from genfound.callbacks.evaluation import Evaluation
from genfound.callbacks.metrics import Metrics
from genfound.callbacks.nonfinite import NonFinite
from genfound.callbacks.preview import Preview
from genfound.callbacks.saving import AtomicCheckpointIO, Saving
from genfound.callbacks.validation import Validation
from genfound.data.loader import TrainLoader
from genfound.data.plan import Micro
from genfound.loading import initialise
from genfound.module import GenerativeModule
from genfound.reporting.provenance import provenance
from genfound.reporting.sinks import JsonLines, Sink
from genfound.reporting.terminal import Terminal
from genfound.sampling import Request, Sampling

LABELS_IN_PREVIEW = 10


def fit(folder: Path) -> None:
    """Train the run of a directory, continuing from its newest checkpoint.

    Raises:
        ValueError: the configuration does not fit together, or not the data of the run.
        FloatingPointError: too many steps in a row were not finite.
    """
    ranks, rank = int(os.environ.get("WORLD_SIZE", "1")), int(os.environ.get("RANK", "0"))
    _quiet_lightning()
    config = paths.read_config(folder)
    build.device_of(config["trainer"]["accelerator"], int(os.environ.get("LOCAL_RANK", "0")) if ranks > 1 else 0)
    parts = build.parts(config, ranks)
    newest = checkpoints.newest(folder / "checkpoints")
    start = {"global_step": 0, "images_seen": 0} if newest is None else checkpoints.read(newest)
    budget = config["budget"]["images"] or config["optimizer"]["budget_images"]
    if rank == 0:
        print("\n".join([*parts.report(), f"continuing from {newest}" if newest else "starting from step 0"]))
    if start["images_seen"] >= budget or start["global_step"] >= (config["trainer"]["max_steps"] or np.inf):
        if rank == 0:
            print(f"{folder} has reached its end: {start['images_seen']:,} images in {start['global_step']:,} steps")
            _mark_done(folder, start["images_seen"], start["global_step"])
        return

    module = _module(parts, budget, rank, new=newest is None)
    sinks = _sinks(folder, config, budget, start) if rank == 0 else []
    loader = parts.loader(rank)
    trainer = _trainer(folder, parts, _callbacks(folder, parts, loader, sinks))
    try:
        trainer.fit(module, loader, ckpt_path=newest, weights_only=True)
    finally:
        for sink in sinks:
            sink.close()
    if trainer.interrupted:
        raise KeyboardInterrupt
    if rank == 0:
        _mark_done(folder, module.images_seen, trainer.global_step)
        print(f"done: {module.images_seen:,} images in {trainer.global_step:,} steps; everything is in {folder}")


def _module(parts: build.Parts, budget: int, rank: int, new: bool) -> GenerativeModule:
    """What Lightning trains; a new run starts from the weights of `init_from`."""
    config = parts.config
    if new and config["init_from"]:
        remarks = initialise(parts.net, Path(config["init_from"]))
        if rank == 0:
            print("\n".join(remarks), flush=True)
    if config["trainer"]["compile"]:
        parts.net.compile_blocks()
    return GenerativeModule(
        parts.net,
        parts.objective,
        config["optimizer"],
        config["model"]["label_drop"],
        config["seed"],
        budget,
        parts.micro_batches,
        parts.ranks,
        parts.assembly,
    )


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


def validation_micros(parts: build.Parts, wanted: int) -> list[Micro]:
    """Micro-batches that hold the first `wanted` held-out images of a fixed order; independent of the ranks."""
    micros: list[Micro] = []
    for step in parts.held_out_plan.steps():
        micros += step
        if sum(len(m.indices) for m in micros) >= min(wanted, len(parts.held_out.labels)):
            break
    return micros


def _callbacks(
    folder: Path, parts: build.Parts, loader: TrainLoader, sinks: Sequence[Sink]
) -> list[lightning.Callback]:
    """In the order in which they act after a step: average, measure, judge, evaluate, draw, save."""
    settings, names = parts.config["trainer"], parts.images.class_names
    decays = parts.config["ema"]["decays"]
    ema = Ema([parts.config["optimizer"]["ema_decay"]] if decays is None else decays)
    metrics = Metrics(sinks, settings["log_every"], loader)
    nonfinite = NonFinite(folder / "nonfinite.jsonl", settings["log_every"], settings["nonfinite_limit"])
    sizes = typical_sizes(parts.images.sizes)
    batch = parts.config["sample"]["batch"]
    sampling = Sampling.of(parts.config, parts.objective, parts.tokenizer, parts.device, batch, settings["precision"])
    sampling.check(parts.net)
    requests = preview_requests(names, sizes)
    facts = {"class_names": names, "sizes": sizes, "fingerprint": parts.images.fingerprint}
    validation: list[lightning.Callback] = []
    if len(parts.held_out.labels):
        batches = parts.batches(parts.held_out)
        micros = validation_micros(parts, settings["val_images"])
        validation = [Validation(batches, micros, settings["val_every"], ema, metrics, parts.workers)]
    evaluation = [Evaluation(folder, parts, ema, metrics)] if settings["eval_every"] else []
    return [
        ema,
        metrics,
        nonfinite,
        *validation,
        *evaluation,
        Preview(folder / "samples", settings["preview_every"], sampling, requests, names, ema, metrics),
        Saving(folder / "checkpoints", settings["checkpoint_every"], settings["keep"], loader, facts),
    ]


def _trainer(folder: Path, parts: build.Parts, callbacks: list[lightning.Callback]) -> lightning.Trainer:
    settings = parts.config["trainer"]
    return lightning.Trainer(
        accelerator="gpu" if parts.device.type == "cuda" else "cpu",
        devices=settings["devices"],
        strategy="ddp" if parts.ranks > 1 else "auto",
        precision=build.precision(settings["precision"], parts.device),  # type: ignore[arg-type]
        max_steps=settings["max_steps"] or -1,
        max_epochs=-1,
        accumulate_grad_batches=parts.micro_batches,
        deterministic=settings["deterministic"],
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


def _mark_done(folder: Path, images: int, steps: int) -> None:
    paths.mark_done(folder, {"images": images, "steps": steps, "loss": _last_loss(folder)})


def _last_loss(folder: Path) -> float | None:
    lines = (json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines())
    losses = [line["train/loss"] for line in lines if "train/loss" in line]
    return round(losses[-1], 5) if losses and losses[-1] is not None else None


def _quiet_lightning() -> None:
    """Lightning's hints speak of its own loops and loaders, which this project replaces."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
