"""DiT: the network, its parts, and a few steps of its training. SiT: the network."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from genfound.backbones.base import Backbone
from genfound.backbones.dit import Block, DiT, FinalLayer, position_table
from genfound.backbones.sit import SiT
from genfound.batch import Batch
from genfound.callbacks.ema import Ema
from genfound.checkpoints.official.dit import from_official, to_official
from genfound.data.images import views
from genfound.layers.embed import LabelEmbedder, TimestepEmbedder, sinusoid
from genfound.layouts import Dense
from genfound.modules.base import GenerativeModule
from genfound.objectives.base import Losses, Net, TimeAdapter
from genfound.rng import Rng
from genfound.runtime import checkpoint_io
from tests.golden.adapters import Results, adapter, sizes_of
from tests.golden.adapters.gaussian import StepNoise, diffusion, sections
from tests.golden.fill import inputs, parameters, unit
from tests.helpers import SAMPLERS, guidance_of, times_of

Fixture = Mapping[str, Any]

DEFAULTS: dict[str, Any] = {
    "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16,
    "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000, "learn_sigma": True,
}  # fmt: skip


SOURCE = Path("official weights")


class _All(tuple[str, ...]):
    """Every key: the adapter itself judges its outputs, which are statistics of random draws."""

    def __contains__(self, key: object) -> bool:
        return True


def build(config: Mapping[str, Any], kind: type[DiT] = DiT) -> DiT:
    """The backbone that official constructor arguments ask for; SiT's learn_sigma makes channels that it never uses."""
    unknown = config.keys() - DEFAULTS.keys()
    if unknown:
        raise NotImplementedError(f"unknown arguments {sorted(unknown)}")
    asked = DEFAULTS | dict(config)
    unused = kind is SiT and asked["learn_sigma"]
    return kind(
        **sizes_of(asked),
        label_drop=asked["class_dropout_prob"],
        learn_sigma=asked["learn_sigma"] and not unused,
        activation_checkpointing=False,
        unused_half=unused,
    )


def official(fixture: Fixture, config: Mapping[str, Any]) -> DiT:
    """The backbone with the official weights of a fixture, its computed position table among them."""
    kind = {"dit": DiT, "sit": SiT}[fixture["topic"]]
    net, weights = build(config, kind), parameters(fixture)
    for key, shape in fixture["buffers"]:
        assert key == "pos_embed"
        side = math.isqrt(shape[1])
        weights[key] = position_table(side, side, shape[2])[None]
    checkpoint_io.load_strict(net, from_official(weights), SOURCE)
    return net.eval()


def dense(x: Tensor, y: Tensor, patch_size: int) -> Batch:
    return Dense(patch_size).to_batch(list(x), y)


