"""NiT: loss and samplers of the official code, around the backbone of `nit`."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from genfound.backbones.base import Backbone, TokenSpec
from genfound.batch import Batch
from genfound.objectives.base import GuidanceOf, TimeAdapter
from genfound.objectives.flow import Flow
from genfound.objectives.predictions import Predictions
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from genfound.samplers.guidance import AutoGuidance
from genfound.samplers.sde import sde_grid
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.nit import Fixture, Official, to_batch
from tests.golden.fill import inputs, unit
from tests.helpers import SAMPLERS, guidance_of, linear_flow

SDE = {"method": "euler", "diffusion": "linear", "norm": 1.0, "last": "mean", "last_step_size": 0.04}
"""The official stochastic sampler: its w = 2 t is twice ours, on every path."""


class Toy(Backbone):
    """v = x (0.4 + 0.2 t) - 0.1 sin(y) + 0.05 cos(x), the network of fixtures that test what is around it."""

    layouts = ("packed",)
    time = "data0"
    null_label = 1000

    def __init__(self, channels: int = 4, patch_size: int = 1) -> None:
        super().__init__()
        self.token_spec = TokenSpec(channels, patch_size)

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """(T, P) -> (T, P)."""
        wave = 0.1 * torch.sin(batch.expand(batch.y.float()))
        return batch.x * (0.4 + 0.2 * batch.expand(t)) - wave + 0.05 * torch.cos(batch.x)


class Watched(Backbone):
    """Another network, whose inputs are rounded to a dtype and whose calls are remembered."""

    def __init__(self, net: Backbone, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype
        self.null_label, self.token_spec = net.null_label, net.token_spec
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """(T, P) -> (T, P)."""
        x, t = (a.to(self.dtype).float() for a in (batch.x, t))
        out: Tensor = self.net(replace(batch, x=x), t)
        self.calls.append((x, t, out))
        return out


class NamedDraws(Rng):
    """The draws of a fixture in place of random ones, by purpose."""

    def __init__(self, draws: Mapping[str, Tensor]) -> None:
        super().__init__(0)
        self.draws = draws

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The draw of this purpose."""
        return self.draws[purpose].reshape(tuple(shape))


class StepNoise:
    """The noise of stochastic samplers; where autoguidance acts, officially a second draw replaces the first."""

    def __init__(self, shape: Sequence[int], weak: Watched | None = None) -> None:
        self.shape, self.weak = list(shape), weak
        self.draws = 0
        self.seen = 0

    def normal(self, step: int) -> Tensor:
        """The draw that the official code uses in this step, as packed tokens."""
        calls = 0 if self.weak is None else len(self.weak.calls)
        self.draws += 1 + (calls > self.seen)
        self.seen = calls
        return torch.from_numpy(unit(f"noise.{self.draws - 1}", self.shape)).flatten(1)


class Weaker(Backbone):
    """The network of fixtures of autoguidance: another one's velocity, scaled and moved."""

    def __init__(self, net: Backbone, gain: float, shift: float) -> None:
        super().__init__()
        self.net, self.gain, self.shift = net, gain, shift
        self.null_label, self.token_spec = net.null_label, net.token_spec

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """(T, P) -> (T, P)."""
        out: Tensor = self.gain * self.net(batch, t) + self.shift
        return out


def flow(transport: Mapping[str, Any], **options: Any) -> Flow:
    """The objective that arguments of the official loss ask for."""
    asked = {"P_mean": 0.0, "P_std": 1.0, "prediction": "v", "sigma_data": 1.0, "path_type": "linear", **transport}
    asked.pop("weighting", None)  # stored and never read
    path, mean, sigma_data = asked.pop("path_type"), asked.pop("P_mean"), asked.pop("sigma_data")
    if path == "triangle":
        mean -= math.log(sigma_data)  # t = atan(sigma / sigma_data)
    settings = {"path": path, "prediction": {"v": "velocity"}[asked.pop("prediction")]}
    settings |= {"time": "log_normal", "time_mean": mean, "time_std": asked.pop("P_std"), "weight": "token"}
    if asked:
        raise NotImplementedError(f"unknown arguments {sorted(asked)}")
    return linear_flow(**settings, **options)


@adapter("nit", "nit_loss")
@torch.no_grad()
def loss(fixture: Fixture) -> Results:
    """The flow-matching loss of a pack, every token counting the same."""
    objective = flow(fixture["config"]["transport"], directional=float(fixture["options"].get("use_dir_loss", False)))
    given, network = inputs(fixture), fixture["config"].get("network")
    images, sizes = given["images"], given["hw_list"].tolist()
    official = None if network is None else Official(fixture, network)
    net = Watched(Toy(*images.shape[1:3]) if official is None else official.net)
    draws = {"noise": given["noises"].flatten(1), "time": torch.from_numpy(unit("noise.0", [len(sizes)]))}
    batch = to_batch(images, sizes, given["y"])
    with official.watched() if official else nullcontext():
        losses = objective.loss(net, batch, NamedDraws(draws))
    weights = image_weight(batch.tokens, objective.weight)
    total, denoising = (
        ((weights * part).sum() / weights.sum())[None] for part in (losses.total, losses.terms.get("mse", losses.total))
    )
    ((x_t, t, out),) = net.calls
    results = {
        "t": t,
        "model_input": x_t.view_as(images),
        "model_output": out.view_as(images),
        "denoising_loss": denoising,
        "loss": total,
    }
    if official is not None:
        results["proj_loss"] = 1 - nn.functional.cosine_similarity(official.zs(batch), given["z"], dim=-1).mean()[None]
    return results


