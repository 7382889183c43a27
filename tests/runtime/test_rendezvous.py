from __future__ import annotations

import os
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from genfound.config.errors import JobError
from genfound.runtime import processes, rendezvous


def free_endpoint() -> str:
    """HOST:PORT of which the port after it is free."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{found.getsockname()[1] - 1}"


def slurm(monkeypatch: pytest.MonkeyPatch, folder: Path, nodes: str) -> dict[str, str]:
    """The environment of a job on node07 and node09, and a `scontrol` that knows them."""
    (folder / "scontrol").write_text("#!/bin/sh\n[ \"$3\" = 'node[07,09]' ] && printf 'node07\\nnode09\\n'\n")
    (folder / "scontrol").chmod(0o755)
    monkeypatch.setenv("PATH", str(folder), prepend=os.pathsep)
    return {"SLURM_JOB_ID": "1234567", "SLURM_JOB_NODELIST": "node[07,09]", "SLURM_NNODES": nodes}


def test_the_machines_of_a_slurm_job_meet_on_its_first_node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendezvous._slurm_endpoint(2, slurm(monkeypatch, tmp_path, "2")) == "node07:24567"
    assert rendezvous._slurm_endpoint(2, slurm(monkeypatch, tmp_path, "1")) is None  # two tasks on one node
    assert rendezvous._slurm_endpoint(2, {"SLURM_NNODES": "2", "SLURM_JOB_NODELIST": "other"}) is None
    assert rendezvous._slurm_endpoint(2, {}) is None


def test_machines_agree_with_the_first_or_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PAUSE", 0.01)
    rdzv = free_endpoint()
    first, *others = [rendezvous.Machines(2, rdzv, job=1) for _ in range(3)]
    assert [machine.first for machine in (first, *others)] == [True, False, False]
    with ThreadPoolExecutor() as pool:
        waiting = pool.submit(first.agree, "the fact")
        with pytest.raises(ValueError, match=r"another command is at rdzv=127\.0\.0\.1:"):
            others[0].agree("something else")
        assert not waiting.done()
        others[0].agree("the fact")
        waiting.result(60)
    with pytest.raises(ValueError, match=r"there are 2 machines at rdzv=.* already"):
        others[1].agree("the fact")
    monkeypatch.setattr(rendezvous, "FAREWELL", 0.05)
    first.leave()


def test_machines_do_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "PAUSE", 0.01)
    monkeypatch.setattr(rendezvous, "PATIENCE", 0.05)
    with rendezvous.machines(2, free_endpoint(), job=1) as machines:
        assert machines is not None
        with pytest.raises(ValueError, match=r"not all machines came to rdzv=.* in 0.05 s; give the command on each"):
            machines.agree("the fact")


def test_each_machine_hears_why_the_first_one_to_fail_did(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rendezvous, "FAREWELL", 0.05)
    first, other = (rendezvous.Machines(2, rdzv, job=1) for rdzv in [free_endpoint()] * 2)
    heard = first.hearing(lambda: 15)
    assert heard() == 15
    assert other.fail("its disk is full") == "its disk is full" == first.fail("it lost the other machine")
    with pytest.raises(JobError, match="its disk is full"):
        heard()
    first.leave()


def test_a_machine_is_known_by_its_address_in_the_network_of_the_first(monkeypatch: pytest.MonkeyPatch) -> None:
    assert rendezvous._address_towards("127.0.0.1", 29500) is None
    if sys.platform == "linux":
        assert rendezvous._interface_of("127.0.0.1") == "lo" and rendezvous._interface_of("192.0.2.1") is None
    monkeypatch.setattr(sys, "platform", "win32")
    assert rendezvous._interface_of("127.0.0.1") is None
