"""What may happen to a run, and what must have come of it: the tensors and losses of an undisturbed one."""

from __future__ import annotations

import functools
import json
import random
import signal
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from genfound.evaluation.protocol import read_results
from genfound.runtime import checkpoint_io, receipts
from genfound.runtime.files import visible
from tests.chaos.processes import Command, flip_a_byte
from tests.cli.commands import TINY
from tests.photographs import write_tree
from tests.stores import contents

RUN = Path("runs/default/run")
TRAIN = [
    *TINY, "budget.images=100", "callbacks.validation.every=40", "callbacks.checkpointing.every=20", "name=run",
]  # fmt: skip
PARALLEL = [*TRAIN, "batch.packs=2", "trainer.max_steps=9", "callbacks.checkpointing.every=1"]
SHARDED = [*PARALLEL, "trainer.devices=2", "strategy=fsdp", "strategy.save_distributed_checkpoint=true"]
SWEEP = [*TRAIN, "trainer.max_steps=4,7", "-m"]
ENCODE = [
    "data=imagenet_mixed", "data.size=32", "data.holdout=9", "data.num_workers=0", "shard_images=4",
    "tokenizer=pixel", "patch_size=2", "out=store",
]  # fmt: skip
EVALUATE = [
    "reference=data", "extractor=probe", "n=120", "sizes=[16,16]", "sampler.steps=4", "batch=4", "references=kept",
    "out=figures",
]  # fmt: skip


@dataclass(frozen=True)
class Undisturbed:
    """What the scenarios are compared with; each is made once."""

    folder: Path

    @functools.cached_property
    def train(self) -> tuple[Path, float]:
        """A run, and the seconds that it took."""
        return self._make("train", TRAIN)

    @functools.cached_property
    def parallel(self) -> Path:
        """A run of one process."""
        return self._make("train", PARALLEL, "parallel")[0]

    @functools.cached_property
    def sharded(self) -> tuple[Path, float]:
        """A run of two processes with sharded checkpoints."""
        return self._make("train", SHARDED, "sharded")

    @functools.cached_property
    def evaluate(self) -> tuple[Path, float]:
        """An evaluation of `small`."""
        return self._make("evaluate", [*EVALUATE, f"from={self.small}"])

    @functools.cached_property
    def small(self) -> Path:
        """A run of three steps on few images."""
        few = ["data.images=300", "data.holdout=100", "data.sides=[12,16]", "trainer.max_steps=3"]
        return self._make("train", [*TRAIN, *few], "small")[0] / RUN

    @functools.cached_property
    def sweep(self) -> tuple[Path, float]:
        """A sweep of two jobs."""
        return self._make("train", SWEEP, "sweep")

    @functools.cached_property
    def images(self) -> Path:
        """A folder of images."""
        write_tree(self.folder / "images", count=110, shrink=4)
        return self.folder / "images"

    @functools.cached_property
    def encode(self) -> tuple[Path, float]:
        """A store."""
        return self._make("encode", [*ENCODE, f"data.root={self.images}"])

    def _make(self, name: str, arguments: list[str], where: str = "") -> tuple[Path, float]:
        folder = self.folder / (where or name)
        folder.mkdir()
        command, begin = Command(name, arguments, folder), time.monotonic()
        assert command.run() == 0, command.errors
        return folder, time.monotonic() - begin


Scenario = Callable[[Undisturbed, Path, random.Random], str]
"""Does it in an empty folder and raises AssertionError where something is lost; what has happened."""


def kill(straight: Undisturbed, folder: Path, chance: random.Random, number: int = signal.SIGKILL) -> str:
    """A training is ended by a signal at random moments."""
    undisturbed, seconds = straight.train
    saving = _saving(chance)
    command = Command("train", [*TRAIN, *saving], folder)
    deaths = _deaths(command, seconds, number, chance)
    command.finish()
    _compare(undisturbed, folder)
    return " ".join([deaths, *saving])


def _saving(chance: random.Random) -> list[str]:
    """How checkpoints are written."""
    return ["callbacks.checkpointing.asynchronous=true"] if chance.random() < 0.5 else []


