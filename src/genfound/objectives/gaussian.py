"""Gaussian diffusion (DDPM): predict the noise of a discrete process, and its variance if wanted."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.config.checks import integer, interval, number, one_of
from genfound.objectives.base import GuidanceOf, GuidedNet, Losses, Net, Objective, TimeAdapter
from genfound.objectives.bits import discretised_bits, kl_bits
from genfound.objectives.interpolants import INTERPOLANTS
from genfound.objectives.predictions import Predictions
from genfound.objectives.process import SCHEDULES, Process, Tables, leading_timesteps, space_timesteps
from genfound.objectives.times import TimeLaw, time_grid
from genfound.objectives.weighting import EXPONENTS


class ReverseStep(NamedTuple):
    """p(x_{t-1} | x_t), each shaped like `batch.x`, and the data that it was derived from."""

    mean: Tensor
    variance: Tensor
    log_variance: Tensor
    x0: Tensor


class Gaussian(Objective):
    """x_t = sqrt(a_t) x + sqrt(1 - a_t) noise at whole steps t; the network predicts noise or data.

    Losses of an image, means over its elements; vb is the term of the variational bound, in bits:
    `hybrid` mse + vb, where vb trains only a learned variance (DiT); `rescaled_mse` mse + vb T / 1000
    (Nichol & Dhariwal 2021); `kl` T vb; `mse` alone, for a fixed variance.

    Args:
        timesteps: T.
        schedule: of the betas, a name of `SCHEDULES`.
        betas: the first and the last; `None`: those of the schedule. `cosine` has none.
        prediction: what the network's first output per channel is: `epsilon` (the noise) or `x0` (the data).
        variance: `learned_range`, a second output v per channel with log variance between the posterior's
            (v = -1) and log beta (v = 1); `fixed_small`, the posterior's; or `fixed_large`, beta.
        loss: `hybrid`, `rescaled_mse`, `kl` or `mse`.
        clip_x0: clamp predicted data to [-1, 1] in ddpm and ddim; for pixels.
        weight: how images count in a global step: `image`, `sqrt` or `token`.
        elbo_weight: of the squared errors of the noise in the variational bound, in nats, beside `mse` (LDM).

    Raises:
        ValueError: an unknown name, or a loss that leaves a learned variance untrained.
    """

    name = "gaussian"
    gives = frozenset(("velocity", "gaussian", "levels"))

    def __init__(
        self, *, timesteps: int, schedule: str, prediction: str, variance: str, loss: str, clip_x0: bool, weight: str,
        betas: Sequence[float] | None = None, elbo_weight: float = 0.0,
    ) -> None:  # fmt: skip
        self.process = Process(_betas(timesteps, schedule, betas))  # the steps it is trained on
        self.prediction = one_of("objective.prediction", prediction, ("epsilon", "x0"))
        self.variance = one_of("objective.variance", variance, ("learned_range", "fixed_small", "fixed_large"))
        self.kind = one_of("objective.loss", loss, ("hybrid", "rescaled_mse", "kl", "mse"))
        self.clip_x0 = clip_x0
        self.weight = one_of("objective.weight", weight, EXPONENTS)
        self.learned_variance = variance == "learned_range"
        self.signature = {
            "objective": self.name,
            "objective.timesteps": timesteps,
            "objective.schedule": schedule,
            "objective.betas": None if betas is None else list(betas),
            "objective.prediction": prediction,
            "objective.variance": "learned" if self.learned_variance else "fixed",
        }
        self.time_law: TimeLaw = lambda rng, n, device: rng.uniform("time", (n,), device)
        self.time_range = (0.0, float(timesteps - 1))
        if loss == "mse" and self.learned_variance:
            ways = "choose objective.loss=hybrid or objective.variance=fixed_large"
            raise ValueError(f"objective.loss=mse does not train objective.variance=learned_range; {ways}")
        self.elbo_weight = number("objective.elbo_weight", elbo_weight, 0)
        if elbo_weight and (loss, prediction) != ("mse", "epsilon"):
            needed = "objective.loss=mse and objective.prediction=epsilon"
            raise ValueError(f"objective.elbo_weight={elbo_weight} needs {needed}")

    def loss_at(self, net: Net, batch: Batch, part: Tensor, noise: Tensor) -> Losses:
        """The loss of each image at a whole step; terms `mse` and `vb`."""
        drawn = (part * len(self.process)).long().to(batch.x.device)
        step = torch.where(batch.real, drawn, len(self.process) // 2)  # (B,)
        tables = self.process.on(batch.x.device)
        c, t = tables.at(batch, step), tables.timesteps[step]
        noised = replace(batch, x=c.q_sample(batch.x, noise))
        terms = self._terms(c, batch, noised, noise, net(noised, t).float())
        return Losses(total=torch.stack(list(terms.values())).sum(0), t=t, terms=terms)

    def views(self, net: Net, batch: Batch, time: Tensor, noise: Tensor) -> Predictions:
        """What the network says at the ratio of noise to signal of the linear path, told the time between two steps."""
        # The variances of signal and noise add up to 1 on this path, too.
        path, ratio = INTERPOLANTS["cosine"], time / (1 - time)
        point = path.point(path.time_of(ratio)).of(batch)
        noised = replace(batch, x=point.state(batch.x, noise))
        output = self.adapt(net)(noised, self.process.timestep_of(ratio)).float()
        kind = "noise" if self.prediction == "epsilon" else "x0"
        return Predictions(kind, self.split(noised, output)[0], noised.x, point)

    def _terms(self, c: Tables, clean: Batch, noised: Batch, noise: Tensor, output: Tensor) -> dict[str, Tensor]:
        prediction, v = self.split(noised, output)
        if self.kind == "kl":
            reverse = self.reverse(c, noised, prediction, v, clip=False)
            return {"vb": vlb_bits(c, clean, noised, reverse) * len(self.process)}
        target = noise if self.prediction == "epsilon" else clean.x
        error = (target - prediction) ** 2
        terms = {"mse": clean.per_image(error)}
        if self.elbo_weight:
            terms["vb"] = self.elbo_weight * clean.per_image(c.vlb_weights * error)
        if v is not None:
            reverse = self.reverse(c, noised, prediction.detach(), v, clip=False)
            factor = len(self.process) / 1000 if self.kind == "rescaled_mse" else 1.0
            terms["vb"] = vlb_bits(c, clean, noised, reverse) * factor
        return terms

    def split(self, batch: Batch, output: Tensor) -> tuple[Tensor, Tensor | None]:
        """The network's prediction, and v where the variance is learned, each shaped like `batch.x`."""
        axis = 1 if batch.layout == "dense" else -1
        has, needs = output.shape[axis] / batch.x.shape[axis], 2 if self.learned_variance else 1
        if has != needs:
            fix = {2: "model.learn_sigma=auto or objective.variance=fixed_large", 1: "model.learn_sigma=auto"}[needs]
            needed = f"needs {needs} output(s) per channel, but the network has {has:g}"
            raise ValueError(f"objective.variance={self.variance} {needed}; set {fix}")
        if not self.learned_variance:
            return output, None
        prediction, v = output.chunk(2, dim=axis)
        return prediction, v

    def reverse(self, c: Tables, batch: Batch, prediction: Tensor, v: Tensor | None, clip: bool) -> ReverseStep:
        """p(x_{t-1} | x_t) at x_t = `batch.x`, from the two parts of the network's output."""
        x0 = prediction if self.prediction == "x0" else c.x0_from_noise(batch.x, prediction)
        x0 = x0.clamp(-1, 1) if clip else x0
        if v is not None:
            share = (v + 1) / 2
            log_variance = share * c.log_betas + (1 - share) * c.posterior_log_variance_clipped
            variance = log_variance.exp()
        elif self.variance == "fixed_large":
            variance, log_variance = c.fixed_large_variance, c.fixed_large_log_variance
        else:
            variance, log_variance = c.posterior_variance, c.posterior_log_variance_clipped
        shape = batch.x.shape
        return ReverseStep(c.posterior_mean(x0, batch.x), variance.expand(shape), log_variance.expand(shape), x0)

    def times(self, steps: Any, needs: str = "velocity", spacing: str = "even") -> Tensor:
        """The kept steps of the process; of other samplers equidistant times, for `velocity` to -1, without noise."""
        if needs == "gaussian":
            count, quadratic = len(self.process), spacing == "quadratic"
            kept = space_timesteps(steps, count) if spacing == "even" else leading_timesteps(steps, count, quadratic)
            return torch.tensor(kept[::-1], dtype=torch.float64)
        if not isinstance(steps, int):
            raise ValueError(f"sampler.steps={steps} must be a number for objective=gaussian and a solver")
        return time_grid(steps, self.time_range[1], -1.0 if needs == "velocity" else 0.0)

    def adapt(self, net: Net) -> TimeAdapter:
        """The network, whose steps have one direction whatever its `time` says."""
        return TimeAdapter(net, process=self.process if self.prediction == "epsilon" else None)

    def field(self, net: Net, guidance: GuidanceOf | None = None) -> "GaussianField":
        """The network as samplers see it."""
        return GaussianField(self.guided(net, guidance), self, self.process)


