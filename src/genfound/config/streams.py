"""Standard output and error of a command: what cannot be shown, or is read by nobody any more, never stops the work."""

import io
import os
import sys
from typing import Any


class _Lasting(io.FileIO):
    """A file that leads nowhere from its first error on, for this process and those that it starts."""

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError:  # a pipe that was closed, a terminal that has gone, a full disk
            nowhere = os.open(os.devnull, os.O_WRONLY)
            os.dup2(nowhere, self.fileno())
            os.close(nowhere)
            return len(data)


def make_lasting() -> None:
    """Let printing succeed whatever becomes of the streams; letters that their encoding lacks are escaped."""
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened must not take its number
            os.open(os.devnull, os.O_RDWR)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue  # captured by whoever runs this process
        if stream is not None:
            stream.flush()
        lasting = io.TextIOWrapper(
            io.BufferedWriter(_Lasting(descriptor, "w", closefd=False)),
            encoding=None if stream is None else stream.encoding,
            errors="backslashreplace",
            line_buffering=name == "stderr" or stream is None or stream.line_buffering,
        )
        setattr(sys, name, lasting)
