"""Which process of a group this is, and how a group is started.

A shell, a scheduler or a container may leave the variables of a launcher (RANK, WORLD_SIZE, SLURM_NTASKS, ...) in the
environment of a command that is a single process. So a command forgets them before anything can read them, and only
a process that genfound has started itself takes its rank from them.

On several machines the same command is given on each. They meet at a store at HOST:PORT, which the first of them keeps,
and so do the agents of torchrun on them.
"""

import atexit
import contextlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, NoReturn

from torch import distributed
from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from genfound.config.environment import LAUNCH, PARENT, forget_inherited
from genfound.config.errors import USER_ERRORS, JobError, mistake, sentence
from genfound.config.streams import make_lasting
from genfound.runtime import stopping
from genfound.runtime.processes import end_with_parent, run_command, wait_until

PATIENCE = 600
"""Seconds to wait for the other machines of a command."""

FAREWELL = 30
"""Seconds for the other machines to end before the store does."""


class Machines:
    """The machines on which a command is given, seen from one of them; the `first` keeps the store."""

    def __init__(self, count: int, rdzv: str, job: int = 0) -> None:
        host, _, port = rdzv.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"rdzv={rdzv} must be HOST:PORT: one of the machines, and a free port of it")
        self.count, self.rdzv = count, f"{host}:{int(port) + job}"
        self._store, self.first = _store(host, int(port) + job)

    def agree(self, fact: str) -> None:
        """Wait for all machines; the others check that a fact is that of the first."""
        if self.first:
            self._store.set("fact", fact)
            others = self.count - 1
            print(f"waiting for {others} other machine(s) at rdzv={self.rdzv}", flush=True)
            return self._wait(lambda: self._store.add("joined", 0) >= others, "not all machines came to")
        self._wait(lambda: self._store.check(["fact"]), "the first machine says nothing at")
        if self._store.get("fact").decode() != fact:
            raise ValueError(f"another command is at rdzv={self.rdzv}; give the same one on every machine")
        if self._store.add("joined", 1) >= self.count:
            raise ValueError(f"there are {self.count} machines at rdzv={self.rdzv} already; give another port")

    def leave(self) -> None:
        """Give up the store; the first machine waits a little until those that came have."""
        with contextlib.suppress(RuntimeError):  # it has gone already
            self._store.add("left", 1)
            if self.first:
                wait_until(lambda: self._store.add("left", 0) > self._store.add("joined", 0), FAREWELL)

    def _wait(self, done: Callable[[], bool], otherwise: str) -> None:
        try:
            if not wait_until(done, PATIENCE):
                raise ValueError(f"{otherwise} rdzv={self.rdzv} in {PATIENCE} s; give the command on each")
        except RuntimeError:
            raise ValueError(f"the machine of rdzv={self.rdzv} has ended; it says why") from None


@contextlib.contextmanager
def machines(count: int, rdzv: str | None, job: int = 0) -> Iterator[Machines | None]:
    """The machines of a command, as long as this one takes part; None if it is the only one.

    Without `rdzv` they meet on the first node of the Slurm job; each job of a sweep has a port of its own.
    """
    if count == 1:
        yield None
        return
    endpoint = rdzv or _slurm_endpoint(count, os.environ)
    if endpoint is None:
        raise ValueError(
            f"{count} machines need rdzv=HOST:PORT: one of them, and a free port of it, the same on each; Slurm tells "
            f"it if there is one task on each of {count} nodes"
        )
    found = Machines(count, endpoint, job)
    try:
        yield found
    finally:
        found.leave()


def _store(host: str, port: int) -> tuple[Store, bool]:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"rdzv={host}:{port}: {error.strerror}; give the name of one of the machines") from None
    with contextlib.suppress(OSError, RuntimeError):  # of another machine, or kept by another process of this one
        with socket.socket(family) as probe:
            probe.bind((address[0], 0))
        return TCPStore(host, port, is_master=True, wait_for_workers=False), True
    deadline = time.monotonic() + PATIENCE
    while True:
        with contextlib.suppress(RuntimeError):
            return TCPStore(host, port, wait_for_workers=False, timeout=timedelta(seconds=5)), False
        if time.monotonic() > deadline:
            raise ValueError(f"nobody answers at rdzv={host}:{port}; give the same command on that machine")


def _slurm_endpoint(count: int, environment: Mapping[str, str]) -> str | None:
    """HOST:PORT of the first node of a Slurm job, if it has so many nodes."""
    nodes = environment.get("SLURM_STEP_NUM_NODES") or environment.get("SLURM_NNODES")
    if nodes != str(count):
        return None
    names = environment.get("SLURM_STEP_NODELIST") or environment.get("SLURM_JOB_NODELIST", "")
    with contextlib.suppress(OSError, subprocess.CalledProcessError, IndexError):
        listed = subprocess.run(["scontrol", "show", "hostnames", names], capture_output=True, text=True, check=True)
        return f"{listed.stdout.split()[0]}:{20_000 + int(environment.get('SLURM_JOB_ID', 0)) % 10_000}"
    return None


