"""What an objective is, and what it gives to samplers."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layers.float64 import float64_device
from genfound.objectives.predictions import Predictions
from genfound.objectives.process import Process
from genfound.objectives.times import TimeLaw
from genfound.rng import Rng

Net = Callable[[Batch, Tensor], Tensor]
"""A backbone: (batch, t (B,)) -> a tensor shaped like `batch.x`."""


class GuidedNet(Protocol):
    """A backbone during sampling, in the time of the framework, where all images are at the same time."""

    copies: int
    """How often the batch holds each image: 2 where the state of the null label is one of its own."""

    def __call__(self, batch: Batch, t: float, decide_at: float | None = None) -> Tensor:
        """The output at time t; whether guidance acts is decided at `decide_at`, or at t."""


GuidanceOf = Callable[..., GuidedNet]
"""(net, time_range=(data, noise)) -> the network with its guidance."""


class TimeAdapter:
    """A network of (batch, t (B,) float32) that is asked, and answers, in the time of the framework.

    There flows run from t = 0 (data) to t = end (noise). A network that declares `time = "data1"` (SiT, FiTv2) counts
    from noise to data, and its velocity points the other way. `end` is `None` for integer steps, which all count alike;
    `process` is the one whose noise the network predicts, if it is of discrete steps. The network, not the batch, may
    be on a device without float64.
    """

    copies = 1

    def __init__(
        self, net: Any, end: float | None = None, velocity: bool = False, process: Process | None = None
    ) -> None:
        self.net = net
        self.process = process
        self.end = end if getattr(net, "time", "data0") == "data1" else None
        self.negated = velocity and self.end is not None
        self.token_spec: Any = getattr(net, "token_spec", None)
        self.null_label: int | None = getattr(net, "null_label", None)
        self.layouts: tuple[str, ...] = getattr(net, "layouts", ())

    def __call__(self, batch: Batch, t: float | Tensor, decide_at: float | None = None) -> Tensor:
        """The output at time t, one of all images or (B,) in float64, which is rounded once."""
        t = t if self.end is None else self.end - t
        if not isinstance(t, Tensor):
            t = torch.full((len(batch.y),), t, dtype=torch.float32, device=batch.x.device)
        place = getattr(self.net, "device", None) or batch.x.device
        moved = batch if place == batch.x.device else batch.to(place)
        out: Tensor = self.net(moved, t.float().to(place)).to(batch.x.device)
        return -out if self.negated else out


@dataclass(frozen=True)
class Losses:
    """The loss of every image of a batch, each (B,)."""

    total: Tensor  # what is minimised; 0 on rows that are not real
    t: Tensor  # the times that were drawn, in the objective's own unit
    terms: dict[str, Tensor] = field(default_factory=dict)  # named parts of `total`


class Field(Protocol):
    """A trained network, with its guidance, as a sampler sees it."""

    net: GuidedNet
    lowest: float
    """The time down to which the velocity is defined, which a sampler's last time may be below of."""

    def velocity(self, batch: Batch, t: float, decide_at: float | None = None) -> Tensor:
        """dx/dt of the probability-flow ODE at x = batch.x and time t; shaped like `batch.x`.

        Guidance acts in all stages of a step or in none: they name the time at which it begins, `decide_at`.
        """


class NoiseLevels(Field, Protocol):
    """A field of which samplers know how much signal and noise there is, and what both are predicted to be."""

    def level(self, t: float) -> tuple[float, float]:
        """alpha and sigma of x = alpha data + sigma noise at time t."""

    def time_of(self, ratio: Tensor) -> Tensor:
        """The times, of any shape and float64, at which sigma / alpha has these values."""

    def data_and_noise(self, batch: Batch, t: float) -> tuple[Tensor, Tensor]:
        """Both as predicted at x = batch.x and time t."""


class Objective(Protocol):
    """Path, prediction, weighting and law of times of one training problem."""

    name: str
    gives: frozenset[str]
    """What samplers may need of its fields: `velocity`, `flow` (all of `Predictions`), `gaussian` (steps of DDPM), and
    `levels` (see `NoiseLevels`)."""
    time_range: tuple[float, float]
    weight: str
    learned_variance: bool
    signature: Mapping[str, object]
    """What makes two networks' outputs mean the same, by the keys of the configuration."""
    time_law: TimeLaw
    noise_scale: float = 1.0
    """Standard deviation of the noise that samplers begin with."""

    def loss(self, net: Net, batch: Batch, rng: Rng) -> Losses:
        """The loss of each image; all randomness comes from `rng`."""
        part = self.time_law(rng, len(batch.y), float64_device(batch.x.device))
        return self.loss_at(net, batch, part, rng.normal("noise", batch.x.shape, batch.x.device))

    def loss_at(self, net: Net, batch: Batch, part: Tensor, noise: Tensor) -> Losses:
        """The loss of each image with this noise, at what `time_law` drew (B,); filler is at the middle time.

        What was drawn is where `float64_device` puts it.
        """

    def views(self, net: Net, batch: Batch, time: Tensor, noise: Tensor) -> Predictions:
        """The network's output on noised data.

        Times (B,) are float64 ones of the linear path, inside (0, 1): sigma / alpha = time / (1 - time).
        """

    def velocity_error(self, net: Net, batch: Batch, time: Tensor, noise: Tensor) -> Tensor:
        """(B,) mean squared error of the predicted `noise - data`, the velocity of the linear path; see `views`.

        It is the same number for every objective whose network says the same of states with equal ratios of
        noise to signal, whatever it predicts, on whatever path.
        """
        views = self.views(net, batch, time, noise)
        return batch.per_image((views.noise - views.x0 - (noise - batch.x)) ** 2)

    def adapt(self, net: Net) -> TimeAdapter:
        """The network, asked and answering in the time of the framework."""

    def field(self, net: Net, guidance: GuidanceOf | None = None) -> Field:
        """What samplers use of the network's output, guided."""

    def guided(self, net: Net, guidance: GuidanceOf | None) -> GuidedNet:
        """The network in the time of the framework, inside its guidance."""
        adapted = self.adapt(net)
        return adapted if guidance is None else guidance(adapted, time_range=self.time_range)

    def times(self, steps: Any, needs: str = "velocity", spacing: str = "even") -> Tensor:
        """The times from noise to data of a sampler with such needs, float64 on the host.

        `spacing` is of the kept steps of a process, see `samplers.ddpm.ddim`.
        """
