"""A process that has imported what the commands need, and forks one process for each command.

Importing torch, Lightning and Hydra takes several times as long as most commands under test do. What a command does
stays the same: it is `python -m genfound.<command>` in a process, a folder and an environment of its own.
"""

from __future__ import annotations

import atexit
import contextlib
import importlib
import json
import os
import pkgutil
import runpy
import sys
import threading
import traceback
from collections.abc import Mapping, Sequence

import genfound


def preload() -> None:
    """Import the whole package but for its loose files, which hold the commands."""
    for module in pkgutil.walk_packages(genfound.__path__, "genfound."):
        if module.name.count(".") > 1:
            importlib.import_module(module.name)


def command(module: str, arguments: Sequence[str], cwd: str, env: Mapping[str, str], output: Sequence[str]) -> None:
    """Become `python -m <module> <arguments>`; never returns."""
    for descriptor, file in enumerate([os.devnull, *output]):
        os.dup2(os.open(file, os.O_RDWR), descriptor)
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = [module, *arguments]
    code: object = 1
    try:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
        code = 0
    except SystemExit as end:
        code = end.code or 0
        if isinstance(code, str):
            print(code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(code if isinstance(code, int) else 1)


def serve() -> None:
    """Answer each line of requests with the exit status of its command."""
    preload()
    for line in sys.stdin:
        process = os.fork()
        if process == 0:
            command(**json.loads(line))
        print(os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]), flush=True)


if __name__ == "__main__":
    serve()
