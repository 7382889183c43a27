"""DiT-MoE: training and sampling with both of its objectives, and the counts of its routing."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from genfound.backbones.dit_moe import DiTMoE, RoutingCounts
from genfound.callbacks.ema import Ema
from genfound.objectives.base import Losses
from genfound.objectives.flow import Flow, FlowField
from tests.golden import fill
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.dit import Draws, dense
from tests.golden.adapters.dit_moe import DEFAULTS, PROCESS, RECIPE, Fixture, Official, settings, tensors
from tests.golden.adapters.gaussian import StepNoise, diffusion, sections
from tests.helpers import SAMPLERS, guidance_of, linear_flow, training_module


def backward(net: DiTMoE, losses: Losses) -> Tensor:
    """The gradient of the mean loss and of what the network adds to it; the mean loss alone."""
    mean = losses.total.mean()
    (mean + sum(training_module(net).extra_losses().values())).backward()
    return mean


def uniform(name: str, *shape: int) -> Tensor:
    """Uniform on [0, 1) from named numbers."""
    return torch.from_numpy(((fill.unit(name, shape).astype("f8") / 3**0.5 + 1) / 2).astype("f4"))


class Counted:
    """The draws of a training step, numbered as the official code draws them: times, noise, label dropout."""

    def __init__(self) -> None:
        self.normals = self.uniforms = 0

    def normal(self, *shape: int) -> Tensor:
        self.normals += 1
        return torch.from_numpy(fill.unit(f"noise.{self.normals - 1}", shape))

    def uniform(self, *shape: int) -> Tensor:
        self.uniforms += 1
        return uniform(f"rand.{self.uniforms - 1}", *shape)

    def step(self, x: Tensor, logit_normal: bool, drop: float) -> Draws:
        time = self.normal(len(x)) if logit_normal else self.uniform(len(x))
        noise = self.normal(*x.shape)
        return Draws(time=time, noise=noise, label_drop=self.uniform(len(x)) if drop else torch.empty(0))


@adapter("dit_moe", "ddpm")
def gaussian(fixture: Fixture) -> Results:
    """Training losses and gradients of Gaussian diffusion, and respaced sampling."""
    config, given, official = fixture["config"], tensors(fixture), Official(fixture)
    options = {key: config[key] for key in PROCESS if key in config}
    objective = diffusion(options, clip=False)
    x, y = given["x"], given["y"]
    draws = Draws(
        time=(given["t"] + 0.5) / len(objective.process),
        noise=torch.from_numpy(fill.unit("noise.0", x.shape)),
        label_drop=uniform("rand.0", len(x)),
    )
    losses = official.module(objective, {}).evaluate(dense(x, y, official.patch_size), draws)
    backward(official.net, losses)
    times = objective.times(sections(options), "gaussian")
    scale = fixture["inputs"]["cfg_scale"]
    guidance = {"name": "cfg", "scale": scale, "interval": [0.0, 1.0], "channels": "first3"}
    field = objective.field(official.net.eval(), guidance_of(**guidance))
    z = given["z"]
    sample = SAMPLERS["ddpm"](field, dense(z, y, official.patch_size), times, StepNoise(z.shape, copies=2))
    return {
        **official.gradients(),
        "loss": losses.total,
        **losses.terms,
        "timestep_map": times.flip(0).long(),
        "sample": sample.x,
    }


def rectified_flow(logit_normal: bool) -> Flow:
    """The objective of RectifiedFlow."""
    return linear_flow(time="logit_normal" if logit_normal else "uniform", time_mean=0.0, time_std=1.0)


@adapter("dit_moe", "rf_train")
def train_flow(fixture: Fixture) -> Results:
    """Loss of the rectified flow, balance loss of each block, and gradients of their sum."""
    given, official = tensors(fixture), Official(fixture, flow=True)
    logit_normal = fixture["config"].get("ln", True)
    draws = Counted().step(given["x"], logit_normal, official.drop)
    module = official.module(rectified_flow(logit_normal), {})
    losses = module.evaluate(dense(given["x"], given["y"], official.patch_size), draws)
    mean = backward(official.net, losses)
    return {
        **official.gradients(),
        "loss": mean[None],
        "per_sample_loss": losses.total,
        "t": losses.t,
        "aux_loss_per_layer": official.net.balances,
    }


@adapter("dit_moe", "rf_train_steps")
def train_steps(fixture: Fixture) -> Results:
    """Optimizer steps of the training module, and its moving average."""
    config, given, official = fixture["config"], tensors(fixture), Official(fixture, flow=True)
    optimizer = dict(config["optimizer"])
    if optimizer.pop("name") != "AdamW":
        raise NotImplementedError(f"optimizer {config['optimizer']['name']}")
    logit_normal = config.get("ln", True)
    module = official.module(rectified_flow(logit_normal), optimizer)
    stepper, ema = module.configure_optimizers(), Ema([config["ema_decay"]])
    trainer: Any = SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, module)
    counted, losses = Counted(), []
    for step in range(config["steps"]):
        batch = dense(given["x"], given["y"], official.patch_size)
        found = module.evaluate(batch, counted.step(given["x"], logit_normal, official.drop))
        stepper.zero_grad()
        losses.append(backward(official.net, found))
        stepper.step()
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module, None, None, step)
    weights = official.outwards({name: p.detach() for name, p in official.net.named_parameters()}, "weights")
    average = official.outwards(ema.averages[config["ema_decay"]], "ema")
    return {"losses": torch.stack(losses), **weights, **average}


@adapter("dit_moe", "rf_sample")
def sample_flow(fixture: Fixture) -> Results:
    """Euler steps without and with guidance, their states, and the data that each step predicts."""
    given, official = tensors(fixture), Official(fixture, flow=True)
    assert set(given["null_y"].tolist()) == {official.net.null_label}
    steps = fixture["inputs"]["sample_steps"]
    flow = rectified_flow(logit_normal=True)
    predicted: list[Tensor] = []
    views = FlowField.views

    def spy(field: FlowField, batch: Any, *times: Any) -> Any:
        found = views(field, batch, *times)
        predicted.append(found.x0)
        return found

    def walk(scale: float) -> list[Tensor]:
        guidance = {"name": "cfg", "scale": scale, "interval": [0.0, 1.0], "channels": "all"}
        states = [given["z"]]
        field = flow.field(official.net, guidance_of(**guidance))
        batch = dense(given["z"], given["y"], official.patch_size)
        SAMPLERS["euler"](field, batch, flow.times(steps), StepNoise([]), lambda _, b: states.append(b.x))
        return states

    plain = walk(1.0)
    with mock.patch.object(FlowField, "views", spy):
        states = walk(fixture["inputs"]["cfg"])
    return {
        "uncond_last": plain[-1],
        "guided_last": states[-1],
        "guided_mid": states[steps // 2],
        "xps_mid": predicted[steps // 2 - 1],
        "xps_last": predicted[-1],
    }


@adapter("dit_moe", "routing_counts")
def routing_counts(fixture: Fixture) -> Results:
    """Choices by class, step and token while images are sampled one by one."""
    config, official = fixture["config"], Official(fixture)
    asked = settings(config, DEFAULTS, *RECIPE)
    options = {key: config[key] for key in PROCESS if key in config}
    objective = diffusion(options, clip=False)
    times = objective.times(sections(options), "gaussian")
    guidance = {"name": "cfg", "scale": config["cfg_scale"], "interval": [0.0, 1.0], "channels": "first3"}
    field = objective.field(official.net, guidance_of(**guidance))
    shape = [1, asked["in_channels"], asked["input_size"], asked["input_size"]]
    classes = tensors(fixture)["classes"]
    with RoutingCounts(official.net, times, asked["num_classes"]).counting() as counts:
        for n, label in enumerate(classes.repeat_interleave(config["images_per_class"])):
            z = torch.from_numpy(fill.unit(f"input.z.{n}", shape))
            SAMPLERS["ddpm"](field, dense(z, label[None], official.patch_size), times, StepNoise(shape, copies=2))
    return {"per_class": counts.per_class[classes], "per_step": counts.per_time, "per_patch": counts.per_token}
