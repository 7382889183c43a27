"""From the plan to batches on the host: reading, tokenizing and laying out images in worker processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from genfound.batch import Batch
from genfound.data.images.base import ImageSource, LatentSource, PictureSource
from genfound.data.images.pixels import to_picture
from genfound.data.packing.batch_plan import MicroBatch, Plan
from genfound.data.packing.collate import Collate, LatentMoments, RawImages
from genfound.data.packing.prefetch import read_ahead
from genfound.rng import Rng

Item = tuple[Batch | RawImages, MicroBatch]


@dataclass(frozen=True)
class HeldOut:
    """A micro-batch of validation.

    Attributes:
        images: a `Batch`, unless they are still to be encoded.
        micro: which they are.
        noise: shaped like the batch, once that is laid out; each image has its own, whatever it is packed with.
    """

    images: Batch | RawImages
    micro: MicroBatch
    noise: Tensor | None = None


class MicroBatches(Dataset[Item]):
    """A micro-batch of the plan -> its images, as a `Batch` unless they are still to be encoded; runs in the workers.

    Args:
        source: images, or latents that were encoded before.
        assembly: encodes and lays them out; `None` leaves that to the training device.
        flips: decides which images of a micro-batch are mirrored; `None` mirrors none.
    """

    def __init__(self, source: ImageSource, assembly: Collate | None, flips: Rng | None = None) -> None:
        self.source = source
        self.assembly = assembly
        self.flips = flips

    def __getitem__(self, micro: MicroBatch) -> Item:
        count = len(micro.indices)
        coins = [False] * count
        if self.flips is not None:
            coins = (self.flips.at(micro.number).uniform("flip", (count,)) < 0.5).tolist()
        images = self._read(list(zip(micro.indices, coins, strict=True)))
        if self.assembly is None:
            assert isinstance(images, RawImages)
            return images, micro
        return self.assembly(images, micro.positions, torch.device("cpu")), micro

    def _read(self, wanted: list[tuple[int, bool]]) -> RawImages | LatentMoments:
        """The images of these indices, mirrored or not."""
        labels = torch.from_numpy(self.source.labels[[index for index, _ in wanted]])
        if isinstance(self.source, LatentSource):
            return LatentMoments([self.source.moments(index, mirrored) for index, mirrored in wanted], labels)
        images = cast(PictureSource, self.source)
        return RawImages([to_picture(images.image(index), mirrored) for index, mirrored in wanted], labels)


class TrainLoader(IterableDataset[Item]):
    """The micro-batches of one rank, from the recorded step on, without end.

    Args:
        batches: reads a micro-batch.
        plan: the global steps.
        rank, ranks: which share of each step to read.
        workers: worker processes; 0 reads in this process.
        pin_memory: page-locked host memory, for CUDA.
    """

    def __init__(
        self, batches: MicroBatches, plan: Plan, rank: int, ranks: int, workers: int, pin_memory: bool
    ) -> None:
        self.batches = batches
        self.plan = plan
        self.rank = rank
        self.ranks = ranks
        self.workers = workers
        self.pin_memory = pin_memory
        self.waited = 0.0  # seconds that the training process spent in here

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


class ValidationLoader:
    """The micro-batches of held-out images that one rank validates on.

    Args:
        batches: reads a micro-batch.
        micros: of all ranks.
        workers: worker processes; 0 reads in this process.
    """

    def __init__(self, batches: MicroBatches, micros: Sequence[MicroBatch], workers: int) -> None:
        self.batches = batches
        self.micros = micros
        self.workers = workers
        self.rank, self.ranks = 0, 1

    def __len__(self) -> int:
        return len(self.micros[self.rank :: self.ranks])

    def __iter__(self) -> Iterator[HeldOut]:
        for images, micro in read_ahead(self.batches, self.micros[self.rank :: self.ranks], self.workers):
            yield HeldOut(images, micro)
