"""Features of a set of images on disk, a file for every 64 images, so that work goes on where it stopped.

Files are the units that processes share out. A file depends on its images only, and is written whole or not at
all; so neither the number of processes nor an interruption changes a number.
"""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from genfound.data.images.npz import headers, write_npz
from genfound.data.images.sets import ImageSet
from genfound.metrics.extractor import Extractor
from genfound.metrics.frechet import ROWS, Gaussian, Moments
from genfound.runtime.progress import Progress, no_progress

BATCH = 64
READERS = 4


class FeatureStore:
    """The features of `count` images in a folder."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder = folder
        self.count = count

    @property
    def files(self) -> list[Path]:
        """One for every 64 images."""
        return [self.folder / f"{start // BATCH:06d}.npz" for start in range(0, self.count, BATCH)]

    @property
    def complete(self) -> bool:
        """Whether every file is there, with the rows that it must have."""
        return all(self._is_there(place) for place in range(len(self.files)))

    def extract(
        self, images: ImageSet, extractor: Extractor, rank: int = 0, ranks: int = 1, progress: Progress = no_progress
    ) -> None:
        """Compute the files of this process that are not there yet."""
        files = list(enumerate(self.files))[rank::ranks]
        sizes = [len(self._numbers(place)) for place, _ in files]
        with ThreadPoolExecutor(READERS) as pool:
            for number, (place, file) in enumerate(files):
                progress(sum(sizes[:number]), sum(sizes))
                if not self._is_there(place):
                    columns = extractor(list(pool.map(images.__getitem__, self._numbers(place))))
                    _check(columns, place)
                    write_npz(file, {name: column.numpy() for name, column in columns.items()})
        progress(sum(sizes), sum(sizes))

    def blocks(self, name: str) -> Iterator[Tensor]:
        """A column in blocks of `ROWS` rows."""
        waiting: list[Tensor] = []
        for file in self.files:
            with np.load(file) as arrays:
                waiting.append(torch.from_numpy(arrays[name]))
            if sum(map(len, waiting)) >= ROWS:
                yield torch.cat(waiting)
                waiting = []
        if waiting:
            yield torch.cat(waiting)

    def width(self, name: str) -> int:
        """Numbers of a column; 0 where the extractor has none of the name."""
        with np.load(self.files[0]) as arrays:
            return int(arrays[name].shape[1]) if name in arrays else 0

    def column(self, name: str, limit: int | None = None) -> Tensor:
        """(count, D) float32, or only the first `limit` rows."""
        rows = self.count if limit is None else min(limit, self.count)
        out: Tensor | None = None
        place = 0
        for block in self.blocks(name):
            out = block.new_empty(rows, block.shape[1]) if out is None else out
            taken = block[: rows - place]
            out[place : place + len(taken)] = taken
            place += len(taken)
            if place == rows:
                break
        if out is None or place != rows:
            raise ValueError(f"{self.folder} holds features of {place:,} images, not of {rows:,}; remove it")
        return out

    def gaussian(self, name: str, device: torch.device) -> Gaussian:
        """Mean and covariance of a column."""
        moments = Moments.zero(self.width(name), device)
        for block in self.blocks(name):
            moments.add(block)
        return moments.gaussian()

    def _numbers(self, place: int) -> range:
        """The images of a file."""
        return range(place * BATCH, min((place + 1) * BATCH, self.count))

    def _is_there(self, place: int) -> bool:
        """Whether a file is whole; one of other images, or a damaged one, is written anew."""
        file, rows = self.files[place], len(self._numbers(place))
        try:
            found = [shape for shape, _ in headers(file).values()]
        except (FileNotFoundError, ValueError):
            return False
        return bool(found) and all(shape[:1] == (rows,) for shape in found)


def _check(columns: dict[str, Tensor], place: int) -> None:
    for name, column in columns.items():
        if not column.isfinite().all():
            raise ValueError(f"features {name} of the images from number {place * BATCH:,} on are not finite")
