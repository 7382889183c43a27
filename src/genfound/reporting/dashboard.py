"""The dashboards of a study in Weights & Biases: saved for who is logged in, and as a script that saves them later."""

import functools
import json
from collections.abc import Sequence
from pathlib import Path

import wandb

from genfound.loggers.base import JUDGING
from genfound.loggers.wandb import mode
from genfound.reporting import wandb_report
from genfound.reporting.collect import Run, metric_names, varied
from genfound.runtime.files import atomic_write


def write_dashboards(runs: Sequence[Run], wanted: Sequence[str], out: Path) -> str:
    """Write wandb_report.py, its .json and the workspace; returns the addresses, or how to get them.

    Raises:
        ValueError: the runs have not logged to one W&B project, or it cannot be written to.
    """
    projects = sorted({run.config["logger.wandb.project"] for run in runs if "logger.wandb.project" in run.config})
    if len(projects) != 1:
        raise ValueError(
            f"wandb=true needs runs of one W&B project, not of {projects or 'none'}; train with logger=wandb"
        )
    metrics = metric_names(runs, wanted)
    best = [f"best/{metric}" for metric in metrics if metric.startswith(JUDGING)]
    compared = {"project": projects[0], "study": runs[0].folder.parent.name, "keys": config_keys(runs)}
    compared |= {"metrics": metrics, "best": best}
    spec = wandb_report.workspace("", **compared)._spec
    script = out / Path(wandb_report.__file__).name
    texts = {script: Path(wandb_report.__file__).read_text(), out / "wandb_workspace.json": json.dumps(spec, indent=1)}
    for file, text in {**texts, script.with_suffix(".json"): json.dumps(compared, indent=1)}.items():
        atomic_write(file, functools.partial(Path.write_text, data=text))
    if mode() != "online":
        return f"W&B dashboards, once you are logged in and the runs are synced: python {script}"
    try:
        return "\n".join(wandb_report.save(out, **compared))
    except (wandb.Error, OSError, ValueError) as error:
        raise ValueError(f"wandb=true: {error}; try again later: python {script}") from None


def config_keys(runs: Sequence[Run]) -> list[str]:
    """What varies, as the W&B runs have it: keys of the configuration, and of groups the chosen options."""
    return [key if any(key in run.config for run in runs) else f"options.{key}" for key in varied(runs)]
