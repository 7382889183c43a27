"""Sets of uint8 images: ADM's npz files, folders, and views of other sets."""

import contextlib
import functools
import hashlib
import json
import os
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from PIL import Image

from genfound.data.images.base import PictureSource
from genfound.data.images.npz import headers, read_member
from genfound.data.images.opening import opened
from genfound.data.images.views import center_crop
from genfound.runtime.files import digest, hidden
from genfound.runtime.progress import ProgressCounter

SUFFIXES = (
    ".png", ".apng", ".jpg", ".jpeg", ".jpe", ".jfif", ".jp2", ".webp", ".avif", ".bmp", ".dib", ".gif", ".tif",
    ".tiff", ".ppm", ".pgm", ".pbm", ".pnm", ".tga",
)  # fmt: skip
MODES = ("RGB", "L", "P", "1", "CMYK", "YCbCr")
"""Of files that become RGB without a choice: no transparency, no 16 bits."""

GRID = "grid.png"
"""Of `genfound.sample`, beside its images."""

LABELS, NOTE = "labels.txt", "protocol.json"
"""Beside exported images: one label per image, and how the images were made."""


class ImageSet(Protocol):
    """Images in a fixed order."""

    key: str  # changes when the images do; a hexadecimal number

    @property
    def sizes(self) -> np.ndarray:
        """(n, 2) int64, height and width in pixels."""

    @property
    def labels(self) -> np.ndarray | None:
        """(n,) int64, or `None` where they are unknown."""

    def __len__(self) -> int:
        """How many there are."""

    def __getitem__(self, number: int) -> np.ndarray:
        """(height, width, 3) uint8."""


class SizedImages:
    """Images of known sizes."""

    sizes: np.ndarray

    def __len__(self) -> int:
        return len(self.sizes)


class NpzImages(SizedImages):
    """`arr_0` of an npz file, (N, H, W, 3) uint8, as ADM's evaluator reads; `arr_1` holds labels, if they are
    whole numbers, one for each image.

    An uncompressed file is mapped, a compressed one is loaded.
    """

    def __init__(self, file: Path) -> None:
        self.file = file
        self.array = read_member(file, "arr_0")
        if self.array is None:
            raise ValueError(f"{file} has no arr_0; a sample file holds uint8 images (N, H, W, 3) under this name")
        shape, dtype = self.array.shape, self.array.dtype
        if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
            raise ValueError(f"{file}: arr_0 is {dtype} {list(shape)}; it must be uint8 (N, H, W, 3) in 0..255, RGB")
        self.sizes = np.tile(np.array(shape[1:3], dtype=np.int64), (shape[0], 1))
        found, kind = headers(file).get("arr_1", ((), np.dtype(object)))
        fits = found == shape[:1] and kind.kind in "iu"
        self.labels = np.array(read_member(file, "arr_1"), dtype=np.int64) if fits else None
        self.key = stat_key([file])

    def __getitem__(self, number: int) -> np.ndarray:
        assert self.array is not None
        return np.asarray(self.array[number])


class FolderImages:
    """All images below a folder, in the order of their paths, which `labels.txt` follows; hidden ones are left out."""

    def __init__(self, folder: Path, max_pixels: int | None = None) -> None:
        self.folder, self.max_pixels = folder, max_pixels
        self.files, self.ignored = image_files(folder)
        if not self.files:
            raise FileNotFoundError(f"{folder} holds no images ({', '.join(SUFFIXES)})")
        self.labels = _read_labels(folder / LABELS, len(self.files))
        self.key = stat_key(self.files)

    @functools.cached_property
    def sizes(self) -> np.ndarray:
        """(n, 2) int64, from the headers of the files."""
        found = []
        for file in self.files:
            with self._opened(file) as picture:
                found.append((picture.height, picture.width))
        return np.array(found, dtype=np.int64)

    def content(self) -> tuple[str, np.ndarray]:
        """16 digits of the SHA-256 of all files, and their order by it, as good as random: whatever their names are."""
        digests, progress = np.empty((len(self), 4), dtype=np.uint64), ProgressCounter("files read")
        with ThreadPoolExecutor(min(os.cpu_count() or 1, 16)) as pool:
            for number, hashed in enumerate(
                pool.map(lambda file: hashlib.sha256(file.read_bytes()).digest(), self.files)
            ):
                digests[number] = np.frombuffer(hashed, dtype=">u8")
                progress(number + 1, len(self))
        order = np.lexsort(digests.T[::-1])
        return hashlib.sha256(digests[order].tobytes()).hexdigest()[:16], order

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, number: int) -> np.ndarray:
        """(height, width, 3) uint8, not turned by EXIF."""
        file = self.files[number]
        with self._opened(file) as picture:
            mode = picture.mode
            if mode in MODES and "transparency" not in picture.info:
                return np.array(picture.convert("RGB"))
        raise ValueError(f"{file} is {mode} with transparency or 16 bits; convert it to 8-bit RGB")

    @contextlib.contextmanager
    def _opened(self, file: Path) -> Iterator[Image.Image]:
        try:
            with opened(file, self.max_pixels, "max_pixels") as picture:
                yield picture
        except OSError as error:
            raise ValueError(f"{file} cannot be read as an image: {error}") from None


