"""safetensors files of which a little is read at a time.

The header of a file is read once and values are then fetched with `pread`, which moves no file position, so that a
reader may be copied into forked or spawned workers. Files are written whole or not at all.
"""

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from genfound.runtime.files import atomic_write

MOST_OPEN = 512
"""Files that a reader keeps open."""

PIECE = 2**26
"""Bytes that are read at a time; the kernel itself never reads 2 GiB or more in one call."""

DTYPES = {
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "U8": torch.uint8,
}  # fmt: skip
"""The format's names of what such files hold here."""


class Span(NamedTuple):
    """Where a tensor lies in its file: dtype, shape, and its first byte."""

    dtype: torch.dtype
    shape: list[int]
    begin: int

    @property
    def bytes(self) -> int:
        """Its length in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


class Header(NamedTuple):
    """What a file holds."""

    spans: dict[str, Span]
    metadata: dict[str, str]


def read_header(file: Path) -> Header:
    """Parse the header of a file and compare it with the file's length."""
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing")
    try:
        with open(file, "rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if length > file.stat().st_size:
                raise ValueError("it ends within its header")
            listed: dict[str, Any] = json.loads(stream.read(length))
        metadata = listed.pop("__metadata__", {})
        spans = {name: _span(entry, 8 + length) for name, entry in listed.items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{file} is damaged: its header cannot be read ({error})") from None
    expected = max((span.begin + span.bytes for span in spans.values()), default=0)
    if expected != file.stat().st_size:
        raise ValueError(f"{file} is damaged: it has {file.stat().st_size:,} bytes, not {expected:,}")
    return Header(spans, metadata)


def _span(entry: Mapping[str, Any], data: int) -> Span:
    begin, end = entry["data_offsets"]
    span = Span(DTYPES[entry["dtype"]], list(entry["shape"]), data + begin)
    if span.bytes != end - begin:
        raise ValueError(f"a tensor of {span.bytes} bytes in a place of {end - begin}")
    return span


def read_tensors(file: Path, spans: Mapping[str, Span]) -> dict[str, np.ndarray]:
    """Whole tensors of a file."""
    with open(file, "rb") as stream:
        arrays = {}
        for name, span in spans.items():
            data = read_bytes(stream.fileno(), span.bytes, span.begin)
            arrays[name] = as_tensor(data, span.dtype).numpy().reshape(span.shape)
    return arrays


def read_bytes(descriptor: int, count: int, begin: int) -> bytes:
    """`count` bytes of an open file from `begin` on; fewer where it ends."""
    data = os.pread(descriptor, min(count, PIECE), begin)
    if len(data) == count:
        return data
    pieces, found = [data], len(data)
    while pieces[-1] and found < count:
        pieces.append(os.pread(descriptor, min(count - found, PIECE), begin + found))
        found += len(pieces[-1])
    return b"".join(pieces)


def as_tensor(data: bytes, dtype: torch.dtype) -> Tensor:
    """Bytes of a file -> a flat tensor of their own."""
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def write_tensors(file: Path, tensors: Mapping[str, Tensor], note: str) -> None:
    """Write a file with one remark in its metadata, whole or not at all; the same values are the same bytes."""

    def save(temporary: Path) -> None:
        try:
            save_file(dict(tensors), temporary, {"genfound": note})  # of several remarks the order would vary
        except SafetensorError as error:
            raise _system_error(error) from None

    atomic_write(file, save)


def _system_error(error: SafetensorError) -> OSError:
    """The error of the operating system, such as a full disk, that safetensors says in words."""
    number = re.search(r"\(os error (\d+)\)", str(error))
    return OSError(int(number[1]), os.strerror(int(number[1]))) if number else OSError(str(error))


class Reader:
    """Bytes of many files, which are opened when needed, in each process anew; several threads may read at once."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = list(files)
        self._open: dict[int, BinaryIO] = {}

    def read(self, number: int, begin: int, count: int) -> bytes:
        """`count` bytes of a file from `begin` on; fewer where it ends."""
        file = self._open.get(number) or self._opened(number)
        return read_bytes(file.fileno(), count, begin)

    def _opened(self, number: int) -> BinaryIO:
        file = open(self.files[number], "rb", buffering=0)  # noqa: SIM115  closes with the last thread that reads it
        os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_RANDOM)
        for oldest in list(self._open)[: max(0, len(self._open) + 1 - MOST_OPEN)]:
            self._open.pop(oldest, None)
        self._open[number] = file
        return file

    def __getstate__(self) -> dict[str, Any]:
        return {"files": self.files, "_open": {}}
