"""Speed of latent stores on this machine: random access, and opening one of ImageNet's size.

python -m benchmarks.store [--entries 100000] [--folder DIR]

Sizes follow `benchmarks.image_sizes`. The store of random values has NiT's 32 channels; the one that is only opened
has a single channel, because its index, which is all that is read, is the same.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.image_sizes import image_sizes
from benchmarks.report import facts, write
from genfound.data.images.views import ImageViews
from genfound.data.latents.manifest import FORMAT, store_digest, write_manifest
from genfound.data.latents.store import ShardWriter, Store, manifest_line, read_index

IMAGENET = 1_300_000
SHARD = 8192
VIEWS = ImageViews("native", 256, 32, 4096)


def main() -> None:
    """Run all benchmarks and write the report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--entries", type=int, default=100_000)
    parser.add_argument("--folder", type=Path, default=None, help="where the stores are made, and removed again")
    parser.add_argument("--open", type=Path, default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.open:
        print(json.dumps(opening(arguments.open)))
        return
    folder = Path(tempfile.mkdtemp(dir=arguments.folder))
    try:
        lines = [*access_lines(folder / "values", arguments.entries), "", *opening_lines(folder / "index")]
    finally:
        shutil.rmtree(folder)
    print("\n".join(lines), write("store", [facts(), "\n".join(lines)]), sep="\n")


def make_store(root: Path, images: int, channels: int) -> None:
    """A store of random moments, not mirrored, as `genfound.encode` would write it."""
    root.mkdir()
    heights, widths = image_sizes(images).T.tolist()
    entries = VIEWS.entries(heights, widths)
    generator = torch.Generator().manual_seed(0)
    codec = {"name": "DcAe", "channels": channels, "stride": 32, "moments": ["mean"]}
    manifest: dict[str, Any] = {
        "format": FORMAT, "tokenizer": codec, "views": ["native"], "mirrored": False, "dtype": "fp16",
        "splits": {"train": {"images": images}}, "source": {"holdout": None},
        "classes": [str(label) for label in range(1000)], "statistics": {"mean": [0.0], "std": [1.0]}, "shards": [],
    }  # fmt: skip
    for number, begin in enumerate(range(0, images, SHARD)):
        own = slice(begin, begin + SHARD)
        sizes = entries.sizes[own] // 32
        columns = {"sizes": sizes, "images": entries.images[own], "rules": entries.rules[own]}
        labels = np.arange(begin, begin + len(sizes)) % 1000
        names = [f"n{label:08d}/n{label:08d}_{image}.JPEG" for image, label in enumerate(labels.tolist(), begin)]
        filling = ShardWriter({**columns, "labels": labels}, names, channels, channels, 1, torch.float16)
        filling.values[""].normal_(generator=generator)
        file = root / f"train-{number:05d}.safetensors"
        filling.write(file, {"split": "train", "number": number, "store": store_digest(manifest)})
        manifest["shards"].append(manifest_line(file, read_index(file)))
    write_manifest(root, manifest)


def access_lines(root: Path, entries: int, reads: int = 20_000) -> list[str]:
    """Random reads in one process, checksums included, after the files have been read once."""
    make_store(root, entries, channels=32)
    source = Store(root, VIEWS, None, "train", False)
    size = sum(file.stat().st_size for file in root.iterdir())
    for file in sorted(root.glob("*.safetensors")):
        file.read_bytes()
    rates = []
    for attempt in range(3):
        order = np.random.default_rng(attempt).integers(0, entries, reads).tolist()
        begin = time.process_time()
        for index in order:
            source.moments(index, False)
        rates.append(reads / (time.process_time() - begin))
    return [
        "| store | random reads a second of processor time, warm |",
        "|---|---|",
        f"| {entries:,} latents of 32 channels, {size / 2**30:.2f} GiB | {max(rates):,.0f} |",
    ]


def opening_lines(root: Path) -> list[str]:
    """Opening a store of ImageNet's size in a fresh process."""
    make_store(root, IMAGENET, channels=1)
    command = [sys.executable, "-m", "benchmarks.store", "--open", str(root)]
    found = [json.loads(subprocess.run(command, check=True, capture_output=True).stdout) for _ in range(3)]
    best = min(found, key=lambda result: float(result["seconds"]))
    return [
        "| store | opened in, processor time | memory beyond the imports |",
        "|---|---|---|",
        f"| {IMAGENET:,} latents | {best['seconds']:.2f} s | {best['megabytes']:.0f} MB at most |",
    ]


def opening(root: Path) -> dict[str, float]:
    """Seconds of processor time and peak memory that opening takes in this process."""
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = peak()
    begin = time.process_time()
    source = Store(root, VIEWS, None, "train", False)
    seconds = time.process_time() - begin
    assert len(source.labels) == IMAGENET
    return {"seconds": seconds, "megabytes": peak() - before}


def peak() -> float:
    """The largest memory that this process has had, in MB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


if __name__ == "__main__":
    main()
