"""What a source of images is."""

from __future__ import annotations

from typing import Protocol

import numpy as np


class ImageSource(Protocol):
    """Labelled images of known sizes, addressed by index.

    Attributes:
        class_names: one name per class; the label is the position in this list.
        labels: (n,) int64.
        sizes: (n, 2) int64, height and width in pixels of what `image` returns.
        fingerprint: changes whenever the images or their order change.
    """

    class_names: list[str]
    labels: np.ndarray
    sizes: np.ndarray
    fingerprint: str

    def image(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8."""

    def report(self) -> list[str]:
        """Lines for the user: what was found, skipped or converted."""
