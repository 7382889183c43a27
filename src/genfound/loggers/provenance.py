"""What code produced a result."""

import contextlib
import json
import os
import platform
import subprocess
import tomllib
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from genfound.loggers.json_lines import lines_of
from genfound.runtime.files import atomic_write

FILE = "provenance.jsonl"
"""Of a run directory: a line for each code that has trained the run, with the step from which on."""


def note(folder: Path, step: int) -> dict[str, str]:
    """Keep that this code trains a run from a step on; returns what it is."""
    facts = provenance()
    kept = [line for line in lines_of(folder / FILE) if line["step"] <= step]
    if not kept or {**kept[-1], "step": step} != {"step": step, **facts}:
        kept.append({"step": step, **facts})
    text = "".join(json.dumps(line) + "\n" for line in kept)
    atomic_write(folder / FILE, lambda temporary: temporary.write_text(text))
    return facts


def in_words(facts: Mapping[str, Any]) -> str:
    """Versions and commit, for readers."""
    return ", ".join(f"{key} {facts[key]}" for key in ("genfound", "torch", "commit") if key in facts)


def provenance() -> dict[str, str]:
    """Versions of genfound, Python and the main libraries; with the commit, where genfound runs from its checkout."""
    facts = {"python": platform.python_version(), **versions("genfound", "torch", "lightning", "diffusers")}
    root = Path(__file__).resolve().parents[3]
    found = commit(root) if is_checkout(root) else None
    return facts if found is None else {**facts, "commit": found}


def versions(*packages: str) -> dict[str, str]:
    """Of those that are installed."""
    found = {}
    for package in packages:
        with contextlib.suppress(PackageNotFoundError):
            found[package] = version(package)
    return found


def is_checkout(root: Path) -> bool:
    """Whether a folder is the repository of genfound itself, and not one around an installation or a copy of it."""
    try:
        project = tomllib.loads((root / "pyproject.toml").read_text())
    except (OSError, ValueError):
        return False
    return (root / ".git").exists() and project.get("project", {}).get("name") == "genfound"


def commit(root: Path) -> str | None:
    """The commit of a checkout, marked if files were changed; `None` where git cannot tell."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    try:
        said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
    return said.stdout.strip()
