"""Gaussian diffusion: tables, one step in both directions, losses, the bound, and samplers of analytic networks."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.layouts import Dense
from genfound.objectives.gaussian import Gaussian, GaussianField, ReverseStep
from genfound.objectives.process import StepSpec, linear, space_timesteps
from genfound.objectives.vlb import variational_bound
from genfound.rng import Rng
from genfound.samplers.ddpm import ddim_invert
from tests.golden.adapters import Results, adapter
from tests.golden.fill import inputs, unit
from tests.helpers import SAMPLERS, times_of

Fixture = Mapping[str, Any]

SIGNALS = linear(1000).neg().add(1).cumprod(0)
"""alpha_bar of the process that the analytic networks know."""


def diffusion(config: Mapping[str, Any], clip: bool) -> Gaussian:
    """The objective that arguments of the official create_diffusion ask for, without its respacing."""
    asked = {
        "noise_schedule": "linear", "use_kl": False, "sigma_small": False, "predict_xstart": False,
        "learn_sigma": True, "rescale_learned_sigmas": False, "diffusion_steps": 1000, "timestep_respacing": "",
    }  # fmt: skip
    unknown = config.keys() - asked.keys()
    if unknown:
        raise NotImplementedError(f"unknown arguments {sorted(unknown)}")
    asked |= dict(config)
    fixed = "fixed_small" if asked["sigma_small"] else "fixed_large"
    return Gaussian(
        timesteps=asked["diffusion_steps"],
        schedule={"linear": "linear", "squaredcos_cap_v2": "cosine"}[asked["noise_schedule"]],
        prediction="x0" if asked["predict_xstart"] else "epsilon",
        variance="learned_range" if asked["learn_sigma"] else fixed,
        loss="kl" if asked["use_kl"] else "rescaled_mse" if asked["rescale_learned_sigmas"] else "hybrid",
        clip_x0=clip,
        weight="image",
    )


def sections(config: Mapping[str, Any]) -> StepSpec:
    """The official respacing as the sampler's number of steps."""
    return config.get("timestep_respacing") or config.get("diffusion_steps", 1000)


def respaced(config: Mapping[str, Any], clip: bool = False) -> Gaussian:
    """The objective on the steps that its respacing keeps."""
    objective = diffusion(config, clip)
    objective.process = objective.process.respaced(space_timesteps(sections(config), len(objective.process)))
    return objective


def dense(x: Tensor) -> Batch:
    return Dense(1).to_batch(list(x), torch.zeros(len(x), dtype=torch.long))


class Toy:
    """The exact predictor of data N(mu, s^2) in each pixel, told the timestep of the 1,000-step process."""

    def __init__(self, options: Mapping[str, Any], learned: bool) -> None:
        self.kind, self.mu, self.s = options["type"], options["mu"], options["s"]
        self.learned = learned

    def __call__(self, batch: Batch, t: Tensor | float) -> Tensor:
        t = torch.as_tensor(t, dtype=torch.float32).expand(len(batch.x))
        a = SIGNALS[t.long()]
        scale = a * self.s**2 + 1 - a
        if self.kind == "gaussian_eps":
            slope = (1 - a).sqrt() / scale
            offset = -a.sqrt() * self.mu * slope
        elif self.kind == "gaussian_x0":
            slope = a.sqrt() * self.s**2 / scale
            offset = self.mu - a.sqrt() * self.mu * slope
        else:
            raise NotImplementedError(f"an analytic network of type {self.kind}")
        out = batch.expand(slope.float()) * batch.x + batch.expand(offset.float())
        return torch.cat([out, 0.8 * torch.cos(batch.x + 0.01 * batch.expand(t))], dim=1) if self.learned else out


def classifier(batch: Batch, t: float) -> Tensor:
    """The gradient that fixtures with a classifier use."""
    return 0.5 * torch.cos(2 * batch.x) - 0.1 * batch.x


class StepNoise:
    """The noise of each step, from its number; guided official samplers draw a doubled batch."""

    def __init__(self, shape: Sequence[int], copies: int = 1) -> None:
        self.shape, self.copies = list(shape), copies

    def normal(self, step: int) -> Tensor:
        shape = [self.copies * self.shape[0], *self.shape[1:]]
        return torch.from_numpy(unit(f"noise.{step}", shape))[: self.shape[0]]


class Numbered(Rng):
    """The k-th draw of a fixture for the key k."""

    def __init__(self, k: int = 0) -> None:
        super().__init__(0)
        self.k = k

    def at(self, *key: int | str) -> Rng:
        return Numbered(int(key[0]))

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return torch.from_numpy(unit(f"noise.{self.k}", shape))


@adapter("dit", "diffusion.tables")
def tables(fixture: Fixture) -> Results:
    """Every table of a process."""
    return vars(respaced(fixture["config"]["diffusion"]).process.tables)


@adapter("dit", "diffusion.respace")
def respace(fixture: Fixture) -> Results:
    """The kept timesteps of each case; a case that must be refused is."""
    results: dict[str, Any] = {}
    for case in fixture["config"]["cases"]:
        try:
            results[case["id"]] = space_timesteps(case["section_counts"], case["num_timesteps"])
            assert "raises" not in case
        except ValueError:
            assert case["raises"] == "ValueError"
    return results


