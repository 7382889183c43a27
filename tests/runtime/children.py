"""Processes that tests start, and whether they run."""

import subprocess
import sys
from pathlib import Path


def started(code: str, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A process that has printed its first line."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def alive(number: int) -> bool:
    """Whether a process runs; one that has ended may still be waited for."""
    try:
        return ") Z " not in Path(f"/proc/{number}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
