"""Flow matching: regress what a path between data and noise is made of."""

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from genfound.batch import Batch
from genfound.config.checks import number, one_of
from genfound.objectives.base import GuidanceOf, GuidedNet, Losses, Net, Objective, TimeAdapter
from genfound.objectives.interpolants import INTERPOLANTS, Coefficients, Interpolant
from genfound.objectives.predictions import PREDICTIONS, Predictions
from genfound.objectives.times import check_shift, shift_factor, shifted, time_grid, time_law
from genfound.objectives.weighting import EXPONENTS, WEIGHTINGS, time_weight


class Flow(Objective):
    """x_t = alpha x + sigma noise; the network predicts its velocity, its noise, its data or its score.

    Where a prediction or a weighting is infinite at an end of the path, times keep a distance from that end:
    1e-3 in sampling, and in training too but on `vp`, 1e-5 (SiT's transport/__init__.py).

    Args:
        path: interpolant, a name of `INTERPOLANTS`.
        prediction: what the network's output is: `velocity`, `noise`, `x0` or `score`.
        weighting: of the times: `none`, `velocity`, `likelihood` or `min_snr`; see `time_weight`.
        min_snr_gamma: the largest weight of `min_snr`.
        time: law of t, a name of `TIME_LAWS`.
        time_mean, time_std: of the normal law behind `logit_normal` and `log_normal`.
        time_shift: moves the law towards noise, s t / (1 + (s - 1) t); or `auto`, see `shift_factor`.
        train_eps, sample_eps: distance from the ends; `None` is the rule above.
        directional: weight of 1 - cosine similarity of velocities along channels (NiT's loss.py, LightningDiT).
        weight: how images count in a global step: `image`, `sqrt` or `token`.
        noise_scale: standard deviation of the noise (JiT, where larger images see more of it).
        sigma_floor: what errors of predicted data, and their velocity in sampling, are divided by at least, in units of
            noise_scale (JiT's t_eps).
        time_window, time_window_share: draw from this [low, high] part of the way alone, in this share of the
            micro-batches; `None` is all of it.

    Raises:
        ValueError: an unknown name; the message lists the known ones. A number that is out of range. A directional
            loss without velocity.
    """

    name = "flow"
    gives = frozenset(("velocity", "flow", "levels"))
    learned_variance = False

    def __init__(
        self,
        *,
        path: str,
        prediction: str,
        weighting: str,
        min_snr_gamma: float,
        time: str,
        time_mean: float,
        time_std: float,
        time_shift: float | str,
        train_eps: float | None,
        sample_eps: float | None,
        directional: float,
        weight: str,
        time_window: Sequence[float] | None = None,
        time_window_share: float = 1.0,
        noise_scale: float = 1.0,
        sigma_floor: float = 0.0,
    ) -> None:
        self.noise_scale = number("objective.noise_scale", noise_scale, 0, above=True)
        self.sigma_floor = noise_scale * number("objective.sigma_floor", sigma_floor, 0)
        self.path = INTERPOLANTS[one_of("objective.path", path, INTERPOLANTS)].with_noise(noise_scale)
        self.prediction = one_of("objective.prediction", prediction, PREDICTIONS)
        self.weighting = one_of("objective.weighting", weighting, WEIGHTINGS)
        self.gamma = number("objective.min_snr_gamma", min_snr_gamma, 0, above=True)
        self.time_law = time_law(time, time_mean, time_std, self.path, time_window, time_window_share)
        self.time_shift = check_shift("objective.time_shift", time_shift)
        self.weight = one_of("objective.weight", weight, EXPONENTS)
        self.signature = {"objective": self.name, "objective.path": path, "objective.prediction": prediction}
        self.signature |= {"objective.noise_scale": noise_scale}
        self.time_range = (0.0, self.path.end)  # (data, noise)
        self.directional = number("objective.directional", directional, 0)
        if directional and prediction != "velocity":
            raise ValueError(f"objective.directional={directional} needs objective.prediction=velocity")
        smooth = prediction == "velocity" and self.path.pure
        train = 0.0 if smooth and weighting != "likelihood" else 1e-3 if self.path.pure else 1e-5
        self.train_interval = self._interval("train_eps", train if train_eps is None else train_eps)
        sample = 0.0 if smooth else 1e-3
        self.sample_interval = self._interval("sample_eps", sample if sample_eps is None else sample_eps)

    def _interval(self, key: str, eps: float) -> tuple[float, float]:
        """(nearest to data, nearest to noise)."""
        if not 0 <= number(f"objective.{key}", eps) < self.path.end / 2:
            raise ValueError(f"objective.{key}={eps} must be at least 0 and less than half of the path")
        return eps, self.path.end - (eps if self.path.pure else 0.0)

    def loss_at(self, net: Net, batch: Batch, part: Tensor, noise: Tensor) -> Losses:
        """Squared error of the prediction, averaged over each image's own elements, times its weighting.

        With a directional loss `terms` are `mse` and `directional`.
        """
        t = self.training_times(batch, part)  # (B,)
        point = self.path.point(t.clamp(min=self.train_interval[0]))
        coefficients = point.of(batch)
        out = self.adapt(net)(replace(batch, x=coefficients.state(batch.x, noise)), t).float()
        velocity = coefficients.velocity(batch.x, noise)
        error = {
            "velocity": lambda: out - velocity,
            "noise": lambda: out - noise,
            "x0": lambda: out - batch.x,
            "score": lambda: coefficients.sigma * out + noise,
        }[self.prediction]()
        mse, drawn = batch.per_image(error**2), t.float().to(out.device)
        if self.weighting != "none":
            factor = time_weight(self.weighting, self.prediction, point, self.gamma, self.sigma_floor)
            mse = mse * factor.float().to(mse.device)
        if not self.directional:
            return Losses(total=mse, t=drawn)
        directional = self.directional * batch.per_image(cosine_loss(net, batch, out, velocity))
        return Losses(total=mse + directional, t=drawn, terms={"mse": mse, "directional": directional})

    def training_times(self, batch: Batch, part: Tensor) -> Tensor:
        """(B,) float64 times of training from what the time law drew; the middle one on rows that are not real.

        They are brought into their interval in SiT's arithmetic, float32 of end - t, on whose last digit the sigma
        of its variance-preserving path depends near data.
        """
        if self.time_shift != 1:
            part = shifted(part, shift_factor("objective.time_shift", self.time_shift, batch))
        (low, high), end = self.train_interval, self.path.end
        t = end * part
        if (low, high) != self.time_range:
            t = end - ((end * (1 - part)).float() * ((high - low) / end) + (end - high)).double()
        return torch.where(batch.real.to(t.device), t, (low + high) / 2)

    def views(self, net: Net, batch: Batch, time: Tensor, noise: Tensor) -> Predictions:
        """What the network says where this path has the linear path's ratio of noise to signal."""
        t = self.path.time_of(time / (1 - time))
        point = self.path.point(t).of(batch)
        noised = replace(batch, x=point.state(batch.x, noise))
        return Predictions(self.prediction, self.adapt(net)(noised, t).float(), noised.x, point)

    def times(self, steps: Any, needs: str = "velocity", spacing: str = "even") -> Tensor:
        """steps + 1 equidistant times."""
        if isinstance(steps, str):
            raise ValueError(f"sampler.steps={steps} must be a whole number for objective=flow")
        data, noise = self.sample_interval
        return time_grid(steps, noise, data)

    def adapt(self, net: Net) -> TimeAdapter:
        """The network in the time of the framework, whatever its own direction."""
        return TimeAdapter(net, self.path.end, self.prediction == "velocity")

    def field(self, net: Net, guidance: GuidanceOf | None = None) -> "FlowField":
        """What the network's output says about velocity, score, data and noise."""
        return FlowField(self.guided(net, guidance), self.path, self.prediction, self.sigma_floor)


