"""How an image of any size becomes one that divides into tokens: planned from sizes, then done.

Every resize is two one-axis passes, width first: the pass order of Pillow before version 13, on which
published data sets were made, and the same bytes in every version since.
"""

from __future__ import annotations

import math

from PIL import Image


def native_size(height: int, width: int, unit: int, max_tokens: int) -> tuple[int, int]:
    """(height, width) to which an image is resized at its native resolution: NiT's rule, then as small as needed.

    The limit of NiT's rule is a square of floor(sqrt(max_tokens)) tokens a side; what is still too large is
    reduced along its longer side until it fits.
    """
    published = published_size(height, width, unit, unit * math.isqrt(max_tokens))
    rows, columns = (max(side // unit, 1) for side in published)
    while rows * columns > max_tokens:
        rows, columns = (rows - 1, columns) if rows >= columns else (rows, columns - 1)
    return rows * unit, columns * unit


def published_size(height: int, width: int, unit: int, side: int) -> tuple[int, int]:
    """NiT's native_resolution_resize, exactly: sides rounded down to multiples of `unit`.

    An image of the area of a square of `side` pixels or more is reduced to that area first; one that is very
    thin can then lose a side to 0.
    """
    if height * width < side**2:
        return max(height // unit, 1) * unit, max(width // unit, 1) * unit
    new_width = math.sqrt(width / height) * side
    new_height = new_width * height / width
    return int(new_height / unit) * unit, int(new_width / unit) * unit


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
