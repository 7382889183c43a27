"""What is to be encoded: the images of each split, cut into shards, and shards into batches of one size."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genfound.data.base import PictureSource
from genfound.data.files import Viewed
from genfound.data.pictures import to_picture
from genfound.data.views import Entries


class Shard(NamedTuple):
    """What belongs into one file: entries `first` to `end` of a split."""

    split: str
    number: int
    first: int
    end: int

    @property
    def name(self) -> str:
        """Its file name without an ending."""
        return f"{self.split}-{self.number:05d}"


class Call(NamedTuple):
    """Entries of one size that are encoded together."""

    shard: Shard
    entries: list[int]


class Part(NamedTuple):
    """One split of the images.

    Attributes:
        source: reads them.
        entries: everything that is to be encoded.
        labels: (images,) of the images.
        names: of the images.
    """

    source: PictureSource
    entries: Entries
    labels: np.ndarray
    names: list[str]

    @classmethod
    def of(cls, source: PictureSource) -> Part:
        """The entries of any source; one whose images have several views knows them itself."""
        if isinstance(source, Viewed):
            return cls(source, source.entries, source.classes, source.files)
        every = np.arange(len(source.labels))
        return cls(source, Entries(every, np.zeros_like(every), source.sizes), source.labels, list(map(str, every)))

    def read(self, entry: int) -> Tensor:
        """(3, height, width) uint8."""
        source = self.source
        return to_picture(source.entry(entry) if isinstance(source, Viewed) else source.image(entry))

    def shards(self, split: str, size: int) -> list[Shard]:
        """Files of `size` images each, but for the last."""
        borders = np.searchsorted(self.entries.images, np.arange(0, len(self.names) + size, size)).tolist()
        pairs = enumerate(pairwise(borders))
        return [Shard(split, number, first, end) for number, (first, end) in pairs if end > first]

    def calls(self, shard: Shard, pixels: int) -> Iterator[Call]:
        """The entries of a shard by size, at most so many pixels at a time, but at least one image."""
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for entry, (height, width) in enumerate(self.entries.sizes[shard.first : shard.end].tolist(), shard.first):
            by_size[height, width].append(entry)
        for (height, width), entries in by_size.items():
            rows = max(pixels // (height * width), 1)
            for begin in range(0, len(entries), rows):
                yield Call(shard, entries[begin : begin + rows])


class Calls(Dataset[tuple[Call, Tensor]]):
    """A call -> its images (B, 3, height, width) uint8; runs in the workers."""

    def __init__(self, parts: Mapping[str, Part]) -> None:
        self.parts = parts

    def __getitem__(self, call: Call) -> tuple[Call, Tensor]:
        part = self.parts[call.shard.split]
        return call, torch.stack([part.read(entry) for entry in call.entries])