class Draws(Rng):
    """The draws of a fixture in place of random ones, by purpose."""

    def __init__(self, **draws: Tensor) -> None:
        super().__init__(0)
        self.draws = draws

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self.draws[purpose]

    def uniform(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        return self.draws[purpose]


class Probe:
    """An objective that only calls the network, at given times."""

    def __init__(self, t: Tensor) -> None:
        self.t = t

    def loss(self, net: Net, batch: Batch, rng: Rng) -> Losses:
        self.out = net(batch, self.t)
        return Losses(batch.per_image(self.out), self.t)


def module_of(net: Backbone, objective: Any, config: Mapping[str, Any], lr: float = 1e-4) -> GenerativeModule:
    """The training module under DiT's recipe."""
    recipe = {"lr": lr, "betas": [0.9, 0.999], "eps": 1e-8, "weight_decay": 0.0}
    drop = (DEFAULTS | dict(config))["class_dropout_prob"]
    return GenerativeModule(net, objective, recipe, drop, seed=0, budget=1)


@adapter("dit", "dit.model")
@adapter("sit", "sit.model")
@torch.no_grad()
def forward(fixture: Fixture) -> Results:
    """The network's output; in training, with the module's label dropout."""
    config, given = fixture["config"], inputs(fixture)
    net = official(fixture, config)
    batch = dense(given["x"], given["y"], net.token_spec.patch_size)
    if fixture["mode"] == "eval":
        return {"out": net(batch, given["t"])}
    probe = Probe(given["t"])
    module_of(net.train(), probe, config).evaluate(batch, Draws(label_drop=given.get("rand.0", torch.empty(0))))
    return {"out": probe.out}


@adapter("dit", "dit.model_cfg")
@adapter("sit", "sit.model_cfg")
@torch.no_grad()
def guided_forward(fixture: Fixture) -> Results:
    """The guided output, image by image because each has its own time; the null half keeps its own rest."""
    given, net = inputs(fixture), official(fixture, fixture["config"])
    scale = fixture["call"]["cfg_scale"]
    guidance = {"name": "cfg", "scale": scale, "interval": [0.0, 1000.0], "channels": "first3"}
    n = len(given["x"]) // 2
    assert (given["y"][n:] == net.null_label).all()
    assert torch.equal(given["t"][n:], given["t"][:n])
    first, second = [], []
    for x, t, y in zip(given["x"][:n], given["t"][:n], given["y"][:n], strict=True):
        batch = dense(x[None], y[None], net.token_spec.patch_size)
        first.append(guidance_of(**guidance)(TimeAdapter(net))(batch, float(t)))
        null = dense(x[None], torch.tensor([net.null_label]), net.token_spec.patch_size)
        second.append(torch.cat([first[-1][:, :3], net(null, t[None])[:, 3:]], dim=1))
    return {"out": torch.cat(first + second)}


@adapter("dit", "dit.pos_embed")
def positions(fixture: Fixture) -> Results:
    """The position table of a square."""
    side = fixture["config"]["grid_size"]
    return {"out": position_table(side, side, fixture["config"]["embed_dim"])}


@adapter("dit", "dit.timestep_embedding")
def time_sinusoid(fixture: Fixture) -> Results:
    """The sinusoid of times."""
    config = dict(fixture["config"])
    period = {"longest_period": config["max_period"]} if "max_period" in config else {}
    return {"out": sinusoid(inputs(fixture)["t"], config["dim"], **period)}


@adapter("dit", "dit.timestep_embedder")
@torch.no_grad()
def time_embedding(fixture: Fixture) -> Results:
    """Sinusoid and MLP."""
    module = TimestepEmbedder(fixture["config"]["hidden_size"])
    checkpoint_io.load_strict(module, parameters(fixture), SOURCE)
    return {"out": module(inputs(fixture)["t"])}


@adapter("dit", "dit.label_embedder")
@torch.no_grad()
def label_embedding(fixture: Fixture) -> Results:
    """Labels after the module's dropout and their rows; a forced drop is the null label itself."""
    config, given = fixture["config"], inputs(fixture)
    net = Labels(LabelEmbedder(config["num_classes"], config["hidden_size"], null_class=config["dropout_prob"] > 0))
    checkpoint_io.load_strict(net.table, parameters(fixture), SOURCE)
    probe, labels = Probe(torch.zeros(0)), given["labels"]
    module = module_of(net, probe, {"class_dropout_prob": config["dropout_prob"]})
    batch = dense(torch.zeros(len(labels), 1, 1, 1), labels, 1)
    module.evaluate(batch, Draws(label_drop=given["rand.0"]))
    forced = torch.where(given["force_drop_ids"] == 1, config["num_classes"], labels)
    return {
        "train_labels_after_drop": net.seen,
        "train": probe.out,
        "eval": net.table(labels),
        "forced_eval": net.table(forced),
    }


class Labels(Backbone):
    """The rows of a label table, as a network."""

    def __init__(self, table: LabelEmbedder) -> None:
        super().__init__()
        self.table, self.null_label = table, table.embedding_table.num_embeddings - 1

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        self.seen = batch.y
        out: Tensor = self.table(batch.y)
        return out


@adapter("dit", "dit.block")
@torch.no_grad()
def block(fixture: Fixture) -> Results:
    """One block; the SiLU before its modulation is computed once for all blocks, outside."""
    config, given = fixture["config"], inputs(fixture)
    module = Block(config["hidden_size"], config["num_heads"], config.get("mlp_ratio", 4.0))
    checkpoint_io.load_strict(module, parameters(fixture), SOURCE)
    return {"out": module(given["x"], torch.nn.functional.silu(given["c"]))}


@adapter("dit", "dit.final_layer")
@torch.no_grad()
def final_layer(fixture: Fixture) -> Results:
    """The last layer, whose patch has another order here; the inverse of the conversion of weights."""
    config, given = fixture["config"], inputs(fixture)
    p, channels = config["patch_size"], config["out_channels"]
    module = FinalLayer(config["hidden_size"], channels * p * p)
    order = torch.arange(channels * p * p).view(p, p, channels).permute(2, 0, 1).flatten()  # ours from theirs
    weights = parameters(fixture)
    weights |= {key: weights[key][order] for key in ("linear.weight", "linear.bias")}
    checkpoint_io.load_strict(module, weights, SOURCE)
    return {"out": module(given["x"], torch.nn.functional.silu(given["c"]))[..., order.argsort()]}


@adapter("dit", "dit.init", notes=_All())
def initialisation(fixture: Fixture) -> Results:
    """Zeros exactly, spreads within what the number of elements allows, uniform laws within their bounds."""
    net = build(fixture["config"])
    net.initialise(Rng(0))
    grid = (fixture["config"].get("input_size", 32) // net.token_spec.patch_size,) * 2
    ours = to_official(net.state_dict(), net.token_spec.patch_size, grid)
    for key, entry in fixture["outputs"].items():
        value = ours[key].detach().double()
        assert list(value.shape) == entry["shape"], key
        if entry["abs_max"] == 0:
            assert (value == 0).all(), key
            continue
        spread = entry["std"]
        assert abs(value.mean() - entry["mean"]) < 7 * spread / value.numel() ** 0.5, key
        assert abs(value.std(correction=0) / spread - 1) < 5 / value.numel() ** 0.5, key
        assert 0.8 < value.abs().max() / entry["abs_max"] < 1.25, key
        if "embed" not in key:  # a uniform law: both come near the same bound
            assert abs(value.abs().max() / entry["abs_max"] - 1) < 20 / value.numel(), key
    return {}


@adapter("dit", "dit.sample")
def sample(fixture: Fixture) -> Results:
    """The official sampling procedure on a small network; of its doubled noise only the first half matters."""
    config, call, given = fixture["config"], dict(fixture["call"]), inputs(fixture)
    objective, net = diffusion(config["diffusion"], clip=False), official(fixture, config["model"])
    scale, name = call.pop("cfg_scale"), call.pop("sampler")
    batch = dense(given["z"], given["y"], net.token_spec.patch_size)
    guidance = {"name": "cfg", "scale": scale, "interval": [0.0, 1000.0], "channels": "first3"}
    times = times_of(name, objective, sections(config["diffusion"]))
    noise = StepNoise(given["z"].shape, copies=1 if scale == 1 else 2)
    out = SAMPLERS[name](objective.field(net, guidance_of(**guidance)), batch, times, noise, **call)
    return {"sample": out.x}


@adapter("dit", "dit.train_steps")
def train(fixture: Fixture) -> Results:
    """Optimizer steps of the training module and its moving average; weights go out in official shapes."""
    config, call, given = fixture["config"], fixture["call"], inputs(fixture)
    net = official(fixture, config["model"]).train()
    objective = diffusion(config["diffusion"], clip=False)
    module = module_of(net, objective, config["model"], call["lr"])
    optimizer, ema = module.configure_optimizers(), Ema([call["ema_decay"]])
    trainer: Any = SimpleNamespace(global_step=0)
    ema.on_train_start(trainer, module)
    shape = call["x_shape"]
    grid = tuple(side // net.token_spec.patch_size for side in shape[2:])

    def outwards(state: Mapping[str, Tensor], name: str) -> dict[str, Tensor]:
        moved = to_official({k: v.detach().clone() for k, v in state.items()}, net.token_spec.patch_size, grid)
        return {f"{name}:{key}": moved[key] for key in call["report"]}

    results: dict[str, Any] = {}
    for step, t in enumerate(given["t"].view(call["steps"], -1)):
        batch = dense(torch.from_numpy(unit(f"input.x.{step}", shape)), given["y"], net.token_spec.patch_size)
        drawn = (t + 0.5) / len(objective.process)
        noise = torch.from_numpy(unit(f"noise.{step}", shape))
        rng = Draws(time=drawn, noise=noise, label_drop=given[f"rand.{step}"])
        losses = module.evaluate(batch, rng)
        optimizer.zero_grad()
        losses.total.mean().backward()
        if step == 0:
            results |= outwards({name: p.grad for name, p in net.named_parameters()}, "grad0")  # type: ignore[misc]
        optimizer.step()
        trainer.global_step += 1
        ema.on_train_batch_end(trainer, module, None, None, step)
        results |= {f"loss.{step}": losses.total} | {f"{name}.{step}": term for name, term in losses.terms.items()}
    results |= outwards(net.state_dict(), "param")
    return results | outwards(ema.averages[call["ema_decay"]], "ema")


@adapter("dit", "data.center_crop")
def center_crop(fixture: Fixture) -> Results:
    """The centre crop of a synthetic image."""
    entry = fixture["inputs"]["image"]
    height, width = entry["height"], entry["width"]
    noise = ((unit(entry["fill"], (height, width, 3)) / np.sqrt(3) + 1) / 2).astype(np.float32).astype(np.float64)
    h, w, _ = np.ogrid[:height, :width, :3]
    image = 0.5 * noise + 0.5 * (0.5 + 0.5 * np.sin(w / 7) * np.cos(h / 11))
    pixels = np.clip(np.floor(256 * image), 0, 255).astype(np.uint8)
    return {"out": np.asarray(views.center_crop(Image.fromarray(pixels), fixture["config"]["image_size"]))}
