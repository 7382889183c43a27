"""`data.decode`: how much of a JPEG is decoded."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from genfound.data.images.folder import ORIENTATION, ImageFolder
from genfound.data.images.imagenet import ImageTree
from genfound.data.images.index import ImageFiles
from genfound.data.images.tars import ImageTars
from genfound.data.images.views import ImageViews
from tests.data.images.test_archives import tar
from tests.photographs import photograph

SIZES = {"large": (500, 375), "middle": (120, 90), "png": (500, 375)}
"""Width and height; the views below show them in 64 x 64 pixels, or in as many."""

NEAR = 5
"""Mean of differences, of 255: centre crops halve odd sides in whole pixels, and are half a pixel off."""

OPTIONS: dict[str, Any] = {"holdout": None, "split": "train", "max_pixels": None}
KINDS = {"folder": ImageFolder, "tree": ImageTree, "tars": ImageTars}


def file(name: str, **options: Any) -> bytes:
    stream = io.BytesIO()
    picture = photograph(np.random.default_rng(0), *SIZES[name])
    picture.save(stream, "PNG" if name == "png" else "JPEG", **options)
    return stream.getvalue()


def source(kind: str, root: Path, decode: str, view: str = "square") -> ImageFiles:
    views, options = ImageViews(view, 64, 8, 64, decode), {**OPTIONS, "check": "header"}
    if kind != "tree":
        options.pop("check")
    return KINDS[kind](root=str(root), views=views, index=str(root.parent / "index"), **options)


@pytest.fixture(params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """Of a source of the three pictures below `images`, in the order of their names."""
    folder = tmp_path / "images" / ("train/a" if request.param == "tree" else "a")
    folder.mkdir(parents=True)
    if request.param == "tars":
        tar(folder.parent / "a.tar", {f"a/{name}.jpg": file(name) for name in SIZES})
        folder.rmdir()
    else:
        for name in SIZES:
            (folder / f"{name}.jpg").write_bytes(file(name))
    return str(request.param)


@pytest.mark.parametrize("view", ["square", "native"])
def test_large_jpegs_are_decoded_at_a_part_of_their_size_and_look_alike(kind: str, view: str, tmp_path: Path) -> None:
    exact, dct = (source(kind, tmp_path / "images", decode, view) for decode in ("exact", "dct"))
    assert exact.fingerprint != dct.fingerprint
    assert exact.picture(0, None).size == (500, 375)
    assert dct.picture(0, dct.views.least(dct.sizes[0])).size == (125, 94)  # a quarter
    for number, equal in enumerate([False, True, True]):
        one, two = exact.image(number).astype(int), dct.image(number).astype(int)
        assert one.shape == two.shape and (one == two).all() == equal
        assert np.abs(one - two).mean() < NEAR


def test_teachers_get_what_their_larger_view_needs(tmp_path: Path) -> None:
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/large.jpg").write_bytes(file("large"))
    shown = source("folder", tmp_path / "images", "dct").rendered(0, [(64, 64), (180, 180)])
    whole = source("folder", tmp_path / "images", "exact").rendered(0, [(64, 64), (180, 180)])
    for one, two in zip(shown, whole, strict=True):
        assert one.shape == two.shape and np.abs(one.astype(int) - two).mean() < NEAR


def test_a_turned_jpeg_keeps_enough_pixels(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    (tmp_path / "images/a").mkdir(parents=True)
    (tmp_path / "images/a/large.jpg").write_bytes(file("large", exif=exif))
    dct = source("folder", tmp_path / "images", "dct", "native")
    height, width = dct.sizes[0]
    picture = dct.picture(0, dct.views.least(dct.sizes[0]))
    assert height > width and picture.height >= height and picture.width >= width
    assert (
        np.abs(dct.image(0).astype(int) - source("folder", tmp_path / "images", "exact", "native").image(0)).mean()
        < NEAR
    )


def test_another_way_is_named() -> None:
    with pytest.raises(ValueError, match=r"data\.decode=fast is unknown; choose exact or dct"):
        ImageViews("native", 64, 8, 64, "fast")
