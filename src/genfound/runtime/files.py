"""Folders that several processes share, on one machine or several: files are written whole or not at all."""

import contextlib
import errno
import hashlib
import os
import platform
import shutil
import signal
import sys
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

from filelock import BaseFileLock, FileLock, LeaseCompromise, SoftFileLease, Timeout

ATTEMPTS = 100
"""To make a folder that other processes remove."""

LONGEST = 255
"""Bytes of a file name."""

NO_LOCKS = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL)
"""What a file system without locks answers; there the work goes on without."""

WAIT = 0.02
"""Seconds between two attempts to take a lock."""

LEASE = 60.0
"""Seconds without a heartbeat after which another machine's work on a folder is over; the same on all machines."""

BEATS = 30
"""Heartbeats in that time."""


def makedirs(folder: Path) -> None:
    """Make a folder and those above it, though other processes remove empty ones at the same time."""
    for _ in range(ATTEMPTS):  # `exist_ok` alone looks twice, and fails if the folder goes in between
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            return folder.mkdir(parents=True, exist_ok=True)
    return folder.mkdir(parents=True, exist_ok=True)


def check_folder(key: str, folder: Path) -> None:
    """Find out before the work whether its folder can be made and written; nothing is made."""
    there = folder
    while not os.path.lexists(there):
        if len(os.fsencode(there.name)) > LONGEST:
            raise ValueError(f"{key}={folder}: a name of more than {LONGEST} bytes; choose another {key}=...")
        there = there.parent
    if not there.is_dir():
        raise ValueError(f"{key}={folder}: {there} is not a folder; choose another {key}=...")
    if not os.access(there, os.W_OK | os.X_OK):
        raise ValueError(f"{key}={folder}: {there} cannot be written by this user; choose another {key}=...")


LITTER = ("__macosx", "thumbs.db", "ehthumbs.db", "desktop.ini", "@eadir", "$recycle.bin", "system volume information",
          "lost+found", "icon\r")  # fmt: skip
"""What systems and archivers leave in folders, in lower case."""


def hidden(name: str) -> bool:
    """Whether a file or folder of this name is none of the user's: `.name`, as `._name` of macOS, or litter."""
    return name.startswith(".") or name.lower() in LITTER


def visible(folder: Path, pattern: str = "*") -> list[Path]:
    """Sorted files and folders directly in a folder that match a pattern and are not hidden; none if it is absent."""
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if fnmatchcase(path.name, pattern) and not hidden(path.name))