def sampler(name: str, asked: dict[str, Any]) -> tuple[Flow, str, Tensor, dict[str, Any]]:
    """Objective, sampler, times and options for arguments of an official sampler; takes them out of `asked`."""
    objective, steps = flow({"path_type": asked.pop("path_type", "linear")}), asked.pop("num_steps")
    if name == "euler_maruyama_sampler":
        return objective, "sde", objective.times(steps), SDE
    if name != "euler_sampler":
        raise NotImplementedError(f"the sampler {name} is unknown")
    name = "heun" if asked.pop("heun", False) else "euler"
    return objective, name, objective.times(steps), {}


@adapter("nit", "nit_sampler")
def sample(fixture: Fixture) -> Results:
    """A sampler with guidance: its samples, and when it called the network."""
    config, given = fixture["config"], inputs(fixture)
    asked = {"cfg_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0, **config["sampler"]}
    interval = [asked.pop("guidance_low"), asked.pop("guidance_high")]
    guidance = {"scale": max(asked.pop("cfg_scale"), 1.0), "interval": interval, "channels": "all"}
    objective, name, times, options = sampler(fixture["options"]["sampler"], asked)
    if asked:
        raise NotImplementedError(f"unknown arguments {sorted(asked)}")
    dtype = getattr(torch, fixture["options"].get("latents_dtype", "float32"))
    latents = given["latents"]
    plain = Official(fixture, config["network"]).net.eval() if "network" in config else Toy(*latents.shape[1:3])
    net, weak = Watched(plain, dtype), None
    if "autoguidance_gain_shift" in config:
        weak = Watched(Weaker(plain, *config["autoguidance_gain_shift"]), dtype)
    guidance_around = guidance_with(weak, guidance)
    batch = to_batch(latents.to(dtype).float(), given["hw_list"].tolist(), given["y"])
    rng = StepNoise(latents.shape, weak)
    out = SAMPLERS[name](objective.field(net, guidance_around), batch, times, rng, **options)
    return {
        "samples": out.x.view_as(latents),
        "noise_draws": rng.draws,
        "model_calls": len(net.calls),
        "model_calls_doubled_for_cfg": sum(len(t) == 2 * len(batch.y) for _, t, _ in net.calls),
        "model_call_times": torch.stack([t[0] for _, t, _ in net.calls]),
    }


def guidance_with(weak: Backbone | None, options: Mapping[str, Any]) -> GuidanceOf | None:
    """Classifier-free guidance, or that by a weaker network at the null label."""
    if weak is None:
        return guidance_of("cfg", **options)
    return functools.partial(AutoGuidance, guide=TimeAdapter(weak), labels="null_label", **options)


@adapter("nit", "nit_score")
def score(fixture: Fixture) -> Results:
    """The score that a velocity implies, image by image because each has its own time."""
    if fixture["config"].keys() - {"path_type"} or fixture["options"]:
        raise NotImplementedError(f"unknown arguments {sorted(fixture['config'])} or {sorted(fixture['options'])}")
    given, path = inputs(fixture), flow(fixture["config"]).path
    batch = to_batch(given["x"], given["hw_list"].tolist(), torch.zeros(len(given["t"])))
    point = path.point(given["t"]).of(batch)
    return {"score": Predictions("velocity", given["v"].flatten(1), batch.x, point).score.view_as(given["x"])}


@adapter("nit", "nit_time_grid")
def times(fixture: Fixture) -> Results:
    """The grid of a sampler, and the steps on which guidance acts for several intervals."""
    config = fixture["config"]
    objective, name, grid, options = sampler(config["sampler"], {"num_steps": config["num_steps"]})
    batch = to_batch(torch.zeros(1, 4, 1, 1), [[1, 1]], torch.zeros(1))
    steps = {}
    for interval in config["intervals"]:
        net = Watched(Toy())
        guidance = {"name": "cfg", "scale": 2.0, "interval": interval, "channels": "all"}
        field = objective.field(net, guidance_of(**guidance))
        SAMPLERS[name](field, batch, grid, StepNoise([1, 4, 1, 1]), **options)
        on = [i for i, (_, t, _) in enumerate(net.calls) if len(t) == 2]
        steps[str(interval)] = {"first": on[0], "last": on[-1], "count": len(on)}
    walk = sde_grid(grid, options["last_step_size"]) if options else grid
    return {"t_steps": walk, "guided_steps": steps}
