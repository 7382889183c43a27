from __future__ import annotations

import builtins
import errno
import fcntl
import os
import signal
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from genfound.runtime import files
from genfound.runtime.files import atomic_folder, atomic_write, check_folder, digest, lock, makedirs, remove, visible
from tests.runtime.children import started

HOLD = """
import socket, sys, time
from pathlib import Path
from genfound.runtime import files
files.LEASE = float(sys.argv[3]) if sys.argv[3:] else files.LEASE
socket.gethostname = (lambda: sys.argv[4]) if sys.argv[4:] else socket.gethostname
with files.lock(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


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
        monkeypatch.setattr(fcntl, "flock", none)
    with ProcessPoolExecutor(4, mp_context=get_context("fork")) as pool:
        assert list(pool.map(write_many, [tmp_path] * 4, range(4))) == [0, 1, 2, 3]
    names = {"common", *(f"{rank}-{i}" for rank in range(4) for i in range(60))}
    assert {file.name for file in tmp_path.iterdir()} == names  # the folder of unfinished files is gone as well
    assert {file.read_text() for file in tmp_path.iterdir()} == {"own", "the same"}


@pytest.mark.parametrize("folder", [True, False])
def test_what_a_killed_process_left_is_removed(tmp_path: Path, folder: bool) -> None:
    left = tmp_path / ".partial-a"
    if folder:
        (left / "of safetensors").mkdir(parents=True)
    else:
        left.write_text("half of a much longer text, of an earlier version")
    names: list[Path] = []
    atomic_write(tmp_path / "a", lambda temporary: names.append(temporary) or temporary.write_text("whole"))
    assert names == [left / "a"] and (tmp_path / "a").read_text() == "whole"
    assert [file.name for file in tmp_path.iterdir()] == ["a"]
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


def test_files_of_safetensors_are_read_by_others_and_nothing_lies_beside_them(tmp_path: Path) -> None:
    seen: list[Path] = []

    def save(temporary: Path) -> None:
        save_file({"a": torch.zeros(3)}, temporary)
        seen.extend(tmp_path.iterdir())

    atomic_write(tmp_path / "a.safetensors", save)
    (tmp_path / "b").touch()
    assert (tmp_path / "a.safetensors").stat().st_mode == (tmp_path / "b").stat().st_mode
    assert {path.name for path in seen} == {".a.safetensors.partial.lock", ".partial-a.safetensors"}


def test_a_folder_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / ".partial-a").mkdir()
    (tmp_path / ".partial-a/of a killed process").touch()

    def half(work: Path) -> None:
        (work / "first").touch()
        raise ValueError("no second")

    with pytest.raises(ValueError, match="no second"):
        atomic_folder(tmp_path / "a", half)
    assert [path.name for path in tmp_path.rglob("*")] == ["a"]
    atomic_folder(tmp_path / "a", lambda work: (work / "first").touch())
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "first"]
    with pytest.raises(OSError, match="not empty"):
        atomic_folder(tmp_path / "a", lambda work: (work / "second").touch())
    assert [path.name for path in tmp_path.rglob("*")] == ["a", "first"]


def test_work_belongs_to_one_process(tmp_path: Path) -> None:
    other, told = started(HOLD, str(tmp_path / "out/work/a"), "60")
    assert told == "held"
    with (
        pytest.raises(ValueError, match=rf"another process \({other.pid} on .*\) is at work on .*/a; wait"),
        lock(tmp_path / "out/work/a"),
    ):
        pass
    with lock(tmp_path / "out/work/b"):
        pass
    other.kill()
    other.wait()
    with lock(tmp_path / "out/work/a"):
        (tmp_path / "out/work/a").mkdir()
        remove(tmp_path / "out/work/a")
    assert not (tmp_path / "out/work").exists()


def test_one_can_wait_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    other, _ = started(HOLD, str(tmp_path / "a"), "60")
    monkeypatch.setattr(builtins, "print", lambda *told, **_: (said.append(told[0]), other.kill(), other.wait()))
    with lock(tmp_path / "a", wait=True):
        assert other.returncode == -signal.SIGKILL
    assert said == [f"waiting for another process, which makes {tmp_path / 'a'}"]


def test_work_belongs_to_one_process_where_the_file_system_has_no_locks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fcntl, "flock", none)
    other, _ = started(HOLD, str(tmp_path / "a"), "60")
    with pytest.raises(ValueError, match="another process"), lock(tmp_path / "a"):
        pass
    other.kill()
    other.wait()
    with lock(tmp_path / "a"):
        pass
    assert not tmp_path.exists()  # which was empty


def test_another_machine_is_believed_as_long_as_its_heart_beats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(files, "LEASE", 6.0)
    other, _ = started(HOLD, str(tmp_path / "a"), "60", "6", "node7")
    with (
        pytest.raises(ValueError, match=rf"another process \({other.pid} on node7.*\) is at work"),
        lock(tmp_path / "a"),
    ):
        pass
    os.kill(other.pid, signal.SIGSTOP)  # as a machine that is suspended, or cut off
    with lock(tmp_path / "a"):
        os.kill(other.pid, signal.SIGCONT)
        assert other.wait(30) == -signal.SIGTERM
    assert f"waiting at most 6 s for a sign of process {other.pid} on node7" in capfd.readouterr().out
    assert not tmp_path.exists()  # which was empty


def test_a_digest_has_two_digits_for_each_byte() -> None:
    assert digest("a", size=3) == digest(b"a", size=3) == "c93f52" != digest("a", "b", size=3) == digest("ab", size=3)
    assert len(digest("a")) == 16


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


def test_the_unfinished_file_has_the_suffix_that_writers_look_at(tmp_path: Path) -> None:
    atomic_write(tmp_path / "a.npy", lambda temporary: np.save(temporary, np.arange(3)))  # adds .npy to other names
    assert np.load(tmp_path / "a.npy").tolist() == [0, 1, 2]
    assert [file.name for file in tmp_path.iterdir()] == ["a.npy"]
