from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genfound import build
from genfound.callbacks.preview import Preview
from genfound.loggers.base import RunLogger
from tests.cli.commands import TINY
from tests.helpers import composed, small_nit, training_module


class Diverging:
    """A sampling whose images are not finite."""

    def draw(self, *_: Any, **__: Any) -> Any:
        raise FloatingPointError("an image is not finite")


def test_a_preview_that_diverges_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[tuple[str, int]] = []
    logger = RunLogger()
    monkeypatch.setattr(logger, "note", lambda *note: notes.append(note))
    ema: Any = SimpleNamespace(ema_weights=lambda module: nullcontext())
    preview = Preview(10, build.build_run(composed(*TINY), 1), ema)
    preview.folder, preview.sampling = tmp_path, Diverging()  # type: ignore[assignment]
    module = training_module(small_nit())
    trainer: Any = SimpleNamespace(is_global_zero=True, global_step=7, loggers=[logger])
    preview.on_interval(trainer, module)
    assert notes == [("no preview: an image is not finite", 7)]
    assert module.training and not list(tmp_path.iterdir())
