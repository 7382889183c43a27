import builtins
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genfound.runtime.work import lock, remove, run_command

HOLD = """
import sys, time
from pathlib import Path
from genfound.runtime.work import held
with held(Path(sys.argv[1])):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""

APART = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the process that runs the tests ignores
signal.signal(signal.SIGINT, signal.default_int_handler)
from genfound.runtime.work import run_apart
child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
run_apart([sys.executable, "-c", child], dict(os.environ))
"""


def started(code: str, *arguments: str) -> tuple[subprocess.Popen[str], str]:
    """A process that has printed its first line."""
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline().strip()


def alive(number: int) -> bool:
    try:
        os.kill(number, 0)
    except ProcessLookupError:
        return False
    return True


def test_work_belongs_to_one_process(tmp_path: Path) -> None:
    other, told = started(HOLD, str(tmp_path / "out/work/a"), "60")
    assert told == "held"
    with pytest.raises(ValueError, match=r"another process is at work on .*/a; wait"), lock(tmp_path / "out/work/a"):
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
    monkeypatch.setattr(builtins, "print", lambda *told, **_: (said.append(told[0]), other.kill()))
    with lock(tmp_path / "a", wait=True):
        assert other.wait(60) == -signal.SIGKILL
    assert said == [f"waiting for another process, which makes {tmp_path / 'a'}"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP, signal.SIGINT])
def test_processes_end_with_the_one_that_began_them(number: signal.Signals) -> None:
    parent, told = started(APART)
    assert alive(int(told))
    parent.send_signal(number)
    assert parent.wait(20) != 0
    deadline = time.monotonic() + 5
    while alive(int(told)) and time.monotonic() < deadline:
        time.sleep(0.02)
    assert not alive(int(told))


def test_the_status_is_that_of_the_command() -> None:
    before = signal.getsignal(signal.SIGTERM)
    assert run_command([sys.executable, "-c", "raise SystemExit(3)"], dict(os.environ)) == 3
    assert signal.getsignal(signal.SIGTERM) is before
