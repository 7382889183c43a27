"""Latents as REPA and its successors keep them, in the layout of EDM2's dataset_tool: a file for each image."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfound.data.images.base import LatentSource, held_out
from genfound.data.images.views import ImageViews
from genfound.data.latents.published import checked_labels, checked_latents, summary
from genfound.runtime.files import digest
from genfound.tokenizers import LatentSpec

LABELS = "dataset.json"
LEAST_DEVIATION = float(np.exp(-15))
"""That of diffusers' autoencoders, which clamp log-variances to -30."""


class REPALatents(LatentSource):
    """A folder of `*.npy` (2 C, h, w), mean and standard deviation, and `dataset.json` with the label of each.

    `{"labels": [["00000/img-mean-std-00000000.npy", 7], ...]}`; the folder is REPA's `vae-sd`, or the one above.
    Latents are of images in [-1, 1], as the autoencoders take them.
    """

    has_variance = True

    def __init__(
        self, root: str | Path, views: ImageViews, holdout: int | None, split: str, mirrored: bool, spec: LatentSpec
    ) -> None:
        self.root = _folder(Path(root))
        names, labels = _listed(self.root)
        every = checked_labels(self.root / LABELS, labels, len(names))
        rows = np.flatnonzero(held_out(every, holdout) == (split == "val"))
        self._files = [names[row] for row in rows.tolist()]
        self.labels = every[rows]
        self.class_names = [str(number) for number in range(int(every.max()) + 1)]
        self._shape = self._read(self.root / names[0]).shape
        self.sizes = np.full((len(rows), 2), views.size, dtype=np.int64)
        self._check(views, mirrored, spec)
        self.fingerprint = digest(repr((names, self._shape, every.tobytes())))

    def _check(self, views: ImageViews, mirrored: bool, spec: LatentSpec) -> None:
        root, shape = f"data.root={self.root}", self._shape
        if len(shape) != 3 or shape[1] != shape[2]:
            raise ValueError(f"{root} holds latents {list(shape)}, not those of squares")
        if shape[0] != 2 * spec.channels:
            held = f"{shape[0]} channels, mean and deviation of {shape[0] // 2}"
            raise ValueError(f"{root} holds {held}, and the tokenizer has {spec.channels}")
        if views.name != "square" or views.size != shape[1] * spec.stride:
            side = shape[1] * spec.stride
            raise ValueError(f"{root} holds squares of {side} pixels; choose data.view=square data.size={side}")
        if mirrored:
            raise ValueError(f"{root} holds no mirror images; set data.flip=false")

    def moments(self, index: int, mirrored: bool) -> Tensor:
        """(2 C, h, w) float32, mean and log-variance."""
        file = self.root / self._files[index]
        mean, deviation = checked_latents(file, torch.from_numpy(self._read(file)).float(), "").chunk(2)
        if mean.shape[0] != self._shape[0] // 2 or mean.shape[1:] != self._shape[1:]:
            raise ValueError(f"{file} holds latents of another size than those before it")
        if (deviation < 0).any():
            raise ValueError(f"{file} holds negative deviations; its second half must be standard deviations")
        return torch.cat([mean, 2 * deviation.clamp(min=LEAST_DEVIATION).log()])

    def _read(self, file: Path) -> np.ndarray:
        try:
            return np.load(file, allow_pickle=False)
        except (OSError, ValueError, EOFError) as error:
            raise ValueError(f"{file} is missing or damaged: {str(error).splitlines()[0]}") from None

    def report(self) -> list[str]:
        """Counts and sizes."""
        return summary(self.root, "REPA", self.labels, self.class_names, self.sizes)


def _folder(root: Path) -> Path:
    found = [
        folder for folder in (root, root / "vae-sd") if (folder / LABELS).is_file() and any(folder.glob("*/*.npy"))
    ]
    if not found:
        raise FileNotFoundError(f"data.root={root} has no {LABELS} beside folders of *.npy, nor has its folder vae-sd")
    return found[0]


def _listed(root: Path) -> tuple[list[str], np.ndarray]:
    """Names of files, and their labels, one for each file of the folder."""
    file = root / LABELS
    try:
        content: dict[str, Any] = json.loads(file.read_text())
        labels = {str(name): label for name, label in content["labels"]}
        numbers = np.array([labels[name] for name in sorted(labels)], dtype=np.float64)
    except (ValueError, KeyError, TypeError) as error:
        what = 'it must hold {"labels": [["00000/name.npy", 7], ...]}'
        raise ValueError(f"{file} is damaged, or has no labels: {what} ({type(error).__name__})") from None
    names, there = sorted(labels), {path.relative_to(root).as_posix() for path in root.glob("*/*.npy")}
    if twice := len(content["labels"]) - len(labels):
        raise ValueError(f"{file} labels {twice:,} files more than once")
    for missing, where in (
        (there - labels.keys(), "has no label of"),
        (labels.keys() - there, "labels a file that is not there:"),
    ):
        if missing:
            raise ValueError(f"{file} {where} {min(missing)} ({len(missing):,} in all)")
    return names, numbers
