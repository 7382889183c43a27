"""Which process of a group this is, and how a group is started.

A shell, a scheduler or a container may leave the variables of a launcher (RANK, WORLD_SIZE, SLURM_NTASKS, ...) in the
environment of a command that is a single process. So a command forgets them before anything can read them, and only
a process that genfound has started itself takes its rank from them.
"""

import atexit
import contextlib
import json
import logging
import os
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NoReturn

from torch import distributed

from genfound.config.environment import LAUNCH, PARENT, forget_inherited
from genfound.config.errors import USER_ERRORS, JobError, mistake, sentence
from genfound.config.streams import make_lasting
from genfound.runtime import stopping
from genfound.runtime.processes import end_with_parent, run_command
from genfound.runtime.rendezvous import Machines


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
        if others.address:  # the machine's name may stand for the machine alone, as 127.0.1.1 on Debian
            group.append(f"--local-addr={others.address}")
            if others.interface:
                shared.setdefault("GLOO_SOCKET_IFNAME", others.interface)
    agent = [__name__, f"--nproc-per-node={devices}", *group, "-m"] if devices > 1 or others else []
    with tempfile.TemporaryDirectory(prefix="genfound-") as folder:
        if isinstance(request, Mapping):
            content, request = json.dumps(dict(request)), Path(folder) / "request.json"
            request.write_text(content)
        if asked is None:
            (Path(folder) / stopping.NOW).touch()
        command = [sys.executable, "-m", *agent, module, str(request)]
        hear = others.hearing(asked) if others and asked else asked
        code = run_command(command, shared | environment | {LAUNCH: folder}, log, hear)
        if code:
            file = Path(folder) / "reason"
            reason = file.read_text() if file.exists() else _ending(code)
            reason = reason.replace(PRINTED, str(log)) if log else reason
            raise JobError(others.fail(reason) if others else reason)


PRINTED = "what the process has printed"
TRACEBACK = f"its traceback is in {PRINTED}"

PATIENCE = 5
"""Seconds in which the agent ends a process that has lost contact, if another one of its machine has died."""


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
            if lost_contact(error):
                time.sleep(PATIENCE)
            _leave_reason(f"{mistake(error)}; {TRACEBACK}")
        raise


def lost_contact(error: BaseException) -> bool:
    """Whether a collective operation failed, most often because another process has ended, which is then the reason."""
    return isinstance(error, distributed.DistError) or "gloo/transport" in str(error)


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
    names = {known.value: known.name for known in signal.Signals}
    if number not in names:
        return f"{process} failed by a mistake in the program; {TRACEBACK}"
    short = ": most often because memory was short" if names[number] == "SIGKILL" else ""
    ended = f"{process} was ended by signal {number} ({names[number]}){short}"
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
        failed = error.failures.items()  # those that were ended by a signal have not lost contact
        rank, failure = min(failed, key=lambda item: (item[1].exitcode >= 0, item[1].timestamp))
        _leave_reason(_ending(failure.exitcode, f"process {rank}"))
        sys.exit(1)
    except SignalException as error:
        sys.exit(128 + error.sigval)
    except RendezvousError as error:
        _leave_reason(f"the machines of this command did not come together: {error}")
        sys.exit(1)


if __name__ == "__main__":
    _torchrun(sys.argv[1:])
