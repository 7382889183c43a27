"""The runs of a study: what was set, how far each one came, and its figures."""

import functools
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pandas as pd

from genfound.config.checks import integer
from genfound.config.compose import flatten
from genfound.evaluation.protocol import RESULTS, Protocol, Result, read_results, size_text
from genfound.loggers import provenance
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
        """Of weights, data order and noise; 0 where it is unknown."""
        return int(self.config.get("seed", 0))

    @property
    def budget(self) -> int:
        """Images after which it ends."""
        return int(self.config.get("budget.images") or self.config.get("optimizer.budget_images", 0))

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

    @property
    def code(self) -> list[str]:
        """What has trained it, one after another."""
        return [provenance.in_words(line) for line in lines_of(self.folder / provenance.FILE)]

    @functools.cached_property
    def evaluations(self) -> Sequence[Result]:
        """What `genfound.evaluate` has measured."""
        return read_results(self.folder)

    @property
    def picture(self) -> Path | None:
        """The last preview."""
        return next(reversed(visible(self.folder / "samples", "images-*.png")), None)


def read_study(folder: Path) -> list[Run]:
    """The runs of a study, in the order in which they were first asked for, and folders of results of others.

    Raises:
        FileNotFoundError: there is no such folder, or it holds no runs.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"study={folder.name}: there is no folder {folder}; train with study={folder.name}")
    runs = [path for path in visible(folder) if _marker(path).is_file()]
    if not runs:
        raise FileNotFoundError(f"study={folder.name}: {folder} holds no run directories")
    return [read_run(path) for path in sorted(runs, key=_asked)]


def _marker(folder: Path) -> Path:
    """What a run directory has, or a folder of results alone."""
    config = folder / "config.yaml"
    return config if config.is_file() else folder / RESULTS


def _asked(folder: Path) -> tuple[float, str]:
    noted = folder / run_directory.OVERRIDES
    return (noted if noted.is_file() else _marker(folder)).stat().st_mtime, folder.name


def read_run(folder: Path) -> Run:
    """A run directory, whatever has become of the run; or a folder of results, of which nothing else is known."""
    if not (folder / "config.yaml").is_file():
        return Run(folder, {}, {}, pd.DataFrame(), "done", "")
    state, reason = _state(folder)
    lines = lines_of(folder / "metrics.jsonl")
    numbers = [{key: value for key, value in line.items() if isinstance(value, int | float)} for line in lines]
    curve = pd.DataFrame([line for line in numbers if "images_seen" in line])
    config = flatten(run_directory.read_config(folder))
    integer(f"{folder / 'config.yaml'}: seed", config.get("seed", 0), 0)
    return Run(folder, config, run_directory.given(folder), curve, state, reason)


def _state(folder: Path) -> tuple[str, str]:
    """How a run stands, and why it failed or was stopped."""
    if (folder / "DONE").exists():
        return "done", ""
    if (folder / "FAILED").exists():
        lines = (folder / "FAILED").read_text(errors="replace").strip().splitlines()
        return "failed", lines[-1] if lines else "unknown"
    if halt := run_directory.stopped(folder):
        return "stopped", halt["reason"]
    written = [path.stat().st_mtime for path in visible(folder) if path.is_file()]
    return ("at work" if time.time() - max(written) < AT_WORK else "stopped"), ""


def evaluated(runs: Sequence[Run]) -> list[Run]:
    """A run for each way in which the networks of runs were sampled; none if each was sampled in one way.

    What tells the ways apart, such as `size` or `guidance.scale`, is a setting, and the figures are metrics `eval/...`.
    Of the same way, also at other times of a training, the last figures count.
    """
    found: dict[tuple[Any, ...], Run] = {}
    for run in runs:
        for result in run.evaluations:
            way, origin = _way(result.protocol), evaluated_run(run, result)
            figures = pd.DataFrame([{"images_seen": 0} | {f"eval/{key}": v for key, v in result.figures.items()}])
            one = replace(origin, given={**origin.given, **way}, curve=figures, state="done")
            found[str(origin.folder), *way.items()] = one
    return list(found.values()) if len({folder for folder, *_ in found}) < len(found) else []


def _way(protocol: Protocol) -> dict[str, str]:
    """{setting: value} of how samples were drawn, as on the command line."""
    drawing = flatten({group: getattr(protocol.drawing, group) for group in ("sampler", "guidance", "rope")})
    written = {key: json.dumps(value, separators=(",", ":")).strip('"') for key, value in drawing.items()}
    return {"size": size_text(protocol.size), **{key: text for key, text in written.items() if text != "null"}}


def evaluated_run(run: Run, result: Result) -> Run:
    """The run that was evaluated, if it is still where it was."""
    folder = Path(result.subject["from"])
    return run if run.config or not (folder / "config.yaml").is_file() else read_run(folder)


def varied(runs: Sequence[Run]) -> list[str]:
    """The settings that differ between runs, but for the seed and for where they lie."""
    keys = dict.fromkeys(key for run in runs for key in run.given)
    free = ("seed", *run_directory.PLACE)
    return [key for key in keys if key not in free and len({run.setting(key) for run in runs}) > 1]


def labels(runs: Sequence[Run]) -> list[str]:
    """What tells each run from the others, as on the command line; their folders where that does not."""
    keys = varied(runs)
    keys += ["seed"] * (len({run.setting("seed") for run in runs}) > 1)
    found = [" ".join(f"{key}={run.setting(key)}" for key in keys) for run in runs]
    return found if len(set(found)) == len(runs) > 1 else [run.folder.name for run in runs]


def metric_names(runs: Sequence[Run], wanted: Sequence[str]) -> list[str]:
    """The metrics that runs have, each once, of those that are wanted: by name, or by what is before a slash."""
    there = dict.fromkeys(column for run in runs for column in run.curve)
    names = (name for want in wanted for name in there if name == want or name.startswith(f"{want}/"))
    return [*dict.fromkeys(names)]
