"""Npz files: arrays that are mapped into memory where they can be, and images that are written one at a time."""

import hashlib
import zipfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from genfound.runtime.files import atomic_write

BLOCK = 1 << 20


class ImageStack(NamedTuple):
    """Images that become one array."""

    shape: tuple[int, int, int, int]  # (N, H, W, 3)
    images: Iterator[np.ndarray]  # (H, W, 3) uint8


def write_npz(file: Path, arrays: Mapping[str, np.ndarray | ImageStack]) -> None:
    """Write arrays uncompressed, the file whole or not at all; its folder is made."""

    def save(temporary: Path) -> None:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for name, array in arrays.items():
                with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
                    if isinstance(array, ImageStack):
                        header = {"descr": "|u1", "fortran_order": False, "shape": array.shape}
                        np.lib.format.write_array_header_1_0(member, header)
                        for image in array.images:
                            member.write(np.ascontiguousarray(image).tobytes())
                    else:
                        np.lib.format.write_array(member, np.asarray(array), allow_pickle=False)

    atomic_write(file, save)


def read_member(file: Path, name: str) -> np.ndarray | None:
    """One array of an npz file, mapped into memory where it is stored uncompressed; `None` if it is absent."""
    with _opened(file) as archive:
        if f"{name}.npy" not in archive.namelist():
            return None
        member = archive.getinfo(f"{name}.npy")
        if member.compress_type == zipfile.ZIP_STORED:
            return _mapped(file, member)
        with archive.open(member) as stream:
            return np.lib.format.read_array(stream, allow_pickle=False)


def headers(file: Path) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{name: (shape, dtype)} of all arrays; only their headers are read."""
    found = {}
    with _opened(file) as archive:
        for name in archive.namelist():
            with archive.open(name) as stream:
                if name.endswith(".npy"):
                    shape, _, dtype = _read_header(stream)
                    found[name.removesuffix(".npy")] = (shape, dtype)
    return found


def file_hash(file: Path) -> str:
    """First 16 digits of the SHA-256 of an npz file, as sha256sum prints it.

    The checksums of arrays that are stored uncompressed are compared: elsewhere these are mapped, unseen by zipfile.
    """
    with _opened(file) as archive, open(file, "rb") as whole:
        for member in archive.infolist():
            if member.compress_type == zipfile.ZIP_STORED:
                with archive.open(member) as stream:
                    while stream.read(BLOCK):
                        pass
        return hashlib.file_digest(whole, "sha256").hexdigest()[:16]


@contextmanager
def _opened(file: Path) -> Iterator[zipfile.ZipFile]:
    """Whatever is raised on damaged bytes becomes one ValueError that names the file."""
    if not file.is_file():
        raise FileNotFoundError(f"there is no file {file}")
    try:
        with zipfile.ZipFile(file) as archive:
            yield archive
    except Exception as error:  # zipfile, zlib and numpy raise error, TokenError, SyntaxError, KeyError and more
        reason = " ".join(str(error).split())[:150] or type(error).__name__
        raise ValueError(f"{file} is damaged or is not an npz file of arrays: {reason}") from None


def _read_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype]:
    """Shape, whether in Fortran's order, and dtype."""
    one = np.lib.format.read_magic(stream) == (1, 0)
    return (np.lib.format.read_array_header_1_0 if one else np.lib.format.read_array_header_2_0)(stream)


def _mapped(file: Path, member: zipfile.ZipInfo) -> np.ndarray:
    """An array that lies uncompressed within a zip file."""
    with open(file, "rb") as stream:
        stream.seek(member.header_offset + 26)
        name, extra = (int.from_bytes(stream.read(2), "little") for _ in range(2))
        begin = stream.seek(member.header_offset + 30 + name + extra)
        shape, fortran, dtype = _read_header(stream)
        if dtype.hasobject or fortran or 0 in shape or not shape:
            stream.seek(begin)
            return np.lib.format.read_array(stream, allow_pickle=False)
        return np.memmap(file, dtype, "r", stream.tell(), shape)
