"""Sweeps through Hydra's launchers."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

from tests.cli.commands import TINY, genfound, one_error


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["joblib", "submitit_local"])
def test_a_launcher_runs_all_jobs_and_the_command_fails_if_one_did(launcher: str, tmp_path: Path) -> None:
    at_once = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    jobs = ["-m", "trainer.devices=3,1", "seed=0,1", "study=s", f"hydra/launcher={launcher}", *at_once]
    result = genfound("train", *jobs, *TINY, "trainer.max_steps=2", cwd=tmp_path, OMP_NUM_THREADS="1")
    done = sorted(tmp_path.glob("runs/s/*/DONE"))
    assert len(done) == len(list(tmp_path.glob("runs/s/*/FAILED"))) == 2, result.stderr
    assert result.returncode == 1
    assert not list(tmp_path.glob("runs/s/.sweep*"))
    if launcher == "joblib":  # two at once
        begun = [(file.parent / "config.yaml").stat().st_mtime for file in done]
        assert max(begun) < min(file.stat().st_mtime for file in done)


def test_what_all_jobs_share_cannot_be_varied(tmp_path: Path) -> None:
    for key in ("trainer.devices", "trainer.num_nodes"):
        refused = genfound("train", "-m", *TINY, f"{key}=1,2", "hydra/launcher=slurm_node", cwd=tmp_path)
        assert f"hydra/launcher=slurm_node asks for the same {key} for all jobs; give a sweep" in one_error(refused)


@pytest.mark.parametrize(("launcher", "plugin", "extra"), [
    ("joblib", "joblib", "joblib"), ("ray_gpus", "ray", "ray"), ("slurm_node", "submitit_slurm", "slurm"),
])  # fmt: skip
def test_a_launcher_that_is_not_installed_is_named_with_its_extra(
    launcher: str, plugin: str, extra: str, tmp_path: Path
) -> None:
    for name in ("joblib", "ray", "submitit"):  # found before those that are installed, and empty
        (tmp_path / f"hydra_plugins/hydra_{name}_launcher").mkdir(parents=True)
        (tmp_path / f"hydra_plugins/hydra_{name}_launcher/__init__.py").touch()
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    refused = genfound("train", "-m", "seed=0,1", f"hydra/launcher={launcher}", cwd=tmp_path, PYTHONPATH=paths)
    assert one_error(refused) == f"error: hydra/launcher={plugin} is not installed; pip install 'genfound[{extra}]'"
