"""From a composed configuration to running jobs.

The process of the command line launches. A single job on one device trains in it; every job of a sweep, and
every job on several devices, is a process group of its own that reads the run's config.yaml. So ranks can never
disagree about what they train, and a job that fails leaves the others alone.
"""

from __future__ import annotations

import ctypes
import os
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from genfound import paths
from genfound.command_line import USER_ERRORS, JobError, complain, frugal
from genfound.work import held


def train(cfg: DictConfig) -> None:
    """Launch one job of `genfound.train`.

    Raises:
        ValueError: the run directory belongs to another configuration, or another process trains there.
        JobError: the job ran in a process of its own and failed.
    """
    hydra_cfg = HydraConfig.get()
    folder = paths.run_dir(cfg, list(hydra_cfg.overrides.task))
    sweeping = hydra_cfg.mode == RunMode.MULTIRUN
    with held(folder, "choose name=..."):
        paths.claim(folder, paths.plain(cfg), cfg.allow_changes)
        result = paths.finished(folder)
        if result and _reached(cfg, result):
            print(f"[done before] {folder}  {_summary(result)}", flush=True)
        elif sweeping or cfg.trainer.devices > 1:
            _run_apart(folder, cfg.trainer.devices)
        else:
            run(folder)


def run(folder: Path) -> None:
    """Train the run of a directory in this process; leave DONE or FAILED there."""
    keep_freed_memory()
    from genfound.fit import fit

    try:
        with frugal("train"):
            fit(folder)
    except BaseException:
        if os.environ.get("RANK", "0") == "0":
            paths.mark_failed(folder, traceback.format_exc())
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


def _run_apart(folder: Path, devices: int) -> None:
    """Train in a process group of its own, which holds the lock as well, and print one summary line."""
    begin = time.monotonic()
    command = [sys.executable]
    if devices > 1:
        command += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={devices}"]
    code = subprocess.run([*command, "-m", "genfound.launch", str(folder)], check=False, close_fds=False).returncode
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


def _worker(folder: Path) -> None:
    """One rank of a job: `python -m genfound.launch RUN_DIR`."""
    try:
        run(folder)
    except USER_ERRORS as error:
        if os.environ.get("RANK", "0") == "0":
            complain(str(error))
        sys.exit(1)


if __name__ == "__main__":
    _worker(Path(sys.argv[1]))
