"""`python -m genfound.train -m`: each job is done, or the table at the end says why it is not."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from genfound.config.signals import STOPPING
from tests.cli.commands import LIMIT, TINY, genfound, one_error, variables

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
    reasons = ["model=nope is unknown; choose one of dig, ", "model=nope is unknown; choose one of dig, ",
               "model.depth=deep must be a whole number", "objective.path=foo is unknown; choose one of"]  # fmt: skip
    assert all(reason in line for reason, line in zip(reasons, told.values(), strict=True)), told
    assert len(list(tmp_path.glob("runs/s/*/FAILED"))) == 1  # of the one that could be composed
    assert not list(tmp_path.glob("runs/s/.sweep*"))


WRONG = {
    f"study={'s' * 300}": "File name too long; give a shorter name",
    "model.depth=1 2": "error: 2 is not key=value; quote texts with spaces: 'key=\"a text\"'",
}


@pytest.mark.parametrize("words", WRONG, ids=["long", "space"])
def test_what_stops_a_sweep_before_its_jobs_is_one_line(words: str, tmp_path: Path) -> None:
    assert WRONG[words] in one_error(genfound("train", "-m", "seed=0,1", *words.split(), cwd=tmp_path))


def test_a_key_that_only_some_models_have_fails_the_others(tmp_path: Path) -> None:
    result = genfound("train", "-m", "model.nope=1,2", "objective.path=foo", *SMALL, cwd=tmp_path)
    assert result.returncode == 1
    assert all("unknown key model.nope" in line for line in table(result.stdout).values()), result.stdout


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


FAULTS = """
import json, time
from pathlib import Path
from lightning import Callback
from genfound.runtime import checkpoint_io

class Faults(Callback):
    def on_fit_start(self, trainer, module):
        file = Path("faults.json")
        self.fault = json.loads(file.read_text()).get(Path(trainer.default_root_dir).name) if file.is_file() else None
        if self.fault == "full disk":
            checkpoint_io.open = lambda *_: open("/dev/full", "wb")

    def on_train_batch_end(self, trainer, *_):
        if trainer.global_step == 3 and self.fault == "mistake":
            raise KeyError("depth")
        if trainer.global_step == 3 and self.fault == "long":
            time.sleep(1000)
"""
"""What becomes of runs, by their names in faults.json."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher", [[], ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]], ids=["basic", "joblib"]
)
def test_faults_of_all_kinds_stop_no_other_job_and_the_same_command_mends_them(
    launcher: list[str], tmp_path: Path
) -> None:
    (tmp_path / "faults.py").write_text(FAULTS)
    faults = {"r__seed-1": "mistake", "r__seed-3": "long", "r__seed-5": "full disk"}
    (tmp_path / "faults.json").write_text(json.dumps(faults))
    command = ["-m", *SMALL, "seed=0,1,2,3,4,5,6,x", "name=r", "trainer.max_steps=6", *launcher]
    command += ["callbacks.checkpointing.every=1", "+callbacks.faults._target_=faults.Faults"]
    sweep = begun(*command, cwd=tmp_path)
    long = tmp_path / "runs/s/r__seed-3"
    wait_for((long / "checkpoints/step-00000002.ckpt").is_file)
    os.kill(training(tmp_path, run=long.name), signal.SIGKILL)
    output, errors = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 1, errors
    assert errors.splitlines()[-1] == "error: 4 of 8 jobs are not done; the same command goes on with them"
    told, healthy = table(output), [f"seed={seed}" for seed in (0, 2, 4, 6)]
    assert [line.split()[0] for line in told.values()] == ["done", "failed"] * 3 + ["done", "failed"], output
    reasons = {
        "seed=1": "a mistake in the program: KeyError: 'depth'; its traceback is in runs/s/r__seed-1/log.txt",
        "seed=3": "the process was ended by signal 9 (SIGKILL): most often because memory was short",
        "seed=5": "checkpoints/step-00000001.ckpt: No space left on device; make room and give the same command",
        "seed=x": "seed=x must be a whole number",
    }
    assert all(reason in told[job] for job, reason in reasons.items()), output
    shown = [line.partition(" ")[0] for line in output.partition("\njob ")[0].splitlines()]
    assert sorted(shown) == [*["[begun]"] * 7, *["[done]"] * 4, *["[failed]"] * 4], output
    assert all(int(told[job].split()[1]) > 0 and float(told[job].split()[2]) > 0 for job in healthy), output
    assert re.match(r"begun \d{4}-\d\d-\d\d \d\d:\d\d:\d\d\n", log := (long / "log.txt").read_text())
    assert "starting from step 0" in log

    (tmp_path / "faults.json").unlink()
    before = stamps(tmp_path, healthy)
    again = genfound("train", *command, cwd=tmp_path)
    told = table(again.stdout)
    assert again.returncode == 1 and again.stderr.startswith("error: 1 of 8 jobs are not done"), again.stderr
    ended = [re.split(r"  +", line)[0] for line in told.values()]
    assert ended == ["done before", "done"] * 3 + ["done before", "failed"], again.stdout
    assert before and stamps(tmp_path, healthy) == before
    assert "step-00000002.ckpt" in (long / "log.txt").read_text().removeprefix(log)
    assert not list(tmp_path.glob("runs/s/*/FAILED")) and not list(tmp_path.glob("runs/s/.sweep*"))


def stamps(folder: Path, jobs: Sequence[str]) -> dict[Path, int]:
    """When each file of finished jobs was written."""
    files = (file for job in jobs for file in folder.glob(f"runs/s/r__{job.replace('=', '-')}/**/*"))
    return {file: file.stat().st_mtime_ns for file in files}


@pytest.mark.slow
def test_jobs_of_a_killed_worker_are_begun_again(tmp_path: Path) -> None:
    joblib = ["hydra/launcher=joblib", "hydra.launcher.n_jobs=2"]
    sweep = begun("-m", *SMALL, "trainer.max_steps=60,2", "name=j", *joblib, cwd=tmp_path)
    wait_for(lambda: list(tmp_path.glob("runs/s/j__trainer.max_steps-60/metrics.jsonl")))
    os.kill(parent_of(training(tmp_path)), signal.SIGKILL)
    output, errors = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 0, errors
    assert all(line.startswith("done") for line in table(output).values()), output
