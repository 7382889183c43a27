"""Running genfound's commands as a user does, with a net that trains in seconds."""

import os
import subprocess
import sys
from pathlib import Path

TINY = [
    "model.width=32", "model.depth=1", "model.heads=1", "data.max_tokens=256", "batch.packs=1", "budget.images=4000",
    "trainer.log_every=1", "trainer.val_images=16", "trainer.val_every=1000", "trainer.preview_every=40",
    "sampler=euler", "sampler.steps=2", "sample.batch=4", "logger=jsonl",
]  # fmt: skip


def genfound(command: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m genfound.<command> <arguments>` in a folder, on one thread, offline."""
    return subprocess.run(
        [sys.executable, "-m", f"genfound.{command}", *arguments],
        cwd=cwd,
        env=variables(**environment),
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def variables(**environment: str) -> dict[str, str]:
    """The environment of a command under test."""
    return os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"} | environment


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The single line that a wrong command must leave on standard error."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1, result.stdout + result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]
