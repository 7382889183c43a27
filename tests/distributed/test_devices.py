"""Two processes train the run of one."""

import json
from pathlib import Path

import pytest

from tests.cli.commands import TINY, genfound, one_error


def curve(run: Path, key: str = "train/loss") -> list[float]:
    lines = (json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines())
    return [line[key] for line in lines if key in line]


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
def test_a_run_moves_from_two_devices_to_one(tmp_path: Path) -> None:
    same = [*TINY, "batch.packs=2", "trainer.precision=fp32"]
    for name, devices in (("moved", (2, 1)), ("stayed", (1, 1))):
        for steps, count in zip((3, 6), devices, strict=True):
            arguments = [f"trainer.max_steps={steps}", f"trainer.devices={count}", f"name={name}"]
            result = genfound("train", *same, *arguments, cwd=tmp_path)
            assert result.returncode == 0, result.stderr
    moved, stayed = (curve(tmp_path / "runs/default" / name) for name in ("moved", "stayed"))
    assert moved == pytest.approx(stayed, rel=1e-5)


def test_a_job_on_two_devices_ends_with_its_reason(tmp_path: Path) -> None:
    wrong = ["batch.packs=2", "trainer.devices=2", "data.max_tokens=64"]  # found by each of them
    result = genfound("train", *TINY, *wrong, "name=run", cwd=tmp_path)
    assert "more than data.max_tokens=64" in one_error(result)
    assert result.stdout.startswith("[failed]") and "Traceback" in (tmp_path / "runs/default/run/FAILED").read_text()
