"""Running genfound's commands as a user does, with a net that trains in seconds."""

import atexit
import functools
import json
import os
import select
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parents[2]
LIMIT = 300
"""Seconds that a command may take."""

TINY = [
    "model.width=32", "model.depth=1", "model.heads=1", "data.max_tokens=256", "batch.packs=1", "budget.images=4000",
    "trainer.log_every_n_steps=1", "callbacks.validation.images=16", "callbacks.validation.every=1000",
    "callbacks.preview.every=40",
    "sampler=euler", "sampler.steps=2", "sample.batch=4", "logger=jsonl",
]  # fmt: skip


def genfound(command: str, *arguments: str, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """`python -m genfound.<command> <arguments>` in a folder, on one thread, offline.

    A new interpreter where variables are given, which may matter before anything is imported; else a process that is
    forked from one that has imported everything.
    """
    module = f"genfound.{command}"
    run = _new_interpreter if environment else _forked
    return run(module, arguments, cwd, variables(**environment))


def _new_interpreter(
    module: str, arguments: tuple[str, ...], cwd: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    words = [sys.executable, "-m", module, *arguments]
    return subprocess.run(words, cwd=cwd, env=env, capture_output=True, text=True, timeout=LIMIT, check=False)


def _forked(
    module: str, arguments: tuple[str, ...], cwd: Path, env: dict[str, str]
) -> subprocess.CompletedProcess[str]:
    server = _server()
    assert server.stdin and server.stdout
    with tempfile.NamedTemporaryFile("r") as out, tempfile.NamedTemporaryFile("r") as errors:
        request = {"module": module, "arguments": arguments, "cwd": str(cwd), "env": env}
        server.stdin.write(json.dumps({**request, "output": [out.name, errors.name]}) + "\n")
        server.stdin.flush()
        if not select.select([server.stdout], [], [], LIMIT)[0]:
            _stop(server)
            _server.cache_clear()
            raise subprocess.TimeoutExpired([module, *arguments], LIMIT, out.read(), errors.read())
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess([module, *arguments], code, out.read(), errors.read())


@functools.cache
def _server() -> subprocess.Popen[str]:
    """The process that forks; one for each process of tests."""
    server = subprocess.Popen(
        [sys.executable, "-m", "tests.cli.fork_server"],
        cwd=ROOT,
        env=variables(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    atexit.register(_stop, server)
    return server


def _stop(server: subprocess.Popen[str]) -> None:
    if server.poll() is None:
        os.killpg(server.pid, signal.SIGKILL)
        server.wait()


def variables(**environment: str) -> dict[str, str]:
    """The environment of a command under test."""
    return os.environ | {"OMP_NUM_THREADS": "1", "WANDB_MODE": "disabled"} | environment


def one_error(result: subprocess.CompletedProcess[str]) -> str:
    """The single line that a wrong command must leave on standard error."""
    lines = result.stderr.strip().splitlines()
    assert result.returncode == 1, result.stdout + result.stderr
    assert len(lines) == 1 and lines[0].startswith("error: "), result.stderr
    return lines[0]
