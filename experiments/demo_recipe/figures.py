"""The table of the study: what each run ended with, and what its steps cost.

python experiments/demo_recipe/figures.py runs/demo_recipe experiments/demo_recipe/figures.csv
Processor time is that of a training step on one thread, all recipes taking turns, times the steps of the run.
"""

import csv
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf

from benchmarks.timing import interleaved, medians
from genfound import build
from genfound.modules.base import module_of

KEYS = (
    "model.width", "model.depth", "data.max_tokens", "objective.time_mean", "optimizer.lr", "optimizer.warmup_images",
    "budget.images",
)  # fmt: skip
VALUES = ("step", "val/velocity_mse_ema", "val/velocity_mse", "val/loss_ema")


def row(run: Path) -> tuple[dict[str, Any], Any]:
    """The figures of a run at its end, and its configuration."""
    config = OmegaConf.load(run / "config.yaml")
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = next(line for line in reversed(lines) if "val/loss" in line)
    chosen = {key: OmegaConf.select(config, key) for key in KEYS}
    chosen["budget.images"] = last["images_seen"]
    return {**chosen, **{key: last[key] for key in VALUES}}, OmegaConf.to_container(config, resolve=True)


def training_step(config: Any) -> Callable[[], None]:
    """A step of the optimizer on the next pack, with clipping, without the average and the logs."""
    parts = build.build_run(config, 1)
    module = module_of(parts)
    module.logs_losses = False
    optimizer, items = module.configure_optimizers(), iter(parts.loader(0))

    def step() -> None:
        module.training_step(next(items), 0)["loss"].backward()
        module.configure_gradient_clipping(optimizer)
        optimizer.step()
        optimizer.zero_grad()

    return step


def main(runs: str, out: str) -> None:
    """Write the table, longest runs last."""
    torch.set_num_threads(1)
    rows, configs = zip(*sorted((row(file.parent) for file in Path(runs).glob("*/DONE")), key=order), strict=True)
    seconds = medians(interleaved([training_step(config) for config in configs], 3))
    with open(out, "w", newline="") as file:
        table = csv.DictWriter(file, [*rows[0], "ms/step", "minutes"])
        table.writeheader()
        for each, second in zip(rows, seconds, strict=True):
            cost = {"ms/step": f"{second * 1e3:.0f}", "minutes": f"{second * each['step'] / 60:.2f}"}
            table.writerow({key: f"{v:.4f}" if key.startswith("val/") else v for key, v in {**each, **cost}.items()})


def order(pair: tuple[dict[str, Any], Any]) -> tuple[float, ...]:
    """By length, then by the choices."""
    return tuple(pair[0][key] for key in ("budget.images", *KEYS[:-1]))


if __name__ == "__main__":
    main(*sys.argv[1:])
