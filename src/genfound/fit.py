"""Training one run, from its directory: `config.yaml` in, checkpoints, curves and pictures out."""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment

from genfound import build, checkpoints, paths, processes, resuming, targets
from genfound.callbacks.ema import Ema
from genfound.callbacks.evaluation import Evaluation
from genfound.callbacks.metrics import Metrics
from genfound.callbacks.nonfinite import NonFinite
from genfound.callbacks.preview import Preview
from genfound.callbacks.saving import AtomicCheckpointIO, Saving
from genfound.callbacks.validation import Validation
from genfound.data.loader import TrainLoader
from genfound.loading import initialise
from genfound.module import GenerativeModule
from genfound.reporting.provenance import provenance
from genfound.reporting.sinks import Courtesy, JsonLines, Sink, lines_of
from genfound.reporting.terminal import Terminal
from genfound.sampling import Request, Sampling

LABELS_IN_PREVIEW = 10


class OneProcess(LightningEnvironment):
    """Of a process that is alone, whatever the variables of its environment say."""

    creates_processes_externally = False

    def __init__(self) -> None:
        super().__init__()
        self.set_global_rank(0)

    def local_rank(self) -> int:
        """The only one."""
        return 0

    def node_rank(self) -> int:
        """The only one."""
        return 0


def fit(folder: Path, place: processes.Place = processes.ALONE) -> None:
    """Train the run of a directory, continuing from its newest checkpoint.

    Raises:
        ValueError: the configuration does not fit together, or not the data of the run.
        FloatingPointError: too many steps in a row were not finite.
    """
    rank, ranks, local_rank = place
    _quiet_lightning()
    config = paths.claimed(folder)
    build.device(config["trainer"]["accelerator"], local_rank)
    parts = build.parts(config, ranks)
    newest = checkpoints.newest(folder / "checkpoints")
    start: dict[str, Any] = {"global_step": 0, "images_seen": 0} if newest is None else checkpoints.read(newest)
    budget = config["budget"]["images"] or config["optimizer"]["budget_images"]
    if rank == 0:
        print("\n".join([*parts.report(), f"continuing from {newest}" if newest else "starting from step 0"]))
    if start["images_seen"] >= budget or start["global_step"] >= (config["trainer"]["max_steps"] or np.inf):
        if rank == 0:
            print(f"{folder} has reached its end: {start['images_seen']:,} images in {start['global_step']:,} steps")
            _mark_done(folder, start["images_seen"], start["global_step"], start["run"]["fingerprint"])
        return

    changes = resuming.changes(folder, parts, start, newest) if newest else {}
    module = _module(parts, budget, rank, new=newest is None)
    sinks = _sinks(folder, config, budget, start, changes) if rank == 0 else []
    loader = parts.loader(rank)
    callbacks = [*_callbacks(folder, parts, loader, sinks), resuming.Continuation(folder, changes, sinks)]
    trainer = _trainer(folder, parts, callbacks)
    try:
        trainer.fit(module, loader, ckpt_path=newest, weights_only=True)
    finally:
        for sink in sinks:
            sink.close()
    if trainer.interrupted:
        raise KeyboardInterrupt
    if rank == 0:
        _mark_done(folder, module.images_seen, trainer.global_step, parts.images.fingerprint)
        print(f"done: {module.images_seen:,} images in {trainer.global_step:,} steps; everything is in {folder}")


def _module(parts: build.Parts, budget: int, rank: int, new: bool) -> GenerativeModule:
    """What Lightning trains; a new run starts from the weights of `init_from`."""
    config = parts.config
    if new and config["init_from"]:
        remarks = initialise(parts.net, Path(config["init_from"]), config["seed"], targets.trusted(config))
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
    picks = [sizes[order[round(q * (len(order) - 1))]] for q in (0.5, 0.94, 0.06)]
    return list(dict.fromkeys((int(h), int(w)) for h, w in picks))


def preview_requests(class_names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[Request]:
    """One image of each of the first classes at each size."""
    pairs = [(label, size) for size in sizes for label in range(min(len(class_names), LABELS_IN_PREVIEW))]
    return [Request(label, size, number) for number, (label, size) in enumerate(pairs)]


def _callbacks(
    folder: Path, parts: build.Parts, loader: TrainLoader, sinks: Sequence[Sink]
) -> list[lightning.Callback]:
    """In the order in which they act after a step: average, measure, judge, evaluate, draw, save."""
    settings, names = parts.config["trainer"], parts.images.class_names
    decays = parts.config["ema"]["decays"]
    ema = Ema([parts.config["optimizer"]["ema_decay"]] if decays is None else decays)
    metrics = Metrics(sinks, settings["log_every"], loader)
    nonfinite = NonFinite(sinks, folder / "nonfinite.jsonl", settings["log_every"], settings["nonfinite_limit"])
    sizes = typical_sizes(parts.images.sizes)
    batch = parts.config["sample"]["batch"]
    sampling = Sampling.of(parts.config, parts.objective, parts.tokenizer, parts.device, batch)
    sampling.check(parts.net)
    requests = preview_requests(names, sizes)
    facts = {"class_names": names, "sizes": sizes, **resuming.facts(parts)}
    validation: list[lightning.Callback] = []
    if len(parts.held_out.labels):
        validation = [Validation.of(parts, ema, metrics)]
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
        plugins=[AtomicCheckpointIO(), TorchElasticEnvironment() if parts.ranks > 1 else OneProcess()],
        default_root_dir=folder,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )


def _sinks(
    folder: Path, config: Mapping[str, Any], budget: int, start: Mapping[str, Any], changes: resuming.Changes
) -> list[Sink]:
    terminal, file = Terminal(budget, start["images_seen"]), folder / "metrics.jsonl"
    ahead = any(line["step"] > start["global_step"] for line in lines_of(file))
    sinks: list[Sink] = [terminal, JsonLines(file, start["global_step"])]
    if config["logger"]["name"] == "wandb":
        make = functools.partial(_dashboard, folder, config, anew=ahead and bool(changes))
        sinks.append(Courtesy(terminal, "Weights & Biases", make, start["global_step"]))
    return sinks


def _dashboard(folder: Path, config: Mapping[str, Any], anew: bool) -> Sink:
    from genfound.reporting.dashboard import Dashboard

    return Dashboard(folder, {**config, "provenance": provenance()}, config["logger"]["project"], anew)


def _mark_done(folder: Path, images: int, steps: int, fingerprint: str) -> None:
    result = {"images": images, "steps": steps, "loss": _last_loss(folder), "fingerprint": fingerprint}
    paths.mark_done(folder, result)


def _last_loss(folder: Path) -> float | None:
    """The last loss of metrics.jsonl, where there is one."""
    losses = [line["train/loss"] for line in lines_of(folder / "metrics.jsonl") if "train/loss" in line]
    return round(losses[-1], 5) if losses and losses[-1] is not None else None


def _quiet_lightning() -> None:
    """Lightning's hints speak of its own loops and loaders, which this project replaces."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")
