"""Decoded images on their way to a batch: mirrored, encoded by the tokenizer, laid out.

A cheap tokenizer does this in the worker that read the images. One that is a network does it on the training
device, a group of equal sizes at a time, outside of the checkpoint and without gradients. What was encoded
before is only normalised.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Protocol, cast

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.data.images.pixels import normalised
from genfound.layouts import Layout
from genfound.rng import Rng
from genfound.tokenizers import Tokenizer


@dataclass(frozen=True)
class RawImages:
    """The images of a micro-batch before they are encoded.

    Attributes:
        images: each (3, height, width) uint8.
        labels: (B,) int64.
    """

    images: list[Tensor]
    labels: Tensor

    def pin_memory(self) -> RawImages:
        """The same in page-locked host memory (called by the DataLoader)."""
        return replace(self, images=[image.pin_memory() for image in self.images])


@dataclass(frozen=True)
class LatentMoments:
    """The images of a micro-batch as an encoder left them.

    Attributes:
        values: each (C, h, w) or (2 C, h, w), see `LatentSource.moments`.
        labels: (B,) int64.
    """

    values: list[Tensor]
    labels: Tensor


class Normaliser(Protocol):
    """A tokenizer of stored moments."""

    def normalise(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, ...) moments -> (B, C, h, w) latents of about unit variance."""


class Collate:
    """Pictures or moments -> batch.

    Args:
        tokenizer: encodes images; one for stored moments also normalises these.
        layout: lays latents out.
        rng: noise of a stochastic tokenizer, by position of the image.
    """

    def __init__(self, tokenizer: Tokenizer, layout: Layout, rng: Rng) -> None:
        self.tokenizer = tokenizer
        self.layout = layout
        self.rng = rng

    def __call__(self, images: RawImages | LatentMoments, positions: Sequence[int], device: torch.device) -> Batch:
        """Encode the images at these positions on a device, or normalise their moments, and lay them out there."""
        known = isinstance(images, LatentMoments)
        tensors = images.values if isinstance(images, LatentMoments) else images.images
        by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, tensor in enumerate(tensors):
            by_size[tuple(tensor.shape)].append(place)
        latents: dict[int, Tensor] = {}
        for places in by_size.values():
            group = torch.stack([tensors[place] for place in places]).to(device, non_blocking=True)
            keys = [positions[place] for place in places]
            height, width = (side // (1 if known else self.tokenizer.spec.stride) for side in group.shape[-2:])
            noise = self._noise((height, width), keys, device) if self.tokenizer.stochastic else None
            encoded = self._normalise(group, noise) if known else self.tokenizer.encode(normalised(group), noise)
            latents |= zip(places, encoded, strict=True)
        ordered = [latents[place] for place in range(len(latents))]
        return self.layout.to_batch(ordered, images.labels.to(device, non_blocking=True))

    def _normalise(self, moments: Tensor, noise: Tensor | None) -> Tensor:
        return cast(Normaliser, self.tokenizer).normalise(moments.float(), noise)

    def _noise(self, size: tuple[int, int], positions: list[int], device: torch.device) -> Tensor:
        """Standard normal numbers shaped like latents of this size; each image has its own."""
        shape = (self.tokenizer.spec.channels, *size)
        return torch.stack([self.rng.at(k).normal("posterior", shape, device) for k in positions])
