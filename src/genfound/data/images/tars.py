"""Images in tar files: those of webdataset, a tar for each class (ImageNet's own), or class folders in tars."""

import json
import tarfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from genfound.data.images.archives import Archives, Member
from genfound.data.images.imagenet import SUFFIXES
from genfound.data.latents.safetensors_io import read_bytes
from genfound.runtime.files import hidden

LABELS = (".cls", ".json")
"""Files of webdataset, beside an image of the same name: the number of its class, or {"label": number}."""

BLOCK = 512
"""Bytes; a tar ends in blocks of zeros."""


class ImageTars(Archives):
    """`*.tar`, uncompressed; the class of an image is the number beside it, its folder, or the name of the tar."""

    suffix = ".tar"

    def scan(self, file: Path) -> Iterator[Member]:
        """The images of a tar."""
        try:
            with tarfile.open(file, "r:") as archive:
                members = [m for m in archive if m.isfile() and not any(map(hidden, m.name.split("/")))]
                numbers = dict(self._numbers(archive, members, file))
                for member in (m for m in members if m.name.lower().endswith(SUFFIXES)):
                    path = PurePosixPath(member.name)
                    label = numbers.get(_key(member.name), path.parent.name or file.stem)
                    stream = archive.extractfile(member)
                    assert stream is not None
                    found = self.header(member.name, stream)
                    yield Member(member.name, label, member.offset_data, member.size, found)
                end = archive.offset
        except tarfile.TarError as error:
            raise ValueError(f"{file} is no tar, is compressed, or is damaged: {error}") from None
        with open(file, "rb") as whole:
            if read_bytes(whole.fileno(), BLOCK, end) != bytes(BLOCK):
                raise ValueError(f"{file} is cut short: it has no end")

    def _numbers(
        self, archive: tarfile.TarFile, members: list[tarfile.TarInfo], file: Path
    ) -> Iterator[tuple[str, int]]:
        """Names without suffixes, and the numbers of classes that lie beside them."""
        for member in members:
            if member.name.endswith(LABELS):
                text = archive.extractfile(member)
                assert text is not None
                try:
                    yield _key(member.name), _number(text, member.name)
                except (ValueError, KeyError, TypeError):
                    what = 'a number of a class, nor {"label": number}'
                    raise ValueError(f"{file}: {member.name} is neither {what}") from None

    def content(self, file: Path, place: int, size: int) -> bytes:
        """The bytes of an image."""
        with open(file, "rb", buffering=0) as archive:
            return read_bytes(archive.fileno(), size, place)


def _key(name: str) -> str:
    """What the files of one image have in common: the name up to the first dot, as in webdataset."""
    folder, _, file = name.rpartition("/")
    return f"{folder}/{file.partition('.')[0]}"


def _number(text: IO[bytes], name: str) -> int:
    content = json.loads(text.read())
    found = content["label"] if name.endswith(".json") else content
    if type(found) is not int:
        raise TypeError
    return found
