"""A folder of images: root/<class>/<file>, any sizes, any format that Pillow reads.

Files are judged by content, not by name. All are decoded once when the folder is first seen, so that a file
that cannot be read is reported before training and never met during it; the result is kept beside the
runs, keyed by path, size and time of change, and later starts look only at new files.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from genfound.data import files
from genfound.data.files import Look, Viewed
from genfound.data.views import Views

ORIENTATION = 0x0112


class ImageFolder(Viewed):
    """Real images at their native sizes, centre-cropped, or in several views.

    EXIF rotation is applied; palettes, grey, 16-bit and CMYK images are converted to RGB; transparency is
    laid on white; of an animation the first frame is used.

    Args:
        root: folder with one folder per class.
        holdout: of each class every holdout-th image validates; `None` holds none out.
        view: see `Views`.
        size: side of square views in pixels.
        max_tokens: of one pack.
        max_image_tokens: larger images are reduced to it; `None` is `max_tokens`.
        unit: pixels per token side.
        split: `train` or `val`.
        index: folder for what is remembered about the files.

    Raises:
        FileNotFoundError: the root, or class folders in it, or readable images do not exist.
        ValueError: unknown view, or a square that does not divide into tokens.
    """

    def __init__(
        self,
        *,
        root: str,
        holdout: int | None,
        view: str,
        size: int,
        max_tokens: int,
        max_image_tokens: int | None,
        unit: int,
        split: str,
        seed: int,
        index: str,
    ) -> None:
        views = Views.of(
            {"view": view, "size": size, "max_tokens": max_tokens, "max_image_tokens": max_image_tokens,
             "holdout": holdout}, unit,
        )  # fmt: skip
        class_names = files.class_folders(Path(root))
        cache = files.index_file(Path(index), Path(root), "image_folder")
        found = files.known(Path(root), class_names, cache, _examine)
        super().__init__(Path(root), found, found.split(holdout, split), class_names, views)

    def picture(self, number: int) -> Image.Image:
        """One of the images, RGB.

        Raises:
            ValueError: the file has become unreadable since the folder was indexed.
        """
        file = self.root / self.files[number]
        try:
            return open_rgb(file)
        except OSError as error:
            raise ValueError(f"{file} could be read when training began and cannot now: {error}") from None


def open_rgb(file: Path) -> Image.Image:
    """Decode a file by its content, upright, as RGB.

    Raises:
        OSError: it cannot be decoded (truncated, empty, not an image).
    """
    with files.decoding(), Image.open(file) as picture:
        picture.load()
        return _rgb(ImageOps.exif_transpose(picture))


def _rgb(picture: Image.Image) -> Image.Image:
    if picture.mode.startswith("I"):  # 16-bit grey
        grey = np.asarray(picture, dtype=np.float64)
        return Image.fromarray((grey / 257).round().clip(0, 255).astype(np.uint8)).convert("RGB")
    if picture.mode in ("RGBA", "LA", "PA") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        white = Image.new("RGBA", picture.size, "white")
        return Image.alpha_composite(white, picture).convert("RGB")
    return picture.convert("RGB")


def _examine(file: Path) -> Look:
    """Decode a file once."""
    picture = open_rgb(file)
    with files.decoding(), Image.open(file) as original:
        return Look(picture.height, picture.width, _notes(original, file))


def _notes(original: Image.Image, file: Path) -> list[str]:
    """What is unusual about a file, in the words of the report."""
    notes = files.format_notes(original, file)
    if original.getexif().get(ORIENTATION, 1) != 1:
        notes.append("rotated upright by their EXIF tag")
    if getattr(original, "n_frames", 1) > 1:
        notes.append("animated, of which the first frame is used")
    return notes
