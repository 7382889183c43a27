from __future__ import annotations

import json
from pathlib import Path

import pytest

from genfound.loggers.json_lines import Courtesy, JsonLines


def lines(file: Path) -> list[dict[str, float | None]]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def log(sink: JsonLines, *steps: int) -> None:
    for step in steps:
        sink.log({"train/loss": step / 2, "images_seen": 8 * step}, step)


def test_each_moment_is_one_line_that_is_there_at_once(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    log(sink, 1)
    sink.log({"val/loss": 0.25}, 1)
    assert lines(tmp_path / "metrics.jsonl") == [
        {"step": 1, "train/loss": 0.5, "images_seen": 8},
        {"step": 1, "val/loss": 0.25},
    ]
    sink.close()


def test_notes_are_lines_of_their_step(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    sink = JsonLines(file, 0)
    log(sink, 1)
    sink.note("something happened", 2)
    sink.close()
    assert lines(file)[1] == {"step": 2, "note": "something happened"}
    JsonLines(file, 1).close()
    assert [line["step"] for line in lines(file)] == [1]


def test_later_steps_are_dropped_on_resume(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    sink = JsonLines(file, 0)
    log(sink, 10, 20, 30, 40)
    sink.close()
    sink = JsonLines(file, 20)
    assert [line["step"] for line in lines(file)] == [10, 20]
    log(sink, 30)
    sink.close()
    assert [line["step"] for line in lines(file)] == [10, 20, 30]
    assert [path.name for path in tmp_path.iterdir()] == ["metrics.jsonl"]


@pytest.mark.parametrize("cut", ['{"step": 20, "train/lo', "", "[1, 2]", "17", '{"loss": 1}', '{"step": null}'])
def test_half_and_foreign_lines_are_dropped_on_resume(tmp_path: Path, cut: str) -> None:
    file = tmp_path / "metrics.jsonl"
    file.write_text('{"step": 10, "train/loss": 1.0}\n' + cut)
    sink = JsonLines(file, 30)
    log(sink, 40)
    sink.close()
    assert [line["step"] for line in lines(file)] == [10, 40]


def test_numbers_that_are_not_finite_become_null(tmp_path: Path) -> None:
    sink = JsonLines(tmp_path / "metrics.jsonl", 0)
    sink.log({"a": float("nan"), "b": float("inf"), "c": -float("inf"), "d": 0.0}, 3)
    sink.close()
    assert lines(tmp_path / "metrics.jsonl") == [{"step": 3, "a": None, "b": None, "c": None, "d": 0.0}]
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()


class Broken:
    """A sink that fails when it is used."""

    def __init__(self) -> None:
        self.used = 0

    def log(self, metrics: dict[str, float], step: int) -> None:
        self.used += 1
        raise ConnectionError("no way to the server\nlong story")


class Notes:
    """Keeps what is noted."""

    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str, step: int) -> None:
        self.notes.append(text)


def test_a_courtesy_that_fails_is_dropped_with_a_note() -> None:
    terminal, broken = Notes(), Broken()
    sink = Courtesy(terminal, "Weights & Biases", lambda: broken, 0)  # type: ignore[arg-type, return-value]
    for step in (1, 2):
        sink.log({"a": 1.0}, step)
    sink.picture("samples", Path("x.png"), 8, 2)
    sink.close()
    assert broken.used == 1
    assert terminal.notes == [
        "Weights & Biases has stopped (no way to the server); training goes on, with its curves in metrics.jsonl"
    ]


def test_a_courtesy_that_cannot_begin_is_a_note() -> None:
    terminal = Notes()
    sink = Courtesy(terminal, "Weights & Biases", lambda: __import__("no_such_module"), 0)  # type: ignore[arg-type]
    sink.log({"a": 1.0}, 1)
    sink.close()
    assert terminal.notes[0].startswith(
        "Weights & Biases has stopped (No module named 'no_such_module'); training goes"
    )
