from __future__ import annotations

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from genfound.data.images.folder import open_rgb
from genfound.data.images.imagenet import decode
from genfound.data.images.opening import opened

RAMP = np.linspace(0, 1, 256).reshape(16, 16)
GREY = np.arange(256).reshape(16, 16)


def saved(folder: Path, values: np.ndarray, suffix: str = "tif") -> Path:
    Image.fromarray(values).save(folder / f"ramp.{suffix}")
    return folder / f"ramp.{suffix}"


@pytest.mark.parametrize("read", [open_rgb, decode])
@pytest.mark.parametrize(
    "values",
    [
        RAMP.astype(np.float32), (RAMP * 255).astype(np.float32), (RAMP * 65535).astype(np.float32),
        GREY.astype(np.int32), (RAMP * 65535).round().astype(np.int32), (RAMP * (2**31 - 1)).astype(np.int32),
        GREY.astype(np.uint16), (GREY * 257).astype(np.uint16), (GREY * 257).astype(">u2"),
    ],
    ids=["unit floats", "floats to 255", "floats to 65535", "32 bits to 255", "32 bits to 65535", "all 32 bits",
         "16 bits to 255", "16 bits", "16 bits, big end first"],
)  # fmt: skip
def test_wide_numbers_are_scaled_by_what_they_hold(
    tmp_path: Path, values: np.ndarray, read: Callable[[Path], Image.Image]
) -> None:
    seen = np.asarray(read(saved(tmp_path, values))).astype(int)
    assert np.abs(seen - GREY[..., None]).max() <= 1


@pytest.mark.parametrize("read", [open_rgb, decode])
@pytest.mark.parametrize(
    "values",
    [
        (RAMP * 5).astype(np.float32), (RAMP - 0.5).astype(np.float32), np.where(RAMP < 0.5, np.nan, RAMP).astype("f4"),
        (RAMP * 1e6).astype(np.float32), (RAMP * 4095).astype(np.uint16), (RAMP * 1e6).astype(np.int32),
        (GREY - 99).astype(np.int32),
    ],
    ids=["floats to 5", "negative floats", "nan", "large floats", "12 bits in 16", "20 bits in 32", "negative"],
)  # fmt: skip
def test_wide_numbers_that_do_not_tell_what_is_white_are_refused(
    tmp_path: Path, values: np.ndarray, read: Callable[[Path], Image.Image]
) -> None:
    with pytest.raises(OSError, match=r"its values, .* in mode (F|I|I;16), do not tell what is white"):
        read(saved(tmp_path, values))


@pytest.mark.parametrize("read", [open_rgb, decode])
def test_wide_numbers_whose_white_is_zero_are_refused(tmp_path: Path, read: Callable[[Path], Image.Image]) -> None:
    Image.fromarray((GREY * 257).astype(np.uint16)).save(tmp_path / "x.tif", tiffinfo={262: 0})
    with pytest.raises(OSError, match=r"its white is 0, which is not read in mode I;16"):
        read(tmp_path / "x.tif")


@pytest.mark.parametrize("mode", ["1", "L", "P", "RGB", "CMYK", "YCbCr", "LAB"])
def test_modes_of_eight_bits_keep_their_colours(tmp_path: Path, mode: str) -> None:
    picture = Image.new("RGB", (16, 16), "white")
    picture.paste("black", (0, 0, 16, 8))
    lab = Image.fromarray(np.where(np.asarray(picture) > 0, [255, 0, 0], 0).astype(np.uint8), "LAB")
    (lab if mode == "LAB" else picture.convert(mode)).save(tmp_path / "x.tif")
    with Image.open(tmp_path / "x.tif") as stored:
        assert stored.mode == mode
    for read in (open_rgb, decode):
        assert np.abs(np.asarray(read(tmp_path / "x.tif")).astype(int) - np.asarray(picture)).max() <= 2


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "L", "RGB", "I;16"])
def test_transparency_is_laid_on_white_in_folders_and_dropped_in_trees(tmp_path: Path, mode: str) -> None:
    black = np.zeros((8, 8), np.uint16)
    picture = Image.fromarray(black) if mode == "I;16" else Image.new("LA" if mode == "LA" else "RGBA", (8, 8), 0)
    if mode in ("P", "L", "RGB"):
        picture = Image.new(mode, (8, 8), 0)
        if mode == "P":
            picture.putpalette([0, 0, 0])
    clear = {"P": 0, "L": 0, "RGB": (0, 0, 0), "I;16": 0}.get(mode)
    picture.save(tmp_path / "x.png", **({} if clear is None else {"transparency": clear}))
    assert (np.asarray(open_rgb(tmp_path / "x.png")) == 255).all()
    assert (np.asarray(decode(tmp_path / "x.png")) == 0).all()


def with_text(text: str) -> Callable[[Path], None]:
    info = PngImagePlugin.PngInfo()
    info.add_text("workflow", text, zip=True)
    return lambda file: Image.new("RGB", (8, 6), "red").save(file, "PNG", pnginfo=info)


def with_exif(suffix: str) -> Callable[[Path], None]:
    return lambda file: Image.new("RGB", (8, 6), "red").save(file, suffix, exif=b"Exif\0\0garbage!", quality=95)


@pytest.mark.parametrize(
    "write",
    [
        with_text("x" * (2 << 20)),
        lambda file: Image.new("RGB", (8, 6), "red").save(file, "PNG", icc_profile=b"\0" * (2 << 20)),
        with_exif("PNG"), with_exif("WEBP"), with_exif("JPEG"),
    ],
    ids=["text", "profile", "exif of a png", "exif of a webp", "exif of a jpeg"],
)  # fmt: skip
def test_metadata_do_not_decide_whether_a_file_is_an_image(tmp_path: Path, write: Callable[[Path], None]) -> None:
    write(tmp_path / "x")
    for read in (open_rgb, decode):
        picture = read(tmp_path / "x")
        assert picture.size == (8, 6)
        assert np.abs(np.asarray(picture).astype(int) - [255, 0, 0]).max() <= 4


def large(file: Path) -> Path:
    """20,000 x 10,000 pixels of one bit, more than Pillow opens."""
    Image.new("1", (20_000, 10_000)).save(file)
    return file


def test_the_limit_of_pixels_can_be_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", Image.MAX_IMAGE_PIXELS)
    file = large(tmp_path / "large.png")
    with pytest.raises(OSError, match=r"200000000 pixels.* data\.max_pixels=N takes images of up to N pixels"):
        opened(file).__enter__()
    with pytest.raises(OSError, match=r"10000 x 20000 pixels are more than key=199999999"):
        opened(file, 199_999_999, "key").__enter__()
    with opened(file, 200_000_000) as picture:
        assert picture.size == (20_000, 10_000)


def test_a_small_limit_of_pixels_is_kept_too(tmp_path: Path) -> None:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6)).save(stream, "PNG")
    (tmp_path / "x.png").write_bytes(stream.getvalue())
    assert open_rgb(tmp_path / "x.png", 48).size == decode(tmp_path / "x.png", 48).size == (8, 6)
    for read in (open_rgb, decode):
        with pytest.raises(OSError, match=r"its 6 x 8 pixels are more than data\.max_pixels=47"):
            read(tmp_path / "x.png", 47)
