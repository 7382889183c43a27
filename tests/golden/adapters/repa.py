"""REPA and iREPA: SiT with its projectors, the alignment loss, samplers, and steps of the official training.

Officially, as here, t = 0 is data and t = 1 noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from genfound.alignment import Alignment, spatially_normalised
from genfound.backbones.sit import SiT
from genfound.batch import Batch
from genfound.checkpoints.official import dit, projectors
from genfound.layouts import Dense
from genfound.modules.base import GenerativeModule
from genfound.objectives.base import Losses
from genfound.objectives.flow import Flow
from genfound.objectives.predictions import Predictions
from genfound.rng import Rng
from genfound.runtime import checkpoint_io
from tests.golden.adapters import Results, adapter, sizes_of
from tests.golden.adapters.dit import Draws
from tests.golden.adapters.nit_flow import SDE
from tests.golden.adapters.training import Drawn, Training
from tests.golden.fill import inputs, parameters, unit
from tests.helpers import SAMPLERS, guidance_of, linear_flow

Fixture = Mapping[str, Any]

SOURCE = Path("official weights")
PROJECTORS = {"projection_layer_type": "mlp", "kernel_size": 3, "spnorm_method": "none", "zscore_alpha": 0.6}


class Official:
    """The network and the projectors of a fixture, under official arguments of both."""

    def __init__(self, fixture: Fixture, network: Mapping[str, Any], alignment: Mapping[str, Any]) -> None:
        asked = {"mlp_ratio": 4.0, "class_dropout_prob": 0.1, "qk_norm": False, **network}
        for key in ("fused_attn", "decoder_hidden_size", "input_size"):
            asked.pop(key, None)
        self.drop = asked.pop("class_dropout_prob")
        weights = parameters(fixture)
        self.net = SiT(
            **sizes_of(asked), label_drop=self.drop, learn_sigma=False, unused_half=False,
            activation_checkpointing=False, time="data0", qk_norm=asked.pop("qk_norm"),
        )  # fmt: skip
        checkpoint_io.load_strict(self.net, dit.from_official(weights), SOURCE)
        self.alignment = alignment_of(alignment, network["hidden_size"])
        checkpoint_io.load_strict(self.alignment, projectors.from_official(weights), SOURCE)

    def batch(self, x: Tensor, y: Tensor, features: tuple[Tensor, ...] = ()) -> Batch:
        return replace(Dense(self.net.token_spec.patch_size).to_batch(list(x), y), features=features)

    def outwards(self, state: Mapping[str, Tensor | None]) -> dict[str, Tensor]:
        """Names of a module -> official ones."""
        known = {name: value.detach().clone() for name, value in state.items() if value is not None}
        own = {name.removeprefix("net."): value for name, value in known.items() if not name.startswith("alignment.")}
        aligned = {n.removeprefix("alignment."): value for n, value in known.items() if n.startswith("alignment.")}
        moved = dit.to_official(own, self.net.token_spec.patch_size, (1, 1))
        return moved | projectors.to_official(aligned, "sit")

    def module(self, objective: Flow, recipe: Mapping[str, Any]) -> Drawn:
        plain = {"lr": 1e-4, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0, "clip": None,
                 "schedule": "constant", "warmup_images": 0}  # fmt: skip
        module = Drawn(self.net, objective, plain | dict(recipe), self.drop, 0, 1, self.alignment)
        module.train()
        return module


def alignment_of(arguments: Mapping[str, Any], width: int) -> Alignment:
    """Ours for official arguments."""
    widths = {str(number): z for number, z in enumerate(arguments["z_dims"])}
    return Alignment(
        width=width, widths=widths, weight=arguments.get("proj_coeff", 0.5), depth=arguments["encoder_depth"],
        projector=arguments.get("projection_layer_type", "mlp"), hidden=arguments["projector_dim"],
        kernel=arguments.get("kernel_size", 1),
    )  # fmt: skip


def flow(path_type: str, weighting: str) -> Flow:
    """The objective of official arguments; the lognormal law of sigma, drawn as normal numbers."""
    return linear_flow(path=path_type, time={"uniform": "uniform", "lognormal": "log_normal"}[weighting])


def normalised(features: Tensor, arguments: Mapping[str, Any], rows: int) -> Tensor:
    """Features (B, N, Z) as the alignment has them."""
    method = arguments.get("spnorm_method", "none")
    if method == "none":
        return features
    assert method == "zscore"
    maps = features.transpose(1, 2).unflatten(2, (rows, -1))
    return spatially_normalised(maps, arguments["zscore_alpha"]).flatten(2).transpose(1, 2)


def similarity(aligned: Tensor, alignment: Alignment) -> Tensor:
    """Official projection loss, minus the similarity, of our (B,) losses with their weight."""
    return aligned.mean() / alignment.weight - 1


@adapter("repa", "model")
@torch.no_grad()
def model(fixture: Fixture) -> Results:
    """Velocity and projections; in training with the module's label dropout."""
    config, given = fixture["config"], inputs(fixture)
    official = Official(fixture, config, config)
    batch = official.batch(given["x"], given["y"])
    with official.alignment.watching(official.net, batch):
        results = {"out": official.net.eval()(batch, given["t"])}
    hidden = official.alignment._hidden
    assert hidden is not None
    results |= {f"zs_{number}": p(hidden, batch) for number, p in enumerate(official.alignment.projectors)}
    if "pos_embed" in fixture["outputs"]:
        side = config["input_size"] // config["patch_size"]
        results["pos_embed"] = dit.to_official(official.net.state_dict(), config["patch_size"], (side, side))[
            "pos_embed"
        ]
    if "label_drop_uniform" in given:
        probe = Velocity(given["t"])
        module = official.module(probe, {})  # type: ignore[arg-type]
        module.alignment = None
        module.draws = Draws(label_drop=given["label_drop_uniform"])
        module.evaluate(batch, module.draws)
        results["out_train_dropout"] = probe.out
    return results