@dataclass
class GaussianField:
    """Views of a network that was trained on a `Gaussian`; times are the timesteps of its training.

    It walks the steps of its process; the gradient is that of a classifier that guides (Dhariwal & Nichol 2021).
    """

    net: GuidedNet
    objective: Gaussian
    process: Process
    gradient: Callable[[Batch, float], Tensor] | None = None  # of log p(y | x_t) over x_t, shaped like `batch.x`
    quantise: Callable[[Tensor, Batch], Tensor] | None = None  # predicted data -> the nearest that a codebook has

    lowest = 0.0

    def respaced(self, timesteps: Tensor) -> "GaussianField":
        """The same network on the process that keeps only these timesteps."""
        return replace(self, process=self.process.respaced(sorted(int(t) for t in timesteps)))

    def at(self, batch: Batch, t: float) -> Tables:
        """The numbers of this time, broadcastable against `batch.x`."""
        step = torch.full((len(batch.y),), self.process.step(t), device=batch.x.device)
        return self.process.on(batch.x.device).at(batch, step)

    def mean_logvar(self, batch: Batch, t: float) -> ReverseStep:
        """The distribution of the next state, one step nearer to the data."""
        reverse = self._reverse(batch, t)
        if self.gradient is None:
            return reverse
        return reverse._replace(mean=reverse.mean + reverse.variance * self.gradient(batch, t))

    def x0(self, batch: Batch, t: float) -> Tensor:
        """The predicted data; a classifier moves the noise that it implies by -sqrt(1 - a) gradient."""
        x0 = self._reverse(batch, t).x0
        if self.gradient is None:
            return x0
        c = self.at(batch, t)
        noise = c.noise_from_x0(batch.x, x0) - (1 - c.alphas_cumprod).sqrt() * self.gradient(batch, t)
        return c.x0_from_noise(batch.x, noise)

    def velocity(self, batch: Batch, t: float, decide_at: float | None = None) -> Tensor:
        """dx/dt of the probability-flow ODE at any real t from -1 to T-1."""
        prediction, _ = self.objective.split(batch, self.net(batch, t, decide_at).float())
        log_a, slope = self.objective.process.log_signal(t)
        sigma = math.sqrt(-math.expm1(log_a))
        noise = prediction
        if self.objective.prediction == "x0":
            noise = (batch.x - math.exp(log_a / 2) * prediction) / sigma
        return slope / 2 * (batch.x - noise / sigma)

    def level(self, t: float) -> tuple[float, float]:
        """alpha and sigma at any real t."""
        log_a, _ = self.objective.process.log_signal(t)
        return math.exp(log_a / 2), math.sqrt(-math.expm1(log_a))

    def time_of(self, ratio: Tensor) -> Tensor:
        """The real timesteps at which sigma / alpha has these values."""
        return self.objective.process.timestep_of(ratio)

    def data_and_noise(self, batch: Batch, t: float) -> tuple[Tensor, Tensor]:
        """Both as predicted at any real t."""
        alpha, sigma = self.level(t)
        prediction, _ = self.objective.split(batch, self.net(replace(batch, x=batch.x.float()), t).float())
        if self.objective.prediction == "x0":
            return prediction, (batch.x - alpha * prediction) / sigma
        return (batch.x - sigma * prediction) / alpha, prediction

    def _reverse(self, batch: Batch, t: float) -> ReverseStep:
        prediction, v = self.objective.split(batch, self.net(batch, t).float())
        return self.objective.reverse(self.at(batch, t), batch, prediction, v, self.objective.clip_x0)


