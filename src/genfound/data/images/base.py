"""What a source of training data is: labelled images, or latents that were encoded before."""

from collections.abc import Sequence
from typing import ClassVar, Protocol, runtime_checkable

import numpy as np
from torch import Tensor


class ImageSource(Protocol):
    """Labelled images of known sizes, addressed by index."""

    class_names: list[str]  # the label of a class is its position
    labels: np.ndarray  # (n,) int64
    sizes: np.ndarray  # (n, 2) int64, height and width in pixels
    fingerprint: str  # changes whenever the images or their order change

    def report(self) -> list[str]:
        """Lines for the user: what was found, skipped or converted."""


class PictureSource(ImageSource, Protocol):
    """Images as pixels, of the given sizes."""

    def image(self, index: int) -> np.ndarray:
        """(height, width, 3) uint8."""


@runtime_checkable
class Rerendered(Protocol):
    """A source that can show its items at other sizes too, from the files themselves."""

    def rendered(self, index: int, sizes: Sequence[tuple[int, int]]) -> list[np.ndarray]:
        """Each (height, width, 3) uint8, the view of an item at these sizes (height, width), decoded once."""


@runtime_checkable
class Captioned(Protocol):
    """A source that knows what its items show."""

    def caption(self, index: int) -> str:
        """In words."""


@runtime_checkable
class LatentSource(ImageSource, Protocol):
    """Images as an encoder left them: unscaled mean and, where it is stochastic, log-variance.

    A source is built with its folder, the views that are wanted, `holdout` (of each class every holdout-th image
    validates), the split `train` or `val`, whether mirror images are wanted, and the tokenizer's `spec`, as far as its
    constructor names them.
    """

    has_variance: ClassVar[bool] = False
    """Whether moments have log-variance; a store says so itself."""

    def moments(self, index: int, mirrored: bool) -> Tensor:
        """(C, h, w), or (2 C, h, w) with log-variance, of the image or of its mirror image."""


def held_out(classes: np.ndarray, holdout: int | None) -> np.ndarray:
    """(n,) bool, True for every holdout-th image of each class, in the order of the images."""
    chosen = np.zeros(len(classes), dtype=bool)
    if holdout is not None:
        for label in np.unique(classes):
            chosen[np.flatnonzero(classes == label)[holdout - 1 :: holdout]] = True
    return chosen