class Velocity:
    """An objective that only calls the network, at given times."""

    def __init__(self, t: Tensor) -> None:
        self.t = t

    def loss(self, net: Any, batch: Batch, rng: Rng) -> Losses:
        self.out = net(batch, self.t)
        return Losses(batch.per_image(self.out), self.t)


@adapter("repa", "loss")
def loss(fixture: Fixture) -> Results:
    """Losses of a batch, and gradients."""
    config, given = fixture["config"], inputs(fixture)
    official = Official(fixture, config, config)
    module = official.module(flow(config["path_type"], config["weighting"]), {})
    shape, uniform = given["images"].shape, config["weighting"] == "uniform"
    time = given["time_uniform"].double() if uniform else named("noise.0", [len(given["y"])])
    noise = named("noise.0" if uniform else "noise.1", list(shape))
    module.draws = Draws(time=time, noise=noise, label_drop=given["label_drop_uniform"])
    features = tuple(given[f"z_{number}"] for number in range(len(config["z_dims"])))
    losses = module.evaluate(official.batch(given["images"], given["y"], features), module.draws)
    return _terms(official, losses, config["proj_coeff"]) | _gradients(official, module, losses)


def _terms(official: Official, losses: Losses, coefficient: float) -> dict[str, Tensor]:
    denoising, projection = losses.terms["objective"], similarity(losses.terms["alignment"], official.alignment)
    return {
        "denoising_loss": denoising, "proj_loss": projection, "weighted_projection_loss": coefficient * projection,
        "total": denoising.mean() + coefficient * projection,
    }  # fmt: skip


def _gradients(official: Official, module: GenerativeModule, losses: Losses) -> dict[str, Tensor]:
    losses.total.mean().backward()
    found = official.outwards({name: p.grad for name, p in module.named_parameters()})
    return {f"gradients.{name}": value for name, value in found.items()}


@adapter("irepa", "loss")
def spatial_loss(fixture: Fixture) -> Results:
    """Losses with spatially normalised features, projections, and gradients."""
    config, given = fixture["config"], inputs(fixture)
    alignment, asked = config["alignment"], config["loss"]
    official = Official(fixture, config["model"], alignment)
    module = official.module(flow(asked["path_type"], asked["weighting"]), {})
    drawn = {name: named(name, shape) for name, shape in fixture["draws"]}
    uniform = asked["weighting"] == "uniform"
    time = drawn["rand.0"].flatten().double() if uniform else drawn["noise.0"].flatten()
    noise, drop = (drawn["noise.0"], drawn["rand.1"]) if uniform else (drawn["noise.1"], drawn["rand.0"])
    rows = config["model"]["input_size"] // config["model"]["patch_size"]
    features = tuple(normalised(given[f"f.{k}"], alignment, rows) for k in range(len(alignment["z_dims"])))
    batch = official.batch(given["x"], given["y"], features)
    hidden = []
    official.net.blocks[alignment["encoder_depth"] - 1].register_forward_hook(lambda m, i, out: hidden.append(out))
    module.draws = Draws(time=time, noise=noise, label_drop=drop)
    losses = module.evaluate(batch, module.draws)
    projected = {f"projected.{k}": p(hidden[0], batch) for k, p in enumerate(official.alignment.projectors)}
    return projected | _terms(official, losses, alignment["proj_coeff"]) | _gradients(official, module, losses)


def named(name: str, shape: list[int]) -> Tensor:
    """The draw of a name: `noise.k` normal, `rand.k` uniform."""
    drawn = torch.from_numpy(unit(name, shape))
    return drawn if name.startswith("noise") else (drawn / 3**0.5 + 1) / 2


@adapter("irepa", "normalisation")
def normalisation(fixture: Fixture) -> Results:
    """Spatial normalisation alone."""
    return {"normalised": normalised(inputs(fixture)["f"], fixture["config"], 1)}


