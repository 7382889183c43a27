"""Training one run, from its directory: `config.yaml` in, checkpoints, curves and pictures out."""

from __future__ import annotations

import logging
import os
import sys
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import DictConfig

from genfound import build
from genfound.callbacks import resuming
from genfound.callbacks.checkpointing import AtomicCheckpointIO, Checkpointing
from genfound.callbacks.ema import Ema
from genfound.callbacks.evaluation import Evaluation
from genfound.callbacks.nonfinite import NonFinite
from genfound.callbacks.preview import Preview
from genfound.callbacks.train_log import TrainLog
from genfound.callbacks.validation import Validation
from genfound.checkpoints.initialise import initialise
from genfound.config import compose, targets
from genfound.config.command_line import explain_oom
from genfound.config.errors import USER_ERRORS, JobError
from genfound.config.options import check
from genfound.config.sweeps import swept_keys
from genfound.data.packing.loader import TrainLoader
from genfound.loggers.json_lines import JsonLines, lines_of
from genfound.loggers.provenance import provenance
from genfound.loggers.terminal import Terminal
from genfound.modules.base import GenerativeModule
from genfound.runtime import checkpoint_io, devices, launch, processes, run_directory
from genfound.runtime.files import lock
from genfound.runtime.processes import sigterm_as_exit, tune_malloc
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest

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


def fit(folder: Path, place: processes.RankInfo = processes.SINGLE_PROCESS) -> None:
    """Train the run of a directory, continuing from its newest checkpoint.

    Raises:
        ValueError: the configuration does not fit together, or not the data of the run.
        FloatingPointError: too many steps in a row were not finite.
    """
    rank, ranks, local_rank = place
    _quiet_lightning()
    config = run_directory.claimed(folder)
    devices.device(config["trainer"]["accelerator"], local_rank)
    parts = build.build_run(config, ranks)
    newest = checkpoint_io.newest(folder / "checkpoints")
    start: dict[str, Any] = {"global_step": 0, "images_seen": 0} if newest is None else checkpoint_io.read(newest)
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
    loader = parts.loader(rank)
    callbacks = [*_callbacks(folder, parts, loader), resuming.Continuation(folder, changes)]
    loggers = [DummyLogger()] if rank else _loggers(folder, config, budget, start, changes)
    trainer = _trainer(folder, parts, callbacks, loggers)
    trainer.fit(module, loader, ckpt_path=newest, weights_only=True)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if rank == 0:
        _mark_done(folder, module.images_seen, trainer.global_step, parts.images.fingerprint)
        print(f"done: {module.images_seen:,} images in {trainer.global_step:,} steps; everything is in {folder}")


def _module(parts: build.RunComponents, budget: int, rank: int, new: bool) -> GenerativeModule:
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


