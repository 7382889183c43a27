"""How an image of any size becomes one that divides into tokens: planned from sizes, then done.

Every resize is two one-axis passes, width first: the pass order of Pillow before version 13, on which
published data sets were made, and the same bytes in every version since.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
from PIL import Image

from genfound.config.checks import integer

FEWEST_TOKENS = 16
"""FiT's recipe leaves smaller images out."""


class ViewRule(Protocol):
    """One way to bring an image to a size."""

    def size(self, height: int, width: int) -> tuple[int, int] | None:
        """(height, width) in pixels of what is shown of an image of this size; `None`: it is not shown this way."""

    def render(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The image at a planned (height, width)."""


class Resized:
    """What rules that keep the whole image have in common."""

    def render(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        """Bicubic; an image that has the size already stays as it is."""
        if (picture.height, picture.width) == tuple(size):
            return picture
        return resize(picture, *size, Image.Resampling.BICUBIC)


class Native(Resized):
    """NiT's rule, see `native_size`."""

    def __init__(self, unit: int, max_tokens: int) -> None:
        self.unit = unit
        self.max_tokens = max_tokens

    def size(self, height: int, width: int) -> tuple[int, int] | None:
        """Sides rounded down to whole tokens, at most `max_tokens` of them."""
        return native_size(height, width, self.unit, self.max_tokens)


class Flexible(Resized):
    """FiT's resize, see `flexible_size`."""

    def __init__(self, unit: int, side: int) -> None:
        self.unit = unit
        self.side = side

    def size(self, height: int, width: int) -> tuple[int, int] | None:
        """At most the area of a square of `side` pixels; images of fewer than 16 tokens are left out."""
        rows, columns = (side // self.unit for side in flexible_size(height, width, self.unit, self.side))
        return (rows * self.unit, columns * self.unit) if rows * columns >= FEWEST_TOKENS else None


class Square:
    """ADM's centre crop, of every image or only of those that are larger both ways."""

    def __init__(self, side: int, larger_only: bool) -> None:
        self.side = side
        self.larger_only = larger_only

    def size(self, height: int, width: int) -> tuple[int, int] | None:
        """The square."""
        return None if self.larger_only and min(height, width) <= self.side else (self.side, self.side)

    def render(self, picture: Image.Image, size: tuple[int, int]) -> Image.Image:
        """The middle of the image."""
        return center_crop(picture, self.side)


class Entries(NamedTuple):
    """Everything that is shown of a number of images, image by image.

    Attributes:
        images: (e,) int64, number of the image.
        rules: (e,) int64, which of the rules shows it.
        sizes: (e, 2) int64, height and width in pixels.
    """

    images: np.ndarray
    rules: np.ndarray
    sizes: np.ndarray


class ImageViews:
    """What is shown of each image: its rules, and how a pass over the data goes through them.

    A pass consists of slots; each shows every image once, by the first rule of the slot that takes it.

    | view | slots |
    |---|---|
    | native | the image at its own size |
    | square | a square of `size` |
    | mixed | native; a square of `size`; a square of twice `size` (NiT's recipe) |
    | flexible | FiT's resize to the area of `size`; the centre crop of images larger both ways, else the resize again |

    So half of the times FiT shows a large image cropped, as in its recipe, whose coin this makes exact.

    Args:
        view: name of the view.
        size: side of squares in pixels.
        unit: pixels per token side.
        max_tokens: larger native images are reduced to it.
    """

    def __init__(self, view: str, size: int, unit: int, max_tokens: int) -> None:
        if view not in ("native", "square", "mixed", "flexible"):
            raise ValueError(f"data.view={view} is unknown; choose native, square, mixed or flexible")
        if view != "native" and size % unit:
            legal = dict.fromkeys(f"{max(side, 1) * unit}" for side in (size // unit, -(-size // unit)))
            raise ValueError(
                f"data.size={size} must be a multiple of {unit} pixels (tokenizer stride x patch); "
                f"the nearest legal sizes are {' and '.join(legal)}"
            )
        self.name = view
        self.size = size
        self.unit = unit
        self.max_tokens = max_tokens
        one, two = f"{size}", f"{2 * size}"
        self.rules: dict[str, ViewRule] = {
            "native": {"native": Native(unit, max_tokens)},
            "square": {one: Square(size, larger_only=False)},
            "mixed": {"native": Native(unit, max_tokens), one: Square(size, False), two: Square(2 * size, False)},
            "flexible": {f"resized-{size}": Flexible(unit, size), one: Square(size, larger_only=True)},
        }[view]  # type: ignore[assignment]
        names = list(self.rules)
        self.slots = [[names[0]], [names[1], names[0]]] if view == "flexible" else [[name] for name in names]

    @classmethod
    def of(cls, data: Mapping[str, Any], unit: int) -> ImageViews:
        """The views that the options of `data` ask for."""
        for key, least in (("size", 1), ("max_tokens", 1)):
            integer(f"data.{key}", data[key], least)
        for key, least in (("max_image_tokens", 1), ("holdout", 2)):
            integer(f"data.{key}", data[key], least, or_null=True)
        limit = min(data["max_image_tokens"] or data["max_tokens"], data["max_tokens"])
        return cls(data["view"], data["size"], unit, limit)

    def entries(self, heights: Sequence[int], widths: Sequence[int]) -> Entries:
        """All that is shown of images of these sizes."""
        sizes = np.zeros((len(heights), len(self.rules), 2), dtype=np.int64)
        for number, rule in enumerate(self.rules.values()):
            planned = functools.cache(rule.size)
            for image, (height, width) in enumerate(zip(heights, widths, strict=True)):
                sizes[image, number] = planned(height, width) or 0
        images, rules = np.nonzero(sizes[..., 0])
        return Entries(images, rules, sizes[images, rules])

    def items(self, entries: Entries, names: Sequence[str] | None = None) -> np.ndarray:
        """(m,) int64, the entries of one pass.

        Args:
            entries: what there is.
            names: of the rules that `entries.rules` counts; `None`: the own ones.
        """
        names = list(self.rules) if names is None else names
        number = np.full((len(names), int(entries.images.max(initial=-1)) + 1), -1, dtype=np.int64)
        number[entries.rules, entries.images] = np.arange(len(entries.images))
        places = {name: number[place] for place, name in enumerate(names)}
        return np.concatenate([_first(slot, places) for slot in self.slots])

    def render(self, picture: Image.Image, rule: int, size: np.ndarray) -> np.ndarray:
        """(height, width, 3) uint8: an image by one of the rules."""
        height, width = map(int, size)
        return np.array(list(self.rules.values())[rule].render(picture, (height, width)))

    def reduced(self, heights: Sequence[int], widths: Sequence[int]) -> int:
        """How many images are reduced because they have too many tokens at their own size."""
        if "native" not in self.rules:
            return 0
        sides = zip(heights, widths, strict=True)
        return sum((h // self.unit) * (w // self.unit) > self.max_tokens for h, w in sides)


def _first(slot: Sequence[str], places: Mapping[str, np.ndarray]) -> np.ndarray:
    """Of every image the entry of the first rule that shows it."""
    chosen = places[slot[-1]]
    for name in reversed(slot[:-1]):
        chosen = np.where(places[name] >= 0, places[name], chosen)
    return chosen[chosen >= 0]


def native_size(height: int, width: int, unit: int, max_tokens: int) -> tuple[int, int]:
    """(height, width) to which an image is resized at its native resolution: NiT's rule, then as small as needed.

    The limit of NiT's rule is a square of floor(sqrt(max_tokens)) tokens a side; what is still too large is
    reduced along its longer side until it fits.
    """
    return _fitted(published_size(height, width, unit, unit * math.isqrt(max_tokens)), unit, max_tokens)


def flexible_size(height: int, width: int, unit: int, side: int) -> tuple[int, int]:
    """(height, width) to which FiT resizes an image, at least one token and at most those of the square."""
    return _fitted(published_flexible_size(height, width, unit, side), unit, (side // unit) ** 2)


def _fitted(size: tuple[int, int], unit: int, max_tokens: int) -> tuple[int, int]:
    rows, columns = (max(side // unit, 1) for side in size)
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


def published_flexible_size(height: int, width: int, unit: int, side: int) -> tuple[int, int]:
    """FiT's resize_arr (fit/data/in1k_dataset.py), exactly: small images are not enlarged, except to one unit.

    One that is very thin can lose a side to 0, or keep more tokens than the square of `side` has.
    """
    new_height, new_width = float(height), float(width)
    if height * width >= side**2:
        new_width = math.sqrt(width / height) * side
        new_height = new_width * height / width
    elif width < unit:
        new_height, new_width = unit * height / width, unit
    elif height < unit:
        new_height, new_width = unit, unit * width / height
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
