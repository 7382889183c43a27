"""What a run reports to: Lightning's loggers; ours also take sentences and pictures.

`log`, `note` and `picture` are the only way from a callback to them. A logger's step is the global step, with
`images_seen` beside it.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lightning
import numpy as np
from lightning.pytorch.loggers import Logger

Sample = tuple[np.ndarray, str, str, int]
"""Image (height, width, 3) uint8, class, size, and seed of its noise."""

JUDGING = ("val/", "eval/")
"""How the names of metrics begin whose best value tells something; that of a noisy training loss does not."""

HIGHER_IS_BETTER = ("accuracy", "inception_score", "precision", "recall", "images_per_s", "tokens_per_s", "mfu")
"""Parts of the names of metrics that grow as a model gets better; the others fall."""


def higher_is_better(metric: str) -> bool:
    """Whether a metric grows as a model gets better."""
    return any(part in metric for part in HIGHER_IS_BETTER)


def improve(best: dict[str, float], metrics: Mapping[str, Any]) -> dict[str, float]:
    """Note which metrics are better than the best so far, as `best/<metric>`; returns these."""
    better = {}
    for key, value in metrics.items():
        if key.startswith(JUDGING) and isinstance(value, int | float) and math.isfinite(value):
            before = best.get(f"best/{key}")
            if before is None or (value > before if higher_is_better(key) else value < before):
                better[f"best/{key}"] = value
    best |= better
    return better


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

    def picture(self, name: str, file: Path, images_seen: int, step: int, samples: Sequence[Sample] = ()) -> None:
        """A picture that has been written to a file, and the samples that are in it."""


def log(trainer: lightning.Trainer, metrics: Mapping[str, float]) -> None:
    """Numbers after the current global step; `images_seen` is among them."""
    for logger in trainer.loggers:
        logger.log_metrics(dict(metrics), trainer.global_step)


def note(trainer: lightning.Trainer, text: str) -> None:
    """A sentence, to those that take one."""
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.note(text, trainer.global_step)


def picture(
    trainer: lightning.Trainer, name: str, file: Path, images_seen: int, samples: Sequence[Sample] = ()
) -> None:
    """A picture, to those that take one."""
    for logger in trainer.loggers:
        if isinstance(logger, RunLogger):
            logger.picture(name, file, images_seen, trainer.global_step, samples)
