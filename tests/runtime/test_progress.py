from __future__ import annotations

import time

import pytest

from genfound.runtime.progress import ProgressCounter


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock that stands still until its only item is changed."""
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_file_gets_a_line_now_and_then_and_at_the_end(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    counter = ProgressCounter("latents")
    for seconds, done in ((0, 200), (4, 300), (11, 420), (15, 430), (40, 1000)):
        clock[0] = 100.0 + seconds
        counter(done, 1000)
    lines = capsys.readouterr().out.splitlines()
    assert lines == ["420/1,000 latents  20 images/s  0:00:29 left", "1,000/1,000 latents  20 images/s  0:00:00 left"]


def test_images_that_are_under_way_count_in_part(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    counter = ProgressCounter("images")
    counter(0, 4)
    clock[0] += 20
    counter(0.5, 4)
    assert capsys.readouterr().out == "0.5/4 images  0.025 images/s  0:02:20 left\n"


def test_a_person_sees_one_line_that_moves(
    clock: list[float], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    counter = ProgressCounter("images")
    for done in (0, 1, 2):
        counter(done, 2)
        clock[0] += 1
    shown = capsys.readouterr().out
    assert shown.count("\r") == 2 and shown.endswith("2/2 images  1 images/s  0:00:00 left\x1b[K\n")
