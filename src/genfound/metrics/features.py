"""Features of a set of images on disk, a file for every 64 images, so that work goes on where it stopped.

Files are the units that processes share out. A file depends on its images only, and is written whole or not at
all; so neither the number of processes nor an interruption changes a number.
"""

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
    """The features of `count` images in a folder; `files` are {file: the numbers of its images}."""

    def __init__(self, folder: Path, count: int) -> None:
        self.folder, self.count = folder, count
        images = [range(start, min(start + BATCH, count)) for start in range(0, count, BATCH)]
        self.files = {folder / f"{place:06d}.npz": numbers for place, numbers in enumerate(images)}

    @property
    def complete(self) -> bool:
        """Whether every file is there, with the rows that it must have."""
        return all(_is_there(file, len(numbers)) for file, numbers in self.files.items())

    def extract(
        self, images: ImageSet, extractor: Extractor, rank: int = 0, ranks: int = 1, progress: Progress = no_progress
    ) -> None:
        """Compute the files of this process that are not there yet."""
        files = list(self.files.items())[rank::ranks]
        done, total = 0, sum(len(numbers) for _, numbers in files)
        with ThreadPoolExecutor(READERS) as pool:
            for file, numbers in files:
                progress(done, total)
                if not _is_there(file, len(numbers)):
                    columns = extractor(list(pool.map(images.__getitem__, numbers)))
                    for name, column in columns.items():
                        if not column.isfinite().all():
                            images_from = f"the images from number {numbers.start:,} on"
                            raise ValueError(f"features {name} of {images_from} are not finite")
                    write_npz(file, {name: column.numpy() for name, column in columns.items()})
                done += len(numbers)
        progress(done, total)

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
        with np.load(next(iter(self.files))) as arrays:
            return int(arrays[name].shape[1]) if name in arrays else 0

    def column(self, name: str, limit: int | None = None) -> Tensor:
        """(count, D) float32, or only the first `limit` rows."""
        rows = self.count if limit is None else min(limit, self.count)
        out, place = torch.empty(rows, self.width(name)), 0
        for block in self.blocks(name):
            taken = block[: rows - place]
            out[place : place + len(taken)] = taken
            place += len(taken)
            if place == rows:
                return out
        raise ValueError(f"{self.folder} holds features of {place:,} images, not of {rows:,}; remove it")

    def gaussian(self, name: str, device: torch.device) -> Gaussian:
        """Mean and covariance of a column."""
        moments = Moments.zero(self.width(name), device)
        for block in self.blocks(name):
            moments.add(block)
        return moments.gaussian()


def _is_there(file: Path, rows: int) -> bool:
    """Whether a file is whole; one of other images, or a damaged one, is written anew."""
    try:
        found = [shape for shape, _ in headers(file).values()]
    except (FileNotFoundError, ValueError):
        return False
    return bool(found) and all(shape[:1] == (rows,) for shape in found)
