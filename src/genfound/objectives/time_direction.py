"""The one adapter between the time of the framework and that of a network.

Inside the framework flows run from t = 0 (data) to t = end (noise). A network that declares `time = "data1"`
(SiT, FiTv2) counts from noise to data, and its velocity points the other way.
"""

from typing import Any

import torch
from torch import Tensor

from genfound.batch import Batch


class TimeAdapter:
    """A network of (batch, t (B,) float32) that is asked, and answers, in the time of the framework.

    Noise is at `end`, `None` for integer steps, which every network counts alike. A velocity has a direction.
    """

    copies = 1

    def __init__(self, net: Any, end: float | None = None, velocity: bool = False) -> None:
        self.net = net
        self.end = end if getattr(net, "time", "data0") == "data1" else None
        self.negated = velocity and self.end is not None
        self.token_spec: Any = getattr(net, "token_spec", None)
        self.null_label: int | None = getattr(net, "null_label", None)

    def __call__(self, batch: Batch, t: float | Tensor, decide_at: float | None = None) -> Tensor:
        """The output at time t, one of all images or (B,) in float64, which is rounded once."""
        t = t if self.end is None else self.end - t
        if not isinstance(t, Tensor):
            t = torch.full((len(batch.y),), t, dtype=torch.float32, device=batch.x.device)
        out: Tensor = self.net(batch, t.float())
        return -out if self.negated else out
