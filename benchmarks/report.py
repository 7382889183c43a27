"""Reports of benchmarks: benchmarks/results/<name>_<machine>_<date>.md."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Sequence
from pathlib import Path

import torch

from genfound.loggers.provenance import provenance


def machine() -> str:
    """The graphics card, or the processor."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    models = [line.partition(":")[2].strip() for line in _cpu_info() if line.startswith("model name")]
    return models[0] if models else platform.machine()


def facts() -> str:
    """Machine and versions, as a list."""
    known = {"machine": machine(), "threads": torch.get_num_threads(), **provenance()}
    if not torch.cuda.is_available():
        known["CUDA device"] = "none: not measured on a GPU"
    return "\n".join(f"- {key}: {value}" for key, value in known.items())


def table(title: str, columns: Sequence[str]) -> list[str]:
    """The head of a table."""
    return [f"## {title}", "", f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]


def write(name: str, sections: Sequence[str]) -> Path:
    """Write a report."""
    words = "_".join(machine().replace("/", " ").replace("(", " ").replace(")", " ").split())
    date = datetime.datetime.now(datetime.UTC).date()
    file = Path(__file__).parent / "results" / f"{name}_{words}_{date}.md"
    file.write_text("\n\n".join([f"# {name.replace('_', ' ')}", *sections]) + "\n")
    return file


def _cpu_info() -> list[str]:
    info = Path("/proc/cpuinfo")
    return info.read_text().splitlines() if info.exists() else []
