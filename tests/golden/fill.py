"""Numbers that follow from a name: what the golden fixtures use for weights and inputs instead of stored tensors.

A name and a position give one number through splitmix64, so that a fixture holds names, shapes and results only.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)
MIX = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def unit(name: str, shape: Sequence[int]) -> np.ndarray:
    """Float32 numbers, uniform on +-sqrt(3): mean 0 and variance 1."""
    count = np.arange(1, math.prod(shape) + 1, dtype=np.uint64)
    state = count * GOLDEN_RATIO + (np.uint64(zlib.crc32(name.encode())) << np.uint64(32))  # modulo 2^64
    for shift, factor in MIX:
        state = (state ^ (state >> np.uint64(shift))) * np.uint64(factor)
    state ^= state >> np.uint64(31)
    fraction = (state >> np.uint64(11)).astype(np.float64) / 2.0**53
    return ((2 * fraction - 1) * math.sqrt(3)).astype(np.float32).reshape(shape)


def parameter(name: str, shape: Sequence[int]) -> np.ndarray:
    """A weight: matrices have variance 1 / fan_in, gains (`*.weight` vectors) lie around 1, biases around 0."""
    values = unit(name, shape)
    if len(shape) > 1:
        return (values / math.sqrt(math.prod(shape[1:]))).astype(np.float32)
    return (0.1 * values + (1 if name.endswith("weight") else 0)).astype(np.float32)


def parameters(fixture: Mapping[str, Any]) -> dict[str, Tensor]:
    """The official state dict of a fixture."""
    return {key: torch.from_numpy(parameter(key, shape)) for key, shape in fixture["parameters"]}


def tensor(entry: Mapping[str, Any]) -> Tensor:
    """An input: named numbers, scaled and shifted, or plain values of a dtype."""
    unknown = entry.keys() - {"fill", "shape", "scale", "shift", "values", "dtype"}
    if unknown:
        raise NotImplementedError(f"inputs with {sorted(unknown)} need an adapter that knows them")
    if "values" in entry:
        return torch.tensor(entry["values"], dtype=getattr(torch, entry["dtype"]))
    values = torch.from_numpy(unit(entry["fill"], entry["shape"]))
    return values * entry.get("scale", 1) + entry.get("shift", 0)


def inputs(fixture: Mapping[str, Any]) -> dict[str, Tensor]:
    """All inputs of a fixture."""
    return {name: tensor(entry) for name, entry in fixture["inputs"].items()}
