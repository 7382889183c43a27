"""One image file: opened by its content, within a limit of pixels, and its values as 8-bit RGB.

Bits that a format declares are taken as declared. One channel of wider numbers does not say what its white is, so
that this is read off the largest value, see `WHITES`; a file that leaves it open is refused rather than shown
nearly black. Metadata never decide whether a file is an image: text and colour profiles may be large, and EXIF data
that cannot be read rotate nothing.
"""

import contextlib
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import IO

import numpy as np
from PIL import Image, PngImagePlugin

PngImagePlugin.MAX_TEXT_CHUNK = PngImagePlugin.MAX_TEXT_MEMORY
"""Text or a colour profile of a PNG may have 64 MiB in one piece, not only in all."""

WIDE = ("I", "F")
"""Modes that begin so hold whole numbers of 16 or 32 bits, or floats."""

WHITES = {"I": (255, 2**16 - 1, 2**31 - 1), "F": (1, 255, 2**16 - 1)}
"""What may be white, by the first letter of the mode: the smallest that no value exceeds."""

PHOTOMETRIC = 262
"""Tag of TIFF; 0: white is zero, which Pillow heeds in 8 bits only."""

DARK = 16
"""Values of less than this part of white leave open whether that is white; the smallest white is exempt."""


@contextlib.contextmanager
def opened(
    file: Path | IO[bytes],
    max_pixels: int | None = None,
    key: str = "data.max_pixels",
    least: tuple[int, int] | None = None,
) -> Iterator[Image.Image]:
    """An image in a file or a stream, judged by its content, its header read; all that fails within is an OSError.

    Images of more than `max_pixels`, which the user sets by a key, are refused; `None`: those that Pillow takes for
    decompression bombs, which are above 178,956,970 pixels. A JPEG of at least twice `least` (width, height)
    is decoded at a half, a quarter or an eighth of its size, by fewer coefficients of its cosine transform.
    """
    if max_pixels is not None and Image.MAX_IMAGE_PIXELS is not None:
        Image.MAX_IMAGE_PIXELS = max(Image.MAX_IMAGE_PIXELS, max_pixels)  # Pillow has one limit for all threads
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(file) as picture:  # damaged EXIF data, large images
            if max_pixels is not None and picture.width * picture.height > max_pixels:
                pixels = f"{picture.height} x {picture.width} pixels"
                raise OSError(f"its {pixels} are more than {key}={max_pixels}")
            if picture.mode.startswith(WIDE) and getattr(picture, "tag_v2", {}).get(PHOTOMETRIC) == 0:
                raise OSError(f"its white is 0, which is not read in mode {picture.mode}; convert it to 8 bits")
            if least is not None:
                picture.draft(None, least)
            yield picture
    except OSError:
        raise
    except Image.DecompressionBombError as error:
        limit = str(error).partition(", could be")[0]
        raise OSError(f"{limit}; {key}=N takes images of up to N pixels") from None
    except Exception as error:  # decoders raise ValueError, SyntaxError, EOFError, struct.error and more
        raise OSError(str(error) or type(error).__name__) from None


def format_notes(picture: Image.Image, file: Path) -> list[str]:
    """What is unusual about the format of a file, in the words of the report."""
    notes = [] if picture.mode == "RGB" else [f"converted from {picture.mode} to RGB"]
    suffix = Image.registered_extensions().get(file.suffix.lower())
    if suffix != picture.format and not {suffix, picture.format} <= {"JPEG", "MPO"}:
        notes.append(f"of format {picture.format} with the suffix {file.suffix}")
    return notes


def on_white(picture: Image.Image) -> Image.Image:
    """RGB, with transparency laid on white."""
    clear = picture.info.get("transparency")
    if picture.mode.startswith(WIDE):
        rgb = as_stored(picture)
        if clear is not None:
            rgb.paste("white", mask=Image.fromarray(np.asarray(picture) == clear))
        return rgb
    if picture.mode in ("RGBA", "RGBa", "LA", "PA") or clear is not None:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return _rgb(picture)


def as_stored(picture: Image.Image) -> Image.Image:
    """RGB as `convert("RGB")` makes it, which drops transparency; wider numbers are scaled first."""
    return _rgb(_scaled(picture) if picture.mode.startswith(WIDE) else picture)


def _rgb(picture: Image.Image) -> Image.Image:
    """As `convert("RGB")`, which copies what is RGB already."""
    picture.load()
    return picture if picture.mode == "RGB" else picture.convert("RGB")


def _scaled(picture: Image.Image) -> Image.Image:
    """One channel of wide numbers as 8-bit grey."""
    values = np.asarray(picture, dtype=np.float64)
    low, high = values.min(), values.max()
    whites = WHITES[picture.mode[0]]
    white = next((white for white in whites if high <= white), None)
    if not low >= 0 or white is None or (white != whites[0] and high < white / DARK):
        raise OSError(
            f"its values, {low:g} to {high:g} in mode {picture.mode}, do not tell what is white; convert it to 8 bits"
        )
    return Image.fromarray((values * (255 / white)).round().astype(np.uint8))
