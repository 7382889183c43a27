"""ImageNet and trees like it: root/train/<class>/<file>, and root/val/<class>/<file> where there is one.

Pixels are those of the official code: decoded by content, never turned by EXIF, `convert("RGB")`.

A tree may hold millions of files, so at the first start only their headers are read (`check: full` decodes
them). A file that passes and then cannot be decoded does not stop a run. Its place is taken, each time, by
the next readable file of its class in the order of names, at the size that was planned for it; the file is
reported once, and counted in the report of later starts.
"""

import contextlib
import functools
import itertools
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from filelock import FileLock
from PIL import Image

from genfound.config.checks import integer
from genfound.data.images.index import FileInfo, ImageFiles, index_file, known
from genfound.data.images.names import class_folders, shown
from genfound.data.images.opening import WIDE, as_stored, format_notes, opened
from genfound.data.images.views import ImageViews
from genfound.runtime.files import visible

SUFFIXES = (".jpeg", ".jpg", ".png", ".webp")
TRIES = 10
"""So many files in a row that cannot be read are no longer damage but a missing disk."""


class ImageTree(ImageFiles):
    """Images at their native sizes, centre-cropped, or in several views.

    Args:
        root: folder with the folders `train` and, for validation, `val`, each with one folder per class.
        holdout: without `val`, every holdout-th image of a class validates; `None` holds none out.
        max_pixels: files of more pixels are skipped; `None`: those that Pillow takes for decompression bombs.
        check: `header` or `full`: how far a file is read when it is first seen.
    """

    def __init__(
        self, *, root: str, views: ImageViews, holdout: int | None, max_pixels: int | None, check: str, split: str,
        index: str,
    ) -> None:  # fmt: skip
        if check not in ("header", "full"):
            raise ValueError(f"data.check={check} is unknown; choose header or full")
        integer("data.max_pixels", max_pixels, 1, or_null=True)
        self.max_pixels = max_pixels
        class_names, val_classes = _classes(Path(root))
        apart = split == "val" and bool(val_classes)
        folder = Path(root) / ("val" if apart else "train")
        cache = index_file(Path(index), folder, f"image_tree {check} {max_pixels}")
        examine = functools.partial(_examine, whole=check == "full", max_pixels=max_pixels)
        found = known(folder, val_classes if apart else class_names, cache, examine, SUFFIXES)
        every = (None, "train") if val_classes else (holdout, split)
        super().__init__(folder, class_names, found, views, *every)
        self._unreadable = cache.with_suffix(".unreadable")

    def picture(self, number: int, least: tuple[int, int] | None) -> Image.Image:
        """One of the images, RGB, or the one that takes its place."""
        for place in itertools.islice(self._class_from(number), TRIES):
            try:
                picture = decode(self.root / self.files[place], self.max_pixels, least)
            except OSError as error:
                self._remark(place, error)
                continue
            self.stand_ins.pop(number, None)
            if place != number:
                self.stand_ins[number] = place
            return picture
        first = self.root / self.files[number]
        raise ValueError(f"{first} and the files after it could be read when training began and cannot now")

    def report(self) -> list[str]:
        """Counts of classes, sizes, and what was skipped, converted, reduced or replaced."""
        lines = super().report()
        if self._unreadable.is_file():
            known = {(shown(n), str(stamp)) for n, stamp in zip(self.found.names, self.found.stamps, strict=True)}
            remarked = self._unreadable.read_text().splitlines()
            count = sum(tuple(line.split("\t")[:2]) in known for line in remarked)
            if count:
                lines.append(
                    f"  {count:,} replaced by others of their class when they were read; see {self._unreadable}"
                )
        return lines

    def _class_from(self, number: int) -> Iterator[int]:
        """An image, and after it the others of its class."""
        yield number
        same = np.flatnonzero(self.classes == self.classes[number])
        yield from np.roll(same, -int(np.searchsorted(same, number)))[1:].tolist()

    def _remark(self, number: int, error: OSError) -> None:
        """Report a file that cannot be read, unless this or another process has."""
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        key, log = f"{shown(self.files[number])}\t{self.stamps[number]}\t", self._unreadable
        with contextlib.suppress(OSError), FileLock(log.with_name(f".{log.name}.lock")):
            if log.is_file() and any(line.startswith(key) for line in log.read_text().splitlines()):
                return
            with open(log, "a") as out:
                out.write(f"{key}{shown(reason)}\n")
        file = shown(self.root / self.files[number])
        print(f"warning: {file} cannot be read, an image of its class takes its place: {reason}", file=sys.stderr)


def decode(file: Path, max_pixels: int | None = None, least: tuple[int, int] | None = None) -> Image.Image:
    """Decode a file by its content as the official code does: RGB, as stored, never turned, transparency dropped."""
    with opened(file, max_pixels, least=least) as picture:
        return as_stored(picture)


def _classes(root: Path) -> tuple[list[str], list[str]]:
    """Sorted class folders for training and validation; none of `val` if it has none (ImageNet's comes flat)."""
    train, val = root / "train", root / "val"
    if not root.is_dir():
        raise FileNotFoundError(f"data.root={root} is not a folder")
    if not train.is_dir():
        raise FileNotFoundError(f"data.root={root} has no folder train; put the images into {root}/train/<class>/")
    names = class_folders(train)
    if not any(path.is_dir() for path in visible(val)):
        return names, []
    val_names = class_folders(val)
    unknown = sorted(set(val_names) - set(names))
    if unknown:
        raise ValueError(f"{val} has {len(unknown)} class folders that {train} has not, such as {unknown[0]}")
    return names, val_names


def _examine(file: Path, whole: bool, max_pixels: int | None) -> FileInfo:
    """Read the header of a file, or all of it; wider numbers than 8 bits are looked at in any case."""
    with opened(file, max_pixels) as picture:
        found = FileInfo(picture.height, picture.width, format_notes(picture, file))
        if whole or picture.mode.startswith(WIDE):
            as_stored(picture)
        return found
