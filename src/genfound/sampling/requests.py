"""Which images are wanted: class, size and number."""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any, cast

import numpy as np

from genfound.checkpoints.load import LoadedModel
from genfound.config import checks
from genfound.data.images.base import Captioned, ImageSource
from genfound.data.images.names import numbered
from genfound.data.images.sets import ImageSet
from genfound.rng import Rng

DATA = "data"
"""As a size or a label rule: as the images of the data set have them."""

FEW = 10
LABEL_RULES = ("random", "balanced", DATA)
Size = tuple[int, int]


@dataclass(frozen=True)
class SampleRequest:
    """One image: its label, its (height, width) in pixels, and its number k within the request.

    That of a model of text has a prompt, and its label says which among those of the request.
    """

    label: int
    size: tuple[int, int]
    number: int
    prompt: str | None = None


def typical_sizes(sizes: np.ndarray) -> list[tuple[int, int]]:
    """Up to three (height, width): of middle, wide and tall images of a data set."""
    aspect = sizes[:, 1] / sizes[:, 0]
    order = np.lexsort((sizes.prod(axis=1), aspect))
    picks = [sizes[order[round(q * (len(order) - 1))]] for q in (0.5, 0.94, 0.06)]
    return list(dict.fromkeys((int(h), int(w)) for h, w in picks))


def preview_requests(class_names: Sequence[str], sizes: Sequence[tuple[int, int]]) -> list[SampleRequest]:
    """One image of each of the first ten classes at each size."""
    pairs = [(label, size) for size in sizes for label in range(min(len(class_names), FEW))]
    return [SampleRequest(label, size, number) for number, (label, size) in enumerate(pairs)]


def some_captions(images: ImageSource) -> list[str]:
    """Up to ten, the first that are not alike among those of a hundred images."""
    found = (cast(Captioned, images).caption(index) for index in range(min(len(images.labels), 100)))
    return list(dict.fromkeys(found))[:FEW]


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
    if not len(labels):
        raise ValueError("labels=[]: give at least one class")
    numbers = [label_number(label, class_names) for label in labels]
    wanted = _in_order(numbers, sizes, n)
    return [SampleRequest(label, size, number) for number, (label, size) in enumerate(wanted)]


def prompt_requests(prompts: Sequence[str], sizes: Sequence[Size], n: int) -> list[SampleRequest]:
    """n images of each prompt at each size, numbered as those of `make_requests`."""
    if not len(prompts) or not all(isinstance(prompt, str) and prompt.strip() for prompt in prompts):
        raise ValueError(f'prompts={list(prompts)}: give at least one text, such as prompts=["a red circle"]')
    wanted = _in_order(range(len(prompts)), sizes, n)
    return [SampleRequest(label, size, number, prompts[label]) for number, (label, size) in enumerate(wanted)]


def requests_of(
    model: LoadedModel, labels: Any, prompts: Any, sizes: Sequence[Size], n: int
) -> tuple[list[SampleRequest], Sequence[str]]:
    """n images of each label, or prompt of a model of text, at each size; and the names of the labels.

    Of classes the first ten are taken, if no label is given.
    """
    if model.net.text_width is None:
        if prompts is not None:
            raise ValueError("prompts: this model knows classes and no text; give labels=[...]")
        labels = model.class_names[:FEW] if labels is None else labels
        given = [labels] if isinstance(labels, int | str) else labels
        return make_requests(given, sizes, n, model.class_names), model.class_names
    if labels is not None:
        raise ValueError("labels: this model reads captions; give prompts=[...]")
    texts = [prompts] if isinstance(prompts, str) else list(prompts or ())
    return prompt_requests(texts, sizes, n), texts


def _in_order(labels: Sequence[int], sizes: Sequence[Size], n: int) -> list[tuple[int, Size]]:
    checks.integer("n", n, 1)
    return [(label, size) for size in sizes for _ in range(n) for label in labels]


def requests_by_rule(
    n: int, labels: str, size: Size | str, classes: int, seed: int, data: ImageSet | None, of_text: bool = False
) -> list[SampleRequest]:
    """n images, numbered, of a size (height, width) in pixels.

    Their labels are `random`, uniform and independent, as DiT, SiT and NiT; `balanced`, each class equally often, in
    random order; or, as the size can be, `data`: those of images of the data set in a fixed random order. Of a model
    of text also their prompts are the captions of these, and nothing else.
    """
    checks.one_of("labels", labels, LABEL_RULES)
    checks.integer("n", n, 1)
    if of_text and labels != DATA:
        raise ValueError(f"labels={labels}: this model reads captions, which are those of its data; set labels=data")
    rng, sizes, prompts = Rng(seed, "evaluate"), np.array([size] * n), dict[int, str]()
    numbers: np.ndarray
    if DATA in (labels, size):
        if data is None or data.labels is None:
            raise ValueError("sizes=data and labels=data need the data set of the run")
        rows = np.resize(rng.permutation("data", len(data)).numpy(), n)
        numbers, sizes = data.labels[rows], data.sizes[rows] if size == DATA else sizes
        if of_text:
            prompts = {k: data.source.caption(int(row)) for k, row in enumerate(rows)}  # type: ignore[attr-defined]
    if labels == "random":
        numbers = np.array([rng.at(k).integer("label") % classes for k in range(n)])
    elif labels == "balanced":
        numbers = rng.permutation("labels", n).numpy() % classes
    pairs = zip(numbers, sizes, strict=True)
    rows_of = ((int(label), (int(h), int(w)), k, prompts.get(k)) for k, (label, (h, w)) in enumerate(pairs))
    return [SampleRequest(*row) for row in rows_of]


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
