"""Small trees of images, and the stores that are encoded of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image

from genfound.data.images.views import ImageViews
from genfound.encoding.encode import encode
from tests.helpers import composed

SIZES = [(40, 56), (64, 40), (33, 90), (40, 56), (100, 70), (40, 40)]
"""Height and width of the images, in turn."""


def tree(root: Path, count: int = 18) -> Path:
    """ImageNet-like: root/train/<class>/*.png in three classes."""
    draw = np.random.default_rng(0)
    for i in range(count):
        height, width = SIZES[i % len(SIZES)]
        coarse = Image.fromarray(draw.integers(0, 256, (4, 5, 3), dtype=np.uint8))
        folder = root / "train" / f"n{i % 3:02d}"
        folder.mkdir(parents=True, exist_ok=True)
        coarse.resize((width, height), Image.Resampling.BICUBIC).save(folder / f"{i:03d}.png")
    return root


def encoded(
    images: Path, out: Path, *overrides: str, rank: int = 0, ranks: int = 1, device: torch.device | None = None
) -> Path:
    """What `genfound.encode` does, in this process; pixels in units of 8, seven images in a shard."""
    shape = ["data=imagenet_native", "tokenizer=pixel", "patch_size=8", "shard_images=7", "data.num_workers=0"]
    where = [f"data.root={images}", f"out={out}", f"runs={images.parent}/runs"]
    encode(composed(*shape, *where, *overrides, name="encode"), rank, ranks, device or torch.device("cpu"))
    return out


def native(unit: int = 8, max_tokens: int = 4096) -> ImageViews:
    """Images at their own sizes."""
    return ImageViews("native", 32, unit, max_tokens)


def contents(folder: Path) -> dict[str, bytes]:
    """All that a folder holds, hidden files as well, but for empty ones (a killed process may leave its lock)."""
    files = (file for file in sorted(folder.rglob("*")) if file.is_file() and file.stat().st_size)
    return {str(file.relative_to(folder)): file.read_bytes() for file in files}
