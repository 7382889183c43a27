"""One prediction of a network, seen as any other.

With x = alpha x0 + sigma n: velocity = alpha' x0 + sigma' n, and score = -n / sigma (Albergo et al. 2023). Every
formula divides only by what must not vanish: a velocity gives noise and data at all times, noise gives no data where
alpha is 0, and data give no noise where sigma is 0.
"""

from dataclasses import dataclass

from torch import Tensor

from genfound.objectives.interpolants import Coefficients

PREDICTIONS = ("velocity", "noise", "x0", "score")


@dataclass(frozen=True)
class Predictions:
    """What a network's output says about the state it was given."""

    kind: str  # what the output is, a name of `PREDICTIONS`
    out: Tensor  # shaped like the state
    x: Tensor  # the state
    point: Coefficients  # of its time, numbers or tensors that broadcast against the state
    sigma_floor: float = 0.0  # the velocity from data divides by at least this

    @property
    def noise(self) -> Tensor:
        """E[noise | x]."""
        p = self.point
        if self.kind == "noise":
            return self.out
        if self.kind == "score":
            return -p.sigma * self.out
        if self.kind == "x0":
            return (self.x - p.alpha * self.out) / p.sigma
        return (p.alpha * self.out - p.d_alpha * self.x) / p.wronskian

    @property
    def x0(self) -> Tensor:
        """E[data | x]; from a score this is Tweedie's formula."""
        p = self.point
        if self.kind == "x0":
            return self.out
        if self.kind == "velocity":
            return (p.d_sigma * self.x - p.sigma * self.out) / p.wronskian
        return (self.x - p.sigma * self.noise) / p.alpha

    @property
    def velocity(self) -> Tensor:
        """E[dx/dt | x], the drift of the probability-flow ODE."""
        p = self.point
        if self.kind == "velocity":
            return self.out
        if self.kind == "x0":
            sigma = (
                p.sigma.clamp(min=self.sigma_floor) if isinstance(p.sigma, Tensor) else max(p.sigma, self.sigma_floor)
            )
            return (p.d_sigma * self.x - p.wronskian * self.out) / sigma
        if self.kind == "score":
            return p.growth * self.x - p.spread * self.out
        return (p.d_alpha * self.x + p.wronskian * self.noise) / p.alpha

    @property
    def score(self) -> Tensor:
        """The gradient of log p_t(x)."""
        return self.out if self.kind == "score" else -self.noise / self.point.sigma
