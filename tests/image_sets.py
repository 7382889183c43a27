"""Sets of images for tests, and an extractor that needs no weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genfound.runtime.files import digest


class Pictures:
    """Random images of given sizes, with labels; those of a label are of one tint."""

    def __init__(self, sizes: Sequence[tuple[int, int]], seed: int = 0, classes: int = 4) -> None:
        draw = np.random.default_rng(seed)
        self.sizes = np.array(sizes, dtype=np.int64)
        self.labels = draw.integers(0, classes, len(sizes))
        self.images = [
            (draw.integers(0, 128, (*size, 3)) + 30 * label).clip(0, 255).astype(np.uint8)
            for size, label in zip(sizes, self.labels, strict=True)
        ]
        self.key = digest(*(image.tobytes() for image in self.images))

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, number: int) -> np.ndarray:
        return self.images[number]


class Averages:
    """Features that are averages of an image; counts its calls."""

    name, hash, width = "inception", "of averages", 6

    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, images: Sequence[np.ndarray]) -> dict[str, Tensor]:
        self.calls += 1
        rows = [torch.from_numpy(image.astype(np.float32)) for image in images]
        pool = torch.stack([torch.cat([row.mean((0, 1)), row.std((0, 1))]) for row in rows]) / 64
        return {"pool": pool, "spatial": pool[:, :4] + pool[:, 1:5], "logits": pool[:, :5] * 8}


def save_pngs(folder: Path, images: Pictures) -> Path:
    folder.mkdir(parents=True)
    for number, image in enumerate(images.images):
        Image.fromarray(image).save(folder / f"{number:04d}.png")
    return folder
