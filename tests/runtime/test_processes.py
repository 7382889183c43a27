import os
import signal
import sys
import time

import pytest

from genfound.config.errors import JobError
from genfound.runtime.processes import run_command, signals_as_exit
from tests.runtime.children import alive, started

APART = """
import os, signal, sys
signal.signal(signal.SIGHUP, signal.SIG_DFL)  # whatever the process that runs the tests ignores
signal.signal(signal.SIGINT, signal.default_int_handler)
from genfound.runtime.processes import run_command
child = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
run_command([sys.executable, "-c", child], dict(os.environ))
"""


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


@pytest.mark.parametrize(("error", "raised"), [(None, SystemExit), (RuntimeError("timed-out too often"), JobError)])
def test_a_scheduler_puts_a_job_in_its_queue_after_the_checkpoint(
    error: Exception | None, raised: type[BaseException]
) -> None:
    events: list[object] = []

    def queue_again(number: int, _: object) -> None:
        events.append(number)
        if error:
            raise error

    before = signal.signal(signal.SIGUSR2, queue_again)
    try:
        with pytest.raises(raised), signals_as_exit():
            try:
                os.kill(os.getpid(), signal.SIGUSR2)
                time.sleep(60)
            finally:
                os.kill(os.getpid(), signal.SIGUSR2)  # as Slurm's srun does a few milliseconds later
                events.append("checkpoint")
        assert signal.getsignal(signal.SIGUSR2) is queue_again
    finally:
        signal.signal(signal.SIGUSR2, before)
    assert events == ["checkpoint", signal.SIGUSR2]
