from __future__ import annotations

import zlib
from typing import Any

import numpy as np
import pytest

from genfound.data.images.shapes import CLASSES, COLOURS, Shapes, polygon


def shapes(**options: Any) -> Shapes:
    defaults: dict[str, Any] = {
        "images": 400, "holdout": 60, "sides": [12, 16, 20], "view": "native", "size": 16,
        "max_tokens": 400, "unit": 2, "split": "train", "seed": 0,
    }  # fmt: skip
    return Shapes(**{**defaults, **options})


def test_an_image_is_a_function_of_seed_and_index() -> None:
    source, again = shapes(), shapes()
    backwards = [again.image(i) for i in reversed(range(20))][::-1]
    for i, image in enumerate(backwards):
        assert np.array_equal(source.image(i), image)
        assert np.array_equal(source.image(i), image)
    assert not np.array_equal(shapes(seed=1).sizes, source.sizes)


def test_more_images_begin_with_the_same_ones() -> None:
    few, many = shapes(images=10, holdout=0), shapes(images=400, holdout=0)
    assert np.array_equal(few.labels, many.labels[:10])
    assert np.array_equal(few.sizes, many.sizes[:10])
    assert all(np.array_equal(few.image(i), many.image(i)) for i in range(10))


def test_images_have_the_planned_sizes() -> None:
    source = shapes()
    for i in range(40):
        image = source.image(i)
        assert image.shape == (*source.sizes[i], 3)
        assert image.dtype == np.uint8


def test_every_pair_of_sides_occurs_and_no_other() -> None:
    source = shapes(images=2000)
    assert set(map(tuple, source.sizes.tolist())) == {(h, w) for h in (12, 16, 20) for w in (12, 16, 20)}


def test_every_class_occurs_about_equally_often() -> None:
    source = shapes(images=5000)
    counts = np.bincount(source.labels, minlength=10)
    assert source.class_names == list(CLASSES)
    assert len(counts) == len(CLASSES) == 10
    assert counts.min() > 400


def test_train_and_val_are_disjoint() -> None:
    train, val = shapes(), shapes(split="val")
    assert (len(train.labels), len(val.labels)) == (400, 60)
    seen = {(train.sizes[i].tobytes(), train.image(i).tobytes()) for i in range(400)}
    assert all((val.sizes[i].tobytes(), val.image(i).tobytes()) not in seen for i in range(60))
    whole = shapes(images=460, holdout=0)
    assert np.array_equal(val.image(0), whole.image(400))


def test_the_square_view() -> None:
    source = shapes(view="square", size=18)
    assert (source.sizes == 18).all()
    assert source.image(3).shape == (18, 18, 3)
    assert np.array_equal(source.labels, shapes().labels)


def test_the_object_differs_from_its_background() -> None:
    source = shapes()
    for i in range(30):
        image = source.image(i).astype(int)
        assert np.ptp(image, axis=(0, 1)).max() > 80


def test_fingerprints_change_with_the_drawings_only() -> None:
    base = shapes().fingerprint
    assert shapes(max_tokens=999).fingerprint == base
    assert shapes(split="val").fingerprint == base
    others = [shapes(seed=1), shapes(images=401), shapes(sides=[12, 16]), shapes(view="square")]
    assert len({base, *(s.fingerprint for s in others)}) == 5


def test_the_report_counts() -> None:
    (line,) = shapes().report()
    assert "400 drawings of 10 classes, 12 x 12 to 20 x 20 pixels" in line


@pytest.mark.parametrize(("side", "unit", "legal"), [(13, 2, "12 and 14"), (3, 8, "8 and 8")])
def test_a_side_that_does_not_divide_is_refused(side: int, unit: int, legal: str) -> None:
    with pytest.raises(ValueError, match=rf"side of {side} pixels.*tokens of {unit}.*{legal}"):
        shapes(sides=[16, side], unit=unit)


def test_too_many_tokens_are_refused() -> None:
    with pytest.raises(ValueError, match=r"20 pixels makes 100 tokens, more than data\.max_tokens=99"):
        shapes(max_tokens=99)


def test_an_unknown_view_is_refused() -> None:
    with pytest.raises(ValueError, match=r"data\.view=round is unknown; choose native or square"):
        shapes(view="round")


def test_distance_to_a_polygon() -> None:
    square = polygon([(-1, -1), (1, -1), (1, 1), (-1, 1)])
    points = np.array([[0.0, 0.0], [0.5, 0.0], [2.0, 0.0], [2.0, 2.0], [1.0, 0.3]])
    np.testing.assert_allclose(square(points), [-1, -0.5, 1, np.sqrt(2), 0], atol=1e-12)


def test_anchor() -> None:
    """A change of these bytes makes every run on the drawings another run."""
    source = shapes()
    drawings = [(tuple(source.sizes[i].tolist()), zlib.crc32(source.image(i).tobytes())) for i in (0, 1, 123)]
    assert drawings == [((20, 12), 732683722), ((20, 12), 2365479522), ((12, 16), 3606683943)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"images": 0}, r"data\.images=0 must be a whole number of at least 1"),
        ({"holdout": -1}, r"data\.holdout=-1 must be a whole number of at least 0"),
        ({"view": "square", "size": 0}, r"data\.size=0 must be a whole number of at least 1"),
        ({"sides": [12, -2]}, r"data\.sides=-2 must be a whole number of at least 1"),
    ],
)
def test_numbers_that_are_too_small_are_named(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        shapes(**options)


def test_a_caption_names_the_colour_and_the_shape_of_its_image() -> None:
    source = shapes()
    captions = [source.caption(index) for index in range(40)]
    for index, caption in enumerate(captions):
        _, colour, shape = caption.split()
        assert shape == source.class_names[source.labels[index]]
        assert (source.image(index) == np.array(COLOURS[colour], dtype=np.uint8)).all(axis=-1).any()
    assert len({caption.split()[1] for caption in captions}) == len(COLOURS)
