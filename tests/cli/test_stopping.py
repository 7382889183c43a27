"""Signals end a run after a global step with a checkpoint, from which the same command continues bit for bit."""

import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

from tests.cli.commands import LIMIT, TINY, genfound
from tests.cli.test_sweeps import SMALL, begun, table, training, wait_for
from tests.helpers import state_differences

SAME = [*TINY, "data.images=300", "callbacks.preview.every=4000", "trainer.max_steps=80"]


def told_during_training(process: "subprocess.Popen[str]", run: Path, number: signal.Signals, whom: int) -> str:
    """Send a signal after a few steps; what the command has said."""
    wait_for(lambda: (run / "metrics.jsonl").is_file() and (run / "metrics.jsonl").read_text().count("train/loss") > 3)
    os.kill(whom, number)
    output, errors = process.communicate(timeout=LIMIT)
    return output + errors


def assert_stopped(run: Path, number: signal.Signals) -> None:
    mark = json.loads((run / "STOPPED").read_text())
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    last = max(line["step"] for line in steps)
    assert mark == {"signal": number, "reason": f"{number.name}: ended after step {last}"}
    assert last < 80 and (run / f"checkpoints/step-{last:08d}.ckpt").is_file()
    assert not (run / "FAILED").exists() and not (run / "DONE").exists()


def assert_continued(run: Path, straight: Path) -> None:
    assert (run / "DONE").is_file() and not (run / "STOPPED").exists()
    assert not state_differences(run, straight)
    figures = [(run / "metrics.jsonl").read_text().splitlines() for run in (run, straight)]
    one, other = ([json.loads(line)["train/loss"] for line in lines if "train/loss" in line] for lines in figures)
    assert one == other


@pytest.mark.slow
def test_a_stopped_run_continues_bit_for_bit(tmp_path: Path) -> None:
    straight = genfound("train", *SAME, "name=straight", cwd=tmp_path)
    assert straight.returncode == 0, straight.stderr
    run = tmp_path / "runs/default/run"
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1):
        process = begun(*SAME, "name=run", cwd=tmp_path)
        said = told_during_training(process, run, number, process.pid)
        assert process.returncode == 75, said
        assert said.count(f"{number.name}: ending after a global step, with a checkpoint") == 1
        assert_stopped(run, number)
        again = genfound("train", *SAME, "name=run", cwd=tmp_path)
        assert again.returncode == 0 and "continuing from" in again.stdout, again.stderr
        assert_continued(run, tmp_path / "runs/default/straight")
        run.rename(run.with_name(number.name))


@pytest.mark.slow
@pytest.mark.parametrize("whom", ["command", "one of its processes"])
def test_two_processes_stop_after_the_same_step(whom: str, tmp_path: Path) -> None:
    same = [*SAME, "trainer.devices=2", "batch.packs=2"]
    process = begun(*same, "name=run", cwd=tmp_path)
    run = tmp_path / "runs/default/run"
    wait_for((run / "metrics.jsonl").is_file)
    target = process.pid if whom == "command" else training(tmp_path, rank=1)
    number = signal.SIGUSR2 if whom == "command" else signal.SIGTERM
    said = told_during_training(process, run, number, target)
    assert process.returncode == 75, said
    assert_stopped(run, number)
    assert genfound("train", *same, "name=run", cwd=tmp_path).returncode == 0
    assert genfound("train", *same, "name=straight", cwd=tmp_path).returncode == 0
    assert_continued(run, tmp_path / "runs/default/straight")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", ["basic", "joblib"])
def test_a_sweep_stops_after_its_jobs_and_the_same_command_goes_on(launcher: str, tmp_path: Path) -> None:
    at_once = ["hydra.launcher.n_jobs=2"] if launcher == "joblib" else []
    jobs = ["-m", *SMALL, "seed=0,1,2", f"hydra/launcher={launcher}", *at_once]
    process = begun(*jobs, "budget.images=1000000", cwd=tmp_path)
    running = 2 if at_once else 1
    wait_for(lambda: len(list(tmp_path.glob("runs/s/*/metrics.jsonl"))) == running)
    for _ in range(2):  # as Slurm and its srun
        process.send_signal(signal.SIGINT)
        time.sleep(0.01)
    output, errors = process.communicate(timeout=LIMIT)
    assert process.returncode == 75, output + errors
    assert [line.split()[0] for line in table(output).values()] == ["stopped"] * running + ["not"] * (3 - running)
    assert "SIGINT: ended after step" in table(output)["seed=0"]
    steps = [json.loads(file.read_text())["reason"].rpartition(" ")[2] for file in tmp_path.glob("runs/s/*/STOPPED")]
    assert len(steps) == running
    end = f"trainer.max_steps={max(map(int, steps)) + 1}"
    again = genfound("train", *jobs, "budget.images=1000000", end, cwd=tmp_path)
    assert again.returncode == 0, again.stdout + again.stderr
    logs = [file.read_text() for file in tmp_path.glob("runs/s/*/log.txt")]
    assert sum("continuing from" in log for log in logs) == running and len(logs) == 3
