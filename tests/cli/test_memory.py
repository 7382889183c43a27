"""What a long training keeps."""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import pytest

from genfound.loggers.json_lines import lines_of
from tests.cli.commands import TINY, variables


@pytest.mark.slow
def test_peak_memory_is_flat_over_two_thousand_steps(tmp_path: Path) -> None:
    """With validations, pictures and checkpoints; the first hundreds of steps fill the pools of the allocator."""
    often = ["callbacks.validation.every=1000", "callbacks.preview.every=2000", "callbacks.checkpointing.every=1000"]
    long = ["budget.images=400000", "trainer.max_steps=2000", "trainer.log_every_n_steps=10", "name=x"]
    words = [sys.executable, "-m", "genfound.train", *TINY, *often, *long]
    peaks: dict[int, int] = {}
    with subprocess.Popen(words, cwd=tmp_path, env=variables(), stdout=subprocess.DEVNULL) as process:
        while process.poll() is None:
            time.sleep(0.2)
            lines = lines_of(tmp_path / "runs/default/x/metrics.jsonl")
            status = Path(f"/proc/{process.pid}/status").read_text()
            if lines and "VmHWM:" in status:  # which a process that has ended lacks
                peaks[lines[-1]["step"]] = int(status.split("VmHWM:")[1].split()[0])
    assert process.returncode == 0 and max(peaks) > 1500
    assert max(peaks.values()) <= 1.02 * max(peak for step, peak in peaks.items() if step < 600)
