"""Pixels as bytes and as numbers in [-1, 1]."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor


def normalised(images: Tensor) -> Tensor:
    """uint8 -> float32 in [-1, 1], as ADM: x / 127.5 - 1."""
    return images.float() / 127.5 - 1


def to_picture(image: np.ndarray, mirrored: bool = False) -> Tensor:
    """(height, width, 3) uint8 -> (3, height, width) uint8."""
    picture = torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return picture.flip(-1) if mirrored else picture.contiguous()


def to_uint8(image: Tensor, rule: str = "round") -> np.ndarray:
    """(3, height, width) in about [-1, 1] -> (height, width, 3) uint8.

    Args:
        rule: `round` to the nearest, halves up (sample_ddp.py of DiT, SiT and FiT), or `truncate`, up to a level
            darker (sample_c2i_ddp.py of NiT).
    """
    if rule not in ("round", "truncate"):
        raise ValueError(f"sample.uint8={rule} is unknown; choose round or truncate")
    scaled = 127.5 * image.float() + 128 if rule == "round" else (image.float() + 1) / 2 * 255
    levels: Tensor = scaled.clamp(0, 255).byte().permute(1, 2, 0)
    return levels.cpu().numpy()


def save_png(file: Path, image: np.ndarray) -> None:
    """Write an image (height, width, 3) uint8."""
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(file)
