"""What TensorBoard has of a run, read back from its event files."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tensorboardX.proto.event_pb2 import Event
from tensorboardX.proto.plugin_hparams_pb2 import HParamsPluginData

from genfound.loggers.tensorboard import TensorBoard

METRIC = "val/velocity_mse_ema"


def summaries(folder: Path) -> Iterator[tuple[int, Any]]:
    """(step, value) of all event files, oldest first."""
    for file in sorted(folder.glob("events.*"), key=lambda file: file.stat().st_mtime_ns):
        with open(file, "rb") as stream:
            while header := stream.read(12):
                event = Event.FromString(stream.read(int.from_bytes(header[:8], "little")))
                stream.read(4)
                yield from ((event.step, value) for value in event.summary.value)


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    """(step, number) of a tag."""
    return [(step, value.simple_value) for step, value in summaries(folder) if value.tag == tag]


def hparams(folder: Path) -> tuple[dict[str, Any], list[str]]:
    """The settings, and the metrics they are compared by."""
    found = {}
    for _, value in summaries(folder):
        if value.tag.startswith("_hparams_/"):
            found[value.tag] = HParamsPluginData.FromString(value.metadata.plugin_data.content)
    start, experiment = found["_hparams_/session_start_info"], found["_hparams_/experiment"]
    kinds = {key: getattr(value, value.WhichOneof("kind")) for key, value in start.session_start_info.hparams.items()}
    return kinds, [info.name.tag for info in experiment.experiment.metric_infos]


def test_runs_are_compared_by_their_last_and_their_best_value(tmp_path: Path) -> None:
    """A run of three validations that goes on after the second one."""
    figures, lines = (0.5, 0.25, 0.75, 0.375), tmp_path / "metrics.jsonl"
    for steps in ((1, 2, 3), (3, 4)):
        lines.write_text("".join(json.dumps({"step": k, METRIC: figures[k - 1]}) + "\n" for k in range(1, steps[0])))
        options = {"save_dir": str(tmp_path), "name": "tensorboard", "version": ""}
        logger = TensorBoard(tmp_path, **options, purge_step=steps[0], filename_suffix=f".{steps[0]}")
        logger.log_hyperparams({"seed": 3, "model": {"depth": 2, "layout": "packed"}})
        for step in steps:
            logger.log_metrics({METRIC: figures[step - 1], "train/loss": 1.0}, step)
        logger.finalize("success")
    folder = tmp_path / "tensorboard"
    assert hparams(folder) == ({"seed": 3, "model/depth": 2, "model/layout": "packed"}, [METRIC, f"best/{METRIC}"])
    assert scalars(folder, METRIC) == [(1, 0.5), (2, 0.25), (3, 0.75), (3, 0.75), (4, 0.375)]
    assert scalars(folder, f"best/{METRIC}") == [(1, 0.5), (2, 0.25)]
    assert not scalars(folder, "hp_metric") and not scalars(folder, "best/train/loss")
