"""One trained network under every sampler and number of steps: `python benchmarks/sampler_grid.py RUN OUT.png`.

Writes a grid whose rows are samplers and steps, and prints a table of network calls.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

import genfound
from genfound.config import compose
from genfound.sampling.pipeline import Pipeline
from genfound.sampling.requests import make_requests

SIZE, FACTOR, LEFT, GAP = (16, 16), 4, 150, 4
ROWS = [
    *[(name, steps) for name in ("euler", "heun", "sde") for steps in (5, 10, 20, 50)],
    ("dopri5", 50),
]


def draw(run: str, name: str, steps: int) -> tuple[list[np.ndarray], int, int]:
    """Images of the ten classes, calls of the network, and how many of them were on twice the images."""
    loaded = genfound.load(run)
    sampler = {**compose.read_yaml(Path(compose.config_dir()) / "sampler" / f"{name}.yaml"), "steps": steps}
    rows: list[int] = []
    handle = loaded.net.register_forward_pre_hook(lambda _, arguments: rows.append(len(arguments[0].y)))
    requests = make_requests(list(range(10)), [SIZE], 1, loaded.class_names)
    config = {**loaded.config, "sampler": sampler, "trainer": {"precision": "fp32"}}
    sampling = Pipeline.from_config(config, loaded.objective, loaded.tokenizer, torch.device("cpu"), len(requests))
    images = sampling(loaded.net, requests, seed=0)
    handle.remove()
    return images, len(rows), sum(count > len(requests) for count in rows)


def main(run: str, out: str) -> None:
    """Draw, label and count."""
    cell = SIZE[0] * FACTOR + GAP
    canvas = Image.new("RGB", (LEFT + 10 * cell, len(ROWS) * cell), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    print("| sampler | steps | network calls | of which guided |\n|---|---|---|---|")
    for row, (name, steps) in enumerate(ROWS):
        images, calls, guided = draw(run, name, steps)
        shown = "by tolerance" if name == "dopri5" else str(steps)
        print(f"| {name} | {shown} | {calls} | {guided} |", flush=True)
        pen.text((6, row * cell + 24), f"{name}, {shown}", "black", font)
        for column, image in enumerate(images):
            large = Image.fromarray(image).resize((FACTOR * SIZE[1], FACTOR * SIZE[0]), Image.Resampling.NEAREST)
            canvas.paste(large, (LEFT + column * cell, row * cell))
    canvas.save(out, optimize=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
