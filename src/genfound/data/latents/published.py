"""What latents that others have published have in common."""

from pathlib import Path

import numpy as np
from torch import Tensor

from genfound.data.images.names import remarks

MOST_CLASSES = 1_000
"""Labels are below it, or below the number of images where that is larger."""


def checked_labels(file: Path, labels: np.ndarray, images: int) -> np.ndarray:
    """The labels of a file as int64, all of which are numbers of classes."""
    most = max(MOST_CLASSES, images)
    legal = np.isfinite(labels) & (labels >= 0) & (labels < most) & (labels == np.floor(labels))
    if not legal.all():
        raise ValueError(f"{file} holds the label {labels[~legal][0]}, which is no number of a class below {most:,}")
    return labels.astype(np.int64)


def checked_latents(file: Path, latents: Tensor, place: str) -> Tensor:
    """Latents of a file, all of which are finite."""
    if not latents.isfinite().all():
        raise ValueError(f"{file} holds latents that are not finite{place}; take the file from its source again")
    return latents


def summary(root: Path, whose: str, labels: np.ndarray, class_names: list[str], sizes: np.ndarray) -> list[str]:
    """The lines of a report."""
    low, high = sizes.min(0), sizes.max(0)
    counts = f"{root}: {len(labels):,} latents of {whose} in {len(class_names)} classes"
    return [f"{counts}, {low[0]} x {low[1]} to {high[0]} x {high[1]} pixels (height x width)", *remarks(class_names)]
