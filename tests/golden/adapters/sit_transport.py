"""SiT: paths, losses, intervals, samplers and likelihood of the official transport, and samples and training with it.

Officially t = 0 is noise and t = 1 data; here it is the other way round. Analytic networks count as the official ones.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from genfound.batch import Batch
from genfound.callbacks.ema import Ema
from genfound.checkpoints.official.dit import to_official
from genfound.layouts import Dense
from genfound.objectives.flow import Flow
from genfound.objectives.predictions import Predictions
from genfound.samplers.log_likelihood import log_likelihood
from genfound.samplers.sde import DIFFUSIONS, sde_grid
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.dit import Draws, module_of, official
from tests.golden.fill import inputs, unit
from tests.helpers import SAMPLERS, guidance_of, linear_flow

Fixture = Mapping[str, Any]

PATH_NAMES = {"Linear": "linear", "GVP": "gvp", "VP": "vp"}
FORMS = {"SBDM": "sbdm", "increasing-decreasing": "increasing_decreasing"}


def flow(transport: Mapping[str, Any], **options: Any) -> Flow:
    """The objective that arguments of the official create_transport ask for.

    It ignores given distances from the ends for a velocity on a smooth path, and sample_eps without train_eps.
    """
    asked = {"prediction": "velocity", "loss_weight": None, "train_eps": None, "sample_eps": None, **transport}
    path, prediction, weighting = PATH_NAMES[asked.pop("path_type")], asked.pop("prediction"), asked.pop("loss_weight")
    train_eps, sample_eps = asked.pop("train_eps"), asked.pop("sample_eps")
    if asked or prediction not in ("velocity", "score", "noise"):
        raise NotImplementedError(f"unknown arguments {sorted(asked)}, or prediction {prediction}")
    if train_eps is None or (prediction == "velocity" and path != "vp"):
        train_eps = sample_eps = None
    if prediction == "velocity" or weighting is None:
        weighting = "none"
    settings = {"path": path, "prediction": prediction, "weighting": weighting, "time": "uniform"}
    return linear_flow(**{**settings, "train_eps": train_eps, "sample_eps": sample_eps, **options})


def dense(x: Tensor, y: Tensor | None = None) -> Batch:
    """Images as they are; patches do not matter to analytic networks."""
    return Dense(1).to_batch(list(x), torch.zeros(len(x), dtype=torch.long) if y is None else y)


class Toy:
    """The analytic networks of the fixtures, in official time."""

    time = "data1"

    def __init__(self, config: Mapping[str, Any]) -> None:
        self.toy, transport = config["toy"], config["transport"]
        self.path, self.prediction = transport["path_type"], transport["prediction"]

    def __call__(self, batch: Batch, t: Tensor | float) -> Tensor:
        x, u = batch.x, torch.as_tensor(t, dtype=torch.float32).flatten()[0]
        if self.toy["type"] == "wavy":
            return torch.sin(3 * x) * (1 + u) + torch.cos(5 * u) - 0.2 * x
        if self.toy["type"] == "mixing":
            return torch.sin(x) * torch.roll(x, 1, -1) * 0.5 + 0.3 * torch.roll(x, 1, 1) + u
        if self.toy["type"] != "gaussian":
            raise NotImplementedError(f"an analytic network of type {self.toy['type']}")
        p, q = self._gaussian(u.double().item())
        return float(torch.tensor(p).float()) * x + float(torch.tensor(q).float())

    def _gaussian(self, u: float) -> tuple[float, float]:
        """Slope and offset of the exact predictor of N(mu, s^2)."""
        mu, s = self.toy["mu"], self.toy["s"]
        alpha, d_alpha, sigma, moved = self._official(u)  # moved = sigma' sigma
        variance = alpha**2 * s**2 + sigma**2
        if self.prediction == "score":
            return -1 / variance, alpha * mu / variance
        if self.prediction == "noise":
            return sigma / variance, -sigma * alpha * mu / variance
        slope = (d_alpha * alpha * s**2 + moved) / variance
        return slope, d_alpha * mu - slope * alpha * mu

    def _official(self, u: float) -> tuple[float, float, float, float]:
        if self.path == "Linear":
            return u, 1.0, 1 - u, u - 1
        if self.path == "GVP":
            alpha, sigma = math.sin(math.pi * u / 2), math.cos(math.pi * u / 2)
            return alpha, math.pi / 2 * sigma, sigma, -math.pi / 2 * alpha * sigma
        alpha = math.exp(-((1 - u) ** 2) * 19.9 / 4 - (1 - u) * 0.05)
        d_alpha = alpha * ((1 - u) * 9.95 + 0.05)
        return alpha, d_alpha, math.sqrt(max(1 - alpha**2, 0)), -alpha * d_alpha


class NamedNoise:
    """The noise of each step or evaluation, from its number."""

    def __init__(self, shape: Sequence[int], name: str = "noise") -> None:
        self.shape, self.name = list(shape), name

    def normal(self, step: int) -> Tensor:
        return torch.from_numpy(unit(f"{self.name}.{step}", self.shape))


@adapter("sit", "transport.path")
def path(fixture: Fixture) -> Results:
    """Coefficients, and one prediction seen as others."""
    given = inputs(fixture)
    batch = dense(given["x1"])
    point = flow(fixture["config"]["transport"]).path.point(1 - given["t"].double())
    wide = point.of(batch)
    x_t = wide.state(given["x1"], given["x0"])
    from_velocity, from_score = (
        Predictions("velocity", -given["v"], x_t, wide),
        Predictions("score", given["v"], x_t, wide),
    )
    return {
        "alpha": point.alpha,
        "sigma": point.sigma,
        "d_alpha": -point.d_alpha,
        "d_sigma": -point.d_sigma,
        "d_alpha_over_alpha": -point.growth,
        "xt": x_t,
        "ut": -wide.velocity(given["x1"], given["x0"]),
        "drift_first": wide.growth * x_t,
        "drift_second": point.spread,
        "score_from_velocity": from_velocity.score,
        "noise_from_velocity": from_velocity.noise,
        "velocity_from_score": -from_score.velocity,
    }


@adapter("sit", "transport.diffusion")
def diffusion(fixture: Fixture) -> Results:
    """The diffusion coefficient of every form and norm; a constant one is officially a single number."""
    config, t = fixture["config"], 1 - inputs(fixture)["t"].double()
    own = flow(config["transport"]).path
    values = {
        f"{form}@{norm}": DIFFUSIONS[FORMS.get(form, form)](own, t, norm)
        for form in config["forms"]
        for norm in config["norms"]
    }
    return {name: value[:1] if name.startswith("constant") else value for name, value in values.items()}


@adapter("sit", "transport.intervals")
def intervals(fixture: Fixture) -> Results:
    """Distances from the ends and the interval that is walked, in official time; `reverse` mirrors it."""
    results = {}
    for case in fixture["config"]["cases"]:
        objective, asked = flow(case["transport"]), dict(case["check_interval"])
        sampling, stochastic, mirrored = (asked.pop(key, False) for key in ("eval", "sde", "reverse"))
        size = asked.pop("last_step_size", 0.0)
        asked.pop("diffusion_form", None)
        if asked:
            raise NotImplementedError(f"unknown arguments {sorted(asked)}")
        walk = torch.tensor(objective.train_interval).flip(0)
        if sampling:
            walk = sde_grid(objective.times(2), size) if stochastic else objective.times(1)
        ends = (1 - walk[[0, -2 if stochastic and size else -1]]).tolist()
        eps = [objective.train_interval[0], objective.sample_interval[0]]
        results[case["id"]] = torch.tensor(eps + [1 - end if mirrored else end for end in ends])
    return results


@adapter("sit", "transport.training_losses")
def losses(fixture: Fixture) -> Results:
    """Losses of every prediction and weighting, and their gradients at the network's output."""
    given, config = inputs(fixture), fixture["config"]
    draws = Draws(time=1 - given["rand.0"].double(), noise=given["x0"])
    results: dict[str, Any] = {}
    for prediction, weighting in config["cases"]:
        net = Watched()
        objective = flow({**config["transport"], "prediction": prediction, "loss_weight": weighting})
        found = objective.loss(net, dense(given["x1"]), draws).total
        found.mean().backward()
        results[f"loss:{prediction}/{weighting}"] = found
        results[f"grad_norm:{prediction}/{weighting}"] = net.out.grad.flatten(1).norm(dim=1)
        results[f"t:{prediction}"] = net.t
    return results