def preview_requests(class_names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[SampleRequest]:
    """One image of each of the first classes at each size."""
    pairs = [(label, size) for size in sizes for label in range(min(len(class_names), LABELS_IN_PREVIEW))]
    return [SampleRequest(label, size, number) for number, (label, size) in enumerate(pairs)]


def _callbacks(folder: Path, parts: build.RunComponents, loader: TrainLoader) -> list[lightning.Callback]:
    """In the order in which they act after a step: average, measure, judge, evaluate, draw, save."""
    settings, names = parts.config["trainer"], parts.images.class_names
    decays = parts.config["ema"]["decays"]
    ema = Ema([parts.config["optimizer"]["ema_decay"]] if decays is None else decays)
    metrics = TrainLog(settings["log_every"], loader)
    nonfinite = NonFinite(folder / "nonfinite.jsonl", settings["log_every"], settings["nonfinite_limit"])
    sizes = typical_sizes(parts.images.sizes)
    batch = parts.config["sample"]["batch"]
    sampling = Pipeline.of(parts.config, parts.objective, parts.tokenizer, parts.device, batch)
    sampling.check(parts.net)
    requests = preview_requests(names, sizes)
    facts = {"class_names": names, "sizes": sizes, **resuming.facts(parts)}
    validation: list[lightning.Callback] = []
    if len(parts.held_out.labels):
        validation = [Validation.of(parts, ema)]
    evaluation = [Evaluation(folder, parts, ema)] if settings["eval_every"] else []
    return [
        ema,
        metrics,
        nonfinite,
        *validation,
        *evaluation,
        Preview(folder / "samples", settings["preview_every"], sampling, requests, names, ema),
        Checkpointing(folder / "checkpoints", settings["checkpoint_every"], settings["keep"], loader, facts),
    ]


def _trainer(
    folder: Path, parts: build.RunComponents, callbacks: list[lightning.Callback], loggers: Sequence[Logger]
) -> lightning.Trainer:
    settings = parts.config["trainer"]
    return lightning.Trainer(
        accelerator="gpu" if parts.device.type == "cuda" else "cpu",
        devices=settings["devices"],
        strategy="ddp" if parts.ranks > 1 else "auto",
        precision=devices.precision(settings["precision"], parts.device),  # type: ignore[arg-type]
        max_steps=settings["max_steps"] or -1,
        max_epochs=-1,
        accumulate_grad_batches=parts.micro_batches,
        deterministic=settings["deterministic"],
        callbacks=callbacks,
        plugins=[AtomicCheckpointIO(), TorchElasticEnvironment() if parts.ranks > 1 else OneProcess()],
        default_root_dir=folder,
        logger=loggers,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,
        limit_val_batches=0,
    )


def _loggers(
    folder: Path, config: Mapping[str, Any], budget: int, start: Mapping[str, Any], changes: resuming.Changes
) -> Sequence[Logger]:
    """Terminal and metrics.jsonl, and those of the group `logger`."""
    step, file = start["global_step"], folder / "metrics.jsonl"
    ahead = any(line["step"] > step for line in lines_of(file))
    loggers: list[Logger] = [Terminal(budget, start["images_seen"]), JsonLines(file, step)]
    if config["logger"]["name"] == "wandb":
        from genfound.loggers.wandb import WandbLogger

        loggers.append(WandbLogger(folder, config["logger"]["project"], anew=ahead and bool(changes)))
    for logger in loggers:
        logger.log_hyperparams({**config, "provenance": provenance()})
    return loggers


def _mark_done(folder: Path, images: int, steps: int, fingerprint: str) -> None:
    result = {"images": images, "steps": steps, "loss": _last_loss(folder), "fingerprint": fingerprint}
    run_directory.mark_done(folder, result)


def _last_loss(folder: Path) -> float | None:
    """The last loss of metrics.jsonl, where there is one."""
    losses = [line["train/loss"] for line in lines_of(folder / "metrics.jsonl") if "train/loss" in line]
    return round(losses[-1], 5) if losses and losses[-1] is not None else None


def _quiet_lightning() -> None:
    """Lightning's hints speak of its own loops and loaders, which this project replaces."""
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    logging.getLogger("lightning.fabric").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", module="lightning")


CONFIG = "GENFOUND_CONFIG"
"""Tells the processes of a job the hash of its configuration."""


def train(cfg: DictConfig) -> None:
    """Launch one job of `genfound.train`.

    Raises:
        ValueError: the run directory belongs to another configuration, or another process trains there.
        JobError: the job ran in processes of its own and failed.
    """
    hydra_cfg = HydraConfig.get()
    folder = run_directory.run_dir(cfg, list(hydra_cfg.overrides.task), swept_keys())
    sweeping = hydra_cfg.mode == RunMode.MULTIRUN
    config = compose.with_own_targets(compose.to_dict(cfg))
    check(config)
    with lock(folder, "choose name=..."):
        result = run_directory.finished(folder)
        if result and _reached(cfg, result):
            run_directory.refuse_changes(folder, config, cfg.allow_changes)
            _check_images(folder, config, result)
            print(f"[done before] {folder}  {_summary(result)}", flush=True)
            return
        run_directory.refuse_changes(folder, config, cfg.allow_changes)
        _check_at_once(folder, config, sweeping)
        run_directory.write_config(folder, config, cfg.allow_changes)
        if sweeping or cfg.trainer.devices > 1:
            _run_apart(folder, cfg.trainer.devices, run_directory.config_hash(folder))
        else:
            run(folder)


def run(folder: Path, place: processes.RankInfo = processes.SINGLE_PROCESS) -> None:
    """Train the run of a directory in this process; leave DONE or FAILED there.

    Raises:
        JobError: it failed as another of its processes did, which has said why.
    """
    tune_malloc()
    if place.rank == 0:
        (folder / "FAILED").unlink(missing_ok=True)
    from genfound.training import fit

    try:
        with sigterm_as_exit(), explain_oom("train"):
            fit(folder, place)
    except BaseException as error:
        first = run_directory.mark_failed(folder, traceback.format_exc())
        if isinstance(error, Exception) and not first:
            raise JobError from error
        raise


def _check_at_once(folder: Path, config: Mapping[str, Any], sweeping: bool) -> None:
    """Refuse what `build.check` finds before a process starts; a new run has that in its FAILED."""
    from genfound import build

    try:
        build.check(config, config["trainer"]["devices"])
    except USER_ERRORS:
        if not (folder / "config.yaml").exists():
            run_directory.write_config(folder, config, allow_changes=False)
            run_directory.mark_failed(folder, traceback.format_exc())
        if sweeping:
            print(f"[failed] {folder}", flush=True)
        raise


def _run_apart(folder: Path, devices: int, config_hash: str) -> None:
    """Train in processes of its own, which hold the lock as well, and print one summary line.

    Raises:
        JobError: one of them failed, and why.
    """
    begin, ended, summary = time.monotonic(), "failed", ""
    try:
        launch.launch("genfound.training", folder, devices, **{CONFIG: config_hash})
        ended, summary = "done", _summary(run_directory.finished(folder) or {})
    except JobError as error:
        run_directory.mark_failed(folder, f"{error}\n")  # unless a process could say more
        raise
    finally:
        minutes, seconds = divmod(round(time.monotonic() - begin), 60)
        print(f"[{ended}] {folder}  {minutes} min {seconds} s  {summary}", flush=True)


def _reached(cfg: DictConfig, result: dict[str, Any]) -> bool:
    """Whether a finished run is also the end of what is asked for now."""
    budget = cfg.budget.images or cfg.optimizer.budget_images
    return bool(result["images"] >= budget or result["steps"] >= (cfg.trainer.max_steps or float("inf")))


def _check_images(folder: Path, config: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Compare the images of a finished run with those of a configuration that looks for them elsewhere.

    Raises:
        ValueError: they are others.
    """
    if any(key.startswith("data.") for key in run_directory.changed(folder, config)):
        from genfound import build

        spec = build.training_tokenizer(config).spec
        if build.source(config, spec, "train").fingerprint != result.get("fingerprint"):
            raise ValueError(
                f"{folder} is finished, and was trained on other images than those of "
                f"data.root={config['data'].get('root')}; choose another name=..."
            )


def _summary(result: Mapping[str, Any]) -> str:
    return "  ".join(f"{key} {value}" for key, value in result.items() if key != "fingerprint")


def _worker(folder: Path) -> None:
    """One rank of a job: `python -m genfound.training RUN_DIR`, which trusts the configuration of the command alone."""
    with launch.reporting():
        place = processes.rank_info()
        if run_directory.config_hash(folder) != os.environ.get(CONFIG):
            raise ValueError(f"the configuration in {folder} is not what the command has written; give it again")
        run(folder, place)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
