"""Commands in processes that can be killed, forked from this one, which has imported what they need."""

from __future__ import annotations

import errno
import os
import random
import resource
import signal
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.cli import fork_server
from tests.cli.commands import LIMIT, variables

CHANGING = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod")
"""Audit events of a folder that changes, beside `open`."""


@dataclass
class Command:
    """`python -m genfound.<name> <arguments>` in a folder."""

    name: str
    arguments: Sequence[str]
    cwd: Path
    clock: int | None = None
    """Seeds the jumps of the clock, a day forth and back."""
    read_only: tuple[float, float] = (0, 0)
    """From which second to which second after its start no file of a run can be written."""
    slow: float = 0
    """Seconds that it takes to open, rename or remove a file of a run."""

    @property
    def errors(self) -> str:
        """What the last process wrote on standard error."""
        return (self.cwd / "stderr").read_text()

    def begin(self, largest: int = resource.RLIM_INFINITY) -> int:
        """Fork a process, which leads a group of its own and may write files of so many bytes; its id."""
        output = [self.cwd / "stdout", self.cwd / "stderr"]
        for file in output:
            file.write_text("")
        process = os.fork()
        if process == 0:
            os.setsid()
            for number in (signal.SIGINT, signal.SIGTERM):
                signal.signal(number, signal.SIG_DFL)
            resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))
            if self.clock is not None:
                now, chance = time.time, random.Random(self.clock)
                time.time = lambda: now() + chance.uniform(-86_400, 86_400)
            if self.slow or any(self.read_only):
                sys.addaudithook(self._hindrance())
            paths = [str(path) for path in output]
            fork_server.command(f"genfound.{self.name}", self.arguments, str(self.cwd), variables(), paths)
        while os.getpgid(process) != process:  # until then there is no group to be killed
            time.sleep(0.001)
        return process

    def _hindrance(self) -> Callable[[str, tuple[Any, ...]], None]:
        """What Python is to call before it opens, renames or removes a file."""
        runs, begin, (first, last) = self.cwd / "runs", time.monotonic(), self.read_only

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            writes = event in CHANGING or (event == "open" and arguments[2] & (os.O_WRONLY | os.O_RDWR))
            if writes and Path(str(arguments[0])).absolute().is_relative_to(runs):
                time.sleep(self.slow)
                if first <= time.monotonic() - begin < last:
                    raise OSError(errno.EROFS, os.strerror(errno.EROFS), arguments[0])

        return hook

    def run(self, largest: int = resource.RLIM_INFINITY) -> int:
        """The exit code of a process that is left alone."""
        code = wait(self.begin(largest), LIMIT)
        assert code is not None, f"{self.name} took more than {LIMIT} s"
        return code

    def end(self, number: int, seconds: float, group: bool = True) -> bool:
        """Send a signal to a process so many seconds after its start; whether it was still alive."""
        process = self.begin()
        if wait(process, seconds, kill=False) is not None:
            return False
        return self.send(process, number, group)

    def end_when(self, found: Callable[[], object], group: bool = True) -> bool:
        """Kill a process as soon as something is found; whether it was still alive."""
        process = self.begin()
        deadline = time.monotonic() + LIMIT
        while not found():
            if wait(process, 0.002, kill=False) is not None:
                return False
            assert time.monotonic() < deadline
        return self.send(process, signal.SIGKILL, group)

    def send(self, process: int, number: int, group: bool = True) -> bool:
        """Send a signal and wait for the end."""
        (os.killpg if group else os.kill)(process, number)
        assert wait(process, LIMIT) is not None, f"{self.name} outlived signal {number} by {LIMIT} s"
        return True

    def finish(self, attempts: int = 3) -> None:
        """Give the command again until it succeeds; each failure must be one line."""
        for _ in range(attempts):
            if self.run() == 0:
                return
            self.check_error()
            time.sleep(2)
        raise AssertionError(f"not done after {attempts} attempts: {self.errors}")

    def check_error(self) -> None:
        """What failed said so in a line."""
        assert "error: " in self.errors and "Traceback" not in self.errors, self.errors


def wait(process: int, seconds: float, kill: bool = True) -> int | None:
    """The exit code of a process that ends in time, or None, and it is killed."""
    deadline = time.monotonic() + seconds
    while True:
        ended, status = os.waitpid(process, os.WNOHANG)
        if ended:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            break
        time.sleep(0.001)
    if kill:
        os.killpg(process, signal.SIGKILL)
        os.waitpid(process, 0)
    return None


def flip_a_byte(file: Path, chance: random.Random) -> None:
    """Change one byte of a file."""
    whole = bytearray(file.read_bytes())
    whole[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
    file.write_bytes(whole)