class Sourced(SizedImages):
    """The images of a data set, as a model is trained on them."""

    def __init__(self, source: PictureSource) -> None:
        self.source, self.sizes, self.labels = source, source.sizes, source.labels
        self.key = digest(source.fingerprint, source.sizes.tobytes(), source.labels.tobytes())

    def __getitem__(self, number: int) -> np.ndarray:
        return self.source.image(number)


class Subset(SizedImages):
    """Some images of a set, in a given order."""

    def __init__(self, images: ImageSet, numbers: Sequence[int] | np.ndarray) -> None:
        self.images, self.numbers = images, np.asarray(numbers, dtype=np.int64)
        self.sizes = images.sizes[self.numbers]
        self.labels = None if images.labels is None else images.labels[self.numbers]
        self.key = digest(images.key, self.numbers.tobytes())

    def __getitem__(self, number: int) -> np.ndarray:
        return self.images[int(self.numbers[number])]


class Cropped(SizedImages):
    """A set brought to one size: as small as covers it, bicubic, then its centre."""

    def __init__(self, images: ImageSet, size: tuple[int, int]) -> None:
        self.images, self.size = images, size
        self.labels = images.labels
        self.sizes = np.tile(np.array(size, dtype=np.int64), (len(images), 1))
        self.key = digest(images.key, f"crop {size[0]} {size[1]}")

    def __getitem__(self, number: int) -> np.ndarray:
        return np.array(center_crop(Image.fromarray(self.images[number]), *self.size))


def open_images(path: Path, max_pixels: int | None = None) -> NpzImages | FolderImages:
    """An npz file, or a folder of images of at most `max_pixels` each, see `data.opening.opened`."""
    if path.is_dir():
        return FolderImages(path, max_pixels)
    if path.is_file() and path.suffix != ".npz":
        raise ValueError(f"{path} is neither an .npz file nor a folder of images")
    return NpzImages(path)


def image_files(folder: Path) -> tuple[list[Path], dict[str, int]]:
    """Every image file below a folder, sorted by path, and how many others there are of each kind.

    Links are followed. What `export` and `genfound.sample` write beside images is neither.
    """
    own = [folder / name for name in (GRID, LABELS, NOTE)]
    found, ignored = [], Counter[str]()
    for path, unseen in _below(folder, frozenset(), within=False):
        image = path.suffix.lower() in SUFFIXES
        if unseen:
            ignored["hidden"] += image
        elif image and path not in own:
            if not path.is_file():
                raise FileNotFoundError(f"{path} is a link that leads nowhere; mend or remove it")
            found.append(path)
        elif path not in own:
            ignored[path.suffix.lower() or "without suffix"] += 1
    return sorted(found, key=lambda p: p.relative_to(folder).as_posix()), dict(sorted((+ignored).items()))


def ignored_files(images: ImageSet) -> dict[str, str]:
    """What a protocol says of the files beside images: `{"ignored": "1 hidden, 2 .txt"}`, or nothing."""
    ignored = images.ignored if isinstance(images, FolderImages) else {}
    return {"ignored": ", ".join(f"{count:,} {kind}" for kind, count in ignored.items())} if ignored else {}


def _below(folder: Path, above: frozenset[tuple[int, int]], within: bool) -> Iterator[tuple[Path, bool]]:
    """Files below a folder, through links but never round in circles; whether each, or what it is in, is hidden."""
    stat = folder.stat()
    if (stat.st_dev, stat.st_ino) in above:
        return
    with os.scandir(folder) as entries:
        for entry in entries:
            path, unseen = folder / entry.name, within or hidden(entry.name)
            if entry.is_dir():
                yield from _below(path, above | {(stat.st_dev, stat.st_ino)}, unseen)
            else:
                yield path, unseen


def read_note(path: Path) -> dict[str, Any] | None:
    """How exported images were made; `None` for images of other origin."""
    text: object = None
    if not path.is_dir():
        _, kind = headers(path).get("protocol", ((), np.dtype(float)))
        text = read_member(path, "protocol") if kind.kind == "U" else None
    elif (path / NOTE).is_file():
        text = (path / NOTE).read_text()
    try:
        note = None if text is None else json.loads(str(text))
    except ValueError:
        raise ValueError(f"{path}: the protocol beside the images is damaged; remove it") from None
    return note if isinstance(note, dict) else None


def stat_key(files: Sequence[Path]) -> str:
    """A number that changes with the names, sizes and times of change of files."""
    facts = [(str(file.resolve()), (stat := file.stat()).st_size, stat.st_mtime_ns) for file in files]
    return digest(repr(facts))


def _read_labels(file: Path, count: int) -> np.ndarray | None:
    if not file.is_file():
        return None
    try:
        labels = np.array([int(line) for line in file.read_text().split()], dtype=np.int64)
    except ValueError:
        raise ValueError(f"{file} must hold one whole number per image") from None
    if len(labels) != count:
        raise ValueError(f"{file} has {len(labels):,} labels for {count:,} images")
    return labels
