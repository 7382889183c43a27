"""Whether a run is what its receipt says: its checkpoints by their hashes, its steps by computing them again."""

import re
import shutil
import sys
import tempfile
from collections.abc import Collection, Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from genfound import training
from genfound.config import compose, targets
from genfound.config.checks import integer
from genfound.runtime import checkpoint_io, receipts, run_directory
from genfound.runtime.files import visible
from genfound.runtime.receipts import Line

NEEDED = ("ema", "nonfinite", "checkpointing", "receipt")
"""Callbacks of a recomputation."""

STRATEGY = re.compile(r"(lightning\.pytorch\.strategies|genfound\.runtime\.fsdp)\.[A-Za-z]+Strategy")


def audit(run: Path, window: int | None, trust: Collection[str] = ()) -> None:
    """Recompute the last steps of a run and say that they are equal.

    Args:
        run: its directory; nothing is written there.
        window: how many global steps, or a few more, as checkpoints allow; `None`: those since the last checkpoint but
            one.
        trust: packages beside genfound of which its configuration may name classes.

    Raises:
        ValueError: the receipt was changed, a checkpoint is not that of its line, or a step differs, which is named.
    """
    integer("window", window, 1, or_null=True)
    run_directory.read_config(run)
    files = visible(run / "checkpoints", "step-*.ckpt")  # before the lines: the run may go on
    lines = receipts.read(run / receipts.FILE)
    if not any("loss" in line for line in lines):
        raise ValueError(f"run={run} has no steps in its {receipts.FILE}; nothing can be compared")
    end = max(line["step"] for line in lines if "loss" in line)
    intact, problems = _checkpoints(files, lines, end)
    print(f"{run}: the receipt is whole; checkpoints that agree with it: {', '.join(intact.values())}", flush=True)
    start = max((step for step in intact if step <= end - (window or 1)), default=0)
    with tempfile.TemporaryDirectory(prefix="genfound-") as scratch:
        again = Path(scratch) / "runs" / "audit" / run.name
        _recompute(run, again, lines, start, end, trust)
        problems += _steps(lines, receipts.read(again / receipts.FILE), start)
        problems += _values(run, again, end)
    if problems:
        raise ValueError(f"run={run}: " + "; ".join(problems))
    print(f"equal: steps {start + 1:,} to {end:,} are bit by bit those of the receipt", flush=True)


def _checkpoints(files: Sequence[Path], lines: Sequence[Line], end: int) -> tuple[dict[int, str], list[str]]:
    """Step -> file of kept checkpoints that are those of their lines, and what is wrong with the others."""
    noted = {line["checkpoint"]: line for line in lines if "checkpoint" in line}
    intact, problems = {}, []
    for file in files:
        if line := noted.get(file.name):
            held = receipts.hashes(checkpoint_io.read(file, parts=()), checkpoint_io.values(file))
            if wrong := [name for name, value in held.items() if line[name] != value]:
                problems.append(f"{file.name} has other {' and '.join(wrong)} than the receipt says")
            else:
                intact[int(line["step"])] = file.name
        elif checkpoint_io.read(file, parts=())["global_step"] > end:
            problems.append(f"{receipts.FILE} ends at step {end:,}, before {file.name}: lines are missing")
    return intact, problems


def _recompute(run: Path, again: Path, lines: Sequence[Line], start: int, end: int, trust: Collection[str]) -> None:
    """Train steps of a run in another directory."""
    begun = [line for line in lines if "ranks" in line]
    first = max((line["step"] for line in begun if line["step"] <= start), default=0)
    ranks = {line["ranks"] for line in begun if first <= line["step"] < end}
    config = run_directory.read_config(run)
    configs = {line["config"] for line in lines if "checkpoint" in line and line["step"] >= start}
    if configs and receipts.config_hash(config) not in configs:
        raise ValueError(f"{run / 'config.yaml'} is not the configuration that the receipt tells of")
    for values, what in ((ranks, "number of processes"), (configs, "configuration")):
        if len(values) > 1:
            raise ValueError(f"window: the run changed its {what} after step {start:,}; give a smaller window=...")
    (again / "checkpoints").mkdir(parents=True)
    if start:
        file = Path("checkpoints") / f"step-{start:08d}.ckpt"
        (again / file).symlink_to((run / file).resolve())
    shutil.copy(run / receipts.FILE, again / receipts.FILE)
    config = targets.from_file(config, trust, run / "config.yaml")
    print(f"recomputing steps {start + 1:,} to {end:,}", flush=True)
    training.start(again, _config(run_directory.located(config, run), ranks.pop(), end), sweeping=True)


def _config(config: Mapping[str, Any], ranks: int, end: int) -> dict[str, Any]:
    """The configuration of the recomputation: the same steps, without what only watches or names foreign code."""
    for key, path in compose.targets_in(config["strategy"], "strategy."):
        if not STRATEGY.fullmatch(str(path)):
            raise ValueError(f"{key}={path} is no strategy of Lightning or genfound; code that a file names is not run")
    usual = compose.read_option("callbacks", "default")
    callbacks = {name: usual[name] for name in NEEDED}
    callbacks["checkpointing"] |= {"every": sys.maxsize}
    trainer = {**config["trainer"], "max_steps": end, "devices": ranks, "num_nodes": 1, "max_time": None}
    return {**config, "callbacks": callbacks, "logger": {}, "trainer": trainer}


def _steps(lines: Sequence[Line], again: Sequence[Line], start: int) -> list[str]:
    """The first step that differs."""
    pairs = zip_longest(*([line for line in own if "loss" in line and line["step"] > start] for own in (lines, again)))
    for one, other in pairs:
        if not one or not other:
            return [f"step {(one or other)['step']:,} is on one side only"]
        for name in ("images_seen", "loss", "grad_norm"):
            if one[name] != other[name]:
                was, now = (own[name] if name == "images_seen" else float.fromhex(own[name]) for own in (one, other))
                return [f"step {one['step']:,} is the first that differs: its {name} was {was!r} and is {now!r}"]
    return []


def _values(run: Path, again: Path, end: int) -> list[str]:
    """What differs in the checkpoint of the last step, if the run has kept it."""
    file = Path("checkpoints") / f"step-{end:08d}.ckpt"
    if not (run / file).exists():
        return []
    states = [checkpoint_io.read(folder / file, parts=()) for folder in (run, again)]
    kept, new = (dict(receipts.leaves({key: state[key] for key in receipts.HELD.values()})) for state in states)
    was, now = (checkpoint_io.values(folder / file) for folder in (run, again))
    other = [name for name, leaf in kept.items() if not receipts.same(was(name, leaf), now(name, new.get(name)))]
    return [f"{file.name}: {len(other)} of {len(kept)} values differ, first {other[0]}"] if other else []
