"""What Windows lacks is not needed to import genfound and to train; simulated, since no test runs there."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from tests.cli.commands import TINY, variables

WITHOUT = """
import enum, importlib, os, pkgutil, signal, sys
import diffusers, filelock, lightning.pytorch, matplotlib.pyplot, pandas, rich.progress, torch.distributed.run, wandb
from lightning.pytorch.trainer.connectors import signal_connector

names = ("SIGINT", "SIGTERM", "SIGABRT", "SIGSEGV", "SIGILL", "SIGFPE")
signal.Signals = enum.IntEnum("Signals", {name: int(getattr(signal, name)) for name in names})
signal.valid_signals = lambda: set(signal.Signals)
for name in ("SIGUSR1", "SIGUSR2", "SIGHUP", "SIGKILL", "SIGQUIT", "SIGALRM", "alarm"):
    delattr(signal, name)
for name in ("uname", "fork", "pread", "posix_fadvise", "sched_getaffinity", "statvfs"):
    delattr(os, name)
sys.modules |= dict.fromkeys(("fcntl", "resource", "pwd", "grp", "termios"))
sys.platform, signal_connector._IS_WINDOWS = "win32", True

import genfound
for module in pkgutil.walk_packages(genfound.__path__, "genfound."):
    importlib.import_module(module.name)
from genfound import training
from genfound.runtime import launch, processes

assert launch._ending(3221225477) == "the process failed by a mistake in the program; " + launch.TRACEBACK
processes.end_with_parent()
training.run(training.Path(sys.argv[1]))
"""


def test_a_run_trains_without_what_windows_lacks(tmp_path: Path) -> None:
    from tests.helpers import run_dir

    folder = run_dir(tmp_path / "run", *TINY, f"runs={tmp_path}", "trainer.max_steps=2")
    command = [sys.executable, "-c", WITHOUT, str(folder)]
    result = subprocess.run(command, env=variables(), capture_output=True, text=True, timeout=300, check=False)
    assert result.returncode == 0 and (folder / "DONE").exists(), result.stderr
    assert list((folder / "checkpoints").glob("*.ckpt"))
