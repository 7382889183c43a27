"""The runs of a study: what was set, how far each one came, and its figures."""

import functools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from genfound.config.compose import flatten
from genfound.evaluation.protocol import Result, read_results
from genfound.loggers.json_lines import lines_of
from genfound.runtime import run_directory
from genfound.runtime.files import visible

AT_WORK = 120.0
"""Seconds since a run has last written anything, within which it is taken to be at work."""

DEFAULT = "default"
"""The value of a setting that was not given, where the configuration has no such key."""


@dataclass(frozen=True)
class Run:
    """A run directory, as far as it has come."""

    folder: Path
    config: Mapping[str, Any]  # {dotted key: value}
    given: Mapping[str, str]  # {dotted key or group: value}, as on the command line
    curve: pd.DataFrame  # a row for each line of metrics.jsonl
    state: str  # done, failed, at work or stopped
    reason: str  # why it failed or was stopped

    @property
    def seed(self) -> int:
        """Of weights, data order and noise."""
        return int(self.config["seed"])

    @property
    def budget(self) -> int:
        """Images after which it ends."""
        return int(self.config["budget.images"] or self.config["optimizer.budget_images"])

    @property
    def images_seen(self) -> int:
        """By its last line."""
        return int(self.curve["images_seen"].max()) if len(self.curve) else 0

    @property
    def progress(self) -> str:
        """Images of its budget."""
        return f"{self.images_seen:,} of {self.budget:,}"

    def last(self, metric: str) -> float:
        """The last value of a metric; NaN if there is none."""
        values = self.values(metric)
        return float(values.iloc[-1]) if len(values) else float("nan")

    def values(self, metric: str) -> pd.Series:
        """All values of a metric, by images seen."""
        if metric not in self.curve:
            return pd.Series(dtype=float)
        return self.curve.set_index("images_seen")[metric].dropna().astype(float)

    def setting(self, key: str) -> str:
        """What was set, or what the configuration says."""
        return self.given.get(key, str(self.config.get(key, DEFAULT)))

    @functools.cached_property
    def evaluations(self) -> Sequence[Result]:
        """What `genfound.evaluate` has measured."""
        return read_results(self.folder)

    @property
    def picture(self) -> Path | None:
        """The last preview."""
        return next(reversed(visible(self.folder / "samples", "images-*.png")), None)


def read_study(folder: Path) -> list[Run]:
    """The runs of a study, in the order in which they were first asked for.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no runs.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"study={folder.name}: there is no folder {folder}; train with study={folder.name}")
    runs = [path for path in visible(folder) if (path / "config.yaml").is_file()]
    if not runs:
        raise FileNotFoundError(f"study={folder.name}: {folder} holds no run directories")
    return [read_run(path) for path in sorted(runs, key=_asked)]


def _asked(folder: Path) -> tuple[float, str]:
    noted = folder / run_directory.OVERRIDES
    return (noted if noted.is_file() else folder / "config.yaml").stat().st_mtime, folder.name


def read_run(folder: Path) -> Run:
    """A run directory, whatever has become of the run."""
    pairs = (override.lstrip("+~").partition("=") for override in run_directory.overrides_of(folder))
    state, reason = _state(folder)
    curve = pd.DataFrame([line for line in lines_of(folder / "metrics.jsonl") if "images_seen" in line])
    config = flatten(run_directory.read_config(folder))
    return Run(folder, config, {key: value for key, _, value in pairs}, curve, state, reason)


def _state(folder: Path) -> tuple[str, str]:
    """How a run stands, and why it failed or was stopped."""
    if (folder / "DONE").exists():
        return "done", ""
    if (folder / "FAILED").exists():
        lines = (folder / "FAILED").read_text().strip().splitlines()
        return "failed", lines[-1] if lines else "unknown"
    if halt := run_directory.stopped(folder):
        return "stopped", halt["reason"]
    written = [path.stat().st_mtime for path in visible(folder) if path.is_file()]
    return ("at work" if time.time() - max(written) < AT_WORK else "stopped"), ""


def varied(runs: Sequence[Run]) -> list[str]:
    """The settings that differ between runs, but for the seed and for where they lie."""
    keys = dict.fromkeys(key for run in runs for key in run.given)
    free = ("seed", *run_directory.PLACE)
    return [key for key in keys if key not in free and len({run.setting(key) for run in runs}) > 1]


def metric_names(runs: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """The metrics that runs have, of those that are wanted: by name, or all that begin with a name and a slash."""
    found = dict.fromkeys(column for run in runs for column in run.curve)
    return [name for want in wanted for name in found if name == want or name.startswith(f"{want}/")]
