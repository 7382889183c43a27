"""From the plan to batches on the host: reading, tokenizing and laying out images in worker processes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from genfound.batch import Batch
from genfound.data.base import ImageSource
from genfound.data.plan import Micro, Plan
from genfound.layouts import Layout
from genfound.rng import Rng
from genfound.tokenizers import Tokenizer

Item = tuple[Batch, Micro]


class MicroBatches(Dataset[Item]):
    """A micro-batch of the plan -> its images as one `Batch`; runs in the workers.

    Args:
        source: images.
        tokenizer: encodes them.
        layout: lays them out.
        flips: decides which images of a micro-batch are mirrored; `None` mirrors none.
    """

    def __init__(self, source: ImageSource, tokenizer: Tokenizer, layout: Layout, flips: Rng | None = None) -> None:
        self.source = source
        self.tokenizer = tokenizer
        self.layout = layout
        self.flips = flips

    def __getitem__(self, micro: Micro) -> Item:
        images = [to_tensor(self.source.image(index)) for index in micro.indices]
        if self.flips is not None:
            coins = self.flips.at(micro.number).uniform("flip", (len(images),)) < 0.5
            images = [image.flip(-1) if coin else image for image, coin in zip(images, coins, strict=True)]
        latents = [self.tokenizer.encode(image[None])[0] for image in images]
        labels = torch.from_numpy(self.source.labels[list(micro.indices)])
        return self.layout.to_batch(latents, labels), micro


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
        loader = DataLoader(
            self.batches,
            batch_size=None,
            sampler=_Share(self),
            num_workers=self.workers,
            pin_memory=self.pin_memory,
            prefetch_factor=4 if self.workers else None,
        )
        items = iter(loader)
        while True:
            begin = time.perf_counter()
            item = next(items)
            self.waited += time.perf_counter() - begin
            yield item

    def share(self) -> Iterator[Micro]:
        """This rank's micro-batches."""
        for micros in self.plan.steps():
            yield from micros[self.rank :: self.ranks]

    def state(self, step: int) -> dict[str, Any]:
        """The position of the plan before this step."""
        return self.plan.state(step)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue at a recorded position."""
        self.plan.restore(state)


class _Share(torch.utils.data.Sampler[Micro]):
    """The DataLoader's view of `TrainLoader.share`; iterated in the main process."""

    def __init__(self, loader: TrainLoader) -> None:
        self.loader = loader

    def __iter__(self) -> Iterator[Micro]:
        return self.loader.share()


def to_tensor(image: np.ndarray) -> Tensor:
    """(height, width, 3) uint8 -> (3, height, width) float32 in [-1, 1]."""
    return torch.from_numpy(image).permute(2, 0, 1).float() / 127.5 - 1


def to_uint8(image: Tensor) -> np.ndarray:
    """(3, height, width) in [-1, 1] -> (height, width, 3) uint8, rounded."""
    scaled: Tensor = (image.float().clamp(-1, 1) + 1) * 127.5
    return scaled.round().byte().permute(1, 2, 0).cpu().numpy()


def save_png(file: Path, image: np.ndarray) -> None:
    """Write an image (height, width, 3) uint8."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)
