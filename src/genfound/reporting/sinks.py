"""What receives the numbers and pictures of a run, and the one that is always there."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol


class Sink(Protocol):
    """Receives what a run reports; only on rank 0."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of one moment; `images_seen` is among them."""

    def note(self, text: str, step: int) -> None:
        """A sentence about the run, after this step."""

    def picture(self, name: str, file: Path, images_seen: int) -> None:
        """A picture that has been written to a file."""

    def close(self) -> None:
        """The run has ended."""


class JsonLines:
    """metrics.jsonl: one line per moment, appended and flushed.

    Args:
        file: the run's metrics.jsonl.
        step: where the run continues; later lines, of steps that a killed run did not save, are dropped.
    """

    def __init__(self, file: Path, step: int) -> None:
        lines = file.read_text().splitlines() if file.exists() else []
        kept = [line for line in lines if _step_of(line) <= step]
        temporary = file.with_suffix(".tmp")
        temporary.write_text("".join(line + "\n" for line in kept))
        temporary.replace(file)
        self._out = open(file, "a", buffering=1)  # noqa: SIM115  closed by `close`

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a line; a number that is not finite becomes null."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._out.write(json.dumps({"step": step, **finite}) + "\n")

    def note(self, text: str, step: int) -> None:
        """Append a line."""
        self._out.write(json.dumps({"step": step, "note": text}) + "\n")

    def picture(self, name: str, file: Path, images_seen: int) -> None:
        """Pictures are already files."""

    def close(self) -> None:
        """Close the file."""
        self._out.close()


def _step_of(line: str) -> float:
    """The step of a line; a line cut off by a kill belongs to no step that was saved."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
