"""Drawn shapes: ten classes, no files, every image at its own native size.

An image is a pure function of (seed, index): one anti-aliased object that fills most of the shorter side,
off the middle of the longer side, in a palette of object and background colours.
"""

from collections.abc import Callable, Sequence

import numpy as np

from genfound.config.checks import integer
from genfound.data.images.base import PictureSource
from genfound.runtime.files import digest

Distance = Callable[[np.ndarray], np.ndarray]
"""Signed distance (negative inside) of points (..., 2) as x to the right and y downwards; objects have radius 1."""

COLOURS = {
    "red": [226, 60, 52], "blue": [58, 132, 230], "green": [52, 176, 92], "yellow": [245, 196, 48],
    "white": [240, 240, 240], "purple": [178, 84, 206],
}  # fmt: skip
OBJECTS = np.array(list(COLOURS.values()), dtype=np.float64)
BACKGROUNDS = np.array([[24, 26, 36], [38, 52, 66], [66, 44, 58], [40, 60, 46]], dtype=np.float64)


def disc(radius: float, x: float = 0.0, y: float = 0.0) -> Distance:
    """A disc around a point."""
    return lambda p: np.hypot(p[..., 0] - x, p[..., 1] - y) - radius


def moon(p: np.ndarray) -> np.ndarray:
    """A crescent, open to the right."""
    return np.maximum(disc(0.95)(p), -disc(0.75, 0.55, -0.1)(p))


def polygon(corners: Sequence[tuple[float, float]]) -> Distance:
    """A closed polygon; exact distance to its edges, sign by the crossing rule."""
    a = np.asarray(corners, dtype=np.float64)
    b = np.roll(a, -1, axis=0)
    edge = b - a

    def distance(p: np.ndarray) -> np.ndarray:
        to_point = p[..., None, :] - a  # (..., E, 2)
        along = np.clip((to_point * edge).sum(-1) / (edge * edge).sum(-1), 0, 1)
        nearest = np.linalg.norm(to_point - along[..., None] * edge, axis=-1).min(-1)
        above = (a[:, 1] > p[..., 1, None]) != (b[:, 1] > p[..., 1, None])
        with np.errstate(divide="ignore", invalid="ignore"):
            crossing = a[:, 0] + (p[..., 1, None] - a[:, 1]) / edge[:, 1] * edge[:, 0]
        inside = (above & (p[..., 0, None] < crossing)).sum(-1) % 2 == 1
        return np.where(inside, -nearest, nearest)

    return distance


def _heart_corners() -> list[tuple[float, float]]:
    """The curve x = 16 sin^3 s, y = 13 cos s - 5 cos 2s - 2 cos 3s - cos 4s, scaled to radius 1."""
    s = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    x = 16 * np.sin(s) ** 3
    y = 13 * np.cos(s) - 5 * np.cos(2 * s) - 2 * np.cos(3 * s) - np.cos(4 * s)
    return list(zip(x / 17, -(y + 2.5) / 15.5, strict=True))


_ARROW = [(-0.95, -0.32), (0.0, -0.32), (0.0, -0.86), (0.98, 0.0), (0.0, 0.86), (0.0, 0.32), (-0.95, 0.32)]
_CROSS = [
    (-0.34, -0.92), (0.34, -0.92), (0.34, -0.34), (0.92, -0.34), (0.92, 0.34), (0.34, 0.34),
    (0.34, 0.92), (-0.34, 0.92), (-0.34, 0.34), (-0.92, 0.34), (-0.92, -0.34), (-0.34, -0.34),
]  # fmt: skip

CLASSES: dict[str, Distance] = {
    "circle": disc(0.92),
    "square": polygon([(-0.8, -0.8), (0.8, -0.8), (0.8, 0.8), (-0.8, 0.8)]),
    "triangle": polygon([(0.0, -0.92), (0.98, 0.8), (-0.98, 0.8)]),
    "diamond": polygon([(0.0, -0.98), (0.66, 0.0), (0.0, 0.98), (-0.66, 0.0)]),
    "cross": polygon(_CROSS),
    "ring": lambda p: np.abs(disc(0.68)(p)) - 0.25,
    "heart": polygon(_heart_corners()),
    "arrow": polygon(_ARROW),
    "moon": moon,
    "hourglass": polygon([(-0.8, -0.9), (0.8, -0.9), (0.0, 0.0), (0.8, 0.9), (-0.8, 0.9), (0.0, 0.0)]),
}


