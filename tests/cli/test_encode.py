"""Encoding from the command line: killed, cut short, on several processes; and training on what came of it."""

from __future__ import annotations

import contextlib
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from PIL import Image

from tests.cli.commands import TINY, genfound, one_error, variables
from tests.cli.test_sweeps import table
from tests.photographs import write_tree
from tests.stores import contents

PIXEL = ["tokenizer=pixel", "patch_size=2"]
DC_AE = ["tokenizer=dc_ae", "tokenizer.weights=random_tiny", "data=imagenet_native"]
COMMON = [
    "data=imagenet_mixed", "data.size=32", "data.root=images", "data.holdout=9", "data.num_workers=0",
    "shard_images=12",
]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("encode")
    write_tree(root / "images", count=110, shrink=4)
    return root


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    """A store of pixels that was encoded without a break."""
    result = genfound("encode", *COMMON, *PIXEL, "out=straight", cwd=folder)
    assert result.returncode == 0 and "images/s" in result.stdout and " left" in result.stdout, result.stderr
    return folder / "straight"


def shards(store: Path) -> int:
    return len(list(store.glob("[!.]*.safetensors")))


def kill_somewhere(command: list[str], store: Path, chance: random.Random) -> None:
    """Start encoding and kill it at a random moment after its next shard."""
    before = shards(store)
    process = subprocess.Popen(command, cwd=store.parent, env=variables(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while shards(store) == before and process.poll() is None:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    time.sleep(chance.random() * 0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


def kill_three_times(store: Path, options: list[str]) -> None:
    """Encode in four attempts, of which the first three are killed."""
    chance = random.Random(0)
    command = [sys.executable, "-m", "genfound.encode", *options, f"out={store}"]
    for _ in range(3):
        kill_somewhere(command, store, chance)
    times = {file.name: file.stat().st_mtime_ns for file in store.glob("[!.]*.safetensors")}
    result = genfound("encode", *options, f"out={store}", cwd=store.parent)
    assert result.returncode == 0, result.stderr
    assert f"{len(times)} of {shards(store)} shards are there and intact" in result.stdout
    assert {name: (store / name).stat().st_mtime_ns for name in times} == times  # none was encoded again


@pytest.mark.slow
def test_killed_three_times_it_ends_in_the_same_bytes(folder: Path, straight: Path) -> None:
    kill_three_times(folder / "killed", [*COMMON, *PIXEL])
    assert contents(folder / "killed") == contents(straight)


@pytest.mark.slow
def test_so_does_a_network(folder: Path) -> None:
    assert genfound("encode", *COMMON, *DC_AE, "out=network", cwd=folder).returncode == 0
    kill_three_times(folder / "killed_network", [*COMMON, *DC_AE])
    assert contents(folder / "killed_network") == contents(folder / "network")


@pytest.mark.slow
def test_two_processes_make_the_same_store(folder: Path, straight: Path) -> None:
    both = genfound("encode", *COMMON, *PIXEL, "out=both", "devices=2", cwd=folder)
    assert both.returncode == 0, both.stderr
    assert contents(folder / "both") == contents(straight)
    assert both.stdout.count("done: ") == 1
    error = one_error(genfound("encode", *COMMON, *PIXEL, "out=both", "devices=2", "data.flip=false", cwd=folder))
    assert "out=both was begun with other settings or images (mirrored: True there, False now)" in error


@pytest.mark.slow
def test_a_sweep_of_stores_names_the_one_that_cannot_be(folder: Path, straight: Path) -> None:
    swept = genfound("encode", "-m", *COMMON, *PIXEL, "out=first,second", "dtype=fp16,int8", cwd=folder)
    assert swept.stderr == "error: 2 of 4 jobs are not done; the same command goes on with them\n"
    told = table(swept.stdout)
    assert [line.split()[0] for line in told.values()] == ["done", "failed"] * 2, swept.stdout
    assert "dtype=int8 is unknown; choose one of fp16, bf16, fp32" in told["out=second dtype=int8"]
    assert contents(folder / "first") == contents(folder / "second") == contents(straight)


def worker(rank: int, folder: Path) -> int | None:
    """The process of a rank that works in a folder, if it has begun."""
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            variables = (process / "environ").read_bytes().split(b"\0")
            if f"RANK={rank}".encode() in variables and (process / "cwd").readlink() == folder:
                return int(process.name)
    return None


@pytest.mark.slow
def test_a_killed_process_of_several_is_named_and_made_good(folder: Path, straight: Path) -> None:
    options = [*COMMON, *PIXEL, "out=one_killed", "devices=2"]
    command = [sys.executable, "-m", "genfound.encode", *options]
    group = subprocess.Popen(
        command, cwd=folder, env=variables(), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 120
    while not (second := worker(1, folder)):
        assert time.monotonic() < deadline and group.poll() is None
        time.sleep(0.01)
    os.kill(second, signal.SIGKILL)
    output, errors = group.communicate(timeout=120)
    assert group.returncode == 1 and "done: " not in output
    assert errors.startswith("error: process 1 was ended by signal 9") and errors.count("\n") == 1
    assert errors.endswith("; the same command goes on with what is complete\n")
    again = genfound("encode", *options, cwd=folder)
    assert again.returncode == 0, again.stderr
    assert contents(folder / "one_killed") == contents(straight)


@pytest.mark.slow
def test_a_wrong_command_does_not_keep_the_folder(folder: Path, straight: Path) -> None:
    wrong = [*COMMON, *PIXEL, "out=wrong", "data.flip=false"]
    command = [sys.executable, "-m", "genfound.encode", *wrong]
    process = subprocess.Popen(command, cwd=folder, env=variables(), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder / "wrong/manifest.json").exists():
        assert time.monotonic() < deadline
        time.sleep(0.0005)
    process.kill()
    process.wait()
    for shard in (folder / "wrong").glob("[!.]*.safetensors"):  # one may have been quick enough
        shard.unlink()
    assert genfound("encode", *COMMON, *PIXEL, "out=wrong", cwd=folder).returncode == 0
    assert contents(folder / "wrong") == contents(straight)


@pytest.mark.slow
def test_a_full_disk_loses_nothing(folder: Path, straight: Path) -> None:
    options = [*COMMON, *PIXEL]
    largest = 300_000  # bytes of a file; the first shards are larger

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (largest, largest))

    command = [sys.executable, "-m", "genfound.encode", *options, "out=full"]
    result = subprocess.run(
        command, cwd=folder, env=variables(), preexec_fn=limit, capture_output=True, text=True, check=False
    )
    assert "full/train-00000.safetensors cannot be written: " in one_error(result)
    assert "make room and give the same command again" in result.stderr
    assert not list((folder / "full").glob(".*"))
    assert genfound("encode", *options, "out=full", cwd=folder).returncode == 0
    assert contents(folder / "full") == contents(straight)


@pytest.mark.slow
def test_a_run_trains_from_a_store_resumes_and_samples(folder: Path) -> None:
    encoding = ["data=imagenet_native", "data.root=images", "data.holdout=9", "data.max_image_tokens=64", *PIXEL]
    assert genfound("encode", *encoding, "out=store", cwd=folder).returncode == 0
    shown = Image.open(folder / "store/train-00000.png")
    assert shown.width == 2 * (shown.width // 2)
    halves = [shown.crop((side * shown.width // 2, 0, (side + 1) * shown.width // 2, shown.height)) for side in (0, 1)]
    assert halves[0].tobytes() == halves[1].tobytes()  # pixels are decoded as they were
    data = ["data.holdout=9", "data.max_image_tokens=64", "data.num_workers=1"]
    losses = {}
    for source, option in (("images", "imagenet_native"), ("store", "latent_store")):
        options = [*TINY, f"data={option}", *data, f"data.root={source}", f"name={source}"]
        result = genfound("train", *options, "tokenizer=pixel", "trainer.max_steps=3", cwd=folder)
        assert result.returncode == 0, result.stderr
        losses[source] = [
            float(line.split("loss ")[1].split()[0]) for line in result.stdout.splitlines() if "  loss " in line
        ]
    assert len(losses["store"]) == 3
    assert losses["store"] == pytest.approx(losses["images"], rel=2e-3)
    again = genfound("train", *options, "tokenizer=pixel", "trainer.max_steps=4", cwd=folder)
    assert again.returncode == 0 and "continuing from" in again.stdout, again.stderr
    sampled = genfound("sample", "from=runs/default/store", "labels=[n03000684]", "out=drawn", cwd=folder)
    assert sampled.returncode == 0, sampled.stderr


def test_wrong_options_are_one_clear_line(folder: Path) -> None:
    assert "out is missing; give out=..." in one_error(genfound("encode", *COMMON, *PIXEL, cwd=folder))
    error = one_error(genfound("encode", *COMMON, *PIXEL, "out=images", cwd=folder))
    assert "out=images holds train and is no latent store; choose another out=" in error
    (folder / "file").touch()
    for out in ("file", "file/store"):
        error = one_error(genfound("encode", *COMMON, *PIXEL, f"out={out}", cwd=folder))
        assert f"out={out}: file is not a folder; choose another out=..." in error
    error = one_error(genfound("encode", *COMMON, *PIXEL, "out=x", "devices=0", cwd=folder))
    assert "devices=0 must be a whole number of at least 1, or null" in error
    error = one_error(genfound("encode", *COMMON, *PIXEL, "out=x", "data.holdout=0", cwd=folder))
    assert "data.holdout=0 must be a whole number of at least 2" in error
    assert not (folder / "x").exists()
