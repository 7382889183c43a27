"""Training one run, from its directory: `config.yaml` in, checkpoints, curves and pictures out."""

import contextlib
import logging
import os
import sys
import tempfile
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
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.loggers import CSVLogger, Logger
from lightning.pytorch.loggers.logger import DummyLogger
from omegaconf import DictConfig

from genfound import build
from genfound.alignment import from_config
from genfound.callbacks import resuming
from genfound.callbacks.stopping import Stopping
from genfound.checkpoints.initialise import initialise
from genfound.config import compose, sweeps, targets
from genfound.config.command_line import explain_oom
from genfound.config.errors import USER_ERRORS, JobError
from genfound.config.options import check, one_step, sharded, world_size
from genfound.config.signals import Stopped
from genfound.config.targets import instantiate_own
from genfound.data.datamodule import GenerativeDataModule
from genfound.loggers import provenance
from genfound.loggers.json_lines import JsonLines, lines_of
from genfound.loggers.terminal import Terminal
from genfound.modules.base import module_of
from genfound.runtime import checkpoint_io, devices, launch, processes, rendezvous, run_directory
from genfound.runtime.files import lock
from genfound.runtime.stopping import signal_of
from genfound.text.from_config import draws_samples, fetch_for_training


class OneProcess(LightningEnvironment):
    """Of a process that is alone, whatever the variables of its environment say."""

    creates_processes_externally = False

    def __init__(self) -> None:
        super().__init__()
        self.set_global_rank(0)

    def local_rank(self) -> int:
        """The only one."""
        return 0

    node_rank = local_rank


def fit(folder: Path, place: processes.RankInfo = processes.SINGLE_PROCESS) -> None:
    """Train the run of a directory, continuing from its newest checkpoint."""
    rank, ranks, local_rank = place
    _quiet_lightning()
    config = run_directory.claimed(folder)
    devices.device(config["trainer"]["accelerator"], local_rank, "trainer.accelerator")
    apart = sharded(config, ranks) and not config["init_from"]  # then each process draws its part
    parts = build.build_run(config, ranks, with_values=not apart)
    newest = checkpoint_io.newest(folder / "checkpoints")
    start: dict[str, Any] = checkpoint_io.read(newest, parts=()) if newest else {"global_step": 0, "images_seen": 0}
    module = module_of(parts)
    if rank == 0:
        print("\n".join([*parts.report(), f"continuing from {newest}" if newest else "starting from step 0"]))
    limit = -1 if start["images_seen"] >= module.budget else config["trainer"]["max_steps"] or -1
    if 0 < limit <= start["global_step"]:  # a run that has seen its budget may have been cut short in its last preview
        if rank == 0:
            print(f"{folder} has reached its end: {start['images_seen']:,} images in {start['global_step']:,} steps")
            _mark_done(folder, start["images_seen"], start["global_step"], start["run"]["fingerprint"])
        return
    changes = resuming.changes(folder, parts, start, newest) if newest else {}
    if newest is None and config["init_from"]:
        remarks = initialise(module, Path(config["init_from"]), targets.trusted(config))
        if rank == 0:
            print("\n".join(remarks), flush=True)
    callbacks = [*_callbacks(config), resuming.Continuation(folder, changes), stopping := Stopping()]
    loggers = [DummyLogger()] if rank else _loggers(folder, config, module.budget, start, changes)
    trainer = _trainer(folder, parts, limit, callbacks, loggers)
    with devices.float32_products(trainer.precision, parts.device):
        trainer.fit(module, datamodule=_data(parts), ckpt_path=newest, weights_only=True)
    if stopping.signal:
        if rank == 0:
            run_directory.mark_stopped(folder, stopping.signal, f"ended after step {trainer.global_step:,}")
            print(f"stopped after step {trainer.global_step:,}; the same command continues {folder}", flush=True)
        raise Stopped(stopping.signal)
    if rank == 0:
        _mark_done(folder, module.images_seen, trainer.global_step, parts.images.fingerprint)
        kept = "" if config["trainer"]["fast_dev_run"] else f"; everything is in {folder}"
        print(f"done: {module.images_seen:,} images in {trainer.global_step:,} steps{kept}")


