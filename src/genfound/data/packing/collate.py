"""Decoded images on their way to a batch: mirrored, encoded by the tokenizer, laid out.

A cheap tokenizer does this in the worker that read the images. One that is a network does it on the training
device, a group of equal sizes at a time, outside of the checkpoint and without gradients. What was encoded
before is only normalised.
"""

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.data.images.pixels import normalised
from genfound.data.latents.stored_tokenizer import StoredTokenizer
from genfound.layouts import Layout
from genfound.rng import Rng
from genfound.tokenizers import Tokenizer


@dataclass(frozen=True)
class RawImages:
    """The images of a micro-batch as they were read."""

    images: list[Tensor]  # each (3, height, width) uint8, or moments, see `LatentSource.moments`
    labels: Tensor  # (B,) int64
    encoded: bool  # they are moments
    pictures: list[Tensor] | None = None  # (3, height, width) uint8 for teachers, where those are not the images
    features: list[list[Tensor]] | None = None  # what they see, of each (Z, rows, columns), where that is stored
    text: list[str] | list[Tensor] | None = None  # captions, or (n, E) what is made of each where that is stored


@dataclass
class Collate:
    """Images or moments -> batch."""

    tokenizer: Tokenizer  # encodes images; one for stored moments also normalises these
    layout: Layout
    rng: Rng  # noise of a stochastic tokenizer, by position of the image

    def __call__(self, images: RawImages, positions: Sequence[int], device: torch.device) -> Batch:
        """Encode the images at these positions on a device, or normalise their moments, and lay them out there."""
        by_size: dict[tuple[int, ...], list[int]] = defaultdict(list)
        for place, tensor in enumerate(images.images):
            by_size[tuple(tensor.shape)].append(place)
        stride = 1 if images.encoded else self.tokenizer.spec.stride
        latents: dict[int, Tensor] = {}
        for shape, places in by_size.items():
            group = torch.stack([images.images[place].to(device, non_blocking=True) for place in places])
            noise = None
            if self.tokenizer.stochastic:  # each image has its own
                latent = (self.tokenizer.spec.channels, *(side // stride for side in shape[-2:]))
                drawn = [self.rng.at(positions[place]).normal("posterior", latent, device) for place in places]
                noise = torch.stack(drawn)
            if images.encoded:
                found = cast(StoredTokenizer, self.tokenizer).normalise(group.float(), noise)
            else:
                found = self.tokenizer.encode(normalised(group), noise)
            latents |= zip(places, found, strict=True)
        ordered = [latents[place] for place in range(len(latents))]
        return self.layout.to_batch(ordered, images.labels.to(device, non_blocking=True))