class Watched:
    """f(x, t) = 0.3 x + 0.5 cos(3 t) + 0.1 sin(2 x), whose time and output are kept."""

    time = "data1"

    def __call__(self, batch: Batch, t: Tensor) -> Tensor:
        self.t = t
        wave = 0.5 * torch.cos(3 * batch.expand(t))
        self.out = (0.3 * batch.x + wave + 0.1 * torch.sin(2 * batch.x)).requires_grad_()
        return self.out


@adapter("sit", "transport.drift_score")
def drift_score(fixture: Fixture) -> Results:
    """Drift of the ODE and score, image by image because each has its own time."""
    config, given = fixture["config"], inputs(fixture)
    field = flow(config["transport"]).field(Toy(config))
    views = [
        field.views(dense(x[None]), t) for x, t in zip(given["x"], (1 - given["t"].double()).tolist(), strict=True)
    ]
    return {"drift": torch.cat([-v.velocity for v in views]), "score": torch.cat([v.score for v in views])}


def solver(call: Mapping[str, Any]) -> dict[str, Any]:
    """Official arguments of an ODE sampler as ours; num_steps counts times."""
    asked = {"sampling_method": "dopri5", "num_steps": 50, "atol": 1e-6, "rtol": 1e-3, "reverse": False, **call}
    ours = {
        "method": asked.pop("sampling_method"),
        "steps": asked.pop("num_steps") - 1,
        "atol": asked.pop("atol"),
        "rtol": asked.pop("rtol"),
        "reverse": asked.pop("reverse"),
    }
    if asked:
        raise NotImplementedError(f"unknown arguments {sorted(asked)}")
    return ours


