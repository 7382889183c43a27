"""Writing sets of images: ADM's npz file, or a folder of PNGs."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from genfound.data.images.npz import ImageStack, write_npz
from genfound.data.images.sets import LABELS, NOTE, ImageSet
from genfound.runtime.files import atomic_folder, check_folder, visible


def export(images: ImageSet, to: str, note: Mapping[str, Any]) -> Path:
    """Write images with their labels and a note of how they were made, whole or not at all; see `check_target`."""
    check_target(to, one_size=len(np.unique(images.sizes, axis=0)) == 1)
    path, text = Path(to), json.dumps(dict(note))
    if path.suffix == ".npz":
        stack = ImageStack((len(images), *images.sizes[0].tolist(), 3), (images[k] for k in range(len(images))))
        labels = {} if images.labels is None else {"arr_1": images.labels}
        write_npz(path, {"arr_0": stack, **labels, "protocol": np.array(text)})
        return path

    def fill(work: Path) -> None:
        digits = max(len(str(len(images) - 1)), 6)  # 000000.png and on, as DiT's and SiT's sample_ddp.py
        for number in range(len(images)):
            Image.fromarray(images[number]).save(work / f"{number:0{digits}d}.png")
        (work / NOTE).write_text(text)
        if images.labels is not None:
            (work / LABELS).write_text("".join(f"{label}\n" for label in images.labels))

    atomic_folder(path, fill)
    return path


def check_target(to: str, one_size: bool) -> None:
    """Raise a ValueError for images of several sizes in an npz file, or a place that is taken or cannot be written."""
    path = Path(to)
    check_folder("export", path.parent)
    if path.suffix == ".npz":
        if not one_size:
            raise ValueError(f"export={to}: an npz file holds images of one size; give a folder instead")
        if path.is_dir():
            raise ValueError(f"export={to} is a folder; give a file ending in .npz, or a folder of another name")
    elif path.is_file() or (path.is_dir() and visible(path)):
        raise ValueError(f"export={to} exists; give an empty folder, or a file ending in .npz")
