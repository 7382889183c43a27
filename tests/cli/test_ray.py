"""Sweeps on Ray, which shares out graphics cards; its launcher needs an environment of its own: make test-ray."""

from __future__ import annotations

import itertools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.cli.commands import LIMIT, genfound, one_error
from tests.cli.test_sweeps import SMALL, begun, parent_of, table, training, wait_for
from tests.distributed.test_devices import free_port

pytest.importorskip("ray", reason="needs the extra `ray`, see make test-ray")

CARDS = [
    "hydra/launcher=ray_gpus", "+hydra.launcher.ray.init.num_gpus=2", "+hydra.launcher.ray.init.num_cpus=4",
    "+hydra.launcher.ray.init.object_store_memory=80000000",
]  # fmt: skip
"""Two cards that Ray believes in."""

STAMP = """
import json, os, time
from pathlib import Path
from lightning import Callback

class Stamp(Callback):
    def note(self, event):
        own = {"card": os.environ["CUDA_VISIBLE_DEVICES"], "event": event, "time": time.time()}
        with Path(f"stamps-{os.getpid()}").open("a") as out:
            out.write(json.dumps(own) + "\\n")

    def on_fit_start(self, trainer, module):
        self.note("begin")

    def on_fit_end(self, trainer, module):
        time.sleep(2)
        self.note("end")
"""


def left_of_ray(folder: Path) -> list[str]:
    """Processes in a folder that Ray has started."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if (file.parent / "cwd").resolve() == folder.resolve() and "ray" in file.read_text():
                found.append(file.read_text())
        except OSError:
            continue
    return found


@pytest.mark.slow
def test_two_cards_hold_one_job_each(tmp_path: Path) -> None:
    (tmp_path / "stamping.py").write_text(STAMP)
    jobs = ["-m", *SMALL, "seed=0,1,2,3,4,5", "trainer.max_steps=2", *CARDS, "+callbacks.stamp._target_=stamping.Stamp"]
    paths = os.pathsep.join([str(tmp_path), *sys.path])
    result = genfound("train", *jobs, cwd=tmp_path, PYTHONPATH=paths)
    assert result.returncode == 0, result.stdout + result.stderr
    assert [line.split()[0] for line in table(result.stdout).values()] == ["done"] * 6
    stamps = [[json.loads(line) for line in file.read_text().splitlines()] for file in tmp_path.glob("stamps-*")]
    spans = [(begin["card"], begin["time"], end["time"]) for begin, end in stamps]
    assert {card for card, *_ in spans} == {"0", "1"} and len(spans) == 6
    at_once = [
        (a, b) for (a, *one), (b, *two) in itertools.combinations(spans, 2) if max(one[0], two[0]) < min(one[1], two[1])
    ]
    assert at_once and all(a != b for a, b in at_once), spans
    wait_for(lambda: not left_of_ray(tmp_path))


@pytest.mark.slow
def test_what_cannot_be_shared_out_is_refused(tmp_path: Path) -> None:
    varied = genfound("train", "-m", *SMALL, *CARDS, "trainer.devices=1,2", cwd=tmp_path)
    assert "hydra/launcher=ray_gpus asks for the same trainer.devices for all jobs" in one_error(varied)
    many = genfound("train", "-m", *SMALL, *CARDS, "trainer.devices=3", cwd=tmp_path)
    assert "a job takes 3 GPUs of one machine, and Ray finds 2; give fewer devices" in one_error(many)


@pytest.mark.slow
def test_a_wrong_job_and_a_killed_worker_stop_no_other(tmp_path: Path) -> None:
    jobs = ["-m", *SMALL, "objective.path=foo,linear", "trainer.max_steps=150,2", "name=r", *CARDS]
    sweep = begun(*jobs, cwd=tmp_path)
    run = tmp_path / "runs/s/r__objective.path-linear__trainer.max_steps-150"
    wait_for((run / "metrics.jsonl").is_file)
    os.kill(parent_of(training(tmp_path, run="max_steps-150")), signal.SIGKILL)
    output, errors = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 1, errors
    assert [line.split()[0] for line in table(output).values()] == ["failed"] * 2 + ["done"] * 2
    assert (run / "log.txt").read_text().count("begun ") == 2


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_jobs(number: signal.Signals, tmp_path: Path) -> None:
    sweep = begun("-m", *SMALL, "seed=0,1,2", "budget.images=1000000", "name=r", *CARDS, cwd=tmp_path)
    wait_for(lambda: len(list(tmp_path.glob("runs/s/*/metrics.jsonl"))) == 2)
    sweep.send_signal(number)
    output, errors = sweep.communicate(timeout=LIMIT)
    assert sweep.returncode == 75, output + errors
    assert sorted(line.split()[0] for line in table(output).values()) == ["not", "stopped", "stopped"]
    assert output.count(f"{number.name}: ended after step") == 2
    wait_for(lambda: not left_of_ray(tmp_path))


@pytest.mark.slow
def test_another_command_than_training_gets_the_cards_that_it_asks_for(tmp_path: Path) -> None:
    run = "from=runs/s/run"
    assert genfound("train", *SMALL, "name=run", "trainer.max_steps=1", cwd=tmp_path).returncode == 0
    drawn = genfound("sample", "-m", run, "labels=[0]", "seed=0,1", *CARDS, cwd=tmp_path, NO_COLOR="1")
    assert drawn.returncode == 0, drawn.stdout + drawn.stderr
    assert len(list(tmp_path.glob("runs/s/run/samples/*/grid.png"))) == 2
    many = genfound("evaluate", "-m", run, "reference=data", "seed=0,1", "devices=3", *CARDS, cwd=tmp_path)
    assert "a job takes 3 GPUs of one machine, and Ray finds 2; give fewer devices" in one_error(many)


@pytest.mark.slow
def test_jobs_on_a_cluster_work_in_the_folder_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "here").mkdir()
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    address = f"127.0.0.1:{free_port()}"
    options = [f"--port={address.partition(':')[2]}", "--num-gpus=1", "--num-cpus=2", "--object-store-memory=80000000"]
    ray = [sys.executable, "-m", "ray.scripts.scripts", "start", "--head", "--block", "--include-dashboard=false"]
    with subprocess.Popen([*ray, *options], cwd=tmp_path / "elsewhere", stdout=subprocess.PIPE, text=True) as head:
        assert head.stdout and any("Ray runtime started" in line for line in head.stdout)
        jobs = ["-m", *SMALL, "seed=0,1", "trainer.max_steps=2", "hydra/launcher=ray_gpus"]
        result = genfound("train", *jobs, cwd=tmp_path / "here", RAY_ADDRESS=address)
        head.terminate()
    Path("/tmp/ray/ray_current_cluster").unlink(missing_ok=True)  # where Ray would look for it
    assert result.returncode == 0, result.stdout + result.stderr
    assert len(list(tmp_path.glob("here/runs/s/*/DONE"))) == 2 and not list(tmp_path.glob("elsewhere/runs/s/*"))
    wait_for(lambda: not left_of_ray(tmp_path / "elsewhere"))
