"""How an image of any size becomes one that divides into tokens: planned from sizes, then done.

Every resize is two one-axis passes, width first: the pass order of Pillow before version 13, on which
published data sets were made, and the same bytes in every version since.
"""

from __future__ import annotations

import math

from PIL import Image


def native_size(height: int, width: int, unit: int, max_tokens: int) -> tuple[int, int]:
    """(height, width) to which an image is resized at its native resolution; NiT's rule.

    Each side is rounded down to a multiple of `unit`. An image of more than `max_tokens` tokens is first
    reduced to the area of a square of floor(sqrt(max_tokens)) tokens a side, and then along its longer side
    until it fits.
    """
    side = unit * math.isqrt(max_tokens)
    new_height, new_width = float(height), float(width)
    if (height // unit or 1) * (width // unit or 1) > max_tokens:
        new_width = math.sqrt(width / height) * side
        new_height = new_width * height / width
    rows, columns = (max(int(v / unit), 1) for v in (new_height, new_width))
    while rows * columns > max_tokens:
        rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
    return rows * unit, columns * unit


def resize(image: Image.Image, height: int, width: int, method: Image.Resampling) -> Image.Image:
    """Two one-axis passes, width first."""
    return image.resize((width, image.height), method).resize((width, height), method)


def center_crop(image: Image.Image, size: int) -> Image.Image:
    """ADM's centre crop: box-halve while twice too large, bicubic to the shorter side, crop."""
    while min(image.size) >= 2 * size:
        image = resize(image, image.height // 2, image.width // 2, Image.Resampling.BOX)
    scale = size / min(image.size)
    image = resize(image, round(image.height * scale), round(image.width * scale), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
