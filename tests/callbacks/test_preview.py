from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from genfound import build
from genfound.callbacks.preview import Preview
from genfound.loggers.base import RunLogger
from genfound.modules.base import module_of
from tests.cli.commands import TINY
from tests.helpers import composed


class Diverging:
    """A sampling whose images are not finite."""

    def __call__(self, *_: Any, **__: Any) -> Any:
        raise FloatingPointError("an image is not finite")


def test_a_preview_that_diverges_does_not_end_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    notes: list[tuple[str, int]] = []
    logger = RunLogger()
    monkeypatch.setattr(logger, "note", lambda *note: notes.append(note))
    preview, parts = Preview(10), build.build_run(composed(*TINY), 1)
    trainer: Any = SimpleNamespace(
        is_global_zero=True, global_step=7, loggers=[logger], callbacks=[], default_root_dir=tmp_path,
        datamodule=SimpleNamespace(parts=parts), strategy=SimpleNamespace(broadcast=lambda value: value),
    )  # fmt: skip
    module = module_of(parts)
    preview.setup(trainer, module, "fit")
    preview.sampling = Diverging()  # type: ignore[assignment]
    preview.on_interval(trainer, module)
    assert notes == [("no preview: an image is not finite", 7)]
    assert module.training and not list(tmp_path.iterdir())
