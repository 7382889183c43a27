"""What code produced a result."""

import contextlib
import os
import platform
import subprocess
import tomllib
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path


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
