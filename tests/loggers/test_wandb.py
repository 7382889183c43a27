"""What W&B has of a run, read back from its offline directories."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import wandb
from PIL import Image
from wandb.cli.cli import cli
from wandb.proto import wandb_internal_pb2

from genfound.loggers.json_lines import JsonLines
from genfound.loggers.wandb import WandbLogger, stored_records

CONFIG = {
    "seed": 3,
    "model": {"depth": 2, "_target_": "genfound.backbones.nit.NiT"},
    "data": {"_target_": "genfound.data.images.shapes.Shapes"},
    "options": {"model": "nit_tiny", "guidance": "none"},
}


def line(step: int) -> dict[str, float]:
    return {"images_seen": 8 * step, "train/loss": step / 2, "val/loss": abs(step - 2.5), "eval/recall": -abs(step - 2)}


def begin(folder: Path, start: int, anew: bool = False) -> tuple[JsonLines, WandbLogger]:
    """The loggers of a run that goes on after so many steps."""
    logger = WandbLogger(folder, "genfound", anew)
    logger.log_hyperparams(CONFIG)
    return JsonLines(folder / "metrics.jsonl", start), logger


def log(loggers: tuple[JsonLines, WandbLogger], steps: range) -> None:
    for step in steps:
        for logger in loggers:
            logger.log_metrics(line(step), step)


def end(loggers: tuple[JsonLines, WandbLogger]) -> None:
    """As at the end of a process, where W&B's own process writes what is left and ends as well."""
    for logger in loggers:
        logger.finalize("success")
    wandb.teardown()


def records(folder: Path) -> list[tuple[str, Any]]:
    """(id of the W&B run, record) of all offline directories, oldest first."""
    message: Any = vars(wandb_internal_pb2)["Record"]
    files = sorted((folder / "wandb").glob("offline-run-*/*.wandb"))
    return [(file.stem, message.FromString(data)) for file in files for data in stored_records(file)]


def rows(folder: Path) -> list[tuple[str, int, dict[str, Any]]]:
    """(id, step, values) of each row."""
    found = []
    for run, record in records(folder):
        if record.WhichOneof("record_type") == "history":
            items = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            found.append((run, record.history.step.num, items))
    return found


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WANDB_MODE", "offline")
    return tmp_path / "axes/seed-3"


KILLED = """
import os, signal, sys
from pathlib import Path
from tests.loggers.test_wandb import begin, log
log(begin(Path(sys.argv[1]), 0), range(1, 7))
os.kill(os.getpid(), signal.SIGKILL)
"""


def artifact_files(run: Path) -> list[str]:
    """What is sent of the tables of samples beside their text: the pictures."""
    own = (record.artifact for _, record in records(run) if record.WhichOneof("record_type") == "artifact")
    return [entry.path for artifact in own for entry in artifact.manifest.contents]


@pytest.mark.parametrize("first", [pytest.param("killed", marks=pytest.mark.slow), "written"])
def test_a_run_that_goes_on_shows_each_step_once(run: Path, first: str) -> None:
    """Six steps, the last checkpoint after three: W&B has lost all of them, or has all of them."""
    if first == "killed":
        killed = subprocess.run([sys.executable, "-c", KILLED, str(run)], env=dict(os.environ), check=False)
        assert killed.returncode == -signal.SIGKILL
    else:
        loggers = begin(run, 0)
        log(loggers, range(1, 7))
        end(loggers)
    loggers = begin(run, 3)
    log(loggers, range(4, 9))
    picture = run / "images-64.png"
    Image.new("RGB", (4, 4)).save(picture)
    image = np.zeros((4, 6, 3), np.uint8)
    loggers[1].picture("samples", picture, 64, 8, [(image, "moon", "4x6", 0), (image, "ring", "4x6", 0)])
    end(loggers)
    found = rows(run)
    assert [step for _, step, _ in found] == list(range(1, 9))
    assert all(values["train/loss"] == step / 2 and values["images_seen"] == 8 * step for _, step, values in found)
    assert found[-1][2]["samples._type"] == "image-file"
    table = json.loads(next(run.glob("wandb/offline-run-*/files/media/table/samples_table_*.json")).read_text())
    assert table["columns"] == ["picture", "class", "size", "seed", "images_seen"]
    assert [row[1:] for row in table["data"]] == [["moon", "4x6", 0, 64], ["ring", "4x6", 0, 64]]
    [sent] = [name for name in artifact_files(run) if name.startswith("media/images/")]  # both are the same one
    assert sent.endswith(".png")
    assert len({run_id for run_id, _, _ in found}) == 1
    described = [record.run for _, record in records(run) if record.WhichOneof("record_type") == "run"]
    assert {(run.run_group, run.display_name, run.project) for run in described} == {("axes", "seed-3", "genfound")}
    kept = {item.key: json.loads(item.value_json) for item in described[-1].config.update}
    assert CONFIG.items() <= kept.items()
    assert {(run.job_type, *run.tags) for run in described} == {("train", "NiT", "Shapes", "nit_tiny")}


