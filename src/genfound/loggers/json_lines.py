"""metrics.jsonl, which is always written."""

import contextlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from genfound.loggers.base import RunLogger
from genfound.runtime.files import atomic_write


class JsonLines(RunLogger):
    """One line per moment, appended and flushed.

    Args:
        step: where the run continues; later lines, of steps that a killed run did not save, are dropped, and what is
            said again of this one is not written twice.
    """

    def __init__(self, file: Path, step: int) -> None:
        kept = [line for line in lines_of(file) if line["step"] <= step]
        text = "".join(json.dumps(line) + "\n" for line in kept)
        atomic_write(file, lambda temporary: temporary.write_text(text))
        self._there = [line for line in kept if line["step"] == step]
        self._out = open(file, "a", buffering=1)  # noqa: SIM115  closed by `finalize`

    def log_metrics(self, metrics: Mapping[str, float], step: int | None = None) -> None:
        """Append a line; a number that is not finite becomes null."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        line = {"step": step, **finite}
        if line not in self._there:
            self._out.write(json.dumps(line) + "\n")

    def note(self, text: str, step: int) -> None:
        """Append a line."""
        self._out.write(json.dumps({"step": step, "note": text}) + "\n")

    def finalize(self, status: str) -> None:
        """Close the file."""
        self._out.close()


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, if it is there; one cut off by a kill belongs to no step that was saved."""
    found = []
    for text in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int | float):
                found.append(line)
    return found
