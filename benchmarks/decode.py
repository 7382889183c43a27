"""Images a second that one process reads: opened, decoded, brought to their view, and laid out as a tensor.

python -m benchmarks.decode [--images 200] [--folder DIR]

Pictures of `tests.photographs` in sizes that follow `benchmarks.image_sizes`, all 500 x 375, and of 12 megapixels; or a
folder of your own, as `data=image_folder` reads it. Processor time, in turn; decoding and resizing alone beside it.
Then, by the clock, what workers of a loader bring together.
"""

from __future__ import annotations

import argparse
import os
import shutil
import tempfile
import time
from collections import deque
from collections.abc import Callable
from functools import partial
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from benchmarks.image_sizes import image_sizes
from benchmarks.report import facts, write
from benchmarks.timing import interleaved, medians
from genfound.data.images.folder import ImageFolder
from genfound.data.images.pixels import to_picture
from genfound.data.images.views import ImageViews
from genfound.data.packing.prefetch import read_ahead
from tests.photographs import photograph

VIEWS = {"native": ("native", 256, 32, 4096), "square 256": ("square", 256, 16, 1024)}
"""View, its size, pixels per token side and the most tokens: NiT's, and DiT's at 256 pixels."""

REPEATS = 5
MICRO_BATCH = 40
"""Images that a worker reads in one piece."""


def main() -> None:
    """Measure, print and write the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--folder", type=Path, default=None)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    scratch = Path(tempfile.mkdtemp())
    sizes = {
        "as ImageNet's": image_sizes(arguments.images).tolist(),
        "500 x 375": [(375, 500)] * arguments.images,
        "4,000 x 3,000": [(3000, 4000)] * 8,
    }
    lines = [
        "| images | KB each | view | data.decode | images/s | decoding and resizing alone, images/s |",
        "|---|---|---|---|---|---|",
    ]
    try:
        made = {name: make(scratch / str(number), sizes[name]) for number, name in enumerate(sizes)}
        folders = {arguments.folder.name: arguments.folder} if arguments.folder else made
        for name, root in folders.items():
            lines += rows(name, root, scratch / "index")
            print("\n".join(lines[-4:]), flush=True)
        lines += ["", *by_workers(*next(iter(folders.items())), scratch / "index")]
    finally:
        shutil.rmtree(scratch)
    print(write("decode", [facts(), "\n".join(lines)]))


def make(root: Path, sizes: list[tuple[int, int]]) -> Path:
    """A folder of JPEGs of these heights and widths."""
    draw = np.random.default_rng(0)
    (root / "a").mkdir(parents=True)
    for number, (height, width) in enumerate(sizes):
        photograph(draw, width, height).save(root / f"a/{number:05d}.jpg", quality=92)
    return root


def rows(name: str, root: Path, index: Path) -> list[str]:
    """Lines of the table for a folder."""
    ways = [(view, decode) for view in VIEWS for decode in ("exact", "dct")]
    sources = [opened(root, index, *way) for way in ways]
    count = len(sources[0].labels)
    calls: list[Callable[[], object]] = [partial(read, source) for source in sources]
    times = medians(interleaved([*calls, *(partial(resize, source) for source in sources)], REPEATS))
    size = np.mean([file.stat().st_size for file in root.rglob("*.jp*g")]) / 1000
    return [
        f"| {name} | {size:.0f} | {view} | {decode} | {count / whole:.0f} | {count / bare:.0f} |"
        for (view, decode), whole, bare in zip(ways, times[: len(ways)], times[len(ways) :], strict=True)
    ]


def opened(root: Path, index: Path, view: str, decode: str) -> ImageFolder:
    """A folder whose images are brought to one of `VIEWS`."""
    return ImageFolder(
        views=ImageViews(*VIEWS[view], decode), root=str(root), holdout=None, max_pixels=None, split="train",
        index=str(index),
    )  # fmt: skip


class Pictures(Dataset[list[Tensor]]):
    """The images of a folder, a micro-batch of them an item, for workers."""

    def __init__(self, source: ImageFolder) -> None:
        self.source = source

    def __getitem__(self, indices: range) -> list[Tensor]:
        return [to_picture(self.source.image(index)) for index in indices]


def by_workers(name: str, root: Path, index: Path) -> list[str]:
    """Images a second by the clock, in native views, of several workers, which the first pass starts."""
    lines = [f"| workers, of {os.cpu_count()} processors: {name}, native, exact | images/s by the clock |", "|---|---|"]
    source = opened(root, index, "native", "exact")
    whole = len(source.labels) // MICRO_BATCH
    once = [range(MICRO_BATCH * number, MICRO_BATCH * (number + 1)) for number in range(whole)]
    for workers in (1, 2, 4):
        items = read_ahead(Pictures(source), once * (REPEATS + 1), workers)
        deque(islice(items, whole), maxlen=0)
        begin = time.perf_counter()
        images = sum(map(len, items))
        lines.append(f"| {workers} | {images / (time.perf_counter() - begin):.0f} |")
        print(lines[-1], flush=True)
    return lines


def read(source: ImageFolder) -> None:
    """As a worker of a training does."""
    for index in range(len(source.labels)):
        to_picture(source.image(index))


def resize(source: ImageFolder) -> None:
    """Pillow alone."""
    rule = next(iter(source.views.rules.values()))
    for number, size in zip(source.files, source.sizes, strict=True):
        with Image.open(source.root / number) as picture:
            if (least := source.views.least(size)) is not None:
                picture.draft(None, least)
            rule.render(picture, *map(int, size))


if __name__ == "__main__":
    main()