def _data(parts: build.RunComponents) -> GenerativeDataModule:
    """The data of a run, whose network and encoder are compiled if that is wanted."""
    data = GenerativeDataModule(parts)
    if devices.compiled(parts.config["compile"], parts.device):
        parts.net.compile_blocks()
        data.compile_tokenizer()
    return data


def _callbacks(config: Mapping[str, Any]) -> list[lightning.Callback]:
    """Those of the group `callbacks`: averages first, and last checkpoints, which hold what the others have done."""
    groups = config["callbacks"].items()
    options = {name: own for name, own in groups if own is not None and own.get("every", 1) is not None}
    names = sorted(options, key=lambda name: {"ema": 0, "checkpointing": 2}.get(name, 1))
    return [instantiate_own(f"callbacks.{name}", options[name]) for name in names]


def _trainer(
    folder: Path,
    parts: build.RunComponents,
    max_steps: int,
    callbacks: Sequence[lightning.Callback],
    loggers: Sequence[Logger],
) -> lightning.Trainer:
    """`lightning.Trainer` with what the configuration sets, and what genfound decides."""
    options, ranks = parts.config["trainer"], parts.ranks
    ours = {
        "accelerator": parts.device.type,
        "strategy": _strategy(parts) if ranks > 1 else "auto",
        "precision": devices.precision(options["precision"], parts.device),
        "max_steps": max_steps,
        "max_epochs": -1,
        "accumulate_grad_batches": parts.micro_batches,
        "callbacks": list(callbacks),
        "logger": list(loggers),
        "plugins": [TorchElasticEnvironment() if ranks > 1 else OneProcess()],
        "default_root_dir": folder,
        "enable_checkpointing": any(isinstance(callback, Checkpoint) for callback in callbacks),
        "use_distributed_sampler": False,
        "limit_val_batches": 0,
        "fast_dev_run": False,
        "overfit_batches": 0,
    }
    set_here = {key: value for key, value in options.items() if value is not None and key not in ours}
    try:
        trainer: lightning.Trainer = instantiate_own("trainer", set_here, ours)
    except (MisconfigurationException, RuntimeError, TypeError) as error:
        raise ValueError(f"trainer: {error}") from None
    return trainer


def _strategy(parts: build.RunComponents) -> Any:
    options = parts.config["strategy"] or compose.read_option("strategy", "ddp")
    given = {"process_group_backend": devices.backend(parts.device)}
    return instantiate_own("strategy", options, {key: value for key, value in given.items() if key not in options})


def _loggers(
    folder: Path, config: Mapping[str, Any], budget: int, start: Mapping[str, Any], changes: resuming.Changes
) -> Sequence[Logger]:
    """Terminal and metrics.jsonl, and those of the group `logger`."""
    step, file = start["global_step"], folder / "metrics.jsonl"
    ahead = any(line["step"] > step for line in lines_of(file))
    loggers: list[Logger] = [Terminal(budget, start["images_seen"]), JsonLines(file, step)]
    known = {"folder": folder, "anew": ahead and bool(changes)}
    here = {"save_dir": str(folder), "purge_step": step + 1}
    for name, options in config["logger"].items():
        if options is not None:
            filled = {key: here.get(key) if value is None else value for key, value in options.items()}
            loggers.append(instantiate_own(f"logger.{name}", filled, known))
    given = run_directory.given(folder).items()
    chosen = {key: value for key, value in given if "." not in key and isinstance(config.get(key, {}), Mapping)}
    options = {**run_directory.options_of(folder), **chosen}  # Hydra knows no choice of several
    settings = compose.without_nulls({**config, "options": options, "provenance": provenance.note(folder, step)})
    for logger in loggers:
        logger.log_hyperparams(settings)
        for line in lines_of(file) if isinstance(logger, CSVLogger) else ():  # which begins its file anew
            numbers = {key: value for key, value in line.items() if isinstance(value, int | float)}
            logger.log_metrics(numbers, line["step"])
    return loggers


def _mark_done(folder: Path, images: int, steps: int, fingerprint: str) -> None:
    loss = _reached(folder).get("loss")
    run_directory.mark_done(folder, {"images": images, "steps": steps, "loss": loss, "fingerprint": fingerprint})


