"""The receipt of a run: a chain of hashes over its global steps and its checkpoints, which a recomputation must meet.

A line of receipt.jsonl is a step (its loss and the norm of its gradient, as hexadecimal floats, exact to the bit), the
beginning of a process that trains (`ranks`), or a checkpoint (hashes of what it holds). Its `hash` is over its content
and the hash of the line before.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from itertools import takewhile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfound.config.compose import flatten
from genfound.runtime.files import atomic_write, digest
from genfound.runtime.run_directory import changes_numbers

FILE = "receipt.jsonl"
HELD = {"weights": "state_dict", "optimizer": "optimizer_states", "averages": "ema", "position": "GenerativeDataModule"}
"""What the line of a checkpoint has a hash of -> its key in the file."""

Line = dict[str, Any]


def read(file: Path) -> list[Line]:
    """The lines of a receipt, without a last one that was cut short.

    Raises:
        ValueError: a line is not what its hash says, or does not follow the one before.
    """
    lines: list[Line] = []
    text = file.read_text(errors="replace").split("\n") if file.is_file() else [""]
    for number, written in enumerate(text[:-1], 1):
        try:
            line = json.loads(written)
            intact = isinstance(line["step"], int) and line == _chained(lines[-1]["hash"] if lines else "", line)
        except (ValueError, TypeError, KeyError):
            intact = False
        if not intact:
            what = f"line {number} does not follow from those before it"
            raise ValueError(f"{file} was changed: {what}; without this file a run goes on, and proves less")
        lines.append(line)
    return lines


def head_at(file: Path, checkpoint: str) -> str | None:
    """The hash of the line of a checkpoint, which stands for all that led to it; None if the receipt has none."""
    found = None
    with file.open() if file.is_file() else nullcontext(()) as lines:
        for written in lines:
            if f'"checkpoint": "{checkpoint}"' in written:
                found = str(json.loads(written)["hash"])
    return found


class Receipt:
    """Writes the receipt of a run that begins, or goes on after a step, behind which lines are cut off.

    A checkpoint that was complete only after the next step loses its line with that, and is given another.

    `checkpoints` are the steps of those that have a line.
    """

    def __init__(self, file: Path, step: int) -> None:
        kept = list(takewhile(lambda line: line["step"] <= step, read(file)))
        atomic_write(file, lambda partial: partial.write_text("".join(map(_written, kept))))
        self._file, self._head = file, kept[-1]["hash"] if kept else ""
        self.checkpoints = {line["step"] for line in kept if "checkpoint" in line}

    def add(self, *contents: Mapping[str, Any]) -> None:
        """Add lines."""
        lines = []
        for content in contents:
            lines.append(_chained(self._head, content))
            self._head = lines[-1]["hash"]
        with open(self._file, "a") as out:
            out.write("".join(map(_written, lines)))
        self.checkpoints |= {line["step"] for line in lines if "checkpoint" in line}


def _chained(head: str, content: Mapping[str, Any]) -> Line:
    own = {key: value for key, value in content.items() if key != "hash"}
    return {**own, "hash": digest(head, json.dumps(own, sort_keys=True))}


def _written(line: Line) -> str:
    return json.dumps(line) + "\n"


def config_hash(config: Mapping[str, Any]) -> str:
    """Of the keys of a run's configuration that decide its numbers."""
    keys = {key: value for key, value in flatten(config).items() if changes_numbers(key)}
    return digest(json.dumps(keys, sort_keys=True, default=str), size=16)


def hashes(state: Mapping[str, Any], value: Callable[[str, Any], Any] = lambda name, leaf: leaf) -> dict[str, str]:
    """Of the parts of a checkpoint that decide how the training goes on; `value` is that of a leaf and its name."""
    return {name: _hash(state.get(key), key, value) for name, key in HELD.items()}


def _hash(part: Any, key: str, value: Callable[[str, Any], Any]) -> str:
    """Of one tensor after another: a checkpoint need not fit into memory beside the training."""
    hashed = hashlib.blake2b(digest_size=16)
    for name, leaf in leaves(part, key):
        own = name.removeprefix(key).removeprefix(".")
        for piece in (f"{own}=".encode(), *_bytes(value(name, leaf))):
            hashed.update(piece)
    return hashed.hexdigest()


def leaves(part: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """(name, value) of the tensors and plain values in dicts and lists, in one order."""
    if isinstance(part, Mapping):
        for key in sorted(part, key=str):
            yield from leaves(part[key], f"{name}.{key}" if name else str(key))
    elif isinstance(part, list | tuple):
        for index, value in enumerate(part):
            yield from leaves(value, f"{name}[{index}]")
    else:
        yield name, part


def same(leaf: Any, other: Any) -> bool:
    """Whether two values of `leaves` are equal to the bit."""
    return _bytes(leaf) == _bytes(other)


def _bytes(leaf: Any) -> tuple[bytes, memoryview]:
    """What a value is, and the bytes of a tensor."""
    if not isinstance(leaf, Tensor):
        return repr(leaf).encode(), memoryview(b"")
    values = leaf.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
    return f"{leaf.dtype}{tuple(leaf.shape)}".encode(), values.numpy().data
