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

from genfound import paths
from genfound.checks import number, whole
from genfound.command_line import USER_ERRORS, JobError, complain, frugal
from genfound.work import ending_as_exit, held, run_apart

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
        JobError: the job ran in a process of its own and failed.
    """
    hydra_cfg = HydraConfig.get()
    folder = paths.run_dir(cfg, list(hydra_cfg.overrides.task))
    sweeping = hydra_cfg.mode == RunMode.MULTIRUN
    config = paths.with_own_targets(paths.plain(cfg))
    check(config)
    with held(folder, "choose name=..."):
        result = paths.finished(folder)
        if result and _reached(cfg, result):
            paths.check_same(folder, config, cfg.allow_changes)
            print(f"[done before] {folder}  {_summary(result)}", flush=True)
            return
        paths.claim(folder, config, cfg.allow_changes)
        if sweeping or cfg.trainer.devices > 1:
            _run_apart(folder, cfg.trainer.devices, paths.config_hash(folder))
        else:
            run(folder)


def run(folder: Path) -> None:
    """Train the run of a directory in this process; leave DONE or FAILED there.

    Raises:
        JobError: it failed as another of its processes did, which has said why.
    """
    keep_freed_memory()
    if os.environ.get("RANK", "0") == "0":
        (folder / "FAILED").unlink(missing_ok=True)
    from genfound.fit import fit

    try:
        with ending_as_exit(), frugal("train"):
            fit(folder)
    except BaseException as error:
        first = paths.mark_failed(folder, traceback.format_exc())
        if isinstance(error, USER_ERRORS) and not first:
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
    """Train in a process group of its own, which holds the lock as well, and print one summary line."""
    begin = time.monotonic()
    command = [sys.executable]
    if devices > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    code = run_apart([*command, "-m", "genfound.launch", str(folder), config_hash], os.environ)
    minutes, seconds = divmod(round(time.monotonic() - begin), 60)
    summary = "" if code else _summary(paths.finished(folder) or {})
    print(f"[{'failed' if code else 'done'}] {folder}  {minutes} min {seconds} s  {summary}", flush=True)
    if code:
        raise JobError


def _reached(cfg: DictConfig, result: dict[str, Any]) -> bool:
    """Whether a finished run is also the end of what is asked for now."""
    budget = cfg.budget.images or cfg.optimizer.budget_images
    return bool(result["images"] >= budget or result["steps"] >= (cfg.trainer.max_steps or float("inf")))


def _summary(result: dict[str, Any]) -> str:
    return "  ".join(f"{key} {value}" for key, value in result.items())


def _worker(folder: Path, config_hash: str) -> None:
    """One rank of a job: `python -m genfound.launch RUN_DIR HASH`, which trusts the config.yaml of this hash alone."""
    try:
        if paths.config_hash(folder) != config_hash:
            raise ValueError(f"{folder / 'config.yaml'} is not what the command has written; give the command again")
        run(folder)
    except USER_ERRORS as error:
        complain(str(error))
        sys.exit(1)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]), sys.argv[2])
