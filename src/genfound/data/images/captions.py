"""A folder of captioned images: a file of text beside each image, of the same name but for its suffix (webdataset)."""

import functools
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from genfound.config.checks import integer
from genfound.data.images.folder import ImageFolder, examine
from genfound.data.images.imagenet import SUFFIXES
from genfound.data.images.index import ImageFiles, index_file, known
from genfound.data.images.names import Names
from genfound.data.images.views import ImageViews
from genfound.runtime.files import digest

TEXT = ".txt"


class CaptionedImages(ImageFolder):
    """Images at any depth below a folder, opened as those of `ImageFolder`; they have no classes, and all labels are 0.

    Captions are UTF-8. White space is joined into single blanks.

    Args:
        root: the folder.
        holdout: every holdout-th image validates; `None` holds none out.
        max_pixels: files of more pixels are skipped; `None`: those that Pillow takes for decompression bombs.

    Raises:
        FileNotFoundError, ValueError: an image has no caption, or an empty one; the message names the file.
    """

    def __init__(
        self, *, root: str, views: ImageViews, holdout: int | None, max_pixels: int | None, split: str, index: str
    ) -> None:
        integer("data.max_pixels", max_pixels, 1, or_null=True)
        self.max_pixels, folder = max_pixels, Path(root)
        if not folder.is_dir():
            raise FileNotFoundError(f"data.root={root} is not a folder")
        look = functools.partial(examine, max_pixels=max_pixels)
        found = known(folder, ["."], index_file(Path(index), folder, f"captions {max_pixels}"), look, SUFFIXES)
        found.ignored.pop(TEXT, None)
        ImageFiles.__init__(self, folder, [], found, views, holdout, split, np.zeros(len(found.good), dtype=np.int64))
        with ThreadPoolExecutor() as pool:
            captions = list(pool.map(self._read, self.files))
        self.captions = Names(captions)
        self.fingerprint = digest(self.fingerprint, *(text.encode() for text in captions))

    def caption(self, index: int) -> str:
        """Of an item of the pass."""
        return self.captions[int(self.entries.images[self.items[index]])]

    def _read(self, name: str) -> str:
        file = (self.root / name).with_suffix(TEXT)
        try:
            caption = " ".join(file.read_text(encoding="utf-8").split())
        except FileNotFoundError:
            raise FileNotFoundError(
                f"data.root: {self.root / name} has no caption; write {file.name} beside it"
            ) from None
        except UnicodeDecodeError as error:
            raise ValueError(f"data.root: {file} is not UTF-8 ({error.reason}); save it so") from None
        if not caption:
            raise ValueError(f"data.root: {file} is empty; write the caption into it, or remove it and its image")
        return caption
