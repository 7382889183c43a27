"""Images in archives, a folder of files that each hold many: what tars and tables have in common.

Archives are of the split that their path names (`train-00000-of-00294`, `val/000.tar`, `validation`); those of `test`
are left out. Where none is for validation, images are held out. At the first start the headers of all images are read;
what was found is kept in an index beside the runs, and looked for anew when an archive is new or has changed.
"""

import io
import json
import re
from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np
from PIL import Image

from genfound.config.checks import integer
from genfound.data.images.index import FileIndex, FileInfo, ImageFiles, index_file
from genfound.data.images.opening import as_stored, format_notes, opened
from genfound.data.images.views import ImageViews
from genfound.data.latents.published import checked_labels
from genfound.runtime.files import atomic_write, hidden, lock

VALIDATION, TEST = {"val", "valid", "validation"}, {"test"}


class Member(NamedTuple):
    """An image in an archive."""

    name: str
    label: int | str  # number or name of its class
    place: int  # where it lies, and
    size: int  # how many bytes it has
    found: FileInfo | str  # or why it cannot be read


class Archives(ImageFiles):
    """Images of archives, with the pixels of the official code: never turned by EXIF, `convert("RGB")`.

    Args:
        root: folder with the archives, in folders or not.
        holdout: without archives for validation, every holdout-th image of a class validates; `None` holds none out.
        max_pixels: images of more pixels are skipped; `None`: those that Pillow takes for decompression bombs.
    """

    suffix: str
    """Of an archive."""

    def __init__(
        self, *, root: str, views: ImageViews, holdout: int | None, max_pixels: int | None, split: str, index: str
    ) -> None:
        integer("data.max_pixels", max_pixels, 1, or_null=True)
        folder, self.max_pixels = Path(root), max_pixels
        shards = _shards(folder, self.suffix)
        train, labels = self._known(folder, shards["train"], Path(index))
        names = self.names_of(labels, folder / shards["train"][0])
        apart = split == "val" and bool(shards["val"])
        found, labels = self._known(folder, shards["val"], Path(index)) if apart else (train, labels)
        classes = _numbers(folder, labels, names)
        every = (None, "train") if shards["val"] else (holdout, split)
        super().__init__(folder, names, found, views, *every, classes=classes)

    @abstractmethod
    def scan(self, file: Path) -> Iterator[Member]:
        """The images of an archive; a ValueError says what is wrong with it."""

    @abstractmethod
    def content(self, file: Path, place: int, size: int) -> bytes:
        """The bytes of an image."""

    def names_of(self, labels: Sequence[int | str], file: Path) -> list[str]:
        """Names of the classes of these labels, of which one archive is given."""
        if isinstance(labels[0], str):
            return sorted({str(label) for label in labels})
        return [str(number) for number in range(max(map(int, labels)) + 1)]

    def header(self, member: str, stream: IO[bytes]) -> FileInfo | str:
        """What the header of an image tells."""
        try:
            with opened(stream, self.max_pixels) as picture:
                return FileInfo(picture.height, picture.width, format_notes(picture, Path(member)))
        except OSError as error:
            return str(error).splitlines()[0]

    def picture(self, number: int, least: tuple[int, int] | None) -> Image.Image:
        """One of the images, RGB."""
        archive, _, member = self.files[number].partition(f"{self.suffix}/")
        file = self.root / f"{archive}{self.suffix}"
        try:
            data = self.content(file, int(self.stamps[number]), int(self.bytes[number]))
            with opened(io.BytesIO(data), self.max_pixels, least=least) as picture:
                return as_stored(picture)
        except OSError as error:
            raise ValueError(f"{file}: {member} cannot be read: {error}") from None

    def _known(self, folder: Path, shards: list[str], index: Path) -> tuple[FileIndex, list[int | str]]:
        """The images of archives, in their order, and the labels of those that can be read."""
        stats = [(shard, (stat := (folder / shard).stat()).st_size, stat.st_mtime_ns) for shard in shards]
        cache = index_file(index, folder, f"{type(self).__name__} {self.max_pixels} {stats}")
        with lock(cache, wait=True):
            if not cache.is_file():
                content = _columns(folder, shards, self.scan)
                atomic_write(cache, lambda temporary: temporary.write_text(json.dumps(content)))
        content = json.loads(cache.read_text())
        labels = content.pop("labels")
        found = FileIndex(**content)
        if not found.good:
            raise FileNotFoundError(f"data.root={folder}: none of {len(found.names)} images can be read")
        return found, _checked(folder, [labels[i] for i in found.good])


def _columns(folder: Path, shards: list[str], scan: Callable[[Path], Iterator[Member]]) -> dict[str, Any]:
    """Of a `FileIndex`, and `labels`."""
    print(f"{folder}: looking into {len(shards):,} archive(s); this is done once", flush=True)
    members = [(f"{shard}/{member.name}", member) for shard in shards for member in scan(folder / shard)]
    good = {name: member.found for name, member in members if isinstance(member.found, FileInfo)}
    return {
        "names": [name for name, _ in members],
        "labels": [member.label for _, member in members],
        "bytes": [member.size for _, member in members],
        "stamps": [member.place for _, member in members],
        "heights": [good[name].height if name in good else 0 for name, _ in members],
        "widths": [good[name].width if name in good else 0 for name, _ in members],
        "notes": {name: list(found.notes) for name, found in good.items() if found.notes},
        "errors": {name: member.found for name, member in members if isinstance(member.found, str)},
        "ignored": {},
    }


def _shards(root: Path, suffix: str) -> dict[str, list[str]]:
    """Sorted archives below a folder, by split."""
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder")
    found: dict[str, list[str]] = {"train": [], "val": [], "test": []}
    for path in sorted(root.rglob(f"*{suffix}")):
        name = path.relative_to(root).as_posix()
        if path.is_file() and not any(map(hidden, name.split("/"))):
            words = {*re.split(r"[^a-z]+", name.lower())}
            found["val" if words & VALIDATION else "test" if words & TEST else "train"].append(name)
    if not found["train"]:
        others = ", but for validation or test" if found["val"] or found["test"] else ""
        raise FileNotFoundError(f"data.root={root} holds no *{suffix}{others}")
    return found


def _checked(root: Path, labels: list[int | str]) -> list[int | str]:
    """Labels that are all names, or all numbers of classes."""
    if len({type(label) for label in labels}) > 1:
        raise ValueError(f"data.root={root} has images with the number of their class beside them, and others without")
    return labels if isinstance(labels[0], str) else checked_labels(root, np.array(labels), len(labels)).tolist()


def _numbers(root: Path, labels: Sequence[int | str], names: list[str]) -> np.ndarray:
    """The number of the class of each image, of which validation has no others than training."""
    known = {name: number for number, name in enumerate(names)} if isinstance(labels[0], str) else range(len(names))
    if unknown := sorted({*labels} - {*known}):
        raise ValueError(f"data.root={root}: class {unknown[0]} is none of the {len(names)} of the training archives")
    return np.array([known[label] for label in labels], dtype=np.int64)  # type: ignore[index]
