"""SiT's released checkpoints: their options (github.com/willisma/SiT, models.py)."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from genfound.checkpoints.official import dit


def official_options(state: Mapping[str, Tensor]) -> dict[str, Any]:
    """Constructor options that an official state dict tells; not the number of heads."""
    options = dit.official_options(state)
    return {**options, "unused_half": options["learn_sigma"], "learn_sigma": False}