@adapter("dit", "diffusion.q_sample")
def forward_process(fixture: Fixture) -> Results:
    """Noising, its moments, and the posterior at the noised state."""
    given = inputs(fixture)
    process, batch = respaced(fixture["config"]["diffusion"]).process, dense(given["x_start"])
    c = process.on(batch.x.device).at(batch, given["t"])
    x_t = c.q_sample(batch.x, given["noise"])
    return {
        "x_t": x_t,
        "mean": c.sqrt_alphas_cumprod * batch.x,
        "variance": 1 - process.tables.alphas_cumprod[given["t"]],
        "log_variance": c.log_one_minus_alphas_cumprod.flatten(),
        "posterior_mean": c.posterior_mean(batch.x, x_t),
        "posterior_variance": c.posterior_variance.flatten(),
        "posterior_log_variance": c.posterior_log_variance_clipped.flatten(),
        "xstart_from_eps": c.x0_from_noise(x_t, given["noise"]),
    }


@adapter("dit", "diffusion.p_mean_variance")
def reverse_step(fixture: Fixture) -> Results:
    """The distribution of the next state, from an analytic network."""
    config, given = fixture["config"], inputs(fixture)
    objective = respaced(config["diffusion"])
    batch = dense(given["x"])
    table = objective.process.on(batch.x.device)
    output = Toy(config["toy"], objective.learned_variance)(batch, table.timesteps[given["t"]])
    clip = fixture["call"]["clip_denoised"]
    reverse = objective.reverse(table.at(batch, given["t"]), batch, *objective.split(batch, output), clip)
    named = reverse._asdict()
    return named | {"pred_xstart": named.pop("x0")}


@adapter("dit", "diffusion.training_losses")
def losses(fixture: Fixture) -> Results:
    """Loss terms and the gradient of their mean with respect to a constant output of the network."""
    given = inputs(fixture)
    objective = respaced(fixture["config"]["diffusion"])
    output = given["model_output"].requires_grad_()
    drawn = (given["t"] + 0.5) / len(objective.process)
    found = objective.loss(lambda batch, t: output, dense(given["x_start"]), _Given(drawn, given["noise"]))
    found.total.mean().backward()
    return {"loss": found.total, **found.terms, "grad_of_mean_loss_wrt_model_output": output.grad}


class _Given(Rng):
    def __init__(self, time: Tensor, noise: Tensor) -> None:
        super().__init__(0)
        self.time, self.noise = time, noise

    def uniform(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self.time

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self.noise


@adapter("dit", "diffusion.bpd")
def bound(fixture: Fixture) -> Results:
    """The variational bound over all steps."""
    config = fixture["config"]
    objective = respaced(config["diffusion"], fixture["call"]["clip_denoised"])
    net = Toy(config["toy"], objective.learned_variance)
    found = variational_bound(objective, net, dense(inputs(fixture)["x_start"]), Numbered())
    return {
        "total_bpd": found.total,
        "prior_bpd": found.prior,
        "vb": found.vb,
        "xstart_mse": found.x0_mse,
        "mse": found.noise_mse,
    }


@adapter("dit", "diffusion.ancestral")
def ancestral(fixture: Fixture) -> Results:
    """Ancestral sampling of an analytic network."""
    return _walk(fixture, "ddpm", {})


@adapter("dit", "diffusion.ddim")
def implicit(fixture: Fixture) -> Results:
    """DDIM of an analytic network."""
    return _walk(fixture, "ddim", {"eta": fixture["call"]["eta"]})


def _walk(fixture: Fixture, name: str, options: Mapping[str, Any]) -> Results:
    config, call = fixture["config"], fixture["call"]
    objective = diffusion(config["diffusion"], call["clip_denoised"])
    field = objective.field(Toy(config["toy"], objective.learned_variance))
    field.gradient = classifier if call.get("cond_fn") else None
    states: list[Tensor] = []
    predicted: list[Tensor] = []
    mean_logvar = GaussianField.mean_logvar

    def spy(field: GaussianField, batch: Batch, t: float) -> ReverseStep:
        reverse = mean_logvar(field, batch, t)
        predicted.append(reverse.x0)
        return reverse

    batch = dense(inputs(fixture)["init"])
    times = times_of(name, objective, sections(config["diffusion"]))
    with mock.patch.object(GaussianField, "mean_logvar", spy):
        SAMPLERS[name](field, batch, times, StepNoise(batch.x.shape), lambda _, b: states.append(b.x), **options)
    last = {"pred_xstart_last": predicted[-1]} if predicted else {}
    return {"sample": states[-1], "sample_after_first_step": states[0], **last}


@adapter("dit", "diffusion.ddim_reverse")
def inversion(fixture: Fixture) -> Results:
    """From data back to the noise of DDIM."""
    config = fixture["config"]
    objective = diffusion(config["diffusion"], fixture["call"]["clip_denoised"])
    field = objective.field(Toy(config["toy"], objective.learned_variance))
    times = objective.times(sections(config["diffusion"]), "gaussian").flip(0)
    batch = dense(inputs(fixture)["init"])
    return {"latent": ddim_invert(field, replace(batch), times).x}
