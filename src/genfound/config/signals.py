"""Signals that end a run, and the code that says so."""

import math
import signal
import time


def known(*names: str) -> tuple[signal.Signals, ...]:
    """Those of the signals that this system has; Windows has few."""
    return tuple(number for number in signal.Signals if number.name in names)


OF_SCHEDULERS = known("SIGUSR1", "SIGUSR2")
"""With which they say that a job has to end; submitit listens to one, and puts the job in Slurm's queue again."""

STOPPING = (signal.SIGTERM, signal.SIGINT, *OF_SCHEDULERS)
"""Signals of users and schedulers that end a run after a global step, with a checkpoint."""

REQUEUE = 75
"""Code of a command that the same command continues: EX_TEMPFAIL of sysexits.h, on which a scheduler may requeue."""

ECHO = 1.0
"""Seconds in which a signal that comes again is the same one: Slurm and its srun both give it to a process."""


class Stopped(SystemExit):
    """A signal has ended a run, which the same command continues."""

    def __init__(self, number: int) -> None:
        super().__init__(REQUEUE)
        self.number = number


class Received:
    """The signals that a process has got."""

    def __init__(self) -> None:
        self._last: dict[int, float] = {}

    def new(self, number: int) -> bool:
        """Whether a signal that has just come is no echo of one before."""
        last, self._last[number] = self._last.get(number, -math.inf), time.monotonic()
        return self._last[number] - last > ECHO

    def __contains__(self, number: int) -> bool:
        return number in self._last
