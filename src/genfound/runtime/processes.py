"""Which process of a group this is, and processes that end with the one that started them."""

import contextlib
import ctypes
import math
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import IO, Any, NamedTuple

from genfound.config.environment import LAUNCH, PARENT
from genfound.config.errors import JobError
from genfound.config.signals import OF_SCHEDULERS, Received, Stopped, known
from genfound.runtime import stopping

GRACE = 40
"""Seconds for processes to end when they are told to; torchrun takes up to 30 to end its own."""

PAUSE = 1.0
"""Seconds between two looks at what another process does."""


class RankInfo(NamedTuple):
    """Of a process in its group; `local_rank` counts on its machine."""

    rank: int
    world_size: int
    local_rank: int


SINGLE_PROCESS = RankInfo(0, 1, 0)

NOT_LAUNCHED = (
    "this module is a process of a group that genfound starts itself: give the command, such as "
    "python -m genfound.train ... trainer.devices=N"
)


def rank_info() -> RankInfo:
    """The place that genfound gave this process when it started it."""
    given = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if Path(os.environ.get(LAUNCH, os.devnull)).is_dir():
        if given == [None] * 3:
            return SINGLE_PROCESS
        if all(value is not None and value.isdecimal() for value in given):
            found = RankInfo(*(int(value) for value in given if value))
            if found.local_rank <= found.rank < found.world_size:
                return found
    raise ValueError(NOT_LAUNCHED)


def tune_malloc() -> None:
    """Let glibc keep the memory of a step for the next one, instead of paging it in anew (1.5x on CPUs).

    Blocks above 32 MB, such as the gradients of a stack of experts, are kept only if nothing is mapped on its own.
    """
    trim_threshold, top_pad, mmap_max = -1, -2, -4
    if sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        libc.mallopt(mmap_max, 0)
        libc.mallopt(trim_threshold, 2**31 - 1)
        libc.mallopt(top_pad, 2**26)


def wait_until(done: Callable[[], bool], patience: float = math.inf) -> bool:
    """Whether another process has done something in so many seconds; a collective would end the run after its own."""
    deadline = time.monotonic() + patience
    while not done():
        if time.monotonic() > deadline:
            return False
        time.sleep(PAUSE)
    return True


def run_command(
    command: Sequence[str],
    environment: Mapping[str, str],
    log: Path | None = None,
    asked: Callable[[], int] | None = None,
) -> int:
    """Exit status of a command, which ends with this process: told to, or killed if it calls `end_with_parent`.

    With `asked`, which gives the number of a signal that another process has got or 0, the command listens to requests
    of `stopping`: then that signal, or a first one of this process, is such a request, and Stopped is raised.
    """
    launch = Path(environment[LAUNCH]) if LAUNCH in environment else None
    with signals_as_exit(), _appended(log) as output:
        shared = {**environment, PARENT: str(os.getpid())}
        process = subprocess.Popen(command, env=shared, start_new_session=True, stdout=output, stderr=output)
        try:
            return _wait(process, launch, asked) if launch and asked else process.wait()
        finally:
            if process.poll() is None:
                if launch:
                    (launch / stopping.NOW).touch()
                process.terminate()
                try:
                    process.wait(GRACE)
                except subprocess.TimeoutExpired:
                    process.kill()


def _wait(process: "subprocess.Popen[bytes]", launch: Path, asked: Callable[[], int]) -> int:
    """Exit status of a process that listens to requests."""
    try:
        while not (number := asked()):
            with contextlib.suppress(subprocess.TimeoutExpired):
                return process.wait(PAUSE)
    except SystemExit as end:
        number = stopping.signal_of(end)
        stopping.announce(number)
    stopping.ask(launch, number)
    process.wait()
    raise Stopped(number)


@contextlib.contextmanager
def _appended(log: Path | None) -> Iterator[IO[str] | None]:
    """A file that goes on with a line of the time; None, for the streams of this process, if there is none."""
    if log is None:
        yield None
        return
    with log.open("a") as output:
        print(f"begun {datetime.now():%Y-%m-%d %H:%M:%S}", file=output, flush=True)
        yield output


def end_with_parent() -> None:
    """Be killed, from now on, when the process that started this one ends, however that ends (on Linux).

    That one alone hears a scheduler, which may give its signals to all processes of a job.
    """
    for number in OF_SCHEDULERS:
        signal.signal(number, signal.SIG_IGN)
    parent = os.environ.pop(PARENT, None)
    if parent is not None and sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
        if os.getppid() != int(parent):
            os._exit(1)


@contextlib.contextmanager
def signals_as_exit() -> Iterator[None]:
    """Signals that would end this process at once raise SystemExit, so that it can clean up.

    So do those of a scheduler that have a handler, which is called afterwards: once a job is in the queue again, Slurm
    begins to kill its processes.
    """
    ending = known("SIGTERM", "SIGHUP") + OF_SCHEDULERS
    usual: dict[int, Any] = {**dict.fromkeys(ending, signal.SIG_DFL), signal.SIGINT: signal.default_int_handler}
    alone = threading.current_thread() is threading.main_thread()
    deadly: dict[int, Any] = {number: own for number, own in usual.items() if alone and signal.getsignal(number) is own}
    later: dict[int, Any] = {n: own for n in OF_SCHEDULERS if alone and callable(own := signal.getsignal(n))}
    received = Received()

    def end(number: int, _: Any) -> None:
        if received.new(number):
            raise SystemExit(128 + number)

    for number in deadly | later:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number, own in (deadly | later).items():
            signal.signal(number, own)
        for number, own in later.items():
            if number in received:
                _call(own, number)


def _call(handler: Any, number: int) -> None:
    """A handler of submitit, which raises a RuntimeError if it does not put the job in the queue again."""
    try:
        handler(number, None)
    except RuntimeError as error:
        raise JobError(str(error)) from None