def stochastic(call: Mapping[str, Any]) -> dict[str, Any]:
    """Official arguments of an SDE sampler as ours; where the last step is none or empty, num_steps counts times."""
    asked = {
        "sampling_method": "Euler", "diffusion_form": "SBDM", "diffusion_norm": 1.0, "last_step": "Mean",
        "last_step_size": 0.04, "num_steps": 250, **call,
    }  # fmt: skip
    last, form = asked.pop("last_step"), asked.pop("diffusion_form")
    if asked["last_step_size"] == 0 and last == "Tweedie":
        raise NotImplementedError("Tweedie's formula at the end of the walk")
    last = last if asked["last_step_size"] else None
    ours = {
        "method": asked.pop("sampling_method").lower(),
        "diffusion": FORMS.get(form, form),
        "norm": asked.pop("diffusion_norm"),
        "last": "none" if last is None else last.lower(),
        "last_step_size": asked.pop("last_step_size"),
        "steps": asked.pop("num_steps") - (last is None),
    }
    if asked:
        raise NotImplementedError(f"unknown arguments {sorted(asked)}")
    return ours


@adapter("sit", "sampler.ode")
def ode(fixture: Fixture) -> Results:
    """Final and intermediate states; `reverse` mirrors the times."""
    config, options = fixture["config"], solver(fixture["call"])
    objective, steps = flow(config["transport"]), options.pop("steps")
    times = objective.times(steps)
    times = 1 - times if options.pop("reverse") else times
    states = [inputs(fixture)["init"]]
    batch = dense(states[0])
    noise = NamedNoise(batch.x.shape)
    SAMPLERS["dopri5"](objective.field(Toy(config)), batch, times, noise, lambda _, b: states.append(b.x), **options)
    return {"sample": states[-1], "state_index_1": states[1], "state_middle": states[(steps + 1) // 2]}


@adapter("sit", "sampler.sde")
def sde(fixture: Fixture) -> Results:
    """The state after the first step, before the last one, and at the end."""
    config, options = fixture["config"], stochastic(fixture["call"])
    objective = flow(config["transport"])
    times = objective.times(options.pop("steps"))
    states: list[Tensor] = []
    batch = dense(inputs(fixture)["init"])
    noise = NamedNoise(batch.x.shape)
    SAMPLERS["sde"](objective.field(Toy(config)), batch, times, noise, lambda _, b: states.append(b.x), **options)
    before = states[-1 if options["last"] == "none" else -2]
    return {"sample": states[-1], "state_first": states[0], "state_before_last_step": before}


@adapter("sit", "sampler.likelihood")
def likelihood(fixture: Fixture) -> Results:
    """Log-density of data and their noise; the official walk is that of sampling, mirrored."""
    config, options = fixture["config"], solver(fixture["call"])
    if options.pop("reverse"):
        raise NotImplementedError("a likelihood has no reverse")
    objective = flow(config["transport"])
    batch = dense(inputs(fixture)["x"])
    times = 1 - objective.times(options.pop("steps"))
    signs = NamedNoise(batch.x.shape, "sign")
    logp, latent = log_likelihood(objective.field(Toy(config)), batch, times, signs, **options)
    return {"logp": logp, "latent": latent.x}


@adapter("sit", "sit.sample")
def sample(fixture: Fixture) -> Results:
    """The official sampling procedure on a small network; guided, its state holds every image twice."""
    call, given, net = dict(fixture["call"]), inputs(fixture), official(fixture, fixture["config"]["model"])
    objective, mode, scale = flow(fixture["config"]["transport"]), call.pop("mode"), call.pop("cfg_scale")
    options = {"ODE": solver, "SDE": stochastic}[mode](call.pop("sampler"))
    if call or options.pop("reverse", False):
        raise NotImplementedError(f"unknown arguments {sorted(call)}, or a sample in reverse")
    name = {"ODE": "dopri5", "SDE": "sde"}[mode]
    z, y, around = given["z"], given["y"], None
    if scale > 1:
        around = guidance_of("cfg", scale=scale, channels="first3", doubled=True)
        assert net.null_label is not None
        z, y = torch.cat([z, z]), torch.cat([y, torch.full_like(y, net.null_label)])
    batch = Dense(net.token_spec.patch_size).to_batch(list(z), y)
    times = objective.times(options.pop("steps"))
    out = SAMPLERS[name](objective.field(net, around), batch, times, NamedNoise(z.shape), **options)
    return {"sample": out.x[: len(given["z"])]}


@adapter("sit", "sit.train_steps")
def train(fixture: Fixture) -> Results:
    """Optimizer steps of the training module and its moving average; weights go out in official names."""
    call, given, net = fixture["call"], inputs(fixture), official(fixture, fixture["config"]["model"]).train()
    objective = flow(fixture["config"]["transport"])
    module = module_of(net, objective, fixture["config"]["model"], call["lr"])
    optimizer, ema = module.configure_optimizers(), Ema([call["ema_decay"]])
    trainer: Any = SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, module)
    shape, p = call["x_shape"], net.token_spec.patch_size

    def outwards(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        copies = {k: v.detach().clone() for k, v in state.items()}
        moved = to_official(copies, p, (shape[2] // p, shape[3] // p))
        return {f"{name}:{key}": moved[key] for key in call["report"]}

    results: dict[str, Any] = {}
    for step in range(call["steps"]):
        batch = Dense(p).to_batch(list(torch.from_numpy(unit(f"input.x.{step}", shape))), given["y"])
        t, drop = 1 - given[f"rand.{2 * step}"].double(), given[f"rand.{2 * step + 1}"]
        draws = Draws(time=t, noise=torch.from_numpy(unit(f"noise.{step}", shape)), label_drop=drop)
        losses = module.evaluate(batch, draws)
        optimizer.zero_grad()
        losses.total.mean().backward()
        if step == 0:
            results |= outwards({name: p.grad for name, p in net.named_parameters()}, "grad0")  # type: ignore[misc]
        optimizer.step()
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module, None, None, step)
        results[f"loss.{step}"] = losses.total
    results |= outwards(net.state_dict(), "param")
    return results | outwards(ema.averages[call["ema_decay"]], "ema")
