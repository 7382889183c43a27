"""What a text encoder is."""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor


class TextEncoder(ABC):
    """A frozen text encoder; it is never part of a checkpoint. Its constructor takes the options of its yaml."""

    width: int  # E, the values of a token
    tokens: int  # L, of a caption at most; what is longer is cut off

    @classmethod
    def fetch(cls, weights: str | None, download: bool = True) -> Path | None:
        """The folder of weights, downloaded if it is not at hand; `None` where there is nothing to be had."""
        return None

    @abstractmethod
    def __call__(self, captions: Sequence[str], device: torch.device) -> list[Tensor]:
        """What is made of each caption on a device, (n, E) with n <= L."""
