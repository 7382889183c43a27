"""JiT: which parameters decay, and dropout that depends on the micro-batch alone."""

from collections.abc import Iterable
from typing import Any

import torch

from genfound.backbones.jit import JiT
from genfound.batch import Batch
from genfound.modules.base import GenerativeModule
from genfound.objectives.base import Losses
from genfound.rng import Rng


class JiTModule(GenerativeModule):
    """Trains a JiT."""

    backbone = JiT
    net: JiT

    def parameter_groups(self) -> Iterable[Any]:
        """Matrices and tables decay; biases and vectors do not."""
        named = list(self.named_parameters())
        kept = [p for name, p in named if p.ndim == 1 or name.endswith(".bias")]
        decayed = [p for name, p in named if not (p.ndim == 1 or name.endswith(".bias"))]
        return [{"params": decayed}, {"params": kept, "weight_decay": 0.0}]

    def evaluate(self, batch: Batch, rng: Rng) -> Losses:
        """As of `GenerativeModule`; dropout, which PyTorch draws, is seeded by the micro-batch."""
        if self.net.dropout:
            torch.manual_seed(rng.integer("dropout"))
        return super().evaluate(batch, rng)
