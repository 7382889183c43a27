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

from_official, to_official = dit.from_official, dit.to_official


class SiT(DiT):
    """The velocity, score or noise of every latent pixel, given time and class; options as of `DiT`."""

    time = "data1"


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options that an official state dict tells; not the number of heads."""
    options = dit.official_options(state)
    return {**options, "unused_half": options["learn_sigma"], "learn_sigma": False}
