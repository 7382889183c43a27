"""Folders that several processes share, on one machine or several: files are written whole or not at all."""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import time
from collections.abc import Callable, Iterator
from fnmatch import fnmatchcase
from pathlib import Path

PARTIAL = ".partial"
"""Folder of unfinished files, beside where they belong."""

ATTEMPTS = 100
"""To make a folder that other processes remove."""

LONGEST = 255
"""Bytes of a file name."""

STALE = 3600
"""After so many seconds without a change an unfinished file is given up where a file system has no locks."""


def makedirs(folder: Path) -> None:
    """Make a folder and those above it, though other processes remove empty ones at the same time.

    `exist_ok` alone looks twice, and fails if the folder goes in between.

    Raises:
        OSError: it cannot be made.
    """
    for _ in range(ATTEMPTS):
        with contextlib.suppress(FileExistsError, FileNotFoundError):
            return folder.mkdir(parents=True, exist_ok=True)
    return folder.mkdir(parents=True, exist_ok=True)


def check_folder(key: str, folder: Path) -> None:
    """Find out before the work whether its folder can be made and written; nothing is made.

    Raises:
        ValueError: it cannot; the message names the key.
    """
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
    """Sorted files and folders directly in a folder that match a pattern and are not hidden; none if it is absent.

    Raises:
        OSError: the folder cannot be listed.
    """
    paths = folder.iterdir() if folder.is_dir() else ()
    return sorted(path for path in paths if fnmatchcase(path.name, pattern) and not hidden(path.name))


def atomic_write(file: Path, save: Callable[[Path], object]) -> None:
    """Let `save` write a file elsewhere, and give it its name when it is on the disk.

    Unfinished files lie in the folder `.partial` beside it. A killed process leaves its own there, and the next
    one that writes, and finds nobody else writing, removes them with the folder.

    Raises:
        OSError: the file, which is named, cannot be written; nothing of it stays.
    """
    try:
        _write_whole(file, save)
    except OSError as error:
        error.filename = error.filename or str(file)  # errors of writing name no file
        raise


def _write_whole(file: Path, save: Callable[[Path], object]) -> None:
    with _partial(file.parent) as folder:
        temporary = folder / f"{os.uname().nodename}-{os.getpid()}-{secrets.token_hex(4)}-{file.name}"
        try:
            mode = _created(temporary)
            save(temporary)
            temporary.chmod(mode)  # safetensors lets nobody else read what it writes
            with open(temporary, "rb") as stream:
                os.fsync(stream.fileno())
            temporary.replace(file)
        finally:
            temporary.unlink(missing_ok=True)


def _created(file: Path) -> int:
    """The mode of an empty file that is there now, also where no lock has kept others from removing its folder."""
    while True:
        makedirs(file.parent)
        with contextlib.suppress(FileNotFoundError):
            file.touch()
            return file.stat().st_mode


@contextlib.contextmanager
def lock_folder(folder: Path) -> Iterator[None]:
    """Keep other processes out of a folder, where the file system has locks."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        _locked(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _partial(beside: Path) -> Iterator[Path]:
    """The folder of unfinished files, which nobody removes meanwhile; the last to leave does."""
    folder = beside / PARTIAL
    descriptor = _entered(folder)
    try:
        yield folder
    finally:
        _clear(folder, descriptor)
        os.close(descriptor)


def _entered(folder: Path) -> int:
    """A descriptor that shares the lock of the folder, which is there."""
    while True:
        makedirs(folder)
        with contextlib.suppress(FileNotFoundError):  # another process has just removed it
            descriptor = os.open(folder, os.O_RDONLY)
            _locked(descriptor, fcntl.LOCK_SH)
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.fstat(descriptor), folder.stat()):
                    return descriptor
            os.close(descriptor)


def _clear(folder: Path, descriptor: int) -> None:
    """Remove the folder with what killed processes left in it, unless another process writes there."""
    with contextlib.suppress(OSError):
        only = _locked(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        for file in folder.iterdir():
            if only or time.time() - file.stat().st_mtime > STALE:
                file.unlink()
        folder.rmdir()


def _locked(descriptor: int, kind: int) -> bool:
    """Whether a lock was had; False where the file system has none.

    Raises:
        BlockingIOError: another process has it, and `kind` does not wait.
    """
    try:
        fcntl.flock(descriptor, kind)
    except BlockingIOError:
        raise
    except OSError:
        return False
    return True
