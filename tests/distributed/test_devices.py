"""Two processes train the run of one."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.cli.commands import TINY, genfound, one_error, variables
from tests.cli.test_encode import worker
from tests.helpers import state_differences


def curve(run: Path, key: str = "train/loss") -> list[float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


@pytest.mark.slow
def test_two_devices_give_the_loss_curve_of_one(tmp_path: Path) -> None:
    for devices in (1, 2):
        arguments = [*TINY, "batch.packs=2", "trainer.max_steps=6", f"trainer.devices={devices}", f"name=on_{devices}"]
        arguments += [
            "callbacks.validation.every=20",
            "callbacks.validation.images=17",
        ]  # three micro-batches, which two do not divide
        result = genfound("train", *arguments, "trainer.precision=fp32", cwd=tmp_path)
        assert result.returncode == 0, result.stderr
    one, two = (curve(tmp_path / f"runs/default/on_{devices}") for devices in (1, 2))
    assert len(one) == 6
    assert two == pytest.approx(one, rel=1e-5)
    for key in ("val/loss", "val/velocity_mse", "val/loss_ema", "val/velocity_mse_ema"):
        one, two = (curve(tmp_path / f"runs/default/on_{devices}", key) for devices in (1, 2))
        assert len(one) >= 2 and two == pytest.approx(one, rel=1e-5)


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_run_moves_from_two_devices_to_one(optimizer: str, tmp_path: Path) -> None:
    same = [*TINY, "batch.packs=2", "trainer.precision=fp32", f"optimizer={optimizer}"]
    for name, devices in (("moved", (2, 1)), ("stayed", (1, 1))):
        for steps, count in zip((3, 6), devices, strict=True):
            arguments = [f"trainer.max_steps={steps}", f"trainer.devices={count}", f"name={name}"]
            result = genfound("train", *same, *arguments, cwd=tmp_path)
            assert result.returncode == 0, result.stderr
    moved, stayed = (curve(tmp_path / "runs/default" / name) for name in ("moved", "stayed"))
    assert moved == pytest.approx(stayed, rel=1e-5)


@pytest.mark.slow
def test_a_job_on_two_devices_ends_with_its_reason(tmp_path: Path) -> None:
    wrong = ["batch.packs=2", "trainer.devices=2", "data.max_tokens=64"]  # found by each of them
    result = genfound("train", *TINY, *wrong, "name=run", cwd=tmp_path)
    assert "more than data.max_tokens=64" in one_error(result)
    assert result.stdout.startswith("[failed]") and "Traceback" in (tmp_path / "runs/default/run/FAILED").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("ended", [0, 1])
def test_a_process_that_is_killed_is_named_and_its_job_goes_on(ended: int, tmp_path: Path) -> None:
    options = [*TINY, "trainer.devices=2", "batch.packs=2", "trainer.precision=fp32", "name=run"]
    words = [sys.executable, "-m", "genfound.train", *options, "trainer.max_steps=100000", "budget.images=1000000"]
    job = subprocess.Popen(words, cwd=tmp_path, env=variables(), stdout=-1, stderr=-1, text=True)
    steps, deadline = tmp_path / "runs/default/run/metrics.jsonl", time.monotonic() + 120
    while not (steps.exists() and steps.stat().st_size):
        assert time.monotonic() < deadline and job.poll() is None
        time.sleep(0.05)
    killed = worker(ended, tmp_path)
    assert killed is not None
    os.kill(killed, signal.SIGKILL)
    errors = job.communicate(timeout=120)[1]
    said = f"process {ended} was ended by signal 9 (SIGKILL): most often because memory was short; the same command"
    assert job.returncode == 1 and said in one_line(errors)
    assert (steps.parent / "FAILED").read_text().startswith(said)


def one_line(errors: str) -> str:
    """The error of a command, which says nothing else."""
    assert errors.startswith("error: ") and errors.count("\n") == 1, errors
    return errors


def machine(cwd: Path, *arguments: str) -> "subprocess.Popen[str]":
    """The training command on one of several machines."""
    command = [sys.executable, "-m", "genfound.train", *TINY, *arguments]
    return subprocess.Popen(
        command, cwd=cwd, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


@pytest.mark.slow
def test_two_machines_of_one_device_give_the_run_of_one_with_two(tmp_path: Path) -> None:
    same = ["batch.packs=2", "trainer.max_steps=3", "trainer.precision=fp32"]
    rdzv = f"rdzv=127.0.0.1:{free_port()}"
    both = [machine(tmp_path, *same, "trainer.num_nodes=2", rdzv, "name=two") for _ in range(2)]
    said = [process.communicate(timeout=240) for process in both]
    assert [process.returncode for process in both] == [0, 0], said
    assert [errors for _, errors in said] == ["", ""]
    assert sum("waiting for 1 other machine" in output for output, _ in said) == 1  # the first, which locks and writes
    assert all("[done]" in output for output, _ in said)
    one = genfound("train", *TINY, *same, "trainer.devices=2", "name=one", cwd=tmp_path)
    assert one.returncode == 0, one.stderr
    runs = [tmp_path / "runs/default" / name for name in ("two", "one")]
    assert curve(runs[0]) == curve(runs[1]) and len(curve(runs[0])) == 3
    assert not [key for key in state_differences(*runs) if not key.startswith("run.")]
    again = genfound("train", *TINY, *same, "trainer.num_nodes=2", rdzv, "name=two", cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.startswith("[done before]")  # nobody is waited for


@pytest.mark.slow
def test_another_command_does_not_join(tmp_path: Path) -> None:
    same = ["batch.packs=2", "trainer.max_steps=1", "trainer.num_nodes=2", f"rdzv=127.0.0.1:{free_port()}", "name=run"]
    first = machine(tmp_path, *same)
    assert first.stdout is not None and first.stdout.readline().startswith("waiting for 1 other machine")
    error = one_error(genfound("train", *TINY, *same, "seed=1", cwd=tmp_path))
    assert "another command is at rdzv=127.0.0.1:" in error and "give the same one on every machine" in error
    first.terminate()
    assert first.wait(60) != 0 and not (tmp_path / "runs/default/run/DONE").exists()


@pytest.mark.parametrize(("rdzv", "message"), [
    ("null", "2 machines need rdzv=HOST:PORT"),
    ("node1", "rdzv=node1 must be HOST:PORT"),
    ("no.such.host.invalid:29500", "rdzv=no.such.host.invalid:29500: "),
])  # fmt: skip
def test_machines_must_know_where_to_meet(rdzv: str, message: str, tmp_path: Path) -> None:
    arguments = ["batch.packs=2", "trainer.num_nodes=2", f"rdzv={rdzv}", "name=run"]
    assert message in one_error(genfound("train", *TINY, *arguments, cwd=tmp_path))
    assert not (tmp_path / "runs/default/run").exists()
