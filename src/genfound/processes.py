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
from collections.abc import Iterator, Mapping, MutableMapping
from pathlib import Path
from typing import NamedTuple

from genfound.errors import USER_ERRORS, JobError, sentence
from genfound.reporting.streams import make_lasting
from genfound.work import run_apart

LAUNCH = "GENFOUND_LAUNCH"
"""Of processes that genfound starts: a folder that exists as long as their group."""

SIZES = ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "GROUP_WORLD_SIZE", "ROLE_WORLD_SIZE", "SLURM_NTASKS", "SLURM_NPROCS",
         "SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "JSM_NAMESPACE_SIZE")  # fmt: skip
RANKS = ("RANK", "LOCAL_RANK", "GROUP_RANK", "ROLE_RANK", "NODE_RANK", "SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID",
         "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_LOCAL_RANK", "PMI_RANK", "JSM_NAMESPACE_RANK",
         "JSM_NAMESPACE_LOCAL_RANK")  # fmt: skip
OTHERS = ("MASTER_ADDR", "MASTER_PORT", "ROLE_NAME")
PREFIXES = ("TORCHELASTIC_", "PET_")
"""What torchrun, Slurm and MPI tell their processes; PET_ are torchrun's own options."""

LAUNCHERS = (("TORCHELASTIC_RUN_ID", "WORLD_SIZE"), ("SLURM_STEP_ID", "SLURM_STEP_NUM_TASKS"),
             ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"), ("PMI_RANK", "PMI_SIZE"))  # fmt: skip
"""Of torchrun, srun and MPI: a variable that only their processes have, and the one of how many there are."""


class Place(NamedTuple):
    """Of a process in its group; `local_rank` counts on its machine."""

    rank: int
    world_size: int
    local_rank: int


ALONE = Place(0, 1, 0)


def place() -> Place:
    """The place that genfound gave this process when it started it.

    Raises:
        ValueError: it was started by something else.
    """
    given = [os.environ.get(name) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")]
    if Path(os.environ.get(LAUNCH, os.devnull)).is_dir():
        if given == [None] * 3:
            return ALONE
        if all(value is not None and value.isdecimal() for value in given):
            found = Place(*(int(value) for value in given if value))
            if found.local_rank <= found.rank < found.world_size:
                return found
    raise ValueError(
        "this module is a process of a group that genfound starts itself: give the command, such as "
        "python -m genfound.train ... trainer.devices=N"
    )


def copies(environment: Mapping[str, str]) -> tuple[str, int]:
    """The variable with which a launcher says that it has started this command so many times; 1 if none has."""
    if LAUNCH not in environment:
        for own, size in LAUNCHERS:
            count = environment.get(size, "")
            if own in environment and count.isdecimal() and int(count) > 1:
                return size, int(count)
    return "", 1


def forget_inherited(environment: MutableMapping[str, str]) -> list[str]:
    """Remove what a launcher may have left in an environment; `NAME=value` of what speaks of several processes."""
    names = {name for name in environment if name in (*SIZES, *RANKS, *OTHERS, LAUNCH) or name.startswith(PREFIXES)}
    values = {name: environment.pop(name) for name in sorted(names)}
    alone = dict.fromkeys(SIZES, "1") | dict.fromkeys(RANKS, "0")
    return [f"{name}={value}" for name, value in values.items() if alone.get(name, value) != value]


def launch(module: str, request: Path, devices: int, **environment: str) -> None:
    """Run `python -m <module> <request>` in so many processes, which end with this one.

    Raises:
        JobError: one of them failed, and why.
    """
    shared = dict(os.environ)
    forget_inherited(shared)
    group = [__name__, str(devices)] if devices > 1 else []
    with tempfile.TemporaryDirectory(prefix="genfound-") as folder:
        code = run_apart([sys.executable, "-m", *group, module, str(request)], shared | environment | {LAUNCH: folder})
        if code:
            reason = Path(folder) / "reason"
            raise JobError(reason.read_text() if reason.exists() else _ending(code))


@contextlib.contextmanager
def reporting() -> Iterator[None]:
    """Leave the reason of a failure to the process that has launched this one; the first of a group is the one."""
    make_lasting()
    try:
        yield
    except USER_ERRORS as error:
        reason, folder = sentence(error), Path(os.environ.get(LAUNCH, os.devnull))
        if not folder.is_dir():
            sys.exit(f"error: {reason}")
        if reason:
            with contextlib.suppress(FileExistsError), open(folder / "reason", "x") as out:
                out.write(reason)
        sys.exit(1)


def _ending(code: int) -> str:
    """About a process that could say nothing itself, or has left a traceback."""
    number = -code if code < 0 else code - 128
    if number <= 0:
        return "a process failed by a mistake in the program; its traceback is above"
    short = ": most often because memory was short" if number == signal.SIGKILL else ""
    return f"a process was ended by signal {number} ({signal.Signals(number).name}){short}"


def _torchrun(devices: str, module: str, request: str) -> None:
    """The agent of a group: torchrun, which leaves it to others to say why a process failed."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)
    try:
        run.run(run.parse_args(["--standalone", f"--nproc-per-node={devices}", "-m", module, request]))
    except ChildFailedError as error:
        code = error.get_first_failure()[1].exitcode
        sys.exit(code if code > 0 else 128 - code)
    except SignalException as error:
        sys.exit(128 + error.sigval)


if __name__ == "__main__":
    _torchrun(*sys.argv[1:])
