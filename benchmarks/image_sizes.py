"""A law of image sizes like ImageNet's, so that figures of packing and speed need no images.

Sizes are drawn from a seed. 37 % are 500 x 375 and 11 % 500 x 333 pixels, the sizes that a photo site gave to
most of its pictures, and 22 % of these stand upright. All others are log-normal: the square root of the area has
the median 230 pixels and the deviation 0.75 of its logarithm, the aspect ratio the median 1.1 and the deviation
0.3; no side is below 64 pixels. In NiT's tokens of 32 pixels this has the mean 152 and the median 150, a quarter
of the images has 42 or fewer, one in a hundred more than 1,100, and the largest reach the limit of 4,096.
The shares, the mean and the tail follow what was measured of ImageNet's sizes for NiT's packing.
"""

from __future__ import annotations

import numpy as np

from genfound.data.images.views import ImageViews

COMMON = ((0.37, (500, 375)), (0.11, (500, 333)))
"""Share of a size, and its longer and shorter side."""

UPRIGHT = 0.22
SMALLEST = 64


def image_sizes(count: int, seed: int = 0) -> np.ndarray:
    """(count, 2) int64, height and width in pixels."""
    draw = np.random.Generator(np.random.Philox(seed))
    kind, upright = draw.random(count), draw.random(count) < UPRIGHT
    side = np.exp(draw.normal(np.log(230), 0.75, count))
    stretch = np.exp(draw.normal(np.log(1.1), 0.3, count) / 2)
    sizes = np.stack([side / stretch, side * stretch], axis=1).round().clip(SMALLEST)
    begin = 0.0
    for share, (long, short) in COMMON:
        chosen = (kind >= begin) & (kind < begin + share)
        sizes[chosen] = np.where(upright[chosen, None], [long, short], [short, long])
        begin += share
    return sizes.astype(np.int64)


def token_counts(count: int, view: str = "native", seed: int = 0) -> np.ndarray:
    """(n,) int64, tokens of the images of a pass, in the order of the entries, at stride 32 and patch size 1.

    Args:
        count: images; `mixed` shows each of them three times.
        view: see `Views`; squares are of 256 and 512 pixels.
        seed: of the sizes.
    """
    views = ImageViews(view, 256, 32, 4096)
    heights, widths = image_sizes(count, seed).T.tolist()
    return (views.entries(heights, widths).sizes // 32).prod(axis=1)
