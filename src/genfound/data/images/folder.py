"""A folder of images: root/<class>/<file>, any sizes, any format that Pillow reads.

Files are judged by content, not by name. All are decoded once when the folder is first seen, so that a file
that cannot be read is reported before training and never met during it; see `index`.
"""

import contextlib
import functools
from pathlib import Path

from PIL import Image, ImageOps

from genfound.config.checks import integer
from genfound.data.images.index import FileInfo, ImageFiles, index_file, known
from genfound.data.images.names import class_folders
from genfound.data.images.opening import format_notes, on_white, opened
from genfound.data.images.views import ImageViews

ORIENTATION = 0x0112


class ImageFolder(ImageFiles):
    """Real images at their native sizes, centre-cropped, or in several views.

    EXIF rotation is applied; palettes, grey, CMYK and the like are converted to RGB, one channel of 16 or 32 bits by
    the rule of `opening`; transparency is laid on white; of an animation the first frame is used.

    Args:
        root: folder with one folder per class.
        holdout: of each class every holdout-th image validates; `None` holds none out.
        max_pixels: files of more pixels are skipped; `None`: those that Pillow takes for decompression bombs.
    """

    def __init__(
        self, *, root: str, views: ImageViews, holdout: int | None, max_pixels: int | None, split: str, index: str
    ) -> None:
        integer("data.max_pixels", max_pixels, 1, or_null=True)
        self.max_pixels, folder = max_pixels, Path(root)
        class_names = class_folders(folder)
        cache = index_file(Path(index), folder, f"image_folder {max_pixels}")
        found = known(folder, class_names, cache, functools.partial(examine, max_pixels=max_pixels))
        super().__init__(folder, class_names, found, views, holdout, split)

    def picture(self, number: int, least: tuple[int, int] | None) -> Image.Image:
        """One of the images, RGB."""
        file = self.root / self.files[number]
        try:
            return open_rgb(file, self.max_pixels, least)
        except OSError as error:
            raise ValueError(f"{file} could be read when training began and cannot now: {error}") from None


def open_rgb(file: Path, max_pixels: int | None = None, least: tuple[int, int] | None = None) -> Image.Image:
    """Decode a file by its content, upright as its EXIF tag says, if that can be read, as RGB."""
    with opened(file, max_pixels, least=least) as picture:
        picture.load()
        turned: Image.Image = picture
        with contextlib.suppress(Exception):  # the parser of EXIF data raises SyntaxError, struct.error and more
            if picture.getexif().get(ORIENTATION, 1) != 1:
                turned = ImageOps.exif_transpose(picture)
        return on_white(turned)


def examine(file: Path, max_pixels: int | None) -> FileInfo:
    """What is found in a file; of more pixels than are allowed it is an OSError."""
    picture = open_rgb(file, max_pixels)
    with opened(file, max_pixels) as original:
        notes = format_notes(original, file)
        with contextlib.suppress(Exception):  # as above
            if original.getexif().get(ORIENTATION, 1) != 1:
                notes.append("rotated upright by their EXIF tag")
        if getattr(original, "n_frames", 1) > 1:
            notes.append("animated, of which the first frame is used")
    return FileInfo(picture.height, picture.width, notes)
