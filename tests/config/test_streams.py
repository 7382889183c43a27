from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PRINT = """
import subprocess, sys
from pathlib import Path
from genfound.config.streams import make_lasting
make_lasting()
for _ in range(3):
    print("naïve 图", flush=True)
    print("naïve 图", file=sys.stderr)
sys.stdout.isatty()
other = open("other", "w")
subprocess.run([sys.executable, "-c", "print('child')"], check=True)
Path("done").touch()
"""


def run(folder: Path, **options: object) -> tuple[int, str]:
    environment = {**os.environ, "PYTHONIOENCODING": "ascii"}
    command = [sys.executable, "-c", PRINT]
    result = subprocess.run(command, cwd=folder, env=environment, check=False, **options)  # type: ignore[call-overload]
    assert (folder / "done").exists()
    return result.returncode, result.stdout or ""


def test_letters_that_a_terminal_lacks_are_escaped(tmp_path: Path) -> None:
    code, said = run(tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    assert code == 0 and said.count("na\\xefve \\u56fe") == 6 and "child\n" in said


@pytest.mark.parametrize("streams", [(1,), (1, 2), (0, 1, 2)])
def test_closed_streams_are_no_error_and_no_file_takes_their_place(streams: tuple[int, ...], tmp_path: Path) -> None:
    def close() -> None:
        for stream in streams:
            os.close(stream)

    assert run(tmp_path, preexec_fn=close)[0] == 0
    assert (tmp_path / "other").read_text() == ""


def test_a_pipe_that_nobody_reads_does_not_stop_the_work(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.close(reader)
    assert run(tmp_path, stdout=writer, stderr=writer)[0] == 0
    os.close(writer)
