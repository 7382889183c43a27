"""TensorBoard, whose tab HPARAMS compares runs."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from genfound.loggers.base import improve
from genfound.loggers.json_lines import lines_of

COMPARED = "val/velocity_mse_ema"
"""The tab HPARAMS shows its last and its best value."""


class TensorBoard(TensorBoardLogger):
    """Lightning's, with every setting and the last and best validation loss in the tab HPARAMS.

    Args:
        folder: run directory, whose metrics.jsonl has what was best before the run goes on.
        options: of Lightning's logger.
    """

    def __init__(self, folder: Path, **options: Any) -> None:
        super().__init__(default_hp_metric=False, **options)
        self._best: dict[str, float] = {}
        for line in lines_of(folder / "metrics.jsonl"):
            improve(self._best, line)

    def log_hyperparams(self, params: Any, metrics: dict[str, Any] | None = None, step: int | None = None) -> None:
        """The settings, with the names of what they are compared by, which has no values yet."""
        super().log_hyperparams(params, metrics or {COMPARED: None, f"best/{COMPARED}": None}, step)

    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Numbers, and those that are the best so far."""
        numbers = {key: value for key, value in metrics.items() if value is not None}
        super().log_metrics({**numbers, **improve(self._best, numbers)}, step)
