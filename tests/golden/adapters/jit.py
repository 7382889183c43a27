"""JiT: the network, its sizes and initial values, loss, samples and training. Officially t = 0 is noise."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from genfound import build
from genfound.backbones.dit import position_table
from genfound.backbones.jit import JiT
from genfound.batch import Batch
from genfound.checkpoints.official.jit import from_official, official_options, to_official
from genfound.layers.rope import Rope
from genfound.layouts import Dense
from genfound.modules.jit import JiTModule
from genfound.objectives.flow import Flow
from genfound.rng import Rng
from genfound.runtime import checkpoint_io
from tests.golden.adapters import Results, adapter, sizes_of
from tests.golden.adapters.fit import law
from tests.golden.adapters.training import Drawn, Training
from tests.golden.fill import inputs, parameters, unit
from tests.helpers import SAMPLERS, composed, guidance_of, linear_flow

Fixture = Mapping[str, Any]
Config = Mapping[str, Any]

SOURCE = Path("official weights")
ROPE = {"rule": "normal", "trained": 16, "target": None, "decouple": True, "exact": True}


def model_of(asked: Config) -> dict[str, Any]:
    """Keys of `model` for official constructor arguments."""
    own = ("bottleneck_dim", "in_context_len", "in_context_start")
    others = {
        "input_size",
        "in_channels",
        "hidden_size",
        "num_heads",
        "num_classes",
        "patch_size",
        "depth",
        "mlp_ratio",
    }
    if unknown := asked.keys() - {*own, *others}:
        raise NotImplementedError(f"unknown arguments {sorted(unknown)}")
    released = {key: composed("model=jit_b")["model"][key] for key in ("ffn", "norm", "qk_norm", "positions", "shift")}
    return {
        **sizes_of(asked), **{key: asked[key] for key in own}, **released,
        "rope_theta": 10_000, "rope_scaling": ROPE, "label_drop": 0.1, "learn_sigma": False, "unused_half": False,
        "attention": "auto", "activation_checkpointing": False, "dropout": 0.0,
    }  # fmt: skip


def grid_of(asked: Config) -> tuple[int, int]:
    return (asked["input_size"] // asked["patch_size"],) * 2


def official(fixture: Fixture, asked: Config) -> JiT:
    """The backbone with the official weights of a fixture, whose options its shapes tell too."""
    weights, model = parameters(fixture), model_of(asked)
    assert [key for key, _ in fixture["buffers"]] == ["pos_embed"]
    weights["pos_embed"] = position_table(*grid_of(asked), model["width"])[None]
    told = official_options(weights)
    assert all(model[key] == value for key, value in told.items() if key not in ("mlp_ratio", "in_context_start"))
    net = JiT(**{**model, "mlp_ratio": told["mlp_ratio"]})
    checkpoint_io.load_strict(net, from_official(weights), SOURCE)
    return net.eval()


def dense(net: JiT, x: Tensor, y: Tensor) -> Batch:
    return Dense(net.token_spec.patch_size).to_batch(list(x), y)


def outwards(state: Mapping[str, Tensor], asked: Config) -> dict[str, Tensor]:
    """Tensors of ours under official names."""
    return to_official({k: v.detach().clone() for k, v in state.items()}, asked["patch_size"], grid_of(asked))


@adapter("jit", "model")
@torch.no_grad()
def forward(fixture: Fixture) -> Results:
    """The output, the tables, and the tokens that each block sees."""
    asked, given, net = fixture["config"], inputs(fixture), official(fixture, fixture["config"])
    seen: list[tuple[int, Tensor]] = []
    for block in net.blocks:
        block.register_forward_pre_hook(lambda _, given: seen.append((given[0].shape[1], given[-1])))
    out = net(dense(net, given["x"], given["y"]), given["t"])
    cos, sin = seen[-1][1][0, :, 0].repeat_interleave(2, dim=1).unbind(-1)  # (tokens, d) each
    table = position_table(*grid_of(asked), asked["hidden_size"])[None]
    lengths = [count for count, _ in seen]
    return {"out": out, "pos_embed": table, "rope_cos": cos, "rope_sin": sin, "tokens_per_block": lengths}


@adapter("jit", "sizes")
def sizes(fixture: Fixture) -> Results:
    """Exact parameter counts, names and shapes of the presets."""
    return {"rows": [size(row["name"], row["img_size"]) for row in fixture["rows"]]}


def size(name: str, side: int) -> dict[str, Any]:
    preset, patch = name.removeprefix("JiT-").lower().split("/")
    config = composed(f"model=jit_{preset}", f"model.patch_size={patch}")
    model, grid = config["model"], (side // int(patch),) * 2
    with torch.device("meta"):
        net = build.net(config, build.published_spec(config), 1000)
    assert isinstance(net, JiT) and isinstance(net.rope, Rope)
    state = to_official(net.state_dict(), int(patch), grid)
    lines = sorted(f"{key}:{','.join(map(str, tensor.shape))}" for key, tensor in state.items())
    trained = sum(p.numel() for p in net.parameters())
    return {
        "name": name, "img_size": side, "num_classes": 1000, "depth": model["depth"], "hidden": model["width"],
        "heads": model["heads"], "head_dim": net.rope.head, "bottleneck": model["bottleneck_dim"],
        "in_context_len": model["in_context_len"], "in_context_start": model["in_context_start"],
        "tokens": grid[0] * grid[1], "swiglu_hidden": net.blocks[0].mlp.w3.in_features,
        "total": trained + grid[0] * grid[1] * model["width"], "trainable": trained, "state_dict_entries": len(state),
        "sha1_of_sorted_key_shape_lines": hashlib.sha1("\n".join(lines).encode()).hexdigest(),
    }  # fmt: skip


@adapter("jit", "init", notes=("kind",))
def initialisation(fixture: Fixture) -> Results:
    """The law of every parameter, from one network; the laws are names, which are compared here."""
    net = JiT(**model_of(fixture["config"]))
    net.initialise(Rng(0))
    wanted = fixture["outputs"]["kind"]["values"]
    assert {key: law(value.detach()) for key, value in net.named_parameters()} == wanted
    return {}


@adapter("jit", "dropout_blocks")
def dropout(fixture: Fixture) -> Results:
    """The numbers of the blocks that drop."""
    found = {}
    for name in fixture["config"]["sizes"]:
        preset = name.removeprefix("JiT-").lower().partition("/")[0]
        depth = int(name.split()[1]) if name.startswith("depth") else composed(f"model=jit_{preset}")["model"]["depth"]
        small = {"hidden_size": 8, "num_heads": 1, "input_size": 2, "patch_size": 1, "in_channels": 3, "mlp_ratio": 4.0}
        context = {"num_classes": 1, "bottleneck_dim": 1, "in_context_len": 0, "in_context_start": 0}
        net = JiT(**{**model_of({**small, **context, "depth": depth}), "dropout": 0.2})
        ours = [getattr(part.dropout, "p", 0) for block in net.blocks for part in (block.attn, block.mlp)]
        assert ours[::2] == ours[1::2] and set(ours) == {0, 0.2}
        found[name] = [i for i, p in enumerate(ours[::2]) if p]
    return found


def objective_of(settings: Config) -> Flow:
    """The objective of official arguments: that of the recipe with these numbers; its times run backwards."""
    asked = {key: value for key, value in settings.items() if key != "label_drop_prob"}
    numbers = {
        "time_mean": -asked.pop("P_mean", -0.8), "time_std": asked.pop("P_std", 0.8),
        "sigma_floor": asked.pop("t_eps"), "noise_scale": asked.pop("noise_scale"),
    }  # fmt: skip
    if asked:
        raise NotImplementedError(f"unknown arguments {sorted(asked)}")
    recipe = composed("objective=flow_jit")["objective"]
    return linear_flow(**{key: value for key, value in recipe.items() if key != "_target_"} | numbers)


class Draws(Rng):
    """The official draws of a step: label dropout is rand.k, the time noise.2k, the noise noise.2k+1."""

    def __init__(self, step: int = 0) -> None:
        super().__init__(0)
        self.step = step

    def normal(self, purpose: str, shape: Any, device: Any = "cpu") -> Tensor:
        drawn = torch.from_numpy(unit(f"noise.{2 * self.step + (purpose == 'noise')}", shape))
        return -drawn if purpose == "time" else drawn

    def uniform(self, purpose: str, shape: Any, device: Any = "cpu") -> Tensor:
        assert purpose == "label_drop"
        return (torch.from_numpy(unit(f"rand.{self.step}", shape)) / 3**0.5 + 1) / 2


class DrawnJiT(Drawn, JiTModule):
    """The training module with the draws of a fixture."""


class Watched:
    """Keeps what a network is given and what it answers."""

    def __init__(self, net: JiT) -> None:
        net.register_forward_hook(self)

    def __call__(self, net: Any, given: Any, out: Tensor) -> None:
        (self.batch, self.t), self.out = given, out


@adapter("jit", "loss")
def loss(fixture: Fixture) -> Results:
    """The loss, what the network was given and answered, and gradients."""
    config, given = fixture["config"], inputs(fixture)
    net = official(fixture, config["model"]).train(config["train"])
    module = DrawnJiT(net, objective_of(config["loss"]), {}, config["loss"]["label_drop_prob"] * config["train"], 0, 1)
    module.draws, watched = Draws(), Watched(net)
    total = module.evaluate(dense(net, given["x"], given["y"]), Rng(0)).total.mean()
    total.backward()
    gradients = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    moved = {f"gradients.{key}": value for key, value in outwards(gradients, config["model"]).items()}
    labels = watched.batch.y.tolist()
    return {"loss": total, "t": watched.t, "z": watched.batch.x, "x_pred": watched.out, "labels": labels, **moved}


@adapter("jit", "sample")
def sample(fixture: Fixture) -> Results:
    """The official sampling procedure."""
    config, y = dict(fixture["config"]["sampler"]), inputs(fixture)["y"]
    net = official(fixture, fixture["config"]["model"])
    name, steps, scale = config.pop("method"), config.pop("steps"), config.pop("cfg")
    interval = [1 - config.pop("interval_max"), 1 - config.pop("interval_min")]
    objective, around = objective_of(config), guidance_of("cfg", scale=scale, interval=interval, ends="open")
    noise = objective.noise_scale * torch.from_numpy(unit("noise.0", fixture["draws"][0][1]))
    options = {"guidance_at": "slope"} if name == "heun" else {}
    field, times = objective.field(net, around), objective.times(steps)
    return {"samples": SAMPLERS[name](field, dense(net, noise, y), times, Rng(0), **options).x}


@adapter("jit", "train_steps")
def train(fixture: Fixture) -> Results:
    """Steps of the training module, its schedule included, and both averages."""
    config, call, given = fixture["config"], fixture["call"], inputs(fixture)
    asked, decays = config["model"], [call["ema_decay1"], call["ema_decay2"]]
    images, per_epoch = call["x_shape"][0], call["steps_per_epoch"] * call["x_shape"][0]
    recipe = {
        **{key: call[key] for key in ("lr", "min_lr", "weight_decay", "betas", "eps")}, "clip": None,
        "schedule": call["lr_schedule"],
        "warmup_images": call["warmup_epochs"] * per_epoch, "warmup_start": 0.0,
    }  # fmt: skip
    net, goal = official(fixture, asked).train(), objective_of(config["loss"])
    module = DrawnJiT(net, goal, recipe, config["loss"]["label_drop_prob"], 0, call["epochs"] * per_epoch)
    training, labels = Training(module, *decays), [given[f"y.{k}"] for k in range(len(given))]
    for step in range(call["steps"]):
        bytes_ = np.floor((unit(f"input.x.{step}", call["x_shape"]) / np.float32(3**0.5) + 1) * 128).clip(0, 255)
        batch = dense(net, torch.from_numpy(bytes_).float() / 255 * 2 - 1, labels[step % len(labels)])
        module.images_seen = step * images
        training.step(batch, Draws(step))
    results = {
        f"grad0:{key}": value
        for key, value in outwards(
            {name.removeprefix("net."): p for name, p in training.gradients.items()}, asked
        ).items()
    }
    states = {
        "param": dict(net.named_parameters()),
        **{f"ema{i + 1}": training.ema.averages[d] for i, d in enumerate(decays)},
    }
    for name, state in states.items():
        results |= {f"{name}:{key}": value for key, value in outwards(state, asked).items()}
    return results | {"losses": torch.stack(training.losses)}
