"""What receives the numbers and pictures of a run, and the one that is always there."""

from __future__ import annotations

import contextlib
import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from genfound.runtime.files import atomic_write


class Sink(Protocol):
    """Receives what a run reports; only on rank 0."""

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Numbers of one moment; `images_seen` is among them."""

    def note(self, text: str, step: int) -> None:
        """A sentence about the run, after this step."""

    def picture(self, name: str, file: Path, images_seen: int, step: int) -> None:
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
        kept = "".join(json.dumps(line) + "\n" for line in lines_of(file) if line["step"] <= step)
        atomic_write(file, lambda temporary: temporary.write_text(kept))
        self._out = open(file, "a", buffering=1)  # noqa: SIM115  closed by `close`

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """Append a line; a number that is not finite becomes null."""
        finite = {key: value if math.isfinite(value) else None for key, value in metrics.items()}
        self._out.write(json.dumps({"step": step, **finite}) + "\n")

    def note(self, text: str, step: int) -> None:
        """Append a line."""
        self._out.write(json.dumps({"step": step, "note": text}) + "\n")

    def picture(self, name: str, file: Path, images_seen: int, step: int) -> None:
        """Pictures are already files."""

    def close(self) -> None:
        """Close the file."""
        self._out.close()


class Courtesy:
    """A sink without which training goes on: when it fails it is dropped, with a note.

    Args:
        terminal: where the note goes.
        name: of the sink.
        make: makes it.
        step: where the run continues.
    """

    def __init__(self, terminal: Sink, name: str, make: Callable[[], Sink], step: int) -> None:
        self.terminal = terminal
        self.name = name
        self.step = step
        self._sink: Sink | None = None
        self._try(lambda: setattr(self, "_sink", make()))

    def log(self, metrics: Mapping[str, float], step: int) -> None:
        """See `Sink`."""
        self.step = step
        self._pass_on("log", metrics, step)

    def note(self, text: str, step: int) -> None:
        """See `Sink`."""
        self._pass_on("note", text, step)

    def picture(self, name: str, file: Path, images_seen: int, step: int) -> None:
        """See `Sink`."""
        self._pass_on("picture", name, file, images_seen, step)

    def close(self) -> None:
        """See `Sink`."""
        self._pass_on("close")

    def _pass_on(self, method: str, *arguments: Any) -> None:
        if self._sink is not None:
            self._try(lambda: getattr(self._sink, method)(*arguments))

    def _try(self, act: Callable[[], object]) -> None:
        try:
            act()
        except Exception as error:
            self._sink = None
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
            self.terminal.note(
                f"{self.name} has stopped ({reason}); training goes on, with its curves in metrics.jsonl", self.step
            )


def lines_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a metrics.jsonl, if it is there; one cut off by a kill belongs to no step that was saved."""
    found = []
    for text in file.read_text().splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            line = json.loads(text)
            if isinstance(line, dict) and isinstance(line.get("step"), int | float):
                found.append(line)
    return found
