"""Sweeps and jobs of several nodes on a real Slurm."""

from __future__ import annotations

import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.cli import slurm
from tests.cli.commands import LIMIT, ROOT, TINY, genfound, one_error
from tests.cli.test_sweeps import SMALL, begun, table, wait_for
from tests.distributed.test_devices import curve
from tests.helpers import state_differences

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(slurm.MISSING), reason="needs slurmctld, slurmd, slurm-client and munge of Debian"),
]
ON_SLURM = ["hydra/launcher=slurm_node", "hydra.launcher.partition=two"]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    with slurm.cluster(tmp_path_factory.mktemp("slurm")) as file:
        yield file


@pytest.fixture(autouse=True)
def _on_the_cluster(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_CONF", str(config))


def jobs() -> dict[str, list[str]]:
    """Number of a job -> its state, its node and its cards."""
    listed = subprocess.run(
        ["squeue", "-hr", "-O", "JobArrayID,StateCompact,NodeList,tres-per-node"],
        capture_output=True,
        text=True,
        check=True,
    )
    return {words[0]: words[1:] for words in map(str.split, listed.stdout.splitlines())}


def losses(run: Path) -> list[float]:
    return curve(run) if (run / "metrics.jsonl").is_file() else []


def test_a_preempted_job_of_an_array_goes_on_as_if_nothing_had_been(tmp_path: Path) -> None:
    sweep = ["-m", *SMALL, "trainer.max_steps=200", "name=r"]
    process = begun(*sweep, "seed=0,1,2,3", *ON_SLURM, cwd=tmp_path)
    run, straight = (tmp_path / "runs" / study / "r__seed-0" for study in ("s", "straight"))
    wait_for(lambda: len(losses(run)) > 3)
    queued = jobs()
    (first,) = [number for number in queued if number.endswith("_0")]
    # Its step: for a whole task of an array scancel repeats the signal for a minute, in what was requeued as well.
    subprocess.run(["scancel", "--signal=USR2", f"{first}.0"], check=True)
    output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 0, output + errors
    assert [line.split()[0] for line in table(output).values()] == ["done"] * 4
    assert sorted(state for state, *_ in queued.values()) == ["PD", "PD", "R", "R"], queued
    assert {words[1] for words in queued.values() if words[0] == "R"} == set(slurm.NODES)
    assert all(words[-1].endswith("gpu:1") for words in queued.values()), queued
    log = (run / "log.txt").read_text()
    assert log.count("begun ") == 2 and "stopped after step" in log and "continuing from" in log
    alone = genfound("train", *sweep, "seed=0,1", "study=straight", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    assert losses(run) == losses(straight) and len(losses(run)) == 200
    assert not state_differences(run, straight)


@pytest.mark.parametrize("launched", ["srun", "sweep"])
def test_a_task_on_each_of_two_nodes_gives_the_loss_curve_of_one(launched: str, tmp_path: Path) -> None:
    same = [*TINY, "batch.packs=2", "trainer.max_steps=6", "trainer.precision=fp32"]
    alone = genfound("train", *same, "name=alone", cwd=tmp_path)
    assert alone.returncode == 0, alone.stderr
    if launched == "srun":
        task = [sys.executable, "-m", "genfound.train", *same, "trainer.num_nodes=2", "name=two"]
        command = ["srun", "--partition=two", "--nodes=2", "--ntasks-per-node=1", *task]
        two = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=LIMIT, check=False)
    else:
        two = genfound("train", "-m", *same, "trainer.num_nodes=2", "name=two", *ON_SLURM, cwd=tmp_path)
    assert two.returncode == 0, two.stdout + two.stderr
    one, other = (losses(tmp_path / "runs/default" / name) for name in ("alone", "two"))
    assert len(one) == 6 and other == pytest.approx(one, rel=1e-5)


def test_images_are_drawn_on_nodes(tmp_path: Path) -> None:
    assert genfound("train", *SMALL, "name=run", "trainer.max_steps=1", cwd=tmp_path).returncode == 0
    drawn = genfound("sample", "-m", "from=runs/s/run", "labels=[0]", "seed=0,1", *ON_SLURM, cwd=tmp_path)
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    assert len(list(tmp_path.glob("runs/s/run/samples/*/grid.png"))) == 2
    varied = genfound("evaluate", "-m", "from=runs/s/run", "reference=data", "devices=1,2", *ON_SLURM, cwd=tmp_path)
    assert "hydra/launcher=slurm_node asks for the same devices for all jobs" in one_error(varied)


def test_the_batch_script_of_the_guide_goes_on_after_a_signal(tmp_path: Path) -> None:
    script = (ROOT / "docs/sweeps.md").read_text().partition("```\n#SBATCH")[2].partition("```")[0]
    command = shlex.join([sys.executable, "-m", "genfound.train", *SMALL, "trainer.max_steps=200"])
    script = f"#!/bin/bash\n#SBATCH{script}".replace("python -m genfound.train", command)
    (tmp_path / "job").write_text(script)
    subprocess.run(["sbatch", "--partition=two", "--output=out", "--open-mode=append", "job"], cwd=tmp_path, check=True)
    run = tmp_path / "runs/s/mine"
    wait_for(lambda: len(losses(run)) > 3)
    subprocess.run(["scancel", "--signal=TERM", *jobs()], check=True)
    wait_for(lambda: (run / "DONE").is_file() or (run / "FAILED").is_file())
    said = (tmp_path / "out").read_text()
    assert "SIGTERM: ending after a global step" in said and "continuing from" in said, said
    assert len(losses(run)) == 200


def test_what_slurm_refuses_is_said_in_one_line(tmp_path: Path) -> None:
    for wrong, reason in (
        (["hydra.launcher.partition=nope"], "SlurmLauncher: sbatch: error: invalid partition specified: nope"),
        (["trainer.devices=3"], "Requested node configuration is not available"),
    ):
        refused = genfound("train", "-m", *SMALL, *ON_SLURM, *wrong, cwd=tmp_path)
        said = [line for line in refused.stderr.splitlines() if not line.startswith("sbatch: ")]
        assert refused.returncode == 1 and len(said) == 1, refused.stderr
        assert said[0].startswith("error: ") and reason in said[0]
