"""Which process of a group this is, and how a group is started.

A shell, a scheduler or a container may leave the variables of a launcher (RANK, WORLD_SIZE, SLURM_NTASKS, ...) in the
environment of a command that is a single process. So a command forgets them before anything can read them, and only
a process that genfound has started itself takes its rank from them.
"""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from genfound.config.environment import LAUNCH, PARENT, forget_inherited
from genfound.config.errors import USER_ERRORS, JobError, sentence
from genfound.config.streams import make_lasting
from genfound.runtime.processes import end_with_parent, run_command


def launch(module: str, request: Path, devices: int, **environment: str) -> None:
    """Run `python -m <module> <request>` in so many processes, which end with this one.

    Raises:
        JobError: one of them failed, and why.
    """
    shared = dict(os.environ)
    forget_inherited(shared)
    group = [__name__, str(devices)] if devices > 1 else []
    command = [sys.executable, "-m", *group, module, str(request)]
    with tempfile.TemporaryDirectory(prefix="genfound-") as folder:
        code = run_command(command, shared | environment | {LAUNCH: folder})
        if code:
            reason = Path(folder) / "reason"
            raise JobError(reason.read_text() if reason.exists() else _ending(code))


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Leave the reason of a failure to the process that has launched this one; the first of a group is the one."""
    make_lasting()
    end_with_parent()
    try:
        yield
    except USER_ERRORS as error:
        if not Path(os.environ.get(LAUNCH, os.devnull)).is_dir():
            sys.exit(f"error: {sentence(error)}")
        _leave_reason(sentence(error))
        sys.exit(1)


def _leave_reason(reason: str) -> None:
    """Tell the process that has launched the group, unless another process has."""
    if reason:
        with contextlib.suppress(FileExistsError), open(Path(os.environ[LAUNCH]) / "reason", "x") as out:
            out.write(reason)


def _ending(code: int, process: str = "the process") -> str:
    """About a process that could say nothing itself, or has left a traceback."""
    number = -code if code < 0 else code - 128
    if number <= 0:
        return f"{process} failed by a mistake in the program; its traceback is above"
    short = ": most often because memory was short" if number == signal.SIGKILL else ""
    ended = f"{process} was ended by signal {number} ({signal.Signals(number).name}){short}"
    return f"{ended}; the same command goes on with what is complete"


def _torchrun(devices: str, module: str, request: str) -> None:
    """The agent of a group: torchrun, which leaves it to others to say why a process failed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    end_with_parent()
    os.environ[PARENT] = str(os.getpid())
    logging.disable(logging.ERROR)
    try:
        run.run(run.parse_args(["--standalone", f"--nproc-per-node={devices}", "-m", module, request]))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _leave_reason(_ending(failure.exitcode, f"process {rank}"))
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    _torchrun(*sys.argv[1:])
