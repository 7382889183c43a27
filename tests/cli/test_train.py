"""`python -m genfound.train`: a run and its directory, its continuation, sweeps, and wrong input."""

import contextlib
import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image

from tests.cli.commands import TINY, genfound, one_error, variables
from tests.helpers import state_differences


def losses(run: Path) -> dict[int, float]:
    """Step -> loss of a run's metrics.jsonl."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [line["step"] for line in lines if "train/loss" in line]
    assert steps == sorted(set(steps)), "a step was written twice"
    return {line["step"]: line["train/loss"] for line in lines if "train/loss" in line}


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of twelve steps without interruption."""
    folder = tmp_path_factory.mktemp("straight")
    result = genfound("train", *TINY, "trainer.max_steps=12", "name=run", cwd=folder)
    assert result.returncode == 0, result.stderr
    return folder / "runs/default/run"


def test_a_run_leaves_everything_in_its_directory(straight: Path) -> None:
    assert list(losses(straight)) == list(range(1, 13))
    last = json.loads((straight / "metrics.jsonl").read_text().splitlines()[-1])
    assert {"images_seen", "train/grad_norm", "train/lr", "perf/images_per_s", "perf/tokens_per_s"} <= last.keys()
    assert {"perf/mfu", "perf/padding", "perf/data_wait", "perf/encode_share"} <= last.keys()
    assert json.loads((straight / "DONE").read_text())["steps"] == 12
    picture = Image.open(next((straight / "samples").glob("images-*.png")))
    assert min(picture.size) > 100
    state = torch.load(straight / "checkpoints/step-00000012.ckpt", weights_only=True)
    assert state["ema"].keys() == {"0.995"} and state["images_seen"] == last["images_seen"]


def test_a_finished_run_is_not_trained_again(straight: Path) -> None:
    before = (straight / "metrics.jsonl").read_text()
    result = genfound("train", *TINY, "trainer.max_steps=12", "name=run", cwd=straight.parents[2])
    assert result.returncode == 0 and "done before" in result.stdout
    assert (straight / "metrics.jsonl").read_text() == before


def test_the_same_command_with_more_steps_continues(straight: Path, tmp_path: Path) -> None:
    first = genfound("train", *TINY, "trainer.max_steps=5", "name=run", cwd=tmp_path)
    second = genfound("train", *TINY, "trainer.max_steps=12", "name=run", cwd=tmp_path)
    assert first.returncode == 0 and second.returncode == 0, second.stderr
    assert "continuing from" in second.stdout and "step-00000005.ckpt" in second.stdout
    run = tmp_path / "runs/default/run"
    assert losses(run) == losses(straight)
    assert not state_differences(run, straight)


def test_a_killed_run_goes_on_where_it_was(straight: Path, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "genfound.train", *TINY, "callbacks.checkpointing.every=12", "name=run"]
    process = subprocess.Popen(command, cwd=tmp_path, env=variables(), stdout=subprocess.DEVNULL)
    run = tmp_path / "runs/default/run"
    deadline = time.monotonic() + 120
    while not any((run / "checkpoints").glob("[!.]*.ckpt")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (run / "DONE").exists()
    steps = max(12, int(max(file.stem for file in (run / "checkpoints").glob("[!.]*.ckpt"))[-8:]) + 1)
    end = f"trainer.max_steps={steps}"
    result = genfound("train", *TINY, "callbacks.checkpointing.every=12", end, "name=run", cwd=tmp_path)
    assert result.returncode == 0 and "continuing from" in result.stdout, result.stderr
    resumed = losses(run)
    assert list(resumed) == list(range(1, steps + 1))
    assert {step: resumed[step] for step in losses(straight)} == losses(straight)


@pytest.mark.slow
def test_a_job_ends_with_the_process_that_launched_it(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "genfound.train", "-m", *TINY, "budget.images=400000", "name=run"]
    process = subprocess.Popen(command, cwd=tmp_path, env=variables(), stdout=subprocess.DEVNULL)
    run = tmp_path / "runs/default/run"
    deadline = time.monotonic() + 120
    while not (run / "metrics.jsonl").exists() and time.monotonic() < deadline:
        time.sleep(0.02)
    job = next(job for job in jobs() if str(run.relative_to(tmp_path)) in job.read_text())
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) != 0
    assert not job.exists() and (run / "STOPPED").exists()


def jobs() -> list[Path]:
    """The command lines of the jobs that are running."""
    found = []
    for file in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            found += [file] if "genfound.training" in file.read_text() else []
    return found


@pytest.mark.slow
def test_a_sweep_over_what_does_not_identify_a_run_trains_each_of_its_jobs(tmp_path: Path) -> None:
    """Two folders that read alike as file names; the same command finds the runs again."""
    for root in ("a/b", "a_b"):
        (tmp_path / root / "x").mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (16, 16), (i, 0, len(root))).save(tmp_path / root / f"x/{i}.png")
    data = ["data=image_folder", "tokenizer=pixel", "data.max_image_tokens=64", "data.holdout=null", "name=mine"]
    data += ["data.num_workers=0"]
    sweep = ["-m", *TINY, *data, "trainer.max_steps=1", "data.root=a/b,a_b"]
    first = genfound("train", *sweep, cwd=tmp_path)
    assert first.returncode == 0 and first.stdout.count("[done]") == 2, first.stdout + first.stderr
    names = sorted(path.name for path in (tmp_path / "runs/default").iterdir() if (path / "DONE").exists())
    assert len(names) == 2 and all(name.startswith("mine__data.root-a_b") for name in names)
    again = genfound("train", *sweep, cwd=tmp_path)
    assert again.returncode == 0 and again.stdout.count("[done before]") == 2, again.stdout + again.stderr


