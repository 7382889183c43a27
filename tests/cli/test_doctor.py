"""`genfound.doctor` from the command line."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.cli.commands import genfound, one_error

ROWS = (
    "versions", "processor", "bf16", "attention loop", "grouped matmul", "recurrence of DiG", "recurrence of DiM",
    "torch.compile", "runs", "W&B", "Slurm", "tokenizer", "all-reduce",
)  # fmt: skip


def rows(table: str) -> dict[str, str]:
    return {name: line for line in table.splitlines() for name in ROWS if line.startswith(f"{name}  ")}


def test_two_processes_on_a_machine_that_is_well(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    well = genfound("doctor", "compile=false", "trainer.devices=2", cwd=tmp_path, TMPDIR=str(tmp_path / "tmp"))
    assert well.returncode == 0, well.stdout + well.stderr
    found = rows(well.stdout)
    assert found.keys() == {*ROWS} and len(well.stdout.splitlines()) < 25
    assert "2 processes" in found["all-reduce"] and "GB/s" in found["all-reduce"]
    assert "problem" not in well.stdout
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["tmp"]


def test_a_problem_is_a_row_and_the_exit_code(tmp_path: Path) -> None:
    words = ["compile=false", "trainer.devices=2", "trainer.accelerator=cpu"]
    ill = genfound("doctor", *words, cwd=tmp_path, GLOO_SOCKET_IFNAME="nowhere0")
    assert ill.returncode == 1 and not ill.stderr, ill.stderr
    found = rows(ill.stdout)
    assert "problem" in found["all-reduce"] and "nowhere0" in ill.stdout and "GLOO_SOCKET_IFNAME" in ill.stdout
    assert found.keys() == {*ROWS} and not list(tmp_path.iterdir())


WRONG = {
    "trainer.device=2": "unknown key trainer.device; did you mean trainer.devices?",
    "trainer.devices=0": "trainer.devices=0 must be a whole number of at least 1",
    "model=nope": "model=nope is unknown; choose one of",
    "trainer.precision=fp16": "precision=fp16 is unknown; choose one of auto, bf16, fp32",
}


@pytest.mark.parametrize("arguments", WRONG)
def test_wrong_input_is_one_line(arguments: str, tmp_path: Path) -> None:
    assert WRONG[arguments] in one_error(genfound("doctor", *arguments.split(), cwd=tmp_path))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_block_is_compiled_and_no_cache_left(tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    well = genfound("doctor", cwd=tmp_path, TMPDIR=str(tmp_path / "tmp"))
    assert well.returncode == 0, well.stdout + well.stderr
    assert "relative error of output and gradients" in rows(well.stdout)["torch.compile"]
    assert [path.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("*")] == ["tmp"]
