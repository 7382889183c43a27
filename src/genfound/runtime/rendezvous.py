"""The machines on which a command is given: where they meet, and how they hear that one of them has failed.

They meet at a store at HOST:PORT, which the first of them keeps, and so do the agents of torchrun on them.
"""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from ipaddress import ip_address

from torch.distributed import Store, TCPStore  # type: ignore[attr-defined]

from genfound.config.errors import JobError
from genfound.runtime.processes import wait_until

PATIENCE = 600
"""Seconds to wait for the other machines of a command."""

SIOCGIFADDR = 0x8915
"""Linux's request for the address of an interface."""

FAREWELL = 30
"""Seconds for the other machines to end before the store does."""


class Machines:
    """The machines on which a command is given, seen from one of them; the `first` keeps the store.

    `address` is that of this machine in the network of the first, or None if that is this machine's own alone.
    """

    def __init__(self, count: int, rdzv: str, job: int = 0) -> None:
        host, _, port = rdzv.rpartition(":")
        if not host or not port.isdecimal():
            raise ValueError(f"rdzv={rdzv} must be HOST:PORT: one of the machines, and a free port of it")
        self.count, self.rdzv = count, f"{host}:{int(port) + job}"
        self._store, self.first = _store(host, int(port) + job)
        self.address = _address_towards(host, int(port) + job)
        self.interface = self.address and _interface_of(self.address)

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

    def fail(self, reason: str) -> str:
        """Tell the other machines why the job has failed here; the reason of the one that has said so first."""
        with contextlib.suppress(RuntimeError):  # the store has gone
            return self._store.compare_set("failed", "", reason).decode()
        return reason

    def hearing(self, asked: Callable[[], int]) -> Callable[[], int]:
        """A function that raises a JobError if the job has failed on another machine, and else is what is given."""

        def heard() -> int:
            try:
                failed = self._store.check(["failed"]) and self._store.get("failed").decode()
            except RuntimeError:
                failed = f"the machine of rdzv={self.rdzv} has ended"
            if failed:
                raise JobError(failed)
            return asked()

        return heard

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


def _address_towards(host: str, port: int) -> str | None:
    """The address of this machine in the network of another one; None where that is one machine's own alone."""
    family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
    with socket.socket(family, socket.SOCK_DGRAM) as probe:
        probe.connect(address)  # sends nothing
        own = str(probe.getsockname()[0])
    return None if ip_address(own.partition("%")[0]).is_loopback else own


def _interface_of(address: str) -> str | None:
    """The name of the network interface with an IPv4 address, as gloo asks for it; None where it cannot be found."""
    if sys.platform != "linux":
        return None
    import fcntl  # not on Windows

    with socket.socket() as probe:
        for _, name in socket.if_nameindex():
            with contextlib.suppress(OSError):  # an interface without an address
                found = fcntl.ioctl(probe, SIOCGIFADDR, struct.pack("256s", name.encode()))[20:24]
                if socket.inet_ntoa(found) == address:
                    return name
    return None


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
