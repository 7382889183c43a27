"""Which images are wanted: class, size and number."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral

import numpy as np

from genfound.config import checks
from genfound.data.images.names import numbered
from genfound.data.images.sets import ImageSet
from genfound.rng import Rng

DATA = "data"
"""As a size or a label rule: as the images of the data set have them."""

LABEL_RULES = ("random", "balanced", DATA)
Size = tuple[int, int]


@dataclass(frozen=True)
class SampleRequest:
    """One image: its label, its (height, width) in pixels, and its number k within the request."""

    label: int
    size: tuple[int, int]
    number: int


def typical_sizes(sizes: np.ndarray) -> list[tuple[int, int]]:
    """Up to three (height, width): of middle, wide and tall images of a data set."""
    aspect = sizes[:, 1] / sizes[:, 0]
    order = np.lexsort((sizes.prod(axis=1), aspect))
    picks = [sizes[order[round(q * (len(order) - 1))]] for q in (0.5, 0.94, 0.06)]
    return list(dict.fromkeys((int(h), int(w)) for h, w in picks))


def preview_requests(class_names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[SampleRequest]:
    """One image of each of the first ten classes at each size."""
    pairs = [(label, size) for size in sizes for label in range(min(len(class_names), 10))]
    return [SampleRequest(label, size, number) for number, (label, size) in enumerate(pairs)]


def batches(requests: Sequence[SampleRequest], most: int) -> list[list[int]]:
    """The places of requests in batches of one size, of at most so many images."""
    order = sorted(range(len(requests)), key=lambda k: requests[k].size)
    groups = [list(same) for _, same in itertools.groupby(order, key=lambda k: requests[k].size)]
    return [group[i : i + most] for group in groups for i in range(0, len(group), most)]


def check_size(size: tuple[int, int], unit: int, factor: int = 1) -> None:
    """Raise a ValueError that names the nearest legal sizes if a side is not a positive multiple of `unit`.

    `factor` is of upsample guidance, whose small images are of whole tokens too.
    """
    unit *= factor
    if all(side > 0 and side % unit == 0 for side in size):
        return
    low, high = ([max(f(side / unit), 1) * unit for side in size] for f in (np.floor, np.ceil))
    legal = " and ".join(dict.fromkeys(f"[{int(h)},{int(w)}]" for h, w in (low, high)))
    made = "tokenizer stride x patch" + (" x guidance.factor" if factor > 1 else "")
    rule = f"height and width must be multiples of {unit} pixels ({made})"
    raise ValueError(f"size=[{size[0]},{size[1]}]: {rule}; the nearest legal sizes are {legal}")


def make_requests(
    labels: Sequence[int | str], sizes: Sequence[tuple[int, int]], n: int, class_names: Sequence[str]
) -> list[SampleRequest]:
    """n images of each label at each size, numbered in this order."""
    checks.integer("n", n, 1)
    if not len(labels):
        raise ValueError("labels=[]: give at least one class")
    numbers = [label_number(label, class_names) for label in labels]
    wanted = [(label, size) for size in sizes for _ in range(n) for label in numbers]
    return [SampleRequest(label, size, number) for number, (label, size) in enumerate(wanted)]


def requests_by_rule(
    n: int, labels: str, size: Size | str, classes: int, seed: int, data: ImageSet | None
) -> list[SampleRequest]:
    """n images, numbered, of a size (height, width) in pixels.

    Their labels are `random`, uniform and independent, as DiT, SiT and NiT; `balanced`, each class equally often, in
    random order; or, as the size can be, `data`: those of images of the data set in a fixed random order.
    """
    checks.one_of("labels", labels, LABEL_RULES)
    checks.integer("n", n, 1)
    rng, sizes = Rng(seed, "evaluate"), np.array([size] * n)
    numbers: np.ndarray
    if DATA in (labels, size):
        if data is None or data.labels is None:
            raise ValueError("sizes=data and labels=data need the data set of the run")
        rows = np.resize(rng.permutation("data", len(data)).numpy(), n)
        numbers, sizes = data.labels[rows], data.sizes[rows] if size == DATA else sizes
    if labels == "random":
        numbers = np.array([rng.at(k).integer("label") % classes for k in range(n)])
    elif labels == "balanced":
        numbers = rng.permutation("labels", n).numpy() % classes
    pairs = zip(numbers, sizes, strict=True)
    return [SampleRequest(int(label), (int(h), int(w)), k) for k, (label, (h, w)) in enumerate(pairs)]


def label_number(label: int | str, class_names: Sequence[str]) -> int:
    """The place of a class among all, given by its name or by its place.

    A number that is the name of a class is this class, wherever it stands. Where all classes are named by numbers
    that are not their places, a number is always a name, with or without leading zeros.
    """
    whole_number = isinstance(label, Integral) and not isinstance(label, bool)
    if (whole_number or isinstance(label, str)) and str(label) in class_names:
        return list(class_names).index(str(label))
    by_name = numbered(class_names)
    if whole_number and not by_name and 0 <= int(label) < len(class_names):
        return int(label)
    same = [place for place, name in enumerate(class_names) if by_name and whole_number and int(name) == label]
    if len(same) == 1:
        return same[0]
    names = ", ".join(class_names[:12]) + (", ..." if len(class_names) > 12 else "")
    places = "" if by_name else f" 0..{len(class_names) - 1}"
    raise ValueError(f"labels: {label} is not one of the {len(class_names)} classes{places} ({names})")
