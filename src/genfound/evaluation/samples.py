"""Drawing many images: which ones, by rule, and where they lie until they have been measured.

Images are files of up to 64 of one size. A file is a function of the request alone and is written whole or not at
all, so the number of processes and an interruption change no pixel.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from genfound.backbones.base import Backbone
from genfound.data.images.npz import write_npz
from genfound.data.images.sets import ImageSet, digest
from genfound.rng import Rng
from genfound.runtime.files import atomic_write
from genfound.runtime.progress import Progress, no_progress
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import SampleRequest

PART = 64
DATA = "data"
"""As a size or a label rule: as the images of the data set have them."""

LABEL_RULES = ("random", "balanced", DATA)


def requests_by_rule(
    n: int, labels: str, size: tuple[int, int] | str, classes: int, seed: int, data: ImageSet | None
) -> list[SampleRequest]:
    """n images, numbered.

    Args:
        n: how many.
        labels: `random`, uniform and independent, as DiT, SiT and NiT; `balanced`, each class equally often, in random
            order; `data`, those of images of the data set in a fixed random order.
        size: (height, width) in pixels, or `data`, those of the same images.
        classes: number of labels.
        seed: of labels and order.
        data: the data set; needed for `data`.

    Raises:
        ValueError: an unknown rule, no image, or no data set.
    """
    check_labels(labels)
    if n < 1:
        raise ValueError(f"n={n} must be at least 1")
    rng = Rng(seed, "evaluate")
    rows = np.zeros(0, dtype=np.int64)
    if DATA in (labels, size):
        if data is None or data.labels is None:
            raise ValueError("sizes=data and labels=data need the data set of the run")
        order = rng.permutation("data", len(data)).numpy()
        rows = order[np.arange(n) % len(order)]
    if labels == DATA and data is not None and data.labels is not None:
        numbers = data.labels[rows]
    elif labels == "balanced":
        numbers = rng.permutation("labels", n).numpy() % classes
    else:
        numbers = np.array([rng.at(k).integer("label") % classes for k in range(n)])
    sizes = data.sizes[rows] if size == DATA and data is not None else np.tile(np.array(size), (n, 1))
    pairs = zip(numbers, sizes, strict=True)
    return [SampleRequest(int(label), (int(h), int(w)), k) for k, (label, (h, w)) in enumerate(pairs)]


def check_labels(labels: str) -> None:
    """Raise a ValueError for an unknown rule."""
    if labels not in LABEL_RULES:
        raise ValueError(f"labels={labels} is unknown; choose one of {', '.join(LABEL_RULES)}")


class SampleStore:
    """The images of requests, as far as they have been drawn; see `metrics.images.ImageSet`.

    Args:
        folder: where they lie.
        requests: numbered from 0.
    """

    def __init__(self, folder: Path, requests: Sequence[SampleRequest]) -> None:
        self.folder = folder
        self.requests = list(requests)
        self.sizes = np.array([request.size for request in requests], dtype=np.int64)
        self.labels = np.array([request.label for request in requests], dtype=np.int64)
        self.key = digest(str(folder.resolve()), self.sizes.tobytes(), self.labels.tobytes())
        order = np.lexsort((np.arange(len(requests)), self.sizes[:, 1], self.sizes[:, 0]))
        bounds = np.flatnonzero(np.any(np.diff(self.sizes[order], axis=0) != 0, axis=1)) + 1
        self.parts = [group[i : i + PART] for group in np.split(order, bounds) for i in range(0, len(group), PART)]
        self._place = np.empty((len(requests), 2), dtype=np.int64)
        for part, numbers in enumerate(self.parts):
            self._place[numbers, 0], self._place[numbers, 1] = part, np.arange(len(numbers))
        self._opened = functools.lru_cache(maxsize=PART)(lambda part: np.load(self._file(part), mmap_mode="r"))

    @classmethod
    def open(cls, folder: Path) -> SampleStore:
        """The images of a folder in which `begin` was called."""
        with np.load(folder / "requests.npz") as stored:
            rows = zip(stored["labels"], stored["sizes"], strict=True)
            return cls(folder, [SampleRequest(int(y), (int(h), int(w)), k) for k, (y, (h, w)) in enumerate(rows)])

    def begin(self) -> None:
        """Write the requests into the folder, for `open`."""
        write_npz(self.folder / "requests.npz", {"labels": self.labels, "sizes": self.sizes})

    @property
    def missing(self) -> int:
        """How many images are still to be drawn."""
        return sum(len(numbers) for part, numbers in enumerate(self.parts) if not self._file(part).is_file())

    def draw(
        self,
        net: Backbone,
        sampling: Pipeline,
        seed: int,
        rank: int = 0,
        ranks: int = 1,
        progress: Progress = no_progress,
    ) -> None:
        """Draw the files of this process that are not there yet.

        Args:
            net: backbone in eval mode, on the device of `sampling`.
            sampling: how to draw.
            seed: of the noise.
            rank, ranks: which share of the files.
            progress: see `runtime.progress`.
        """
        mine = list(range(len(self.parts)))[rank::ranks]
        total = sum(len(self.parts[part]) for part in mine)
        missing = [part for part in mine if not self._file(part).is_file()]
        done = total - sum(len(self.parts[part]) for part in missing)

        def within(drawn: float, _: int) -> None:
            progress(done + drawn, total)

        for part in missing:
            images = sampling.draw(net, [self.requests[k] for k in self.parts[part]], seed, within)
            atomic_write(self._file(part), functools.partial(np.save, arr=np.stack(images)))
            done += len(images)

    def __len__(self) -> int:
        return len(self.requests)

    def __getitem__(self, number: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        part, row = self._place[number]
        return np.array(self._opened(int(part))[row])

    def _file(self, part: int) -> Path:
        return self.folder / f"images-{part:06d}.npy"