def _betas(timesteps: int, schedule: str, ends: Sequence[float] | None) -> Tensor:
    """(T,) float64."""
    integer("objective.timesteps", timesteps, 1)
    make = SCHEDULES[one_of("objective.schedule", schedule, SCHEDULES)]
    if ends is not None and schedule == "cosine":
        raise ValueError(f"objective.betas={list(ends)}: objective.schedule=cosine has none; set objective.betas=null")
    betas = make(timesteps, *(() if ends is None else interval("objective.betas", ends)))
    if not ((betas > 0) & (betas < 1)).all():
        asked = "is too few" if ends is None else f"with objective.betas={list(ends)} does not do"
        raise ValueError(
            f"objective.timesteps={timesteps} {asked} for objective.schedule={schedule}, whose largest beta "
            f"would be {betas.max():g}; take more, or objective.schedule=cosine"
        )
    return betas


def vlb_bits(c: Tables, clean: Batch, noised: Batch, reverse: ReverseStep) -> Tensor:
    """(B,) term of the variational bound, bits per dimension: a KL, at the first step a likelihood of 8 bits."""
    true_mean = c.posterior_mean(clean.x, noised.x)
    kl = kl_bits(true_mean, c.posterior_log_variance_clipped, reverse.mean, reverse.log_variance)
    likelihood = discretised_bits(clean.x, reverse.mean, reverse.log_variance)
    first = c.posterior_variance == 0
    return clean.per_image(torch.where(first, likelihood, kl))
