from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genfound.sampling.grid import save_grid
from genfound.sampling.requests import SampleRequest

NAMES = ["zero", "one", "two", "three"]
Size = tuple[int, int]


def drawn(folder: Path, requests: list[SampleRequest]) -> tuple[np.ndarray, list[np.ndarray]]:
    """The grid of images of one colour each, and where each colour is."""
    colours = [(10 + 20 * i, 200 - 15 * i, 90) for i in range(len(requests))]
    images = [np.full((*r.size, 3), c, dtype=np.uint8) for r, c in zip(requests, colours, strict=True)]
    save_grid(folder / "new/grid.png", images, requests, NAMES)
    grid = np.asarray(Image.open(folder / "new/grid.png"))
    return grid, [np.argwhere((grid == c).all(-1)) for c in colours]


def many(sizes: list[Size], labels: list[int], each: int = 1) -> list[SampleRequest]:
    wanted = [(label, size) for size in sizes for _ in range(each) for label in labels]
    return [SampleRequest(label, size, n) for n, (label, size) in enumerate(wanted)]


@pytest.mark.parametrize(("sizes", "factor"), [([(16, 16)], 6), ([(16, 16), (12, 24), (24, 12)], 6), ([(256, 128)], 1)])
def test_images_are_enlarged_by_one_whole_factor(tmp_path: Path, sizes: list[Size], factor: int) -> None:
    requests = many(sizes, [0, 2])
    _, places = drawn(tmp_path, requests)
    for request, place in zip(requests, places, strict=True):
        extent = place.max(0) - place.min(0) + 1
        assert tuple(extent) == (request.size[0] * factor, request.size[1] * factor)
        assert len(place) == extent.prod()  # nothing covers it


def test_columns_are_labels_and_rows_are_sizes_and_repetitions(tmp_path: Path) -> None:
    requests = many([(16, 16), (12, 24)], [3, 1], each=2)
    _, places = drawn(tmp_path, requests)
    corners = {
        (r.label, r.size, n // 2 % 2): place.min(0) for n, (r, place) in enumerate(zip(requests, places, strict=True))
    }
    lefts = {label: {corners[key][1] for key in corners if key[0] == label} for label in (3, 1)}
    tops = {row: {corners[key][0] for key in corners if key[1:] == row} for row in {key[1:] for key in corners}}
    assert all(len(left) == 1 for left in lefts.values())
    assert max(lefts[3]) < min(lefts[1])  # in the order of the requests
    assert all(len(top) == 1 for top in tops.values())
    ordered = [min(tops[size, i]) for size in ((16, 16), (12, 24)) for i in (0, 1)]
    assert ordered == sorted(ordered)
    assert len(set(ordered)) == 4


def test_a_missing_cell_stays_empty(tmp_path: Path) -> None:
    requests = [SampleRequest(0, (16, 16), 0), SampleRequest(1, (16, 16), 1), SampleRequest(1, (16, 16), 2)]
    _, places = drawn(tmp_path, requests)
    assert [len(place) for place in places] == [96 * 96] * 3
    assert places[2].min(0)[1] == places[1].min(0)[1]
    assert places[2].min(0)[0] > places[1].max(0)[0]


def test_there_is_room_for_labels(tmp_path: Path) -> None:
    grid, places = drawn(tmp_path, many([(16, 16)], [0, 1]))
    top, left = places[0].min(0)
    assert (grid[:top, left:].min(-1) < 128).any()  # class names above
    assert (grid[top:, :left].min(-1) < 128).any()  # sizes beside