def _reached(folder: Path) -> dict[str, Any]:
    """How far a run has come, by the last line of its training."""
    lines = [line for line in lines_of(folder / "metrics.jsonl") if "train/loss" in line]
    if not lines:
        return {}
    last, loss = lines[-1], lines[-1]["train/loss"]
    return {"images": last["images_seen"], "steps": last["step"], "loss": None if loss is None else round(loss, 5)}


def _quiet_lightning() -> None:
    """Lightning's hints speak of its own loops and loaders, which this project replaces."""
    for name in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).setLevel(logging.ERROR)
    logging.getLogger("lightning.pytorch.profilers").setLevel(logging.INFO)
    warnings.filterwarnings("ignore", module="lightning")


BY_SIGNAL = 128
"""Beyond which the code of a process is the number of a signal."""

CONFIG = "GENFOUND_CONFIG"
"""Tells the processes of a job the hash of its configuration."""

SUBMITIT = "SUBMITIT_EXECUTOR"
"""Of the processes of submitit, which take what returns for done and requeue others as their scheduler does."""

SHARED_WITHIN = 60
"""Seconds for a file to be seen by the other machines."""


def train(cfg: DictConfig) -> str | None:
    """Launch one job of `genfound.train`; another word for its end than `done`."""
    hydra_cfg = HydraConfig.get()
    folder = run_directory.run_dir(cfg, list(hydra_cfg.overrides.task), sweeps.swept_keys())
    sweeping = hydra_cfg.mode == RunMode.MULTIRUN
    config = compose.with_own_targets(compose.to_dict(cfg))
    check(config)
    if cfg.trainer.fast_dev_run:
        if cfg.trainer.num_nodes > 1:
            raise ValueError("trainer.fast_dev_run tries a single machine; set trainer.num_nodes=1")
        with tempfile.TemporaryDirectory(prefix="genfound-") as scratch:
            start(Path(scratch) / folder.name, one_step(config), sweeping)
        print("fast_dev_run: one global step with every callback; nothing of it was kept", flush=True)
        return None
    run_directory.refuse_changes(folder, config, cfg.allow_changes)
    result = run_directory.finished(folder)
    budget, steps = cfg.budget.images or cfg.optimizer.budget_images, cfg.trainer.max_steps or np.inf
    if result and (result["images"] >= budget or result["steps"] >= steps):
        _check_images(folder, config, result)
        sweeps.tell(folder=str(folder), **result)
        if not sweeping:
            print(f"[done before] {folder}  {_summary(result)}", flush=True)
        return "done before"
    job = hydra_cfg.job.num if sweeping else 0
    with rendezvous.machines(cfg.trainer.num_nodes, cfg.rdzv, job) as machines:
        if machines and not machines.first:
            return _follow(folder, config, machines)
        with lock(folder, "choose name=..."):
            run_directory.note_overrides(folder, list(hydra_cfg.overrides.task))
            run_directory.note_options(folder, hydra_cfg.runtime.choices)
            return start(folder, config, sweeping, machines)


def start(folder: Path, config: Mapping[str, Any], sweeping: bool, machines: rendezvous.Machines | None = None) -> str:
    """Check what can be known at once, write the configuration, and run the job; how it ended."""
    sweeps.tell(folder=str(folder))
    _check_at_once(folder, config)
    checkpoint_io.set_aside_damaged(folder / "checkpoints")
    run_directory.write_config(folder, config, config["allow_changes"])
    if machines:
        machines.agree(run_directory.config_hash(config))
    if sweeping or machines or config["trainer"]["devices"] > 1:
        return _run_apart(folder, config, machines)
    run(folder)
    return "done"


def run(folder: Path, place: processes.RankInfo = processes.SINGLE_PROCESS) -> None:
    """Train the run of a directory in this process; leave DONE, STOPPED or FAILED there.

    A JobError is raised where another of its processes has failed before, and has said why; one that lost contact to
    another leaves it to the command to say why.
    """
    processes.tune_malloc()
    if place.rank == 0:
        run_directory.unmark(folder)
    try:
        with processes.signals_as_exit(), explain_oom("train"):
            fit(folder, place)
    except Stopped:
        raise
    except BaseException as error:
        if isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > BY_SIGNAL:
            run_directory.mark_stopped(folder, error.code - BY_SIGNAL, "ended at once")
            raise
        if launch.lost_contact(error):
            raise
        first = run_directory.mark_failed(folder, traceback.format_exc())
        if isinstance(error, Exception) and not first:
            raise JobError from error
        raise


