"""The terminal: a progress bar for a person, plain lines for a log file."""

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from genfound.loggers.base import RunLogger, Sample


class Terminal(RunLogger):
    """Images seen, loss and speed."""

    def __init__(self, budget: int, images_seen: int) -> None:
        self.budget, self._validation = budget, ""
        self._bar: Progress | None = None
        if sys.stdout.isatty():
            columns = BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn(), TimeRemainingColumn()
            self._bar = Progress(*columns)
            self._task = self._bar.add_task("", total=budget, completed=images_seen)
            self._bar.start()

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Show figures, or the newest training line, in which a validation loss stays until the next one."""
        if "val/loss" in metrics:
            self._validation = f"  val {metrics['val/loss']:.4f} (ema {metrics['val/loss_ema']:.4f})"
        figures = [f"{key} {value:.4g}" for key, value in metrics.items() if key.startswith("eval")]
        if figures:
            print(f"step {step:,}  {'  '.join(figures)}", flush=True)
        if "perf/images_per_s" not in metrics:  # of TrainLog
            return
        seen = int(metrics["images_seen"])
        text = (
            f"{seen:,}/{self.budget:,} images  step {step:,}  loss {metrics['train/loss']:.4f}{self._validation}  "
            f"{metrics['perf/images_per_s']:.0f} images/s  {metrics['perf/tokens_per_s']:,.0f} tokens/s  "
            f"data wait {metrics['perf/data_wait']:.1%}"
        )
        if self._bar is None:
            print(text, flush=True)
        else:
            self._bar.update(self._task, completed=seen, description=text)

    def note(self, text: str, step: int) -> None:
        """Print a line; above the bar where there is one."""
        print(text, flush=True)

    def picture(self, name: str, file: Path, images_seen: int, step: int, samples: Sequence[Sample] = ()) -> None:
        """Say where a picture is."""
        print(f"{name}: {file}", flush=True)

    def finalize(self, status: str) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.stop()