class Shapes(PictureSource):
    """The embedded data set.

    Args:
        images: how many there are.
        sides: pixel sides that occur, e.g. [12, 14, ..., 24]; height and width are drawn independently.
        holdout: how many more there are for validation.
        size: side of the square view in pixels.
    """

    def __init__(
        self, *, images: int, holdout: int, sides: Sequence[int], view: str, size: int, max_tokens: int, unit: int,
        split: str, seed: int,
    ) -> None:  # fmt: skip
        if view not in ("native", "square"):
            raise ValueError(f"data.view={view} is unknown; choose native or square")
        integer("data.holdout", holdout, 0)
        integer("data.images", images, 1)
        integer("data.size", size, 1)
        integer("data.max_tokens", max_tokens, 1)
        integer("data.sides", min(sides, default=0), 1)
        sides = list(sides) if view == "native" else [size]
        _check_sides(sides, unit, max_tokens)
        self.first, count = (0, images) if split == "train" else (images, holdout)
        self.seed = seed
        self.class_names = list(CLASSES)
        numbers = np.random.Generator(np.random.Philox(key=[seed, 0])).integers(0, 2**31, size=(images + holdout, 3))
        numbers = numbers[self.first : self.first + count]
        self.labels = numbers[:, 0] % len(CLASSES)
        self.sizes = np.asarray(sides)[numbers[:, 1:] % len(sides)]
        self.fingerprint = digest(repr((images, holdout, sides, seed)))

    def image(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8."""
        height, width = self.sizes[index]
        return draw_shape(CLASSES[self._class(index)], height, width, self._draw(index))

    def caption(self, index: int) -> str:
        """Colour and shape, such as `a red circle`."""
        height, width = self.sizes[index]
        *_, colour, _ = placed(height, width, self._draw(index))
        return f"a {next(name for name, own in COLOURS.items() if own == colour.tolist())} {self._class(index)}"

    def _class(self, index: int) -> str:
        return self.class_names[self.labels[index]]

    def _draw(self, index: int) -> np.random.Generator:
        return np.random.Generator(np.random.Philox(key=[self.seed, 1 + self.first + index]))

    def report(self) -> list[str]:
        """Number and sizes of the drawings."""
        low, high = self.sizes.min(0), self.sizes.max(0)
        return [
            f"shapes: {len(self.labels):,} drawings of {len(self.class_names)} classes, "
            f"{low[0]} x {low[1]} to {high[0]} x {high[1]} pixels (height x width)"
        ]


def _check_sides(sides: Sequence[int], unit: int, max_tokens: int) -> None:
    """Raise a ValueError for a side that does not divide into tokens, or makes too many of them."""
    for side in sides:
        if side % unit:
            low = side // unit * unit
            raise ValueError(
                f"data: a side of {side} pixels does not divide into tokens of {unit} pixels; "
                f"the nearest legal sides are {max(low, unit)} and {low + unit}"
            )
    side, largest = max(sides), (max(sides) // unit) ** 2
    if largest > max_tokens:
        raise ValueError(
            f"data: a side of {side} pixels makes {largest} tokens, more than data.max_tokens={max_tokens}"
        )


def placed(height: int, width: int, draw: np.random.Generator) -> tuple[float, list[float], np.ndarray, np.ndarray]:
    """Radius and centre (x, y) of an object in pixels, its colour and that of the background."""
    radius = min(height, width) / 2 * draw.uniform(0.86, 0.96)
    centre = [side / 2 + draw.uniform(-0.3, 0.3) * (side - 2 * radius) for side in (width, height)]
    return radius, centre, draw.choice(OBJECTS), draw.choice(BACKGROUNDS)


def draw_shape(shape: Distance, height: int, width: int, draw: np.random.Generator) -> np.ndarray:
    """One object on a background, (height, width, 3) uint8."""
    radius, centre, colour, background = placed(height, width, draw)
    rows, columns = np.mgrid[:height, :width] + 0.5
    offset = np.stack([columns - centre[0], rows - centre[1]], axis=-1) / radius
    coverage = np.clip(0.5 - shape(offset) * radius, 0, 1)[..., None]
    return np.rint(background + coverage * (colour - background)).astype(np.uint8)
