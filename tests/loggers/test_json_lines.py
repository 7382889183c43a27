from __future__ import annotations

import json
from pathlib import Path

import pytest

from genfound.loggers.json_lines import JsonLines


def lines(file: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def log(logger: JsonLines, *steps: int) -> None:
    for step in steps:
        logger.log_metrics({"train/loss": step / 2, "images_seen": 8 * step}, step)


def test_each_moment_is_one_line_that_is_there_at_once(tmp_path: Path) -> None:
    logger = JsonLines(tmp_path / "metrics.jsonl", 0)
    log(logger, 1)
    logger.log_metrics({"val/loss": 0.25}, 1)
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 0.5, "images_seen": 8},
        {"step": 1, "val/loss": 0.25},
    ]
    logger.finalize("success")


def test_notes_are_lines_of_their_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    logger = JsonLines(file, 0)
    log(logger, 1)
    logger.note("something happened", 2)
    logger.finalize("success")
    assert lines(file)[1] == {"step": 2, "note": "something happened"}
    JsonLines(file, 1).finalize("success")
    assert [line["step"] for line in lines(file)] == [1]


def test_later_steps_are_dropped_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    logger = JsonLines(file, 0)
    log(logger, 10, 20, 30, 40)
    logger.finalize("success")
    logger = JsonLines(file, 20)
    assert [line["step"] for line in lines(file)] == [10, 20]
    log(logger, 30)
    logger.finalize("success")
    assert [line["step"] for line in lines(file)] == [10, 20, 30]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", ['{"step": 20, "train/lo', "", "[1, 2]", "17", '{"loss": 1}', '{"step": null}'])
def test_half_and_foreign_lines_are_dropped_on_resume(tmp_path: Path, cut: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "train/loss": 1.0}\n' + cut)
    logger = JsonLines(file, 30)
    log(logger, 40)
    logger.finalize("success")
    assert [line["step"] for line in lines(file)] == [10, 40]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    logger = JsonLines(tmp_path / "metrics.jsonl", 0)
    logger.log_metrics({"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.0}, 3)
    logger.finalize("success")
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 3, "a": None, "b": None, "c": None, "d": 0.0}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
