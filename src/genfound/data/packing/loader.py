"""From the plan to batches on the host: reading, tokenizing and laying out images in worker processes."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from math import ceil
from typing import Any, cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from genfound.batch import Batch
from genfound.data.images.base import ImageSource, LatentSource, PictureSource, Rerendered
from genfound.data.images.pixels import to_picture
from genfound.data.packing.batch_plan import MicroBatch, Plan
from genfound.data.packing.collate import Collate, RawImages
from genfound.data.packing.prefetch import read_ahead
from genfound.rng import Rng

Item = tuple[Batch | RawImages, MicroBatch]

Features = Callable[[MicroBatch, Sequence[bool]], list[list[Tensor]] | None]
"""Of a micro-batch, and which images of it are mirrored: what each teacher sees in each image."""


@dataclass(frozen=True)
class HeldOut:
    """A micro-batch of validation."""

    images: Batch | RawImages  # raw ones are still to be encoded
    micro: MicroBatch
    noise: Tensor | None = None  # shaped like the batch; each image has its own, whatever it is packed with
    counts: bool = True  # else another rank has it, and all compute as often as each other


@dataclass(eq=False)
class MicroBatches(Dataset[Item]):
    """A micro-batch of the plan -> its images, as a `Batch` if they are encoded; runs in the workers."""

    source: ImageSource
    assembly: Collate | None  # encodes and lays them out; `None` leaves that to the training device
    flips: Rng | None = None  # decides which images of a micro-batch are mirrored; `None` mirrors none
    reread: tuple[int, int] | None = None  # for teachers: pixels per token side of the images, and of what they see
    features: Features | None = None  # reads what they see, where that is stored
    text: Callable[[int], Any] | None = None  # reads the caption of an image, or what is made of it; see `RawImages`

    def __getitem__(self, micro: MicroBatch) -> Item:
        count = len(micro.indices)
        coins = [False] * count
        if self.flips is not None:
            coins = (self.flips.at(micro.number).uniform("flip", (count,)) < 0.5).tolist()
        encoded = isinstance(self.source, LatentSource)
        read = self._moments if encoded else self._pictures
        tensors, *seen = zip(*map(read, micro.indices, coins), strict=True)
        pictures = list(seen[0]) if seen else None
        features = None if self.features is None else self.features(micro, coins)
        labels = torch.from_numpy(self.source.labels[list(micro.indices)])
        text = None if self.text is None else [self.text(index) for index in micro.indices]
        images = RawImages(list(tensors), labels, encoded, pictures, features, text)
        return images if self.assembly is None else self.assembly(images, micro.positions, torch.device("cpu")), micro

    def _pictures(self, index: int, mirrored: bool) -> list[Tensor]:
        """An image, and what teachers see of it if that is read anew."""
        if self.reread is None:
            images = [cast(PictureSource, self.source).image(index)]
        else:
            sizes = [self.source.sizes[index], self._of_teachers(index)]
            images = cast(Rerendered, self.source).rendered(index, [(int(h), int(w)) for h, w in sizes])
        return [to_picture(image, mirrored) for image in images]

    def _moments(self, index: int, mirrored: bool) -> list[Tensor]:
        """Those of an image, and what teachers see of it."""
        moments = cast(LatentSource, self.source).moments(index, mirrored)
        if self.reread is None:
            return [moments]
        (image,) = cast(Rerendered, self.source).rendered(index, [self._of_teachers(index)])
        return [moments, to_picture(image, mirrored)]

    def _of_teachers(self, index: int) -> tuple[int, int]:
        """(height, width) of what teachers see of an image."""
        assert self.reread is not None
        unit, wanted = self.reread
        height, width = (self.source.sizes[index] // unit * wanted).tolist()
        return height, width


@dataclass(eq=False)
class TrainLoader(IterableDataset[Item]):
    """The micro-batches of one rank, from the recorded step on, without end."""

    batches: MicroBatches
    plan: Plan
    rank: int
    ranks: int
    workers: int
    pin_memory: bool
    waited: float = 0.0  # seconds that the training process spent in here

    def __iter__(self) -> Iterator[Item]:
        items = read_ahead(self.batches, self.share(), self.workers, self.pin_memory)
        while True:
            begin = time.perf_counter()
            item = next(items)
            self.waited += time.perf_counter() - begin
            yield item

    def share(self) -> Iterator[MicroBatch]:
        """This rank's micro-batches."""
        for micros in self.plan.steps():
            yield from micros[self.rank :: self.ranks]


@dataclass
class ValidationLoader:
    """The micro-batches of held-out images that one rank validates on; every rank has as many."""

    batches: MicroBatches
    micros: Sequence[MicroBatch]
    workers: int
    rank: int = 0
    ranks: int = 1

    def __len__(self) -> int:
        return ceil(len(self.micros) / self.ranks)

    def __iter__(self) -> Iterator[HeldOut]:
        places = range(self.rank, len(self) * self.ranks, self.ranks)
        share = [self.micros[place % len(self.micros)] for place in places]
        for place, (images, micro) in zip(places, read_ahead(self.batches, share, self.workers), strict=True):
            yield HeldOut(images, micro, counts=place < len(self.micros))
