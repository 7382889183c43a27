"""The jobs of a study in the terminal, as they go."""

import time
from collections.abc import Sequence
from datetime import timedelta
from math import isnan
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.table import Table

from genfound.config import sweeps
from genfound.reporting.collect import Run, labels, read_study

EVERY = 2.0
"""Seconds between two looks."""


def watch(folder: Path) -> None:
    """Show the jobs of a study until none of them is at work, nor a sweep of this machine about to begin another."""
    runs = read_study(folder)
    with Live(table(runs), console=Console(), auto_refresh=False) as live:
        while sweeps.running(folder) or any(run.state == "at work" for run in runs):
            time.sleep(EVERY)
            runs = read_study(folder)
            live.update(table(runs), refresh=True)


def table(runs: Sequence[Run]) -> Table:
    """State, images, loss, speed and time left of each job."""
    shown = Table("job", "state", "images", "loss", "images/s", "left", "reason")
    for run, label in zip(runs, labels(runs), strict=True):
        rate, loss = run.last("perf/images_per_s"), run.last("train/loss")
        left = (run.budget - run.images_seen) / rate if run.state == "at work" and rate > 0 else float("nan")
        numbers = ("" if isnan(value) else f"{value:{form}}" for value, form in ((loss, ".4f"), (rate, ",.1f")))
        clock = "" if isnan(left) else f"{timedelta(seconds=round(left))}"
        shown.add_row(label, run.state, run.progress, *numbers, clock, run.reason[:60])
    return shown
