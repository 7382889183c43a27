"""Trainings that are killed at random moments end as if nothing had happened.

Each number of a case seeds what happens to it and when. `make chaos` tries 200; `CHAOS=N` another number.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import time
from dataclasses import dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import pytest
import torch

from genfound.loggers.json_lines import lines_of
from genfound.runtime import checkpoint_io
from genfound.runtime.files import visible
from tests.cli.commands import TINY, variables
from tests.cli.fork_server import command

CASES = range(int(os.environ.get("CHAOS", "20")))
OPTIONS = [
    *TINY, "budget.images=600", "batch.packs=2", "callbacks.checkpointing.every=40", "callbacks.checkpointing.keep=3",
    "callbacks.validation.every=150", "callbacks.preview.every=200", "ema.decays=[0.9,0.99]", "name=x",
]  # fmt: skip
KINDS = ("kill", "kill", "terminate", "kill", "flipped byte", "kill", "full disk", "kill", "clock", "kill")
ATTEMPTS = 3
"""That are disturbed; the next one is left alone."""

context = get_context("forkserver")
context.set_forkserver_preload(["tests.chaos.preloaded"])


@dataclass(frozen=True)
class Undisturbed:
    folder: Path
    seconds: float


def train(root: Path, *options: str, bytes_of_a_file: int | None = None, clock: int | None = None) -> Any:
    """Start `python -m genfound.train` in a process that has imported everything."""
    words = [*OPTIONS, *options]
    process = context.Process(target=_train, args=(root, words, variables(), bytes_of_a_file, clock))
    process.start()
    return process


def _train(root: Path, words: list[str], env: dict[str, str], most: int | None, clock: int | None) -> None:
    if most is not None:  # writing more fails, as on a disk that is full
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (most, resource.RLIM_INFINITY))
    if clock is not None:
        real, chance = time.time, random.Random(clock)
        time.time = lambda: real() + chance.uniform(-1e5, 1e5)
    os.setsid()
    command("genfound.train", words, str(root), env, [str(root / "out.txt"), str(root / "errors.txt")])


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Undisturbed:
    root = prepared(tmp_path_factory.mktemp("undisturbed"))
    ended(train(root), root)  # what only a first process does is not part of the time
    (root / "runs").rename(root / "first")
    begin = time.monotonic()
    ended(train(root), root)
    return Undisturbed(root / "runs/default/x", time.monotonic() - begin)


def prepared(root: Path) -> Path:
    for name in ("out.txt", "errors.txt"):
        (root / name).touch()
    return root


def ended(process: Any, root: Path) -> None:
    process.join(300)
    assert process.exitcode == 0, (root / "errors.txt").read_text()


def flip_a_byte(folder: Path, chance: random.Random) -> None:
    """In the newest of several checkpoints."""
    files = visible(folder, "*.ckpt")
    if len(files) > 1:
        with open(files[-1], "r+b") as file:
            place = chance.randrange(files[-1].stat().st_size)
            file.seek(place)
            [byte] = file.read(1)
            file.seek(place)
            file.write(bytes([byte ^ 1 << chance.randrange(8)]))


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_it_ends_as_if_nothing_had_happened(case: int, undisturbed: Undisturbed, tmp_path: Path) -> None:
    chance, kind, root = random.Random(case), KINDS[case % len(KINDS)], prepared(tmp_path)
    run, size = root / "runs/default/x", max(file.stat().st_size for file in undisturbed.folder.rglob("*.ckpt"))
    for _ in range(ATTEMPTS):
        limit = chance.randrange(size) if kind == "full disk" else None
        process = train(root, bytes_of_a_file=limit, clock=case if kind == "clock" else None)
        process.join(chance.uniform(0, 1.1 * undisturbed.seconds))
        if process.is_alive():
            os.kill(process.pid, signal.SIGTERM if kind == "terminate" else signal.SIGKILL)
            process.join(60)
        if kind == "flipped byte":
            flip_a_byte(run / "checkpoints", chance)
    ended(train(root), root)
    assert (run / "DONE").is_file()
    compare(run, undisturbed.folder)


def compare(run: Path, expected: Path) -> None:
    """Weights, moments, averages, figures, losses in the receipt, and pictures, to the last bit."""
    states = []
    for folder in (run, expected):
        newest = checkpoint_io.newest(folder / "checkpoints")
        assert newest is not None
        states.append({**leaves(checkpoint_io.read(newest)), "name": newest.name})
    assert states[0].keys() == states[1].keys()
    for name, value in states[1].items():
        assert torch.equal(value, states[0][name]) if isinstance(value, torch.Tensor) else value == states[0][name], (
            name
        )
    assert figures(run / "metrics.jsonl") == figures(expected / "metrics.jsonl")
    assert losses(run) == losses(expected)
    pictures = [{file.name: file.read_bytes() for file in visible(folder / "samples")} for folder in (run, expected)]
    assert pictures[0] == pictures[1]


def leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """Of what a training depends on: Lightning's own clocks and counters of loops are left out."""
    if not isinstance(tree, dict | list):
        return {name: tree}
    keep = ("state_dict", "optimizer_states", "ema", "images_seen", "global_step")
    items = enumerate(tree) if isinstance(tree, list) else ((k, v) for k, v in tree.items() if name or k in keep)
    return {key: leaf for k, value in items for key, leaf in leaves(value, f"{name}.{k}").items()}


def figures(file: Path) -> list[dict[str, Any]]:
    """Lines of metrics.jsonl without speeds and notes."""
    lines = [{key: v for key, v in line.items() if not key.startswith("perf/")} for line in lines_of(file)]
    return [line for line in lines if "note" not in line and len(line) > 2]


def losses(run: Path) -> list[tuple[int, str, str]]:
    """Of each step in the receipt."""
    lines = map(json.loads, (run / "receipt.jsonl").read_text().splitlines())
    return [(line["step"], line["loss"], line["grad_norm"]) for line in lines if "loss" in line]
