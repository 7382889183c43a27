from __future__ import annotations

import errno
import fcntl
import os
import re
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import pytest

from genfound.runtime import files
from genfound.runtime.files import PARTIAL, STALE, atomic_write, check_folder, makedirs, visible


def none(*_: object) -> None:
    """As `flock` on a file system without locks."""
    raise OSError(errno.ENOLCK, "No locks available")


def write_many(folder: Path, rank: int) -> int:
    """Files of one's own, and one that all write."""
    for i in range(60):
        atomic_write(folder / "common", lambda temporary: temporary.write_text("the same"))
        atomic_write(folder / f"{rank}-{i}", lambda temporary: temporary.write_text("own"))
    return rank


@pytest.mark.parametrize("locks", [True, False])
def test_processes_that_write_at_once_never_disturb_each_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, locks: bool
) -> None:
    if not locks:
        monkeypatch.setattr(files.fcntl, "flock", none)
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        assert list(pool.map(write_many, [tmp_path] * 4, range(4))) == [0, 1, 2, 3]
    names = {"common", *(f"{rank}-{i}" for rank in range(4) for i in range(60))}
    assert {file.name for file in tmp_path.iterdir()} == names  # the folder of unfinished files is gone as well
    assert {file.read_text() for file in tmp_path.iterdir()} == {"own", "the same"}


def test_temporaries_name_host_and_process_and_are_never_the_same(tmp_path: Path) -> None:
    names: list[str] = []
    for _ in range(2):
        atomic_write(tmp_path / "a", lambda temporary: names.append(temporary.name))
    assert all(re.fullmatch(rf"{os.uname().nodename}-{os.getpid()}-[0-9a-f]{{8}}-a", name) for name in names)
    assert names[0] != names[1]


def test_what_killed_processes_left_goes_when_nobody_else_writes(tmp_path: Path) -> None:
    left = tmp_path / PARTIAL / "other-17-0-b"
    left.parent.mkdir()
    left.write_text("half")
    other = os.open(left.parent, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_SH)  # as a process that is writing
    atomic_write(tmp_path / "a", lambda temporary: temporary.write_text(""))
    assert left.read_text() == "half"
    os.close(other)
    atomic_write(tmp_path / "a", lambda temporary: temporary.write_text(""))
    assert [file.name for file in tmp_path.iterdir()] == ["a"]


def test_without_locks_only_what_is_old_goes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files.fcntl, "flock", none)
    old, new = tmp_path / PARTIAL / "old", tmp_path / PARTIAL / "new"
    old.parent.mkdir()
    for file in (old, new):
        file.touch()
    os.utime(old, (0, new.stat().st_mtime - STALE - 1))
    with files.lock_folder(tmp_path):
        atomic_write(tmp_path / "a", lambda temporary: temporary.write_text("whole"))
    assert (tmp_path / "a").read_text() == "whole"
    assert not old.exists() and new.exists()


def test_a_failed_write_leaves_nothing_and_the_old_file(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("old")

    def full(temporary: Path) -> None:
        temporary.write_text("half")
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        atomic_write(tmp_path / "a", full)
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_a_folder_that_another_process_removes_while_it_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make, calls = os.mkdir, []

    def gone(path: str | Path, *arguments: int) -> None:
        calls.append(path)
        if len(calls) == 1:
            raise FileExistsError(errno.EEXIST, "File exists")  # it was there, and is not any more
        make(path, *arguments)

    monkeypatch.setattr(os, "mkdir", gone)
    atomic_write(tmp_path / "a", lambda temporary: temporary.write_text("whole"))
    assert (tmp_path / "a").read_text() == "whole"


def test_what_is_in_the_place_of_the_folder_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(FileExistsError):
            makedirs(tmp_path / name)


def test_a_folder_that_cannot_be_written_is_known_before_the_work(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_folder("out", tmp_path / "a/b")
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"out=.*file/b: .*file is not a folder; choose another out="):
        check_folder("out", tmp_path / "file/b")
    with pytest.raises(ValueError, match=r"to=.* a name of more than 255 bytes"):
        check_folder("to", tmp_path / ("é" * 128) / "c")
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ValueError, match="cannot be written by this user"):
        check_folder("out", tmp_path / "a")
    assert [file.name for file in tmp_path.iterdir()] == ["file"]


def test_hidden_files_and_folders_are_not_visible(tmp_path: Path) -> None:
    for name in ("b.ckpt", "a.ckpt", "._a.ckpt", ".c.ckpt", "a.txt"):
        (tmp_path / name).touch()
    (tmp_path / "__MACOSX").mkdir()
    assert [file.name for file in visible(tmp_path, "*.ckpt")] == ["a.ckpt", "b.ckpt"]
    assert visible(tmp_path / "none", "*") == []


def test_an_error_of_the_disk_names_the_file(tmp_path: Path) -> None:
    def save(_: Path) -> None:
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match=r"No space left on device: '.*x\.json'"):
        atomic_write(tmp_path / "x.json", save)
