"""A small image tree like ImageNet's: `python -m tests.photographs DIR` writes DIR/train/<class>/*.JPEG.

Pictures of mixed sizes up to 1024 x 681 in four classes, and among them what real collections hold: a CMYK
JPEG, a greyscale one, a PNG named .JPEG, a truncated file, an empty one, a photo with an EXIF rotation, and an
image of one pixel.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from PIL import Image

CLASSES = ("n01440764", "n02099601", "n03000684", "n09472597")
SIZES = ((500, 375), (375, 500), (500, 333), (1024, 681), (640, 480), (333, 500), (400, 400), (256, 341), (800, 531))
ORIENTATION = 274


def photograph(rng: np.random.Generator, width: int, height: int) -> Image.Image:
    """Smooth regions of colour with some grain."""
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), dtype=np.int16)
    grain = rng.normal(0, 6, smooth.shape).astype(np.int16)
    return Image.fromarray(np.clip(smooth + grain, 0, 255).astype(np.uint8))


def write_tree(root: Path, count: int = 60, shrink: int = 1) -> None:
    """Write `count` ordinary photographs, their sides divided by `shrink`, and seven unusual files."""
    rng = np.random.default_rng(0)
    folders = [root / "train" / name for name in CLASSES]
    for folder in folders:
        folder.mkdir(parents=True, exist_ok=True)
    for i in range(count):
        width, height = SIZES[i % len(SIZES)]
        picture = photograph(rng, width // shrink, height // shrink)
        picture.save(folders[i % len(folders)] / f"{folders[i % len(folders)].name}_{i}.JPEG", quality=90)
    picture = photograph(rng, 480 // shrink, 320 // shrink)
    picture.convert("CMYK").save(folders[0] / "cmyk.JPEG")
    picture.convert("L").save(folders[1] / "grey.JPEG")
    picture.save(folders[2] / "png.JPEG", format="PNG")
    whole = (folders[1] / f"{folders[1].name}_1.JPEG").read_bytes()
    (folders[3] / "truncated.JPEG").write_bytes(whole[: len(whole) // 2])
    (folders[0] / "empty.JPEG").write_bytes(b"")
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    picture.save(folders[1] / "rotated.JPEG", exif=exif)
    picture.resize((1, 1)).save(folders[2] / "pixel.JPEG")


if __name__ == "__main__":
    write_tree(Path(sys.argv[1]))
