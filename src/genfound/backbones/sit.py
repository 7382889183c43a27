"""SiT, the scalable interpolant transformer (arXiv 2401.08740): DiT's network, trained on a continuous time.

Two things differ from DiT. Time runs from 0 (noise) to 1 (data) and enters the sinusoids as it is. And the
released networks make 2 C output channels, of which only the first C are ever used (models.py:SiT.forward).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genfound.backbones import dit
from genfound.backbones.dit import DiT
from genfound.batch import Batch

from_official, to_official = dit.from_official, dit.to_official


class SiT(DiT):
    """The velocity, score or noise of every latent pixel, given time and class.

    Args:
        unused_half: make 2 C channels and drop the second half, as the released weights do; their rows never
            get a gradient. Without effect where `learn_sigma` uses them.
        options: those of `DiT`.

    Raises:
        ValueError: as `DiT`.
    """

    time = "data1"

    def __init__(self, *, unused_half: bool, learn_sigma: bool, **options: Any) -> None:
        super().__init__(learn_sigma=learn_sigma or unused_half, **options)
        self.unused_half = unused_half and not learn_sigma

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """Dense `batch.x` (B, C, h, w) at times t (B,) -> (B, C, h, w), with learn_sigma (B, 2 C, h, w)."""
        out = super().forward(batch, t)
        return out[:, : self.token_spec.channels] if self.unused_half else out


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Options that an official state dict tells; not the number of heads."""
    options = dit.official_options(state)
    return {**options, "unused_half": options["learn_sigma"], "learn_sigma": False}
