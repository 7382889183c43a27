"""Pictures of many samples: columns are labels, rows are sizes and repetitions."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from genfound.sampling.requests import SampleRequest

CELL = 96
GAP = 8
PAPER, INK = (255, 255, 255), (40, 40, 40)


def save_grid(
    file: Path, images: Sequence[np.ndarray], requests: Sequence[SampleRequest], class_names: Sequence[str]
) -> None:
    """Write a PNG; images (height, width, 3) uint8 of any sizes, enlarged by whole factors without smoothing."""
    labels = list(dict.fromkeys(request.label for request in requests))
    sizes = list(dict.fromkeys(request.size for request in requests))
    cells = {(size, label): [] for size in sizes for label in labels}  # type: ignore[var-annotated]
    for image, request in zip(images, requests, strict=True):
        cells[request.size, request.label].append(image)
    factor = max(1, CELL // min(max(size) for size in sizes))
    font = ImageFont.load_default(size=14)
    left, top = 84, 28
    column = max(size[1] for size in sizes) * factor + GAP
    rows = [(size, i) for size in sizes for i in range(max(len(cells[size, label]) for label in labels))]
    height = top + sum(size[0] * factor + GAP for size, _ in rows)
    canvas = Image.new("RGB", (left + column * len(labels), height), PAPER)
    draw = ImageDraw.Draw(canvas)
    for x, label in enumerate(labels):
        draw.text((left + x * column, 6), str(class_names[label])[: column // 7], INK, font)
    y = top
    for size, i in rows:
        if i == 0:
            draw.text((6, y), f"{size[0]} x {size[1]}", INK, font)
        for x, label in enumerate(labels):
            if i < len(cells[size, label]):
                picture = Image.fromarray(cells[size, label][i])
                enlarged = picture.resize((size[1] * factor, size[0] * factor), Image.Resampling.NEAREST)
                canvas.paste(enlarged, (left + x * column, y))
        y += size[0] * factor + GAP
    file.parent.mkdir(parents=True, exist_ok=True)
    canvas.save(file)
