"""The one place that knows in which direction a network counts time.

Inside the framework flows run from t = 0 (data) to t = end (noise). A network that declares `time = "data1"`
(SiT, FiTv2) counts from noise to data, and its velocity points the other way.
"""

from __future__ import annotations

from typing import Any, TypeVar

from torch import Tensor

Time = TypeVar("Time", float, Tensor)


def told(net: Any, t: Time, end: float) -> Time:
    """What a network is told at time t (number or tensor); itself, unless it declares `time = "data1"`."""
    return end - t if _reversed(net) else t


def ask(net: Any, batch: Any, t: Any, end: float, prediction: str) -> Tensor:
    """The network's float32 output at time t of the framework, its velocity in the framework's direction.

    Args:
        net: takes (batch, t), t a number or (B,), and may declare `time`.
        batch: its x is handed over in float32.
        t: a number or (B,) tensor, which is handed over in float32.
        end: the time of noise.
        prediction: what the output is; only a velocity has a direction.
    """
    moment = told(net, t, end)
    out: Tensor = net(batch, moment.float() if isinstance(moment, Tensor) else moment).float()
    return -out if prediction == "velocity" and _reversed(net) else out


def _reversed(net: Any) -> bool:
    return getattr(net, "time", "data0") == "data1"
