from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from genfound.data.images.views import (
    FEWEST_TOKENS,
    Entries,
    ImageViews,
    center_crop,
    flexible_size,
    native_size,
    published_flexible_size,
    published_size,
    resize,
)

SIDES = st.integers(1, 3000)
UNITS = st.sampled_from([1, 2, 8, 16, 32])
TOKENS = st.integers(1, 5000)


@settings(max_examples=300)
@given(SIDES, SIDES, UNITS, TOKENS)
@example(15, 700, 16, 1024)
@example(3000, 1, 32, 4)
def test_a_native_size_is_whole_tokens_within_the_budget(height: int, width: int, unit: int, tokens: int) -> None:
    new_height, new_width = native_size(height, width, unit, tokens)
    assert new_height % unit == new_width % unit == 0
    assert new_height >= unit
    assert new_width >= unit
    assert (new_height // unit) * (new_width // unit) <= tokens


@settings(max_examples=300)
@given(SIDES, SIDES, UNITS, TOKENS)
def test_nothing_is_enlarged_except_to_one_unit(height: int, width: int, unit: int, tokens: int) -> None:
    new_height, new_width = native_size(height, width, unit, tokens)
    assert new_height <= max(height, unit)
    assert new_width <= max(width, unit)


@settings(max_examples=200)
@given(SIDES, SIDES, UNITS)
def test_what_fits_is_rounded_down_only(height: int, width: int, unit: int) -> None:
    expected = tuple(max(side // unit, 1) * unit for side in (height, width))
    assert native_size(height, width, unit, 3000 * 3000) == expected


@settings(max_examples=200)
@given(SIDES, SIDES, UNITS, TOKENS)
def test_height_and_width_are_treated_alike(height: int, width: int, unit: int, tokens: int) -> None:
    ours, turned = native_size(height, width, unit, tokens), native_size(width, height, unit, tokens)
    if height != width and ours[0] != ours[1]:
        assert ours == turned[::-1]


@settings(max_examples=200)
@given(st.integers(200, 3000), st.integers(200, 3000), st.integers(64, 1024))
def test_a_reduced_image_keeps_its_area_and_aspect(height: int, width: int, tokens: int) -> None:
    unit = 8
    if height / width > 2 or width / height > 2 or (height // unit) * (width // unit) <= tokens:
        return
    new_height, new_width = native_size(height, width, unit, tokens)
    side = math.isqrt(tokens)
    rows, columns = side * math.sqrt(height / width), side * math.sqrt(width / height)
    assert rows - 1.01 <= new_height / unit <= rows + 1e-6
    assert columns - 1.01 <= new_width / unit <= columns + 1e-6


def picture(height: int, width: int) -> Image.Image:
    pixels = np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def test_resize_is_two_passes_width_first() -> None:
    image = picture(50, 71)
    ours = resize(image, 32, 32, Image.Resampling.BICUBIC)
    width_first = image.resize((32, 50), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
    height_first = image.resize((71, 32), Image.Resampling.BICUBIC).resize((32, 32), Image.Resampling.BICUBIC)
    assert ours.size == (32, 32)
    assert np.array_equal(np.asarray(ours), np.asarray(width_first))
    assert not np.array_equal(np.asarray(ours), np.asarray(height_first))


@settings(max_examples=40)
@given(st.integers(1, 150), st.integers(1, 150), st.integers(1, 40))
def test_a_centre_crop_is_a_square_of_the_wanted_size(height: int, width: int, size: int) -> None:
    assert center_crop(picture(height, width), size).size == (size, size)


def test_a_centre_crop_takes_the_middle() -> None:
    pixels = np.zeros((32, 96, 3), dtype=np.uint8)
    pixels[:, 32:64] = 200
    assert (np.asarray(center_crop(Image.fromarray(pixels), 32)) == 200).all()


@pytest.mark.parametrize("size", [16, 33])
def test_a_square_of_the_wanted_size_is_unchanged(size: int) -> None:
    image = picture(size, size)
    assert np.array_equal(np.asarray(center_crop(image, size)), np.asarray(image))


@settings(max_examples=200)
@given(SIDES, SIDES, st.sampled_from([8, 16]), st.integers(2, 20))
@example(17, 8192, 16, 16)
@example(16, 4096, 16, 16)
def test_a_flexible_size_is_whole_tokens_of_at_most_the_square(height: int, width: int, unit: int, side: int) -> None:
    ours = flexible_size(height, width, unit, unit * side)
    assert all(s >= unit and s % unit == 0 for s in ours)
    assert (ours[0] // unit) * (ours[1] // unit) <= side**2
    published = published_flexible_size(height, width, unit, unit * side)
    if min(published) and published[0] * published[1] <= (unit * side) ** 2:
        assert ours == published


def test_published_sizes_may_lose_a_side() -> None:
    assert published_size(25, 200_000, 32, 2048) == (0, 183_168)
    assert published_flexible_size(17, 8192, 16, 256) == (0, 5616)


def test_the_crop_to_a_size_keeps_the_middle_and_the_aspect() -> None:
    pixels = np.zeros((40, 120, 3), dtype=np.uint8)
    pixels[:, 40:80] = 255
    image = Image.fromarray(pixels)
    assert np.asarray(center_crop(image, 20, 20)).min() > 250
    assert np.array_equal(np.asarray(center_crop(image, 40, 120)), pixels)
    assert np.asarray(center_crop(image, 10, 60)).shape == (10, 60, 3)


VIEWS = ("native", "square", "squares", "mixed", "flexible")
MANY = st.lists(st.tuples(st.integers(1, 300), st.integers(1, 300)), min_size=1, max_size=12)


@settings(max_examples=60)
@given(st.sampled_from(VIEWS), MANY)
def test_a_pass_shows_every_image_equally_often(view: str, sizes: list[tuple[int, int]]) -> None:
    views = ImageViews(view, 64, 8, 500)
    entries = views.entries(*zip(*sizes, strict=True))
    items = views.items(entries)
    shown = np.bincount(entries.images[items], minlength=len(sizes))
    assert set(shown.tolist()) <= {0, len(views.slots)}
    assert view == "flexible" or (shown > 0).all()
    tokens = (entries.sizes // 8).prod(axis=1)
    assert (entries.sizes % 8 == 0).all() and tokens.min(initial=500) >= 1
    if view == "flexible":
        assert tokens.min(initial=FEWEST_TOKENS) >= FEWEST_TOKENS
        assert tokens.max(initial=0) <= 64
        crops = entries.images[items[len(items) // 2 :]][entries.rules[items[len(items) // 2 :]] == 1]
        assert set(crops.tolist()) == {i for i, size in enumerate(sizes) if min(size) > 64}


@settings(max_examples=30)
@given(st.sampled_from(VIEWS), MANY)
def test_what_is_shown_has_the_planned_size(view: str, sizes: list[tuple[int, int]]) -> None:
    views = ImageViews(view, 32, 8, 60)
    entries = views.entries(*zip(*sizes, strict=True))
    for image, rule, size in zip(*entries, strict=True):
        assert views.render(picture(*sizes[image]), int(rule), size).shape == (*size, 3)


def test_entries_of_more_rules_than_a_view_needs_are_chosen_by_name() -> None:
    mixed = ImageViews("mixed", 32, 8, 500)
    entries = mixed.entries([50, 70], [60, 80])
    assert entries.images.tolist() == [0, 0, 0, 1, 1, 1]
    assert mixed.items(entries).tolist() == [0, 3, 1, 4, 2, 5]
    squares = ImageViews("squares", 32, 8, 500)
    assert squares.items(entries, list(mixed.rules)).tolist() == [1, 4, 2, 5]
    square = ImageViews("square", 64, 8, 500)
    assert square.items(entries, list(mixed.rules)).tolist() == [2, 5]
    none = Entries(*(column[:0] for column in entries))
    assert mixed.items(none).tolist() == []


@pytest.mark.parametrize(
    ("size", "legal"), [(250, "224 and 256"), (33, "32 and 64"), (31, "32"), (1, "32"), (511, "480 and 512")]
)
def test_the_nearest_legal_sizes_are_named(size: int, legal: str) -> None:
    words = rf"data\.size={size} must be a multiple of 32 pixels \(tokenizer stride x patch\); "
    for view in ("square", "mixed", "flexible"):
        with pytest.raises(ValueError, match=rf"{words}the nearest legal sizes are {legal}$"):
            ImageViews(view, size, 32, 100)


OPTIONS = {"view": "square", "size": 32, "max_tokens": 64, "max_image_tokens": None, "holdout": None}


def test_the_limit_is_the_smaller_one() -> None:
    assert ImageViews.of(OPTIONS, 8).max_tokens == 64
    assert ImageViews.of({**OPTIONS, "max_image_tokens": 20}, 8).max_tokens == 20
    assert ImageViews.of({**OPTIONS, "max_image_tokens": 99}, 8).max_tokens == 64


@pytest.mark.parametrize(
    ("key", "value", "least"),
    [("size", 0, "1"), ("size", -32, "1"), ("size", None, "1"), ("max_tokens", 0, "1"), ("max_tokens", None, "1"),
     ("max_image_tokens", -5, "1, or null"), ("max_image_tokens", 0, "1, or null"), ("holdout", 0, "2, or null"),
     ("holdout", 1, "2, or null"), ("holdout", 0.1, "2, or null"), ("holdout", "ten", "2, or null")],
)  # fmt: skip
def test_numbers_that_are_too_small_are_named(key: str, value: object, least: str) -> None:
    given = "null" if value is None else value
    with pytest.raises(ValueError, match=rf"^data\.{key}={given} must be a whole number of at least {least}$"):
        ImageViews.of({**OPTIONS, key: value}, 8)
