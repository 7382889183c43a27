"""Work that takes long: its folder, for one process at a time, and processes that end with the one that began them."""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from genfound.runtime.files import makedirs

GRACE = 40
"""Seconds for processes to end when they are told to; torchrun takes up to 30 to end its own."""

PAUSE = 1.0
"""Seconds between two looks at what another process does."""


@contextlib.contextmanager
def lock(folder: Path, way_out: str = "give out=...", wait: bool = False) -> Iterator[None]:
    """Keep other processes from work in a folder, which need not exist and may be removed meanwhile.

    The lock is a file beside the folder; it ends with this process and those that inherit its descriptor.

    Args:
        folder: of the work.
        way_out: what else one can do than wait.
        wait: for another process to finish; otherwise it is an error.

    Raises:
        ValueError: another process works there.
    """
    file = folder.with_name(f".{folder.name}.lock")
    lock = _locked(file, folder, None if wait else way_out)
    try:
        yield
    finally:
        file.unlink(missing_ok=True)
        os.close(lock)
        _remove_empty(file.parent)


def wait_until(done: Callable[[], bool]) -> None:
    """Wait for what another process does, however long it takes: collectives end a run after their timeout."""
    while not done():
        time.sleep(PAUSE)


def remove(work: Path) -> None:
    """Remove a folder of work, and the one that it lies in unless there is other work."""
    shutil.rmtree(work, ignore_errors=True)
    _remove_empty(work.parent)


def run_command(command: Sequence[str], environment: Mapping[str, str]) -> int:
    """Exit status of a command; if this process is interrupted or terminated, so is the command."""
    processes: list[subprocess.Popen[bytes]] = []
    started = threading.Event()

    def start() -> None:
        try:
            processes.append(subprocess.Popen(command, env=environment, close_fds=False, start_new_session=True))
        finally:
            started.set()

    with sigterm_as_exit():
        try:
            threading.Thread(target=start).start()  # a signal interrupts the main thread, so never a half-begun start
            started.wait()
            return processes[0].wait()
        finally:
            started.wait()
            for process in processes:
                _end(process)


def _end(process: subprocess.Popen[bytes]) -> None:
    """Terminate a process that has not ended, and kill its group if it takes too long."""
    if process.poll() is None:
        process.terminate()
        try:
            process.wait(GRACE)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)


def _locked(file: Path, folder: Path, way_out: str | None) -> int:
    """The descriptor of a lock, for this process and what it starts; waits for it if there is no way out."""
    while True:
        makedirs(file.parent)
        try:
            lock = os.open(file, os.O_RDWR | os.O_CREAT, 0o644)
        except FileNotFoundError:
            continue  # another process has removed the empty folder
        try:
            _lock(lock, folder, way_out)
        except BaseException:
            os.close(lock)
            raise
        with contextlib.suppress(FileNotFoundError):
            if os.path.samestat(os.fstat(lock), file.stat()):
                os.set_inheritable(lock, True)
                return lock
        os.close(lock)  # of a file that was removed while this process waited


def _lock(descriptor: int, folder: Path, way_out: str | None) -> None:
    with contextlib.suppress(OSError):  # a file system without locks
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if way_out is not None:
                raise ValueError(f"another process is at work on {folder}; wait for it, or {way_out}") from None
            print(f"waiting for another process, which makes {folder}", flush=True)
            fcntl.flock(descriptor, fcntl.LOCK_EX)


@contextlib.contextmanager
def sigterm_as_exit() -> Iterator[None]:
    """Signals that would end this process at once raise SystemExit, so that it can clean up."""

    def end(number: int, _: Any) -> None:
        raise SystemExit(128 + number)

    deadly = [number for number in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(number) is signal.SIG_DFL]
    deadly = deadly if threading.current_thread() is threading.main_thread() else []
    for number in deadly:
        signal.signal(number, end)
    try:
        yield
    finally:
        for number in deadly:
            signal.signal(number, signal.SIG_DFL)


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