class FlowField:
    """A network in the time of the framework, with its guidance, as samplers see it."""

    def __init__(self, net: GuidedNet, path: Interpolant, prediction: str, sigma_floor: float = 0.0) -> None:
        self.net = net
        self.path = path
        self.sigma_floor = sigma_floor
        self.prediction = prediction
        # Below t = 0 the variance-preserving path has no sigma, which data and noise are converted by.
        self.lowest = -math.inf if path.pure or prediction in ("velocity", "score") else 0.0

    def views(self, batch: Batch, t: float, decide_at: float | None = None) -> Predictions:
        """Everything that one call of the network at time t says; batch.x may be float64."""
        out = self.net(replace(batch, x=batch.x.float()), t, decide_at).float()
        return Predictions(self.prediction, out, batch.x, Coefficients.at(self.path, t), self.sigma_floor)

    def velocity(self, batch: Batch, t: float, decide_at: float | None = None) -> Tensor:
        """dx/dt at time t, shaped like `batch.x`."""
        return self.views(batch, t, decide_at).velocity

    def level(self, t: float) -> tuple[float, float]:
        """alpha and sigma at time t."""
        point = Coefficients.at(self.path, t)
        return float(point.alpha), float(point.sigma)

    def time_of(self, ratio: Tensor) -> Tensor:
        """The times at which sigma / alpha has these values."""
        return self.path.time_of(ratio)

    def data_and_noise(self, batch: Batch, t: float) -> tuple[Tensor, Tensor]:
        """Both as predicted at time t."""
        views = self.views(batch, t)
        return views.x0, views.noise


def cosine_loss(net: Net, batch: Batch, out: Tensor, target: Tensor) -> Tensor:
    """1 - cosine similarity along the channels of each latent pixel; layout of `batch.x`, channels reduced."""
    if batch.layout == "dense":
        return 1 - nn.functional.cosine_similarity(out, target, dim=1)[:, None]
    spec = getattr(net, "token_spec", None)
    if spec is None:
        raise ValueError("objective.directional needs a network with a token_spec, or layout=dense")
    ours, theirs = (v.unflatten(-1, (spec.channels, -1)) for v in (out, target))  # (..., C, p p)
    return 1 - nn.functional.cosine_similarity(ours, theirs, dim=-2)