def test_the_summary_has_the_best_value_of_the_whole_run(run: Path) -> None:
    """Also where it lies before the run goes on, when what is best would begin anew in W&B's own summary."""
    for steps in (range(1, 4), range(4, 7)):
        loggers = begin(run, steps[0] - 1)
        log(loggers, steps)
        end(loggers)
    end_of_first = [record.WhichOneof("record_type") for _, record in records(run)].index("exit")
    items = [item for _, record in records(run)[end_of_first:] for item in record.summary.update]
    last = {item.key or ".".join(item.nested_key): json.loads(item.value_json) for item in items}
    assert (last["best/val/loss"], last["val/loss"]) == (0.5, 3.5)
    assert (last["best/eval/recall"], last["eval/recall"]) == (0, -4)
    assert last["train/loss"] == 3 and "best/train/loss" not in last


def test_the_command_that_sends_an_offline_run_later_is_printed_and_works(
    run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for steps in (range(1, 3), range(3, 5)):
        loggers = begin(run, steps[0] - 1)
        log(loggers, steps)
        end(loggers)
    _, _, command = capsys.readouterr().out.strip().splitlines()[-1].partition(": ")
    words = shlex.split(command)
    assert words[:2] == ["wandb", "sync"] and sorted(map(Path, words[2:])) == sorted((run / "wandb").glob("offline-*"))
    assert len(words) == 4
    taken = cli.commands["sync"].make_context("sync", list(words[2:])).params  # the command refuses what does not exist
    assert tuple(words[2:]) in taken.values()


def test_lines_of_another_configuration_stay_in_a_run_of_their_own(run: Path) -> None:
    loggers = begin(run, 0)
    log(loggers, range(1, 6))
    end(loggers)
    loggers = begin(run, 2, anew=True)
    log(loggers, range(3, 5))
    end(loggers)
    steps: dict[str, list[int]] = {}
    for run_id, step, _ in rows(run):
        steps.setdefault(run_id, []).append(step)
    assert sorted(steps.values()) == [[1, 2, 3, 4], [1, 2, 3, 4, 5]]


def test_records_of_several_blocks_are_read(run: Path) -> None:
    """Records of more than 32 KiB lie in pieces."""
    loggers = begin(run, 0)
    for step in range(1, 5):
        loggers[1].log_metrics({f"layer/{i}": float(i) for i in range(1000)}, step)
    end(loggers)
    assert [(step, len([key for key in row if key.startswith("layer")])) for _, step, row in rows(run)] == [
        (step, 1000) for step in range(1, 5)
    ]


def test_a_failure_of_wandb_is_said_once_and_ends_it(
    run: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tries = []

    def fail(**_: Any) -> None:
        tries.append(1)
        raise ConnectionError("no way to the server\nlong story")

    monkeypatch.setattr(wandb, "init", fail)
    logger = WandbLogger(run, "genfound")
    for step in (1, 2):
        logger.log_metrics(line(step), step)
    logger.note("a sentence", 2)
    logger.picture("samples", Path("x.png"), 8, 2)
    logger.finalize("success")
    assert len(tries) == 1
    assert capsys.readouterr().out == (
        "Weights & Biases has stopped (no way to the server); training goes on, with its curves in metrics.jsonl\n"
    )