@adapter("irepa", "projection")
def projection(fixture: Fixture) -> Results:
    """One projector on tokens of a grid."""
    config, given = fixture["config"], inputs(fixture)
    rows, columns = fixture["call"]["hw"]
    arguments = {**config, "z_dims": [config["z_dim"]], "encoder_depth": 1}
    alignment = alignment_of(arguments, config["hidden_size"])
    weights = {f"projectors.0.{name}": value for name, value in parameters(fixture).items()}
    checkpoint_io.load_strict(alignment, projectors.from_official(weights), SOURCE)
    hidden = given["h"].requires_grad_()
    target = normalised(given["f"] + given["common"], config, rows)
    maps = [torch.zeros(1, rows, columns)] * len(hidden)
    batch = replace(Dense(1).to_batch(maps, torch.zeros(len(hidden), dtype=torch.long)), features=(target,))
    found = alignment(hidden, batch)
    found.mean().backward()
    gradients = {name: p.grad for name, p in alignment.named_parameters() if p.grad is not None}
    theirs = projectors.to_official(gradients, "sit")
    inner = "projection_layer." if config["projection_layer_type"] == "mlp" else ""
    moved = {f"gradients.{inner}{name.removeprefix('projectors.0.')}": value for name, value in theirs.items()}
    projected = alignment.projectors[0](hidden, batch)
    return {"normalised": target, "projected": projected, "loss": found.mean() - 1, "gradients.h": hidden.grad, **moved}


@adapter("repa", "samplers")
@torch.no_grad()
def samplers(fixture: Fixture) -> Results:
    """Samples of every run, and scores."""
    config, given = fixture["config"], inputs(fixture)
    official = Official(fixture, config, config)
    batch = official.batch(given["z"], given["y"])
    results: dict[str, Any] = {}
    for name, run in fixture["runs"].items():
        asked = {"cfg_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0, "path_type": "linear", **run}
        interval = [asked["guidance_low"], asked["guidance_high"]]
        guidance = guidance_of("cfg", scale=max(asked["cfg_scale"], 1.0), interval=interval, channels="all")
        objective = flow(asked["path_type"], "uniform")
        ode = "heun" if asked.get("heun") else "euler"
        kind, options = ("sde", SDE) if asked["mode"] == "sde" else (ode, {})
        rng = StepNoise(list(given["z"].shape))
        field = objective.field(official.net.eval(), guidance)
        times = objective.times(asked["num_steps"])
        results[name] = SAMPLERS[kind](field, batch, times, rng, **options).x
        assert rng.draws == asked["noise_draws"]
    for path in ("linear", "cosine"):
        point = flow(path, "uniform").path.point(torch.linspace(0.1, 0.9, len(given["v"])).double())
        results[f"score_{path}"] = Predictions("velocity", given["v"], given["xt"], point.of(batch)).score
    return results


class StepNoise:
    """The noise of each step, in order."""

    def __init__(self, shape: list[int]) -> None:
        self.shape, self.draws = shape, 0

    def normal(self, step: int) -> Tensor:
        self.draws += 1
        return torch.from_numpy(unit(f"noise.{self.draws - 1}", self.shape))


@adapter("repa", "train_steps")
def train(fixture: Fixture) -> Results:
    """Optimizer steps of the training module, projectors included."""
    config, call = fixture["config"], fixture["call"]
    official = Official(fixture, config, {**config, "proj_coeff": call["proj_coeff"]})
    recipe = {"clip": call["max_grad_norm"], **{k: call[k] for k in ("lr", "betas", "eps", "weight_decay")}}
    module = official.module(flow(call["path_type"], call["weighting"]), recipe)
    training, uniform, shape = Training(module, call["ema_decay"]), call["weighting"] == "uniform", call["x_shape"]
    n, tokens = shape[0], (config["input_size"] // config["patch_size"]) ** 2
    labels = [value for name, value in sorted(inputs(fixture).items())]
    terms = []
    for step in range(call["steps"]):
        names = (f"rand.{2 * step}", f"noise.{step}", f"rand.{2 * step + 1}")
        time, noise, drop = names if uniform else (f"noise.{2 * step}", f"noise.{2 * step + 1}", f"rand.{step}")
        draws = Draws(time=named(time, [n]).double(), noise=named(noise, shape), label_drop=named(drop, [n]))
        features = tuple(torch.from_numpy(unit(f"input.z.{i}.{step}", [n, tokens, z]))
                         for i, z in enumerate(config["z_dims"]))  # fmt: skip
        x = torch.from_numpy(unit(f"input.x.{step}", shape))
        losses = training.step(official.batch(x, labels[step % len(labels)], features), draws)
        terms.append(_terms(official, losses, call["proj_coeff"]))
    results: dict[str, Any] = {
        "denoising_losses": torch.stack([of_step["denoising_loss"].detach() for of_step in terms]),
        "proj_losses": torch.stack([of_step["proj_loss"].detach() for of_step in terms]),
        "grad_norms": torch.stack(training.norms),
    }
    states = {"grad0": training.gradients, "param": dict(module.named_parameters()), "ema": training.average}
    for name, state in states.items():
        moved = official.outwards(state)
        results |= {f"{name}:{key}": moved[key] for key in call["report"]}
    return results
