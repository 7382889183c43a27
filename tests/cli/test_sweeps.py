"""`python -m genfound.train -m`: each job is done, or the table at the end says why it is not."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from genfound.config.signals import STOPPING
from tests.cli.commands import LIMIT, TINY, genfound, variables

SMALL = [*TINY, "data.images=300", "callbacks.preview.every=4000", "study=s"]


def table(output: str) -> dict[str, str]:
    """What a job varies -> the rest of its line in the last table."""
    lines = output[output.rindex("\njob ") + 1 :].splitlines()
    width = lines[0].index("ended")
    return {line[:width].strip(): line[width:] for line in lines[1:]}


def test_every_job_has_its_reason_though_it_cannot_be_composed(tmp_path: Path) -> None:
    jobs = ["-m", "model=nope,nit_tiny", "model.depth=deep,1", "objective.path=foo"]
    result = genfound("train", *jobs, *(word for word in SMALL if "model.depth" not in word), cwd=tmp_path)
    assert result.returncode == 1
    assert result.stderr == "error: 4 of 4 jobs are not done; the same command goes on with them\n"
    told = table(result.stdout)
    assert list(told) == [f"model={m} model.depth={d}" for m in ("nope", "nit_tiny") for d in ("deep", "1")]
    assert all(line.startswith("failed ") for line in told.values())
    reasons = ["model=nope is unknown; choose one of dit, ", "model=nope is unknown; choose one of dit, ",
               "model.depth=deep must be a whole number", "objective.path=foo is unknown; choose one of"]  # fmt: skip
    assert all(reason in line for reason, line in zip(reasons, told.values(), strict=True)), told
    assert len(list(tmp_path.glob("runs/s/*/FAILED"))) == 1  # of the one that could be composed
    assert not list(tmp_path.glob("runs/s/.sweep*"))


def test_a_key_that_only_some_models_have_fails_the_others(tmp_path: Path) -> None:
    result = genfound("train", "-m", "model.nope=1,2", "objective.path=foo", *SMALL, cwd=tmp_path)
    assert result.returncode == 1
    assert all("unknown key model.nope" in line for line in table(result.stdout).values()), result.stdout


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]], ids=["basic", "joblib"]
)
def test_a_wrong_job_stops_no_other_and_the_same_command_goes_on(launcher: list[str], tmp_path: Path) -> None:
    command = ["-m", "model=nope,nit_tiny", "objective.path=foo,linear", *launcher, *SMALL]
    first = genfound("train", *command, "trainer.max_steps=2", cwd=tmp_path)
    assert first.returncode == 1
    told = table(first.stdout)
    good = "model=nit_tiny objective.path=linear"
    assert [line.split()[0] for line in told.values()] == ["failed", "failed", "failed", "done"], first.stdout
    images, loss = told[good].split()[1:3]
    assert int(images) > 0 and float(loss) > 0
    shown = [line.partition(" ")[0] for line in first.stdout.partition("\njob ")[0].splitlines()]
    assert sorted(shown) == ["[begun]", "[done]", "[failed]", "[failed]", "[failed]"], first.stdout
    metrics = next(tmp_path.glob("runs/s/*/DONE")).with_name("metrics.jsonl")
    log = metrics.with_name("log.txt").read_text()
    assert re.match(r"begun \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", log) and "starting from step 0" in log
    before = metrics.read_text()
    again = genfound("train", *command, "trainer.max_steps=2", cwd=tmp_path)
    assert again.returncode == 1 and table(again.stdout)[good].startswith("done before"), again.stdout
    assert metrics.read_text() == before
    longer = genfound("train", *command, "trainer.max_steps=3", cwd=tmp_path)
    assert table(longer.stdout)[good].startswith("done "), longer.stdout
    assert metrics.with_name("log.txt").read_text().startswith(log)
    assert "step-00000002.ckpt" in metrics.with_name("log.txt").read_text().removeprefix(log)


def begun(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """The command, begun."""
    command = [sys.executable, "-m", "genfound.train", *arguments]
    pipe = subprocess.PIPE
    options = {"stdout": pipe, "stderr": pipe, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=variables(), preexec_fn=_hear, **options)  # noqa: PLW1509


def _hear() -> None:
    """Ignore no signal, as shells do in the background and processes of a command, as a test may have become."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_DFL)


def wait_for(found: Callable[[], object]) -> None:
    deadline = time.monotonic() + LIMIT
    while not found():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def parent_of(process: int) -> int:
    return int(Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[1])


def training(folder: Path, rank: int | None = None, run: str = "") -> int:
    """A process that trains a run under a folder: the only one, the one of a rank, or that of a part of its name."""
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = [word for word in file.read_text().split("\0") if word != "-u"]
            alone = rank is None or f"\0RANK={rank}\0" in (file.parent / "environ").read_text()
            if (
                alone
                and words[1:3] == ["-m", "genfound.training"]
                and run in words[3]
                and (file.parent / "cwd").resolve() == folder.resolve()
            ):
                return int(file.parent.name)
        except OSError:
            continue
    raise AssertionError(f"nothing trains in {folder}")


LONG = "trainer.max_steps=100000,2"
"""A job that does not end by itself, and one that does at once."""


@pytest.mark.slow
def test_a_killed_job_is_named_with_its_signal_and_stops_no_other(tmp_path: Path) -> None:
    sweep = begun("-m", *SMALL, LONG, "budget.images=1000000", cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/s/*/metrics.jsonl")))
    os.kill(training(tmp_path), signal.SIGKILL)
    output, errors = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 1 and errors.startswith("error: 1 of 2 jobs are not done"), errors
    killed, done = table(output).values()
    assert killed.startswith("failed") and "ended by signal 9 (SIGKILL)" in killed, output
    assert done.startswith("done")


@pytest.mark.slow
def test_jobs_of_a_killed_worker_are_begun_again(tmp_path: Path) -> None:
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    sweep = begun("-m", *SMALL, "trainer.max_steps=60,2", "name=j", *joblib, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/s/j__trainer.max_steps-60/metrics.jsonl")))
    os.kill(parent_of(training(tmp_path)), signal.SIGKILL)
    output, errors = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 0, errors
    assert all(line.startswith("done") for line in table(output).values()), output
