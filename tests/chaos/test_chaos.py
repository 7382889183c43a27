"""Twenty runs that are killed, run out of disk or lose a byte, and come to the end of an undisturbed one."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.cli.commands import ROOT, variables


@pytest.mark.slow
def test_nothing_is_lost_in_twenty_cases() -> None:
    command = [sys.executable, "-m", "tests.chaos", "20"]
    result = subprocess.run(
        command, cwd=ROOT, env=variables(), capture_output=True, text=True, timeout=1800, check=False
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert "20 of 20 passed" in result.stdout
