"""How an image of any size becomes one that divides into tokens: planned from sizes, then done.

Every resize is two one-axis passes, width first: the pass order of Pillow before version 13, on which
published data sets were made, and the same bytes in every version since.
"""

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from genfound.config.checks import integer

VIEW_KEYS = ("view", "size", "max_tokens", "max_image_tokens", "decode")
"""Keys of `data` that say what is shown of each image."""

FEWEST_TOKENS = 16
"""FiT's recipe leaves smaller images out."""


class ViewRule(NamedTuple):
    """One way to bring an image to a size: (height, width) -> those of what is shown of it, if anything; and that."""

    size: Callable[[int, int], tuple[int, int] | None]
    render: Callable[[Image.Image, int, int], Image.Image]


def resized(picture: Image.Image, height: int, width: int) -> Image.Image:
    """The whole image, bicubic; one that has the size already stays as it is."""
    same = (picture.height, picture.width) == (height, width)
    return picture if same else resize(picture, height, width, Image.Resampling.BICUBIC)


def _square_size(height: int, width: int, side: int, larger_only: bool = False) -> tuple[int, int] | None:
    """Of ADM's centre crop, of every image or only of those that are larger both ways."""
    return None if larger_only and min(height, width) <= side else (side, side)


def _flexible_size(height: int, width: int, unit: int, side: int) -> tuple[int, int] | None:
    """Of FiT's resize, unless it leaves the image fewer than 16 tokens."""
    size = flexible_size(height, width, unit, side)
    return size if math.prod(size) >= FEWEST_TOKENS * unit**2 else None


class Entries(NamedTuple):
    """Everything that is shown of a number of images, image by image."""

    images: np.ndarray  # (e,) int64, number of the image
    rules: np.ndarray  # (e,) int64, which of the rules shows it
    sizes: np.ndarray  # (e, 2) int64, height and width in pixels


class ImageViews:
    """What is shown of each image: its rules, and how a pass over the data goes through them.

    A pass consists of slots; each shows every image once, by the first rule of the slot that takes it.

    | view | slots |
    |---|---|
    | native | the image at its own size |
    | square | a square of `size` |
    | squares | a square of `size`; a square of twice `size` |
    | mixed | native; a square of `size`; a square of twice `size` (NiT's recipe) |
    | flexible | FiT's resize to the area of `size`; the centre crop of images larger both ways, else the resize again |

    So half of the times FiT shows a large image cropped, as in its recipe, whose coin this makes exact.

    Args:
        unit: pixels per token side.
        max_tokens: larger native images are reduced to it.
        decode: `exact`, or `dct`: a JPEG that is shown at half of its size or less is not decoded whole.
    """

    def __init__(self, view: str, size: int, unit: int, max_tokens: int, decode: str = "exact") -> None:
        if view not in ("native", "square", "squares", "mixed", "flexible"):
            raise ValueError(f"data.view={view} is unknown; choose native, square, squares, mixed or flexible")
        if view != "native" and size % unit:
            legal = dict.fromkeys(f"{max(side, 1) * unit}" for side in (size // unit, -(-size // unit)))
            raise ValueError(
                f"data.size={size} must be a multiple of {unit} pixels (tokenizer stride x patch); "
                f"the nearest legal sizes are {' and '.join(legal)}"
            )
        if decode not in ("exact", "dct"):
            raise ValueError(f"data.decode={decode} is unknown; choose exact or dct")
        self.name, self.size, self.unit, self.max_tokens, self.decode = view, size, unit, max_tokens, decode
        one, bound = f"{size}", functools.partial
        native = {"native": ViewRule(bound(native_size, unit=unit, max_tokens=max_tokens), resized)}
        square, twice = (ViewRule(bound(_square_size, side=side), center_crop) for side in (size, 2 * size))
        larger = ViewRule(bound(_square_size, side=size, larger_only=True), center_crop)
        whole = ViewRule(bound(_flexible_size, unit=unit, side=size), resized)
        self.rules: dict[str, ViewRule] = {
            "native": native,
            "square": {one: square},
            "squares": {one: square, f"{2 * size}": twice},
            "mixed": {**native, one: square, f"{2 * size}": twice},
            "flexible": {f"resized-{size}": whole, one: larger},
        }[view]
        names = list(self.rules)
        self.slots = [[names[0]], [names[1], names[0]]] if view == "flexible" else [[name] for name in names]

    @classmethod
    def of(cls, data: Mapping[str, Any], unit: int) -> "ImageViews":
        """The views that the options of `data` ask for."""
        integer("data.size", data["size"], 1)
        integer("data.max_tokens", data["max_tokens"], 1)
        integer("data.max_image_tokens", data["max_image_tokens"], 1, or_null=True)
        integer("data.holdout", data["holdout"], 2, or_null=True)
        limit = min(data["max_image_tokens"] or data["max_tokens"], data["max_tokens"])
        return cls(data["view"], data["size"], unit, limit, data.get("decode", "exact"))

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
        """(m,) int64, those of one pass; `names` are of the rules that `entries.rules` counts, if not the own ones."""
        names = list(self.rules) if names is None else names
        number = np.full((len(names), int(entries.images.max(initial=-1)) + 1), -1, dtype=np.int64)
        number[entries.rules, entries.images] = np.arange(len(entries.images))
        places = {name: number[place] for place, name in enumerate(names)}
        return np.concatenate([_first(slot, places) for slot in self.slots])

    def least(self, size: np.ndarray) -> tuple[int, int] | None:
        """Width and height below which an image must not be decoded that is shown at this size (height, width)."""
        return None if self.decode == "exact" else (int(size[1]), int(size[0]))

    def render(self, picture: Image.Image, rule: int, size: np.ndarray) -> np.ndarray:
        """(height, width, 3) uint8: an image by one of the rules."""
        return np.array(list(self.rules.values())[rule].render(picture, *map(int, size)))

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


def center_crop(image: Image.Image, height: int, width: int | None = None) -> Image.Image:
    """ADM's centre crop: box-halve while twice too large, bicubic to the smallest that covers it, crop.

    Without a width it is a square, as ADM's own.
    """
    width = width or height
    while image.height >= 2 * height and image.width >= 2 * width:
        image = resize(image, image.height // 2, image.width // 2, Image.Resampling.BOX)
    scale = max(height / image.height, width / image.width)
    sides = max(round(image.height * scale), height), max(round(image.width * scale), width)
    image = resize(image, *sides, Image.Resampling.BICUBIC)
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))
