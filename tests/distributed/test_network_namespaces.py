"""Two machines, as two network namespaces of this one: each has its own interfaces, and the same name for itself."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.commands import TINY, genfound, variables
from tests.distributed.test_devices import curve

ADDRESSES = {"genfound-a": "10.77.0.1", "genfound-b": "10.77.0.2"}
"""Of the namespaces; none of this machine's own addresses is theirs but the loopback."""

SAME = ["batch.packs=2", "trainer.precision=fp32", "trainer.num_nodes=2", "rdzv=10.77.0.1:29511"]

Start = Callable[..., "subprocess.Popen[str]"]

pytestmark = pytest.mark.slow


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, text=True)


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Start]:
    """Gives the training command on the machine of a name."""
    first, second = ADDRESSES
    if shutil.which("ip") is None:
        pytest.skip("there is no command ip (iproute2)")
    try:
        ip("netns", "add", first)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"network namespaces are not allowed: {error.stderr.strip()}")
    nothing = tmp_path / "resolv.conf"  # a server of names that cannot be reached costs seconds
    nothing.touch()

    def started(name: str, *arguments: str) -> subprocess.Popen[str]:
        within = [
            "ip",
            "netns",
            "exec",
            name,
            "sh",
            "-c",
            'mount --bind "$0" /etc/resolv.conf && exec "$@"',
            str(nothing),
        ]
        command = [*within, sys.executable, "-m", "genfound.train", *TINY, *SAME, *arguments]
        return subprocess.Popen(
            command, cwd=tmp_path, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )

    try:
        ip("netns", "add", second)
        ip("link", "add", "veth0", "netns", first, "type", "veth", "peer", "name", "veth0", "netns", second)
        for name, address in ADDRESSES.items():
            ip("-n", name, "address", "add", f"{address}/24", "dev", "veth0")
            for link in ("lo", "veth0"):
                ip("-n", name, "link", "set", link, "up")
        yield started
    finally:
        for name in ADDRESSES:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def test_two_machines_train_the_losses_of_one(start: Start, tmp_path: Path) -> None:
    steps = "trainer.max_steps=6"
    both = [start(name, steps, "name=two") for name in ADDRESSES]
    said = [process.communicate(timeout=300) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    one = genfound("train", *TINY, *SAME[:2], steps, "name=one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    losses = [curve(tmp_path / "runs/default" / name) for name in ("two", "one")]
    assert len(losses[1]) == 6 and losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize("trains", [False, True])
def test_a_process_that_is_killed_ends_the_job_on_both(trains: bool, start: Start, tmp_path: Path) -> None:
    both = [start(name, "trainer.max_steps=100000", "budget.images=1000000", "name=run") for name in ADDRESSES]
    steps = tmp_path / "runs/default/run/metrics.jsonl"
    deadline = time.monotonic() + 300
    while not (workers := workers_of("genfound-b")) or (trains and not (steps.exists() and steps.stat().st_size)):
        assert time.monotonic() < deadline and [process.poll() for process in both] == [None, None]
        time.sleep(0.05)
    os.kill(workers[0], signal.SIGKILL)
    killed = time.monotonic()
    errors = [process.communicate(timeout=300)[1] for process in both]
    assert time.monotonic() - killed < 40
    assert [process.returncode for process in both] == [1, 1]
    assert all("error: process 1 was ended by signal 9 (SIGKILL)" in error for error in errors), errors


def workers_of(namespace: str) -> list[int]:
    """The processes that train there."""
    found = subprocess.run(["ip", "netns", "pids", namespace], check=True, capture_output=True, text=True).stdout
    words = {int(number): Path(f"/proc/{number}/cmdline").read_bytes().split(b"\0") for number in found.split()}
    return [
        number for number, own in words.items() if b"genfound.training" in own and own[3:4] == [b"genfound.training"]
    ]