def _check_at_once(folder: Path, config: Mapping[str, Any]) -> None:
    """Refuse what can be known before a process or a logger starts; a new run has that in its FAILED."""
    evaluation = config["callbacks"].get("evaluation") or {}
    try:
        build.check(config, world_size(config))
        from_config.fetch_teachers(config)
        fetch_for_training(config)
        if evaluation.get("every") and evaluation.get("protocol"):
            from genfound.callbacks.evaluation import training_request

            own = (evaluation.get(key) for key in ("extractor", "extractor_weights"))
            training_request(folder, config, evaluation["protocol"], *own).check()
    except USER_ERRORS:
        if not (folder / "config.yaml").exists():
            run_directory.write_config(folder, config, allow_changes=False)
            run_directory.mark_failed(folder, traceback.format_exc())
        raise


def _follow(folder: Path, config: Mapping[str, Any], machines: rendezvous.Machines) -> str:
    """Take part in the job of another machine, which has locked the folder and written the configuration."""
    build.check(config, world_size(config))
    from_config.fetch_teachers(config)
    fetch_for_training(config)
    expected = run_directory.config_hash(config)
    machines.agree(expected)
    if not processes.wait_until(lambda: run_directory.claimed_hash(folder) == expected, SHARED_WITHIN):
        raise ValueError(f"{folder} is not what the first machine has written; give runs=... on a disk that all share")
    return _run_apart(folder, config, machines)


def _run_apart(folder: Path, config: Mapping[str, Any], machines: rendezvous.Machines | None) -> str:
    """Train in processes of its own, and print one summary line; `done`, or `stopped` if only they got a signal."""
    begin, ended, summary = time.monotonic(), "failed", ""
    if sweeps.in_sweep():
        print(f"[begun] {folder}", flush=True)
    try:
        _fetch_tokenizer(config)
        hashed = {CONFIG: run_directory.config_hash(config)}
        log = folder / run_directory.LOG if sweeps.in_sweep() else None
        launch.launch(
            "genfound.training", folder, config["trainer"]["devices"], machines, log, sweeps.stop_signal, **hashed
        )
        ended, summary = "done", _summary(run_directory.finished(folder) or {})
        if halt := run_directory.stopped(folder):
            ended = "stopped"
            if not sweeps.in_sweep() or SUBMITIT in os.environ:
                raise Stopped(halt["signal"])
        return ended
    except SystemExit as error:
        ended = "stopped"
        if not run_directory.stopped(folder):
            run_directory.mark_stopped(folder, signal_of(error), "ended at once")
        raise
    except (JobError, FileNotFoundError) as error:
        run_directory.mark_failed(folder, f"{error}\n")  # unless a process could say more
        raise
    finally:
        reached = run_directory.finished(folder) or run_directory.stopped(folder) or {}
        sweeps.tell(**{**_reached(folder), **reached})
        if not sweeps.in_sweep():
            print(f"[{ended}] {folder}  {sweeps.duration(time.monotonic() - begin)}  {summary}", flush=True)


def _fetch_tokenizer(config: Mapping[str, Any]) -> None:
    """Download the weights of the tokenizer, if the processes of a job will read them and would not have them."""
    latents = build.reads_latents(config)
    if draws_samples(config) or not latents:
        with contextlib.suppress(*[FileNotFoundError] * latents):  # pictures then show channels of the latents
            build.fetch_tokenizer(config)


def _check_images(folder: Path, config: Mapping[str, Any], result: Mapping[str, Any]) -> None:
    """Compare the images of a finished run with those of a configuration that looks for them elsewhere."""
    if any(key.startswith("data.") for key in run_directory.changed(folder, config)):
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
        if run_directory.claimed_hash(folder) != os.environ.get(CONFIG):
            raise ValueError(f"the configuration in {folder} is not what the command has written; give it again")
        if place.world_size != world_size(run_directory.claimed(folder)):
            raise ValueError(processes.NOT_LAUNCHED)
        with contextlib.suppress(Stopped):  # the others may not be at their ends yet, and torchrun would kill them
            run(folder, place)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