def launch(
    module: str, request: Path | Mapping[str, Any], devices: int, others: Machines | None = None,
    log: Path | None = None, asked: Callable[[], int] | None = None, /, **environment: str
) -> None:  # fmt: skip
    """Run `python -m <module> <request>` in so many processes of this machine, which end with this one.

    A mapping is given as a file of JSON. The module calls `reporting`, and learns its rank, which goes on over the
    machines, from `processes.rank_info`. What the processes print is appended to the file `log`, if there is one.
    For `asked` see `run_command`.
    """
    shared = dict(os.environ)
    forget_inherited(shared)
    group = ["--standalone"]
    if others:
        meeting = [f"--rdzv-endpoint={others.rdzv}", "--rdzv-id=genfound", "--rdzv-conf=is_host=false"]
        group = [f"--nnodes={others.count}", "--rdzv-backend=c10d", *meeting]
    agent = [__name__, f"--nproc-per-node={devices}", *group, "-m"] if devices > 1 or others else []
    with tempfile.TemporaryDirectory(prefix="genfound-") as folder:
        if isinstance(request, Mapping):
            content, request = json.dumps(dict(request)), Path(folder) / "request.json"
            request.write_text(content)
        if asked is None:
            (Path(folder) / stopping.NOW).touch()
        command = [sys.executable, "-m", *agent, module, str(request)]
        code = run_command(command, shared | environment | {LAUNCH: folder}, log, asked)
        if code:
            file = Path(folder) / "reason"
            reason = file.read_text() if file.exists() else _ending(code)
            raise JobError(reason.replace(PRINTED, str(log)) if log else reason)


PRINTED = "what the process has printed"
TRACEBACK = f"its traceback is in {PRINTED}"


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Leave the reason of a failure to the process that has launched this one; the first of a group is the one.

    A process of a group that comes to the end of the context ends there, see `end_process`.
    """
    make_lasting()
    end_with_parent()
    try:
        yield
        if distributed.is_initialized():
            end_process()
    except USER_ERRORS as error:
        if not _launched():
            sys.exit(f"error: {sentence(error)}")
        _leave_reason(sentence(error))
        sys.exit(1)
    except Exception as error:
        if _launched():
            _leave_reason(f"{mistake(error)}; {TRACEBACK}")
        raise


def end_process() -> NoReturn:
    """Leave the group of processes, and end without taking Python down.

    Caches of DTensor keep groups, and with them threads of gloo, which abort the process if they free a tensor while
    Python is taken down.
    """
    distributed.destroy_process_group()
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


def _launched() -> bool:
    """Whether the process that has launched this one waits for its reason."""
    return Path(os.environ.get(LAUNCH, os.devnull)).is_dir()


def _leave_reason(reason: str) -> None:
    """Tell the process that has launched the group, unless another process has."""
    if reason:
        with contextlib.suppress(FileExistsError), open(Path(os.environ[LAUNCH]) / "reason", "x") as out:
            out.write(reason)


def _ending(code: int, process: str = "the process") -> str:
    """About a process that could say nothing itself, or has left a traceback."""
    number = -code if code < 0 else code - 128
    if number <= 0:
        return f"{process} failed by a mistake in the program; {TRACEBACK}"
    short = ": most often because memory was short" if number == signal.SIGKILL else ""
    ended = f"{process} was ended by signal {number} ({signal.Signals(number).name}){short}"
    return f"{ended}; the same command goes on with what is complete"


def _torchrun(arguments: list[str]) -> None:
    """The agent of a group: torchrun, which leaves it to others to say why a process failed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError

    end_with_parent()
    os.environ[PARENT] = str(os.getpid())
    logging.disable(logging.ERROR)
    options, folder = run.parse_args(arguments), Path(os.environ[LAUNCH])
    options.signals_to_handle = "SIGINT,SIGHUP,SIGQUIT"

    def terminate(number: int, _: Any) -> None:
        if (folder / stopping.NOW).exists():
            raise SignalException("the command ends", signal.Signals(number))
        stopping.ask(folder, number)

    signal.signal(signal.SIGTERM, terminate)
    try:
        run.run(options)
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        _leave_reason(_ending(failure.exitcode, f"process {rank}"))
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except RendezvousError as error:
        _leave_reason(f"the machines of this command did not come together: {error}")
        sys.exit(1)


if __name__ == "__main__":
    _torchrun(sys.argv[1:])