def terminate(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """As `kill`, by a signal that may be heard."""
    return kill(straight, folder, chance, signal.SIGTERM)


def clock(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """As `kill`, while the clock of the machine jumps."""
    undisturbed, seconds = straight.train
    command = Command("train", TRAIN, folder, clock=chance.randrange(1000))
    deaths = _deaths(command, seconds, signal.SIGKILL, chance)
    command.finish()
    _compare(undisturbed, folder)
    return deaths


def full_disk(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """A checkpoint has no room; the same command finds some."""
    undisturbed, seconds = straight.train
    size = _checkpoints(undisturbed)[-1].stat().st_size
    saving = _saving(chance)
    command = Command("train", [*TRAIN, *saving], folder)
    if before := chance.random() < 0.5:
        command.end(signal.SIGKILL, chance.uniform(0.3, 0.9) * seconds)
    largest = int(chance.uniform(0.3, 0.95) * size)
    if command.run(largest) != 0:
        command.check_error()
    command.finish()
    _compare(undisturbed, folder)
    return " ".join([f"{'killed, then ' * before}files of at most {largest:,} bytes of {size:,}", *saving])


def flipped(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """A byte of the newest checkpoint is another one."""
    command, many = Command("train", TRAIN, folder), chance.randint(2, 4)
    command.end_when(lambda: _newest_step(folder) >= 4 * many and len(_checkpoints(folder)) >= 2)
    newest = _checkpoints(folder)[-1]
    flip_a_byte(newest, chance)
    command.finish()
    _compare(straight.train[0], folder)
    return f"a byte of {newest.name}"


def processes(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """Two processes, then one, then two: killed after random checkpoints."""
    steps = sorted(chance.sample(range(1, 8), 2))
    for devices, step in ((2, steps[0]), (1, steps[1])):
        command = Command("train", [*PARALLEL, f"trainer.devices={devices}"], folder)
        command.end_when(lambda step=step: _newest_step(folder) >= step)  # type: ignore[misc]
    Command("train", [*PARALLEL, "trainer.devices=2"], folder).finish()
    _compare(straight.parallel, folder, exact=False)
    return f"2 to step {steps[0]}, 1 to step {steps[1]}, 2"


def sharded(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """Two processes of FSDP are killed at a random moment, then as they save; they or two of DDP go on."""
    undisturbed, seconds = straight.sharded
    options = [*SHARDED, *_saving(chance)]
    command, after, exact = Command("train", options, folder), chance.uniform(0.1, 1) * seconds, chance.random() < 0.5
    command.end(signal.SIGKILL, after)
    saved = folder / RUN / "checkpoints"
    left = set(saved.glob(f"{checkpoint_io.PARTIAL}*/*"))  # by the first death
    saving = command.end_when(lambda: set(saved.glob(f"{checkpoint_io.PARTIAL}*/*")) - left)
    Command("train", options if exact else [*PARALLEL, "trainer.devices=2"], folder).finish()
    _compare(undisturbed, folder, exact)
    done = f"at {after:.1f} s, {'in a save, ' * saving}then {'FSDP' if exact else 'DDP'}"
    return " ".join([done, *options[len(SHARDED) :]])


def evaluate(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """An evaluation is killed at random moments."""
    undisturbed, seconds = straight.evaluate
    command = Command("evaluate", [*EVALUATE, f"from={straight.small}"], folder)
    deaths = _deaths(command, seconds, signal.SIGKILL, chance)
    command.finish()
    found = [read_results(of / "figures") for of in (undisturbed, folder)]
    assert len(found[0]) == 1 and found[0][0].figures == found[1][-1].figures, f"figures differ: {found}"
    return deaths


def read_only(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """Nothing can be written for a while; the same command can."""
    undisturbed, seconds = straight.train
    first = chance.uniform(0.1, 0.9) * seconds
    last = first + chance.uniform(0.1, 1) * seconds
    command = Command("train", TRAIN, folder, read_only=(first, last))
    if failed := command.run() != 0:
        command.check_error()
        assert "Read-only file system" in command.errors, command.errors
    Command("train", TRAIN, folder).finish()
    _compare(undisturbed, folder)
    return f"from {first:.2f} s to {last:.2f} s, {'ended' * failed or 'not noticed'}"


def slow(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """As `kill`, and each file takes its time."""
    undisturbed, seconds = straight.train
    command = Command("train", TRAIN, folder, slow=chance.uniform(0.005, 0.05))
    deaths = _deaths(command, 2 * seconds, signal.SIGKILL, chance)
    command.finish()
    _compare(undisturbed, folder)
    return f"{command.slow:.3f} s for each file, {deaths}"


def encode(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """The encoding of a store is killed at random moments."""
    undisturbed, seconds = straight.encode
    command = Command("encode", [*ENCODE, f"data.root={straight.images}"], folder)
    deaths = _deaths(command, seconds, signal.SIGKILL, chance)
    command.finish()
    assert contents(folder / "store") == contents(undisturbed / "store"), "the store differs"
    return deaths


def sweep(straight: Undisturbed, folder: Path, chance: random.Random) -> str:
    """The process that leads a sweep is killed, and no other."""
    undisturbed, seconds = straight.sweep
    command, after = Command("train", SWEEP, folder), chance.uniform(0.1, 0.95) * seconds
    command.end(signal.SIGKILL, after, group=False)
    command.finish()
    _compare(undisturbed, folder)
    return f"its parent at {after:.1f} s"


def _deaths(command: Command, seconds: float, number: int, chance: random.Random) -> str:
    """End a command up to four times, each within the seconds that it takes, as long as it does not come to its end."""
    told = []
    for _ in range(chance.randint(1, 4)):
        after = chance.uniform(0.1, 1) * seconds
        alive = command.end(number, after)
        told.append(f"{after:.2f} s" if alive else "its own end")
        if not alive:
            break
    return f"{signal.Signals(number).name} at {', '.join(told)}"


def _checkpoints(folder: Path) -> list[Path]:
    return sorted(file for run in folder.glob("runs/default/*/checkpoints") for file in visible(run, "step-*.ckpt"))


def _newest_step(folder: Path) -> int:
    return max((int(file.stem[-8:]) for file in _checkpoints(folder)), default=0)


def _compare(undisturbed: Path, folder: Path, exact: bool = True) -> None:
    """Marks, pictures, losses and the last checkpoints of all runs under two folders."""
    runs = sorted(done.parent.relative_to(undisturbed) for done in undisturbed.glob("runs/default/*/DONE"))
    assert runs
    for run in runs:
        assert (folder / run / "DONE").exists(), f"{run} is not done"
        pictures = [[file.name for file in visible(root / run / "samples")] for root in (undisturbed, folder)]
        assert pictures[0] == pictures[1], f"pictures differ: {pictures}"
        figures = [_figures(root / run / "metrics.jsonl") for root in (undisturbed, folder)]
        files = [visible(root / run / "checkpoints", "step-*.ckpt")[-1] for root in (undisturbed, folder)]
        assert files[0].name == files[1].name, f"the last checkpoints are {files}"
        states = [dict(receipts.leaves(_decisive(file))) for file in files]
        assert states[0].keys() == states[1].keys()
        if exact:
            assert figures[0] == figures[1], "metrics.jsonl differs"
            other = [name for name, leaf in states[0].items() if not receipts.same(leaf, states[1][name])]
            assert not other, f"{len(other)} values of {files[0].name} differ, first {other[0]}"
        else:
            assert [key for key, _ in figures[0]] == [key for key, _ in figures[1]]
            values = [torch.tensor([value for _, value in own]) for own in figures]
            torch.testing.assert_close(*values, rtol=1e-4, atol=1e-5)
            for name, leaf in states[0].items():
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point():
                    torch.testing.assert_close(leaf, states[1][name], rtol=1e-3, atol=1e-5, msg=f"{name} differs")
        receipts.read(folder / run / receipts.FILE)


def _decisive(file: Path) -> dict[str, object]:
    state = checkpoint_io.read(file)
    return {key: state.get(key) for key in receipts.HELD.values()}


def _figures(file: Path) -> list[tuple[tuple[int, str], float]]:
    """((step, name), value) of what a training and a validation have measured, each once."""
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    found = [
        ((line["step"], key), value)
        for line in lines
        for key, value in line.items()
        if key.startswith("val/") or key in ("train/loss", "train/grad_norm")
    ]
    assert len(dict(found)) == len(found), "a figure was written twice"
    return found


TWENTY = [
    *[kill] * 4, evaluate, sharded, slow, clock, *[terminate] * 2, read_only, *[full_disk] * 2, *[flipped] * 2,
    read_only, *[encode] * 2, processes, sweep,
]  # fmt: skip


def of(seed: int) -> Scenario:
    """The scenario of a seed."""
    return TWENTY[seed % len(TWENTY)]
