"""How a run is asked to end by a signal, with a checkpoint after a global step; a second signal ends it at once.

A process that trains listens to signals itself. One that was launched also looks for files in the folder of its launch:
`stop`, which holds the number of a signal that the command has got, and `now`, with which no signal waits for a step.
"""

import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from genfound.config.environment import LAUNCH
from genfound.config.signals import STOPPING, Received, Stopped

STOP, NOW = "stop", "now"


def ask(launch: Path, number: int) -> None:
    """Let the processes of a launch end after a step."""
    (launch / STOP).write_text(str(number))


def signal_of(end: SystemExit) -> int:
    """The number of the signal that has led to an exit; SIGTERM where it tells none."""
    if isinstance(end, Stopped):
        return end.number
    number = end.code - 128 if isinstance(end.code, int) else 0
    return number if number > 0 else signal.SIGTERM


def announce(number: int) -> None:
    """Say what will happen."""
    text = f"{signal.Signals(number).name}: ending after a global step, with a checkpoint; once more ends at once"
    print(text, file=sys.stderr, flush=True)


class StopRequest:
    """Whether this process has been asked to end, itself or by the command that has launched it."""

    def __init__(self) -> None:
        self._launch = Path(os.environ[LAUNCH]) if LAUNCH in os.environ else None
        self._number = 0  # of a signal that this process has got; schedulers send it to all of them
        self._received = Received()
        self._before: dict[signal.Signals, Any] = {}

    def listen(self) -> None:
        """From now on a first signal is a request."""
        if threading.current_thread() is threading.main_thread():
            usual = (signal.SIGTERM, signal.SIGINT)  # a process of a command leaves those of schedulers to the command
            heard = [number for number in STOPPING if number in usual or signal.getsignal(number) != signal.SIG_IGN]
            self._before = {number: signal.signal(number, self._handle) for number in heard}

    def close(self) -> None:
        """Signals are what they were before."""
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before = {}

    def asked(self) -> int:
        """The number of the signal; 0 if there was none."""
        if not self._number and self._launch and (self._launch / STOP).exists():
            return int((self._launch / STOP).read_text() or 0)
        return self._number

    def _handle(self, number: int, _: Any) -> None:
        new = self._received.new(number)
        if (new and self._number) or (self._launch and (self._launch / NOW).exists()):
            raise SystemExit(128 + number)
        if new:
            self._number = number
            announce(number)
