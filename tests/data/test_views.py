from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from PIL import Image

from genfound.data.views import center_crop, native_size, resize

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
