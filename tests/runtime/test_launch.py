from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from genfound.config.environment import LAUNCH, forget_inherited
from genfound.config.environment import copies as environment_copies
from genfound.config.errors import JobError
from genfound.runtime import launch, processes
from genfound.runtime.processes import SINGLE_PROCESS, RankInfo
from tests.runtime.children import alive, started

TORCHRUN = {"RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1"}


@pytest.fixture
def group(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """This process as one of a group whose launch lasts."""
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(LAUNCH, str(tmp_path))
    return tmp_path


def test_a_process_of_a_launch_knows_its_place(group: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert processes.rank_info() == SINGLE_PROCESS
    for name, value in TORCHRUN.items():
        monkeypatch.setenv(name, value)
    assert processes.rank_info() == RankInfo(3, 4, 1)


@pytest.mark.parametrize("wrong", [
    {"RANK": "1"}, {"WORLD_SIZE": "2"}, {**TORCHRUN, "RANK": "4"}, {**TORCHRUN, "RANK": "-1"},
    {**TORCHRUN, "WORLD_SIZE": "many"}, {**TORCHRUN, "LOCAL_RANK": "4"}, {**TORCHRUN, LAUNCH: "ended/before"},
])  # fmt: skip
def test_a_rank_is_believed_only_with_everything_that_a_launch_sets(
    wrong: dict[str, str], group: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in wrong.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=r"genfound starts itself: give the command.* trainer\.devices=N"):
        processes.rank_info()


def test_a_command_forgets_what_launchers_left() -> None:
    left = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "10.0.0.1", "PET_NNODES": "2", "SLURM_NTASKS": "4",
            "SLURM_PROCID": "0", "NODE_RANK": "1", "TORCHELASTIC_RUN_ID": "x", LAUNCH: "/gone"}  # fmt: skip
    environment = {**left, "HOME": "/home/me", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "4"}
    assert forget_inherited(environment) == ["NODE_RANK=1", "SLURM_NTASKS=4", "WORLD_SIZE=2"]
    assert environment == {"HOME": "/home/me", "SLURM_JOB_ID": "7", "OMP_NUM_THREADS": "4"}


@pytest.mark.parametrize(("environment", "copies"), [
    ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", "RANK": "1"}, ("WORLD_SIZE", 4)),
    ({"SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2"}, ("SLURM_STEP_NUM_TASKS", 2)),
    ({"OMPI_COMM_WORLD_RANK": "0", "OMPI_COMM_WORLD_SIZE": "8"}, ("OMPI_COMM_WORLD_SIZE", 8)),
    ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "1", "RANK": "0"}, ("", 1)),  # torchrun of one process
    ({"SLURM_JOB_ID": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}, ("", 1)),  # in an allocation, not a step of it
    ({"WORLD_SIZE": "4", "RANK": "1"}, ("", 1)),
    ({"TORCHELASTIC_RUN_ID": "none", "WORLD_SIZE": "4", LAUNCH: "/tmp/x"}, ("", 1)),  # begun by one of our processes
])  # fmt: skip
def test_copies_of_a_command_are_told_from_stray_variables(
    environment: dict[str, str], copies: tuple[str, int]
) -> None:
    assert environment_copies(environment) == copies


WORKER = """
import os, sys
from pathlib import Path
from genfound.runtime import launch, processes

with launch.reporting():
    rank = processes.rank_info().rank
    exec(Path(sys.argv[1]).read_text())
"""


@pytest.mark.parametrize(("devices", "code", "reason"), [
    (1, "raise ValueError('shard 3 is damaged')", "shard 3 is damaged"),
    (1, "open('/nowhere/x')", "/nowhere/x: No such file or directory"),
    (2, "raise ValueError(f'shard 3\\n  is damaged')", "shard 3 is damaged"),
    (2, "os.kill(os.getpid(), 9) if rank else None", "process 1 was ended by signal 9 (SIGKILL): most often because"),
])  # fmt: skip
def test_a_launch_ends_with_the_reason_and_nothing_else(
    devices: int, code: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "request").write_text(code)
    for name, value in {"WORLD_SIZE": "7", "MASTER_PORT": "x", "PET_NNODES": "2"}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(JobError) as error:
        launch.launch("worker", tmp_path / "request", devices, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert str(error.value).startswith(reason)
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("devices", [1, 2])
def test_a_mistake_is_named_and_its_traceback_printed(
    devices: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "request").write_text("[][rank]")
    with pytest.raises(JobError, match=r"^a mistake in the program: IndexError: list index out of range; "):
        launch.launch("worker", tmp_path / "request", devices, PYTHONPATH=os.pathsep.join([str(tmp_path), *sys.path]))
    assert "Traceback" in capfd.readouterr().err


@pytest.mark.slow
def test_processes_of_a_launch_end_with_it_however_it_ends(tmp_path: Path) -> None:
    (tmp_path / "worker.py").write_text(WORKER)
    (tmp_path / "request").write_text(
        "import time; Path(sys.argv[1]).with_name(str(rank)).write_text(str(os.getpid())); time.sleep(60)"
    )
    code = "import sys; from pathlib import Path; from genfound.runtime.launch import launch;"
    code += f"launch('worker', Path({str(tmp_path / 'request')!r}), 2)"
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    parent = subprocess.Popen([sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths})
    deadline = time.monotonic() + 60
    files = [tmp_path / "0", tmp_path / "1"]
    while not all(file.exists() and file.read_text() for file in files):
        assert time.monotonic() < deadline and parent.poll() is None
        time.sleep(0.02)
    parent.kill()
    parent.wait()
    while any(alive(int(file.read_text())) for file in files):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_process_of_a_group_ends_without_taking_python_down() -> None:
    """Else torch may abort it; what is registered for its end is done."""
    code = """
import atexit
from torch import distributed
from genfound.runtime import launch
atexit.register(lambda: print("at the end", distributed.is_initialized()))
with launch.reporting():
    distributed.init_process_group("gloo", store=distributed.HashStore(), rank=0, world_size=1)
print("beyond it")
"""
    process, told = started(code)
    assert process.wait(60) == 0 and told == "at the end False"
