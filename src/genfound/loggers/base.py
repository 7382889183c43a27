"""What a run reports to: Lightning's loggers; ours also take sentences and pictures.

`log`, `note` and `picture` are the only way from a callback to them. A logger's step is the global step, with
`images_seen` beside it.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lightning
from lightning.pytorch.loggers import Logger


class RunLogger(Logger):
    """A Lightning logger that also takes sentences and pictures."""

    @property
    def name(self) -> str:
        """Of the logger."""
        return type(self).__name__

    @property
    def version(self) -> str:
        """A run directory has one of each logger."""
        return ""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        """The configuration is in the run's config.yaml."""

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Numbers after a global step."""

    def note(self, text: str, step: int) -> None:
        """A sentence about the run, after a global step."""

    def picture(self, name: str, file: Path, images_seen: int, step: int) -> None:
        """A picture that has been written to a file."""


def log(trainer: lightning.Trainer, metrics: Mapping[str, float]) -> None:
    """Numbers after the current global step; `images_seen` is among them."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), trainer.global_step)


def note(trainer: lightning.Trainer, text: str) -> None:
    """A sentence, to those that take one."""
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.note(text, trainer.global_step)


def picture(trainer: lightning.Trainer, name: str, file: Path, images_seen: int) -> None:
    """A picture, to those that take one."""
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.picture(name, file, images_seen, trainer.global_step)
