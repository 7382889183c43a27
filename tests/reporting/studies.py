"""Studies without training: run directories with the figures that a test wants."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from genfound.runtime import run_directory
from tests.helpers import run_dir

TINY = ["model.width=32", "model.depth=1", "model.heads=1", "data.images=300", "logger=jsonl", "budget.images=400"]


def made_run(
    folder: Path, overrides: Sequence[str], figures: Mapping[str, Sequence[float]], state: str = "DONE"
) -> None:
    """A run directory with a line of metrics for each hundred images."""
    run_dir(folder, *TINY, *overrides)
    run_directory.note_overrides(folder, list(overrides))
    lines = []
    for number in range(len(next(iter(figures.values()), ()))):
        at = {"step": 10 * (number + 1), "images_seen": 100 * (number + 1)}
        lines.append({**at, **{key: values[number] for key, values in figures.items()}})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    if state == "DONE":
        run_directory.mark_done(folder, {"images": 400, "steps": 40, "loss": 1.0})
    elif state == "FAILED":
        run_directory.mark_failed(folder, "Traceback\nRuntimeError: no room <on> the disk\n")
    (folder / "samples").mkdir()
    Image.fromarray(np.full((16, 24, 3), 128, np.uint8)).save(folder / "samples/images-000000400.png")


def made_study(folder: Path) -> Path:
    """Two paths and three seeds, of which gvp is lower by 0.1, 0.2 and 0.3; and one run that failed."""
    for path, shifts in (("linear", (0.0, 0.0, 0.0)), ("gvp", (-0.1, -0.2, -0.3))):
        for seed, shift in enumerate(shifts):
            end = 1.0 + 0.5 * seed + shift
            figures = {
                "val/velocity_mse_ema": [2.0, 1.7, 1.5, end],
                "train/loss": [3.0, 2.5, 2.2, 2.0],
                "train/loss_t/0.00-0.50": [1.0] * 4,
                "train/loss_t/0.50-1.00": [2.0] * 4,
                "perf/images_per_s": [10.0, 11.0, 12.0, 13.0],
                "perf/gflops_per_image": [0.5 if path == "linear" else 0.7] * 4,
            }
            overrides = [f"objective.path={path}", f"seed={seed}"]
            made_run(folder / f"objective.path-{path}__seed-{seed}", overrides, figures)
    made_run(folder / "objective.path-vp__seed-0", ["objective.path=vp", "seed=0"], {}, state="FAILED")
    return folder
