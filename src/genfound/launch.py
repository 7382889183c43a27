"""From a composed configuration to running jobs.

The process of the command line launches. A single job on one device trains in it; every job of a sweep, and
every job on several devices, is a process group of its own that reads the run's config.yaml. So ranks can never
disagree about what they train, and a job that fails leaves the others alone.
"""

from __future__ import annotations

import ctypes
import os
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from genfound import paths, processes
from genfound.checks import number, whole
from genfound.command_line import frugal
from genfound.errors import USER_ERRORS, JobError
from genfound.sweeps import swept_keys
from genfound.work import ending_as_exit, held

CONFIG = "GENFOUND_CONFIG"
"""Tells the processes of a job the hash of its configuration."""

AT_LEAST = {
    "trainer": {
        "devices": 1, "log_every": 1, "checkpoint_every": 1, "keep": 1, "val_every": 1, "val_images": 1,
        "preview_every": 1, "nonfinite_limit": 1,
    },
    "sample": {"batch": 1},
    "optimizer": {"warmup_images": 0, "tokens_per_step": 1, "images_per_step": 1, "budget_images": 1},
    "data": {"num_workers": 0, "max_tokens": 1},
}  # fmt: skip
"""Whole numbers of a run, and the least that each may be."""

OR_NULL = (
    ("trainer", "max_steps"), ("trainer", "eval_every"), ("budget", "images"), ("batch", "packs"), ("batch", "images")
)  # fmt: skip
"""Whole numbers of at least 1, or null."""


SIZES = {"depth", "width", "heads", "patch_size"}
"""Whole numbers of at least 1 of the models that have them."""


def train(cfg: DictConfig) -> None:
    """Launch one job of `genfound.train`.

    Raises:
        ValueError: the run directory belongs to another configuration, or another process trains there.
        JobError: the job ran in processes of its own and failed.
    """
    hydra_cfg = HydraConfig.get()
    folder = paths.run_dir(cfg, list(hydra_cfg.overrides.task), swept_keys())
    sweeping = hydra_cfg.mode == RunMode.MULTIRUN
    config = paths.with_own_targets(paths.plain(cfg))
    check(config)
    with held(folder, "choose name=..."):
        result = paths.finished(folder)
        if result and _reached(cfg, result):
            paths.check_same(folder, config, cfg.allow_changes)
            _check_images(folder, config, result)
            print(f"[done before] {folder}  {_summary(result)}", flush=True)
            return
        paths.check_same(folder, config, cfg.allow_changes)
        _check_at_once(folder, config, sweeping)
        paths.claim(folder, config, cfg.allow_changes)
        if sweeping or cfg.trainer.devices > 1:
            _run_apart(folder, cfg.trainer.devices, paths.config_hash(folder))
        else:
            run(folder)


def run(folder: Path, place: processes.Place = processes.ALONE) -> None:
    """Train the run of a directory in this process; leave DONE or FAILED there.

    Raises:
        JobError: it failed as another of its processes did, which has said why.
    """
    keep_freed_memory()
    if place.rank == 0:
        (folder / "FAILED").unlink(missing_ok=True)
    from genfound.fit import fit

    try:
        with ending_as_exit(), frugal("train"):
            fit(folder, place)
    except BaseException as error:
        first = paths.mark_failed(folder, traceback.format_exc())
        if isinstance(error, Exception) and not first:
            raise JobError from error
        raise


def check(config: Mapping[str, Any]) -> None:
    """Raise a ValueError for a number of the run that makes no sense."""
    for group, keys in AT_LEAST.items():
        for key, least in keys.items():
            whole(f"{group}.{key}", config[group][key], least)
    for group, key in OR_NULL:
        whole(f"{group}.{key}", config[group][key], 1, or_null=True)
    decays, model, optimizer = config["ema"]["decays"], config["model"], config["optimizer"]
    if not isinstance(decays, list | None):
        raise ValueError(f"ema.decays={decays} must be a list, such as [0.9999,0.999]")
    for key, value in (("ema.decays", decays or ()), ("optimizer.betas", optimizer["betas"])):
        for decay in value:
            number(key, decay, 0, 1)
    for key in SIZES & model.keys():
        whole(f"model.{key}", model[key], 1)
    number("model.label_drop", model["label_drop"], 0, 1)
    number("optimizer.ema_decay", optimizer["ema_decay"], 0, 1)
    for key in ("lr", "weight_decay"):
        number(f"optimizer.{key}", optimizer[key], 0)
    if optimizer["clip"] is not None:
        number("optimizer.clip", optimizer["clip"], 0, above=True)
    read, other = ("images", "packs") if config["layout"]["name"] == "dense" else ("packs", "images")
    if config["batch"][read] is None and config["batch"][other] is not None:  # both are for a sweep over layouts
        raise ValueError(f"batch.{other} counts nothing in layout={config['layout']['name']}; set batch.{read}")


def _check_at_once(folder: Path, config: Mapping[str, Any], sweeping: bool) -> None:
    """Refuse what `build.check` finds before a process starts; a new run has that in its FAILED."""
    from genfound import build

    try:
        build.check(config, config["trainer"]["devices"])
    except USER_ERRORS:
        if not (folder / "config.yaml").exists():
            paths.claim(folder, config, allow_changes=False)
            paths.mark_failed(folder, traceback.format_exc())
        if sweeping:
            print(f"[failed] {folder}", flush=True)
        raise


def keep_freed_memory() -> None:
    """Let glibc keep the memory of a step for the next one, instead of paging it in anew (1.5x on CPUs)."""
    if sys.platform == "linux":
        trim_threshold, top_pad, mmap_threshold = -1, -2, -3
        libc = ctypes.CDLL(None)
        if hasattr(libc, "mallopt"):
            libc.mallopt(mmap_threshold, 2**25)
            libc.mallopt(trim_threshold, 2**31 - 1)
            libc.mallopt(top_pad, 2**26)


def _run_apart(folder: Path, devices: int, config_hash: str) -> None:
    """Train in processes of its own, which hold the lock as well, and print one summary line.

    Raises:
        JobError: one of them failed, and why.
    """
    begin, ended, summary = time.monotonic(), "failed", ""
    try:
        processes.launch("genfound.launch", folder, devices, **{CONFIG: config_hash})
        ended, summary = "done", _summary(paths.finished(folder) or {})
    except JobError as error:
        paths.mark_failed(folder, f"{error}\n")  # unless a process could say more
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
    if any(key.startswith("data.") for key in paths.changed(folder, config)):
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
    """One rank of a job: `python -m genfound.launch RUN_DIR`, which trusts the configuration of the command alone."""
    with processes.reporting():
        place = processes.place()
        if paths.config_hash(folder) != os.environ.get(CONFIG):
            raise ValueError(f"the configuration in {folder} is not what the command has written; give it again")
        run(folder, place)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