def atomic_write(file: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file in the folder `.partial-<name>`, which then takes its place when it is on the disk.

    What a killed process leaves there, also of `save`'s own making (safetensors writes beside its file first), the next
    one removes; what fails leaves nothing. Processes that write the same file take turns; where the file system has no
    locks, each has a folder of its own.
    """
    try:
        with _locked(file.with_name(f".{file.name}.partial.lock")) as alone:
            work = _partial(file, alone)
            temporary = work / file.name
            try:
                remove_tree(work)
                work.mkdir()
                temporary.touch()
                mode = temporary.stat().st_mode
                save(temporary)
                temporary.chmod(mode)  # safetensors lets nobody else read what it writes
                with open(temporary, "r+b") as stream:  # Windows writes nothing out that is open for reading
                    os.fsync(stream.fileno())
                temporary.replace(file)
            finally:
                shutil.rmtree(work, ignore_errors=True)
    except OSError as error:
        if Path(error.filename or file).is_relative_to(file.parent):  # errors of writing name no file
            error.filename = str(file)
        raise


def atomic_folder(folder: Path, fill: Callable[[Path], object]) -> None:
    """As `atomic_write` a folder, which is absent or empty before: `fill` writes its files into another one."""
    with _locked(folder.with_name(f".{folder.name}.partial.lock")) as alone:
        work = _partial(folder, alone)
        try:
            remove_tree(work)
            work.mkdir()
            fill(work)
            if folder.is_dir():
                folder.rmdir()
            work.replace(folder)
        finally:
            shutil.rmtree(work, ignore_errors=True)


def remove_tree(path: Path) -> None:
    """Remove a folder with all that is in it, or a file, if it is there."""
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)


def make_once(file: Path, make: Callable[[], object]) -> None:
    """Make a file, by one process at a time, unless it is there."""
    if not file.is_file():
        with lock(file, wait=True):
            if not file.is_file():
                make()


@contextlib.contextmanager
def lock(path: Path, way_out: str = "give out=...", wait: bool = False) -> Iterator[None]:
    """Keep other processes from work on a file or folder, which need not exist and may be removed meanwhile.

    The lock is a file beside it, `.<name>.lock`, with process, host and a heartbeat: locks of the file system may be
    absent, or known to one machine only. It ends with this process, which others of this machine see at once, and those
    of another one after `LEASE` seconds. Another process's lock is an error, unless we wait.

    Raises:
        ValueError: another process is at work there.
    """
    file = path.with_name(f".{path.name}.lock")
    lease = SoftFileLease(file, lease_duration=LEASE, heartbeat_interval=LEASE / BEATS, on_compromise=_stop)
    with contextlib.ExitStack() as stack:
        stack.callback(_remove_empty, file.parent)
        try:
            _acquire(lease, 0)
        except Timeout:
            _wait(lease, path, way_out, wait)
        stack.callback(lease.release)
        yield


def remove(work: Path) -> None:
    """Remove a folder of work, and the one that it lies in unless there is other work."""
    shutil.rmtree(work, ignore_errors=True)
    _remove_empty(work.parent)


def damaged(path: Path, reason: str) -> ValueError:
    """What is said of a checkpoint that cannot be read."""
    return ValueError(f"{path} is damaged or is not a checkpoint of tensors: {reason}")


def digest(*parts: str | bytes, size: int = 8) -> str:
    """The BLAKE2b hash of parts one after another, of so many bytes, in hexadecimal digits."""
    hashed = hashlib.blake2b(digest_size=size)
    for part in parts:
        hashed.update(part.encode() if isinstance(part, str) else part)
    return hashed.hexdigest()


def _partial(path: Path, alone: bool) -> Path:
    """Where a file or folder is made, by one process at a time where the file system has locks."""
    own = "" if alone else f"{platform.node()}-{os.getpid()}-"
    return path.with_name(f".partial-{own}{path.name}")


def _wait(lease: SoftFileLease, path: Path, way_out: str, until_free: bool) -> None:
    """Take a lock that another process has: when it is through, or has had no heartbeat for `LEASE` seconds."""
    if until_free:
        print(f"waiting for another process, which makes {path}", flush=True)
    seen, owner, silent = _beat(lease), lease.owner, 0
    while True:
        try:
            _acquire(lease, LEASE / BEATS)
            return
        except Timeout:
            silent += 1
        if not until_free and _beat(lease) != seen:
            who = f"another process ({owner.pid} on {owner.hostname})" if owner else "another process"
            raise ValueError(f"{who} is at work on {path}; wait for it, or {way_out}") from None
        if not until_free and silent == 2 and owner:
            print(f"waiting at most {LEASE:.0f} s for a sign of process {owner.pid} on {owner.hostname}", flush=True)


def _beat(lease: SoftFileLease) -> int | None:
    """When the heart of a lock's owner beat last; None if the lock is free."""
    with contextlib.suppress(FileNotFoundError):
        return Path(lease.lock_file).stat().st_mtime_ns
    return None


def _stop(lost: LeaseCompromise) -> None:
    """End this process, whose work another one may have taken over, as by SIGTERM; called by the heartbeat."""
    print(
        f"{lost.lock_file} was lost: this process was silent for {LEASE:.0f} s, or its folder is gone", file=sys.stderr
    )
    os.kill(os.getpid(), signal.SIGTERM)


@contextlib.contextmanager
def _locked(file: Path) -> Iterator[bool]:
    """Hold a lock on a file, which is made, or find out that the file system has no locks; see `_acquire`."""
    lock = FileLock(file)
    held = _acquire(lock, -1)
    try:
        yield held
    finally:
        file.unlink(missing_ok=True)  # those who wait look for a new one
        lock.release()


def _acquire(lock: BaseFileLock, timeout: float) -> bool:
    """Take a lock, whose file is made; whether the file system has locks; Timeout if another process has it."""
    for attempt in range(ATTEMPTS):
        makedirs(Path(lock.lock_file).parent)
        try:
            lock.acquire(timeout, poll_interval=WAIT)
            return True
        except FileNotFoundError:  # another process has just removed the empty folder
            if attempt == ATTEMPTS - 1:
                raise
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
    return False


def _remove_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        folder.rmdir()
