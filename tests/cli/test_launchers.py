"""Sweeps through Hydra's launchers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import TINY, genfound


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib", "submitit_local"])
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
