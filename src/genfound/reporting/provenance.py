"""What code produced a result."""

from __future__ import annotations

import platform
import subprocess
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


def provenance() -> dict[str, str]:
    """Versions of genfound, its commit, Python and the main libraries."""
    facts = {"python": platform.python_version()}
    for package in ("genfound", "torch", "lightning", "diffusers"):
        try:
            facts[package] = version(package)
        except PackageNotFoundError:
            continue
    commit = subprocess.run(
        ["git", "describe", "--always", "--dirty", "--abbrev=12"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    )
    if commit.returncode == 0:
        facts["commit"] = commit.stdout.strip()
    return facts
