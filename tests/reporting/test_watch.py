"""The live table."""

import os
import threading
from pathlib import Path

import pytest

from genfound.reporting import watch
from tests.reporting.studies import made_study


def test_the_table_stays_between_two_jobs_of_a_sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No run of the study is at work."""
    monkeypatch.setattr(watch, "EVERY", 0.05)
    made_study(tmp_path / "paths")
    (tmp_path / f"paths/.sweep-{2**22 + 1}").touch()  # of a process that there cannot be
    mark = tmp_path / f"paths/.sweep-{os.getpid()}"
    mark.touch()
    shown = threading.Thread(target=watch.watch, args=(tmp_path / "paths",))
    shown.start()
    shown.join(1)
    assert shown.is_alive()
    mark.unlink()
    shown.join(60)
    assert not shown.is_alive()
