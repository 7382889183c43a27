"""Npz files: arrays that are mapped into memory where they can be, and images that are written one at a time."""

from __future__ import annotations

import os
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import numpy as np


class Stack(NamedTuple):
    """Images (H, W, 3) uint8 that become one array.

    Attributes:
        shape: (N, H, W, 3).
        images: N of them, in order.
    """

    shape: tuple[int, int, int, int]
    images: Iterator[np.ndarray]


def write_npz(file: Path, arrays: Mapping[str, np.ndarray | Stack]) -> None:
    """Write arrays uncompressed, the file whole or not at all."""
    temporary = file.with_name(f".{file.name}.{os.getpid()}")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    if isinstance(array, Stack):
                        header = {"descr": "|u1", "fortran_order": False, "shape": array.shape}
                        np.lib.format.write_array_header_1_0(member, header)
                        for image in array.images:
                            member.write(np.ascontiguousarray(image).tobytes())
                    else:
                        np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)


def read_member(file: Path, name: str) -> np.ndarray | None:
    """One array of an npz file, mapped into memory where it is stored uncompressed; `None` if it is absent.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or the array is one of Python objects.
    """
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        with zipfile.ZipFile(file) as archive:
            if f"{name}.npy" not in archive.namelist():
                return None
            member = archive.getinfo(f"{name}.npy")
            if member.compress_type != zipfile.ZIP_STORED:
                with archive.open(member) as stream:
                    return np.lib.format.read_array(stream, allow_pickle=False)
        return _mapped(file, member)
    except (zipfile.BadZipFile, ValueError, OSError, EOFError) as error:
        raise ValueError(f"{file} is damaged or is not an npz file of arrays: {error}") from None


def _mapped(file: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """An array that lies uncompressed within a zip file."""
    with open(file, "rb") as stream:
        stream.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
        stream.seek(member.header_offset + 30 + name + extra)
        begin = stream.tell()
        version = np.lib.format.read_magic(stream)
        reader = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, fortran, dtype = reader(stream)
        if dtype.hasobject or fortran or 0 in shape or not shape:
            stream.seek(begin)
            return np.lib.format.read_array(stream, allow_pickle=False)
        return np.memmap(file, dtype, "r", stream.tell(), shape)
