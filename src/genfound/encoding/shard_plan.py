"""What is to be encoded: the images of each split, cut into shards, and shards into batches of one size."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from genfound.data.images.base import Captioned, PictureSource
from genfound.data.images.captions import CaptionedImages
from genfound.data.images.index import ImageFiles
from genfound.data.images.pixels import to_picture
from genfound.data.images.views import Entries

LARGEST = 2**30
"""Bytes of values in a shard, unless a single image has more."""


class Shard(NamedTuple):
    """What belongs into one file: entries `first` to `end` of a split."""

    split: str
    number: int
    first: int
    end: int


class EncodeBatch(NamedTuple):
    """Entries of one size that are encoded together."""

    shard: Shard
    entries: list[int]


class Split(NamedTuple):
    """One split of the images: what reads them, everything that is to be encoded, and the label of each image."""

    source: PictureSource
    entries: Entries
    labels: np.ndarray

    @classmethod
    def of(cls, source: PictureSource) -> "Split":
        """The entries of any source; one whose images have several views knows them itself."""
        if isinstance(source, ImageFiles):
            return cls(source, source.entries, source.classes)
        every = np.arange(len(source.labels))
        return cls(source, Entries(every, np.zeros_like(every), source.sizes), source.labels)

    def name(self, image: int) -> str:
        """The name of its file, or its number where it has none."""
        return self.source.files[image] if isinstance(self.source, ImageFiles) else str(image)

    def caption(self, entry: int) -> str:
        """What an entry shows, in words."""
        if isinstance(self.source, CaptionedImages):
            return self.source.captions[int(self.entries.images[entry])]
        return cast(Captioned, self.source).caption(entry)

    def read(self, entry: int) -> Tensor:
        """(3, height, width) uint8."""
        return self.shown(entry, None)[0]

    def shown(self, entry: int, seen: tuple[int, int] | None) -> list[Tensor]:
        """(3, height, width) uint8, and if that can be read anew another one, of so many pixels for each so many."""
        source, size = self.source, self.entries.sizes[entry]
        if not isinstance(source, ImageFiles):
            return [to_picture(source.image(entry))]
        sizes = [size] if seen is None else [size, size // seen[1] * seen[0]]
        return [to_picture(image) for image in source.entry(entry, sizes)]

    def shards(self, split: str, size: int, bytes_per_pixel: float) -> list[Shard]:
        """Files of at most `size` images and `LARGEST` bytes each; an image is never divided."""
        borders = np.searchsorted(self.entries.images, np.arange(len(self.labels) + 1))
        pixels = np.concatenate([[0], self.entries.sizes.prod(axis=1).cumsum()])[borders]
        found: list[Shard] = []
        first = 0
        while first < len(self.labels):
            fits = np.searchsorted(pixels, pixels[first] + LARGEST / bytes_per_pixel, side="right") - 1
            end = min(max(int(fits), first + 1), first + size, len(self.labels))
            if borders[end] > borders[first]:
                found.append(Shard(split, len(found), int(borders[first]), int(borders[end])))
            first = end
        return found

    def replaced(self, entries: Iterable[int]) -> dict[str, str]:
        """Of entries that have been read the images that could not be, and those that are shown in their place."""
        stand_ins = self.source.stand_ins if isinstance(self.source, ImageFiles) else {}
        images = (int(self.entries.images[entry]) for entry in entries)
        return {self.name(image): self.name(stand_ins[image]) for image in images if image in stand_ins}

    def batches(self, shard: Shard, pixels: int) -> Iterator[EncodeBatch]:
        """The entries of a shard by size, at most so many pixels at a time, but at least one image."""
        by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        for entry, (height, width) in enumerate(self.entries.sizes[shard.first : shard.end].tolist(), shard.first):
            by_size[height, width].append(entry)
        for (height, width), entries in by_size.items():
            rows = max(pixels // (height * width), 1)
            for begin in range(0, len(entries), rows):
                yield EncodeBatch(shard, entries[begin : begin + rows])


class EncodeDataset(Dataset[tuple[EncodeBatch, list[Tensor], dict[str, str]]]):
    """A batch -> it, its images (B, 3, height, width) uint8, and which are shown by others; runs in the workers.

    Where teachers see others, these are second; see `Split.shown`.
    """

    def __init__(self, parts: Mapping[str, Split], seen: tuple[int, int] | None = None) -> None:
        self.parts, self.seen = parts, seen

    def __getitem__(self, batch: EncodeBatch) -> tuple[EncodeBatch, list[Tensor], dict[str, str]]:
        part = self.parts[batch.shard.split]
        read = (part.shown(entry, self.seen) for entry in batch.entries)
        pictures = [torch.stack(same) for same in zip(*read, strict=True)]
        return batch, pictures, part.replaced(batch.entries)
