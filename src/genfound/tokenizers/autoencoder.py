"""What tokenizers that are a network have in common: a frozen autoencoder of diffusers."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import ClassVar, Self

import torch
from torch import Tensor

from genfound.tokenizers.base import LatentSpec, Tokenizer
from genfound.tokenizers.weights import Architecture, latent_spec, load, scaling

PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


class Autoencoder(Tokenizer, ABC):
    """Images <-> normalised latents: latent = (h - shift) * scale, with the numbers of the autoencoder's own config.

    The network is frozen and always in eval mode. It moves to the device of the images or latents it is
    given, and works through them in groups of at most `pixels_per_call` pixels, channels last in memory.

    Args:
        weights: name on the Hugging Face hub, a folder, `random` (the official architecture, always the same
            weights), or `random_tiny` (a small one).
        precision: `fp32` or `bf16`, of the network; latents and images are float32.
        pixels_per_call: bounds the memory of a call; an image that is larger goes alone.

    Raises:
        FileNotFoundError: the weights are absent and cannot be downloaded.
        ValueError: an unknown option, damaged weights, or those of another architecture.
    """

    kind: ClassVar[Architecture]
    published: ClassVar[LatentSpec]
    online = True
    stochastic = False

    def __init_subclass__(cls) -> None:
        if "kind" in vars(cls):
            cls.published = latent_spec(cls.kind.official)

    def __init__(self, *, weights: str, precision: str, pixels_per_call: int) -> None:
        if precision not in PRECISIONS:
            raise ValueError(f"tokenizer.precision={precision} is unknown; choose fp32 or bf16")
        self.pixels_per_call = pixels_per_call
        self.dtype = PRECISIONS[precision]
        self.model = load(self.kind, weights).to(dtype=self.dtype, memory_format=torch.channels_last)
        config = self.model.config
        if config.get("latents_mean") is not None:
            raise ValueError(f"tokenizer.weights={weights} normalises each channel (latents_mean): not supported")
        self.spec = latent_spec(config)
        self.scale, self.shift = scaling(config)

    def encode(self, images: Tensor, noise: Tensor | None = None) -> Tensor:
        """(B, 3, height, width) in [-1, 1] -> (B, C, h, w) normalised; see `Tokenizer.encode`."""
        return self.normalise(self.moments(images), noise)

    def decode(self, latents: Tensor) -> Tensor:
        """(B, C, h, w) normalised -> (B, 3, height, width), not clamped."""
        return self._in_groups(self._decode, latents / self.scale + self.shift, self.spec.stride)

    def moments(self, images: Tensor) -> Tensor:
        """Images -> what is stored of them, not scaled: (B, C, h, w), or (B, 2 C, h, w) mean and log-variance."""
        height, width = images.shape[-2:]
        if height % self.spec.stride or width % self.spec.stride:
            raise ValueError(f"an image of {height} x {width} pixels does not divide by {self.spec.stride}")
        return self._in_groups(self._moments, images, 1)

    def normalise(self, moments: Tensor, noise: Tensor | None = None) -> Tensor:
        """Moments -> latents of about unit variance."""
        return (moments - self.shift) * self.scale

    def compiled(self, dynamic: bool) -> Self:
        """The same tokenizer with a compiled encoder; `dynamic`: the same code for images of all sizes."""
        other = copy.copy(self)
        other._moments = torch.compile(self._moments, dynamic=dynamic)  # type: ignore[method-assign]
        return other

    @abstractmethod
    def _moments(self, images: Tensor) -> Tensor:
        """Call the encoder."""

    def _decode(self, latents: Tensor) -> Tensor:
        """Call the decoder on latents that are not scaled."""
        return self.model.decode(latents).sample

    def _in_groups(self, call: Callable[[Tensor], Tensor], x: Tensor, stride: int) -> Tensor:
        """Apply the network to (B, ...), whose last two sides are `stride` pixels each, a few rows at a time."""
        if self.model.device != x.device:
            self.model.to(x.device)
        rows = max(self.pixels_per_call // (x.shape[-2] * x.shape[-1] * stride**2), 1)
        with torch.inference_mode(), torch.autocast(x.device.type, enabled=False):
            parts = [call(part.to(self.dtype, memory_format=torch.channels_last)).float() for part in x.split(rows)]
        return torch.cat(parts).contiguous()  # outside of inference mode: an ordinary tensor