WRONG = {
    "model.dpeth=3": "unknown key model.dpeth; did you mean model.depth?",
    "nonsense=3": "unknown key nonsense",
    "+model.new=3": "unknown key model.new",
    "model=nit_tny": "model=nit_tny is unknown; choose one of",
    "sampler=ddpn": "sampler=ddpn is unknown; choose one of",
    "model.depth=deep": "model.depth=deep must be a whole number",
    "model.heads=5": "model.width=32 over model.heads=5",
    "model.channels=4": "tokenizer is pixel (3 channels) but model.channels is 4",
    "layout=dense": "batch.packs counts nothing in layout=dense; set batch.images",
    "data.sides=[13]": "the nearest legal sides are 12 and 14",
    "data.max_tokens=64": "more than data.max_tokens=64",
    "data.view=round": "data.view=round is unknown",
    "objective.path=curved": "objective.path=curved is unknown",
    "optimizer.schedule=step": "optimizer.schedule=step is unknown",
    "trainer.precision=fp8": "trainer.precision=fp8 is unknown",
    "trainer.accelerator=gpu": "error: trainer.accelerator=gpu is unknown; choose one of auto, cpu, cuda, mps",
    "trainer.accelerator=mps": "trainer.accelerator=mps, but this machine has no Apple GPU; set ",
    "model.attention=flash": "model.attention=flash cannot run on cpu",
    "study=a/b": "study=a/b must consist of",
    "data=image_folder": "data.root is missing",
    "experiment=evaluate/nit_resolutions_mini": "is not one of this command; python -m genfound.evaluate experiment=",
    "experiment=best": "experiment=best is unknown; choose one of alignment, alignment_mini, dit_scaling",
    "callbacks.checkpointing.keep=0": "callbacks.checkpointing.keep=0 must be a whole number of at least 1",
}


WATCHERS = {
    "callbacks.evaluation.every=8 callbacks.evaluation.protocol=fast": "callbacks.evaluation.protocol=fast is unknown",
    "model.label_drop=0": "guidance needs a null label",
}


@pytest.mark.parametrize("options", WATCHERS)
def test_what_stops_a_preview_or_an_evaluation_is_found_before_a_logger_begins(options: str, tmp_path: Path) -> None:
    result = genfound("train", *TINY, *options.split(), "name=x", cwd=tmp_path)
    assert WATCHERS[options] in one_error(result)
    assert {file.name for file in (tmp_path / "runs/default/x").glob("[!.]*")} == {
        "config.yaml",
        "overrides.json",
        "options.json",
        "FAILED",
    }


@pytest.mark.parametrize("override", WRONG)
def test_wrong_input_is_one_clear_line(override: str, tmp_path: Path) -> None:
    result = genfound("train", *TINY, "trainer.max_steps=1", override, cwd=tmp_path)
    assert WRONG[override] in one_error(result)
    assert not list(tmp_path.rglob("[!.]*.ckpt"))


def test_a_changed_configuration_is_refused_and_can_be_allowed(straight: Path) -> None:
    arguments = [*TINY, "name=run", "optimizer.lr=0.5", "trainer.max_steps=13"]
    error = one_error(genfound("train", *arguments, cwd=straight.parents[2]))
    assert "optimizer.lr: 0.003 in the run, 0.5 now" in error and "allow_changes=true" in error


def test_help_lists_the_groups(tmp_path: Path) -> None:
    result = genfound("train", "--help", cwd=tmp_path)
    assert result.returncode == 0
    assert "nit_xl" in result.stdout and "image_folder" in result.stdout


@pytest.mark.slow
def test_variables_left_by_launchers_are_ignored_and_copies_refused(tmp_path: Path) -> None:
    command = ["train", *TINY, "batch.packs=2", "trainer.max_steps=1"]
    left = {"WORLD_SIZE": "2", "RANK": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "0", "PATH": str(tmp_path)}  # no git
    one = genfound(*command, "name=one", cwd=tmp_path)
    other = genfound(*command, "name=other", "logger=wandb", cwd=tmp_path, **left)
    assert one.returncode == other.returncode == 0, other.stderr
    assert other.stderr.count("note: ignoring RANK=1, SLURM_NTASKS=4, WORLD_SIZE=2: this command is one process") == 1
    assert losses(tmp_path / "runs/default/one") == losses(tmp_path / "runs/default/other")
    torchrun = {"WORLD_SIZE": "2", "RANK": "1", "TORCHELASTIC_RUN_ID": "none"}
    error = one_error(genfound(*command, "name=copies", cwd=tmp_path, **torchrun))
    assert "start it once with trainer.devices=N" in error and not (tmp_path / "runs/default/copies").exists()


def test_several_devices_that_cannot_share_a_step_are_refused_before_they_start(tmp_path: Path) -> None:
    result = genfound("train", *TINY, "trainer.devices=3", "batch.packs=2", "name=run", cwd=tmp_path)
    assert "a global step of 2 micro-batches cannot be shared by trainer.devices=3" in one_error(result)
    assert result.stdout == "" and (tmp_path / "runs/default/run/FAILED").exists()
