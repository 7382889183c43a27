"""The wheel carries its configuration: installed elsewhere, it composes from any folder."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import variables

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_the_wheel_runs_from_another_folder(tmp_path: Path) -> None:
    target = tmp_path / "site"
    install = ["install", "-q", "--no-deps", "--no-index", "--no-build-isolation", "--target", str(target), str(ROOT)]
    subprocess.run([sys.executable, "-m", "pip", *install], check=True, timeout=120)
    assert (target / "genfound/conf/train.yaml").is_file() and (target / "genfound/constraints.txt").is_file()
    preset = ["--cfg", "hydra", "hydra/launcher=slurm_node"]
    for command, arguments, expected in (
        ("train", ["--help"], "nit_xl"),
        ("train", ["--cfg", "job", "model=nit_tiny"], "width: "),
        ("train", preset, "requeue: true"),
        ("doctor", ["compile=false"], "packages as tested"),
    ):
        result = subprocess.run(
            [sys.executable, "-m", f"genfound.{command}", *arguments],
            cwd=tmp_path,
            env=variables(PYTHONPATH=str(target)),
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert result.returncode == 0 and expected in result.stdout, result.stderr
