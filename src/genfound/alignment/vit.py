"""Teachers that are vision transformers in the form of DINOv2, as the library transformers computes them."""

from abc import abstractmethod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import interpolate

from genfound.alignment.base import Teacher
from genfound.runtime.transformers_models import FILES, require
from genfound.tokenizers.weights import locate

RANDOM = "random_tiny"
"""Weights for tests: a small network, always the same."""


class VisionTransformer(Teacher):
    """The patch tokens of a frozen vision transformer, whose images have `patch` pixels per token of the backbone.

    Args:
        weights: name on the Hugging Face hub, a folder, or `random_tiny`.

    Raises:
        FileNotFoundError: the weights are absent and cannot be downloaded.
        ValueError: they are damaged; transformers is not installed.
    """

    mean: tuple[float, float, float]  # of the pixels of its training, in [0, 1]
    std: tuple[float, float, float]

    def __init__(self, *, weights: str) -> None:
        self.model = self.load(weights).eval().requires_grad_(False)
        config = self.model.config
        self.width, self.patch = config.hidden_size, config.patch_size
        self.prefix = 1 + getattr(config, "num_register_tokens", 0)
        self.model.embeddings.interpolate_pos_encoding = self._positions

    @classmethod
    def fetch(cls, weights: str | None, download: bool = True) -> Path | None:
        """See `Teacher`; of the hub the two files of a model."""
        require("alignment", cls.__name__)
        return None if weights == RANDOM else locate(str(weights), download, "alignment.teachers weights", FILES)

    @abstractmethod
    def load(self, weights: str) -> Any:
        """The network."""

    @abstractmethod
    def resampled(self, table: Tensor, rows: int, columns: int) -> Tensor:
        """Positions (1, E, R, R) of the trained grid -> (1, E, rows, columns)."""

    def pixels(self, images: Tensor, height: int, width: int) -> Tensor:
        """Images (B, 3, h, w) uint8 -> (B, 3, height, width), normalised, then resized without antialiasing (REPA)."""
        mean, std = (images.new_tensor(v, dtype=torch.float32).view(3, 1, 1) for v in (self.mean, self.std))
        x = (images.float() / 255 - mean) / std
        return x if x.shape[2:] == (height, width) else interpolate(x, (height, width), mode="bicubic")

    def __call__(self, images: Tensor, rows: int, columns: int) -> Tensor:
        """See `Teacher`."""
        model = self.model.to(images.device)
        tokens = model(self.pixels(images, rows * self.patch, columns * self.patch)).last_hidden_state
        features: Tensor = tokens[:, self.prefix :].transpose(1, 2).unflatten(2, (rows, columns))
        return features

    def _positions(self, embeddings: Tensor, height: int, width: int) -> Tensor:
        """(1, 1 + rows * columns, E), in the place of transformers' own rule."""
        table = self.model.embeddings.position_embeddings.float()
        side = round((table.shape[1] - 1) ** 0.5)
        grid = table[:, 1:].unflatten(1, (side, side)).permute(0, 3, 1, 2)  # (1, E, R, R)
        rows, columns = height // self.patch, width // self.patch
        if (rows, columns) != (side, side):
            grid = self.resampled(grid, rows, columns)
        return torch.cat([table[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)
