"""What the figures of a probe say of one trained run: `python benchmarks/probe_figures.py RUN OUT.svg`.

Compares the run with one of shuffled labels, which it trains, and with an untrained one; measures unseen sizes and
scales of guidance. Prints the tables of docs/evaluation.md and draws the plot. RUN is the demo's, or one like it.
"""

from __future__ import annotations

import functools
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

import genfound
from genfound.evaluation.protocol import RESULTS, read_results
from genfound.evaluation.references import RunDataset
from genfound.rng import Rng

SIZE = (16, 16)
SEEN, UNSEEN = ((12, 20), (20, 12), (20, 20)), ((22, 22), (24, 24), (12, 24), (32, 32))
SCALES = (1.0, 1.5, 2.0, 2.5, 3.0, 4.0)
REFERENCE = 1000
FEW, MANY = (500, 8), (250, 25)
"""Samples, and steps of Heun's."""
FIGURES = ("fd_probe", "accuracy_probe", "precision_probe", "recall_probe")


def command(name: str, *arguments: str) -> None:
    """Run a command of the project."""
    subprocess.run([sys.executable, "-m", f"genfound.{name}", *arguments], check=True, stdout=subprocess.DEVNULL)


def write_reference(run: Path, file: Path) -> None:
    """Training images of one size, in ADM's format."""
    loaded = genfound.load(run)
    images = RunDataset(loaded.config, loaded.tokenizer.spec, len(loaded.class_names)).images("train")
    fitting = np.flatnonzero((images.sizes == np.array(SIZE)).all(axis=1))
    np.savez(file, arr_0=np.stack([images[int(number)] for number in fitting[:REFERENCE]]))


def write_shuffled(run: Path, folder: Path) -> None:
    """As many training images as the run has seen, each in the folder of a random class."""
    loaded = genfound.load(run)
    images = RunDataset(loaded.config, loaded.tokenizer.spec, len(loaded.class_names)).images("train")
    count = min(loaded.config["optimizer"]["budget_images"], len(images))
    assert images.labels is not None
    labels = images.labels[Rng(0, "shuffled").permutation("labels", count).numpy()]
    for label, name in enumerate(loaded.class_names):
        (folder / f"{label}_{name}").mkdir(parents=True)
    for number, label in enumerate(labels.tolist()):
        Image.fromarray(images[number]).save(folder / f"{label}_{loaded.class_names[label]}" / f"{number:06d}.png")


@functools.cache
def measure(
    run: Path, size: tuple[int, int], effort: tuple[int, int], scale: float, work: Path, probe: Path
) -> Mapping[str, float]:
    """The figures of a run, by the probe and the reference of the first one."""
    how = ("labels=balanced", f"n={effort[0]}", "sampler=heun", f"sampler.steps={effort[1]}", f"guidance.scale={scale}")
    by = ("extractor=probe", f"extractor_weights={probe}", f"reference={work}/reference.npz")
    command("evaluate", f"from={run}", f"sizes=[{size[0]},{size[1]}]", *how, *by, f"out={work}")
    return read_results(work / RESULTS)[-1].figures


def plot(points: Sequence[tuple[float, float, float]], file: Path) -> None:
    """Precision over recall as SVG, from (recall, precision, scale)."""
    right, top = 1.0, np.ceil(max(p for _, p, _ in points) * 10) / 10
    place = [(70 + 466 * recall / right, 264 - 240 * precision / top, scale) for recall, precision, scale in points]
    lines = [
        '<svg xmlns="http://www.w3.org/2000/svg" width="560" height="320" font-family="sans-serif" font-size="12">',
        '<rect width="560" height="320" fill="white"/>',
    ]
    for i in range(6):
        x, y = 70 + 466 * i / 5, 264 - 240 * i / 5
        lines.append(f'<path d="M{x:.0f} 24V264M70 {y:.0f}H536" stroke="#ddd"/>')
        lines.append(f'<text x="{x:.0f}" y="282" text-anchor="middle">{right * i / 5:.1f}</text>')
        lines.append(f'<text x="62" y="{y + 4:.0f}" text-anchor="end">{top * i / 5:.2f}</text>')
    track = " ".join(f"{x:.0f},{y:.0f}" for x, y, _ in place)
    lines.append(f'<polyline fill="none" stroke="#3a84e6" stroke-width="2" points="{track}"/>')
    for x, y, scale in place:
        lines.append(f'<circle cx="{x:.0f}" cy="{y:.0f}" r="4" fill="#3a84e6"/>')
        lines.append(f'<text x="{x + 8:.0f}" y="{y - 8:.0f}">{scale:g}</text>')
    lines.append('<text x="303" y="306" text-anchor="middle">recall_probe</text>')
    lines.append(
        '<text x="18" y="144" text-anchor="middle" transform="rotate(-90 18 144)">precision_probe</text></svg>'
    )
    file.write_text("\n".join(lines) + "\n")


def row(name: str, figures: Mapping[str, float]) -> str:
    """A line of a table."""
    return f"| {name} | " + " | ".join(f"{figures[key]:.3g}" for key in FIGURES) + " |"


def main(run: Path, out: Path) -> None:
    """Train what is missing, measure, print and plot."""
    work = run.parent.parent / "probe_figures"
    work.mkdir(exist_ok=True)
    write_reference(run, work / "reference.npz")
    if not (work / "images").is_dir():
        write_shuffled(run, work / "images")
    runs = f"runs={run.parent.parent}"
    folder = ("data=image_folder", f"data.root={work / 'images'}", "data.flip=false", "data.max_tokens=1024")
    command("train", runs, "study=probe_figures", "name=shuffled", *folder)
    command("train", runs, "study=probe_figures", "name=untrained", "budget.images=16")
    command("evaluate", f"from={run}", "protocol=quick", "n=64", f"out={work}", f"references={work}")
    (probe,) = work.glob("probe-*.safetensors")
    head = "| | " + " | ".join(FIGURES) + " |\n|---|---|---|---|---|"
    print(head)
    for name, path in (("trained", run), ("shuffled", work / "shuffled"), ("untrained", work / "untrained")):
        print(row(name, measure(path, SIZE, FEW, 2.5, work, probe)), flush=True)
    print("| size | accuracy_probe |\n|---|---|")
    for size in (SIZE, *SEEN, *UNSEEN):
        figures = measure(run, size, FEW, 2.5, work, probe)
        print(f"| {size[0]} x {size[1]} | {figures['accuracy_probe']:.3f} |", flush=True)
    print(head)
    points = []
    for scale in SCALES:
        figures = measure(run, SIZE, MANY, scale, work, probe)
        points.append((figures["recall_probe"], figures["precision_probe"], scale))
        print(row(f"{scale:g}", figures), flush=True)
    plot(points, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
