"""LightningDiT: the network, its parts, sizes, losses, samples and training. Officially t = 0 is noise."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from genfound import build
from genfound.backbones.fit import Attention
from genfound.backbones.lightningdit import LightningDiT
from genfound.batch import Batch
from genfound.checkpoints.official.dit import to_official
from genfound.checkpoints.official.lightningdit import from_official, official_options, tables
from genfound.data.latents.va_vae import STATISTICS, VAVAE
from genfound.data.packing.batch_plan import MicroBatch
from genfound.layers.embed import grid_sinusoid
from genfound.layers.mlp import FusedSwiGLU
from genfound.layers.norm import norm_layer
from genfound.layers.rope import Rope, apply_rope, row_major
from genfound.layouts import Dense
from genfound.objectives.base import Losses, TimeAdapter
from genfound.rng import Rng
from genfound.runtime import checkpoint_io
from tests.golden.adapters import Results, adapter, sizes_of
from tests.golden.adapters.lightningdit import TransportDraws, transport
from tests.golden.adapters.training import Drawn, Training
from tests.golden.fill import inputs, parameters, unit
from tests.helpers import SAMPLERS, composed, guidance_of, linear_flow

Fixture = Mapping[str, Any]
Config = Mapping[str, Any]

SOURCE = Path("official weights")
PRESETS = {"B": "b", "L": "l", "XL": "xl", "1p0B": "1p0b", "1p6B": "1p6b"}
FIXED = {"rope_theta": 10_000, "attention": "auto"}
NORMAL = {"rule": "normal", "trained": 16, "target": None, "decouple": True, "exact": True}
NETWORK = (
    "input_size", "patch_size", "in_channels", "hidden_size", "depth", "num_heads", "mlp_ratio", "class_dropout_prob",
    "num_classes", "learn_sigma", "use_qknorm", "use_swiglu", "use_rope", "use_rmsnorm", "wo_shift", "use_checkpoint",
)  # fmt: skip


def flags(asked: Config) -> dict[str, Any]:
    """Our options for the official flags."""
    affine = "w_rmsnorm" if asked["use_rmsnorm"] else "wb_layernorm"
    return {
        "ffn": "swiglu_fused" if asked["use_swiglu"] else "mlp",
        "norm": "w_rmsnorm" if asked["use_rmsnorm"] else "layernorm",
        "qk_norm": affine if asked["use_qknorm"] else "none",
        "positions": "both" if asked["use_rope"] else "table",
        "shift": not asked["wo_shift"],
        "unused_half": asked["learn_sigma"],
    }


def model_of(asked: Config) -> dict[str, Any]:
    """Keys of `model` for official constructor arguments."""
    return {
        **sizes_of(asked), **flags(asked), **FIXED,
        "rope_scaling": NORMAL,
        "label_drop": asked["class_dropout_prob"],
        "learn_sigma": False,
        "activation_checkpointing": asked["use_checkpoint"],
    }  # fmt: skip


def grid_of(asked: Config) -> tuple[int, int]:
    return (asked["input_size"] // asked["patch_size"],) * 2


def official(fixture: Fixture) -> LightningDiT:
    """The backbone with the official weights and tables of a fixture, whose options its shapes tell too."""
    config, weights = fixture["config"], parameters(fixture)
    model, width = model_of(config), config["hidden_size"]
    weights["pos_embed"] = grid_sinusoid(places(grid_of(config)), width)[None]
    weights |= tables(model, grid_of(config))
    assert {key: list(weights[key].shape) for key, _ in fixture["buffers"]} == dict(fixture["buffers"])
    told = official_options(weights)
    told["num_classes"] += config["class_dropout_prob"] == 0  # without a null label the table has one row less
    assert all(model[key] == told[key] for key in told if key != "mlp_ratio")
    net = LightningDiT(**{**model, "mlp_ratio": told["mlp_ratio"]})
    checkpoint_io.load_strict(net, from_official(weights), SOURCE)
    return net.eval()


def places(grid: tuple[int, int]) -> Tensor:
    return row_major(torch.arange(grid[0] * grid[1]), grid[1])


def dense(net: LightningDiT, x: Tensor, y: Tensor) -> Batch:
    return Dense(net.token_spec.patch_size).to_batch(list(x), y)


@adapter("lightningdit", "model")
@torch.no_grad()
def forward(fixture: Fixture) -> Results:
    """The output; guided above and below the start of the interval, and without one; the tables."""
    config, net, given = fixture["config"], official(fixture), dict(fixture["inputs"])
    scale, start = given.pop("cfg_scale"), given.pop("cfg_interval_start")
    x, t, y = inputs({"inputs": given}).values()
    assert net.null_label is not None
    half = y[: len(y) // 2]
    batch = dense(net, x, torch.cat([half, torch.full_like(half, net.null_label)]))

    def guided(t: float, interval: list[float]) -> Tensor:
        around = guidance_of("cfg", scale=scale, interval=interval, channels="first3", doubled=True)
        return around(TimeAdapter(net, 1.0))(batch, 1 - t)

    found = {
        "out": net(dense(net, x, y), t),
        "cfg_above": guided(start + 0.01, [0.0, 1 - start]),
        "cfg_below": guided(start - 0.01, [0.0, 1 - start]),
        "cfg_no_interval": guided(start - 0.01, [0.0, 1.0]),
        "pos_embed": grid_sinusoid(places(grid_of(config)), config["hidden_size"])[None],
    }
    return found | {key.partition(".")[2]: value for key, value in tables(model_of(config), grid_of(config)).items()}


@adapter("lightningdit", "sizes")
def sizes(fixture: Fixture) -> Results:
    """Exact parameter counts and operations of the presets, at 16 x 16 latents."""
    return {"rows": [size(row["name"], row["setting"]) for row in fixture["rows"]]}


def size(name: str, setting: str) -> dict[str, Any]:
    preset, patch = name.removeprefix("LightningDiT-").split("/")
    config = composed(f"model=lightningdit_{PRESETS[preset]}", f"model.patch_size={patch}")
    with torch.device("meta"):
        net = build.net(config, build.published_spec(config), 1000)
    assert isinstance(net, LightningDiT) and net.rope is not None and setting == "f16d32 final recipe"
    model, tokens, trained = config["model"], (16 // int(patch)) ** 2, sum(p.numel() for p in net.parameters())
    return {
        "name": name, "setting": setting, "depth": len(net.blocks), "hidden": model["width"], "heads": model["heads"],
        "head_dim": net.rope.head, "tokens": tokens, "swiglu_hidden": net.blocks[0].mlp.w3.in_features,
        "total": trained + tokens * model["width"], "trainable": trained,
        "rope_buffer_elems": 2 * tokens * net.rope.head,
        "gflop_counter": net.flops().total(1, tokens, tokens**2) / 1e9,
    }  # fmt: skip


class Draws(TransportDraws):
    """As `TransportDraws`, of a step; uniform numbers of label dropout come after those of the time, if it has some."""

    def __init__(self, logit_normal: bool, step: int = 0) -> None:
        super().__init__(decides=False)
        self.normals, self.uniforms = (1, 0) if logit_normal else (0, 1)
        self.step = step

    def normal(self, purpose: str, shape: Any, device: Any = "cpu") -> Tensor:
        number = self.step * (1 + self.normals) + (purpose == "time")
        drawn = torch.from_numpy(unit(f"noise.{number}", shape))
        return -drawn if purpose == "time" else drawn

    def uniform(self, purpose: str, shape: Any, device: Any = "cpu") -> Tensor:
        number = self.step * (1 + self.uniforms) + (self.uniforms if purpose == "label_drop" else 0)
        drawn = (torch.from_numpy(unit(f"rand.{number}", shape)) / 3**0.5 + 1) / 2
        return 1 - drawn.double() if purpose == "time" else drawn


def module_of(fixture: Fixture, recipe: Config) -> Drawn:
    config = {"sp_timesteps": None, "shifted_mu": 0, **fixture["config"]}
    module = Drawn(official(fixture).train(), transport(config)[0], recipe, config["class_dropout_prob"], 0, 1)
    module.logs_losses = False
    return module


def outwards(state: Mapping[str, Tensor], net: nn.Module, grid: tuple[int, int]) -> dict[str, Tensor]:
    assert isinstance(net, LightningDiT)
    return to_official({key: value.detach().clone() for key, value in state.items()}, net.token_spec.patch_size, grid)


def step(module: Drawn, given: Mapping[str, Tensor], draws: Rng) -> tuple[Tensor, Losses]:
    """The loss of a training step of the module, and that of each image."""
    module.draws = draws
    assert isinstance(module.net, LightningDiT)
    batch = dense(module.net, given["x"], given["y"])
    found = module.training_step((batch, MicroBatch(0, (), (), 0, 0, float(len(batch.y)), 0)), 0)
    return found["loss"], found["losses"]


@adapter("lightningdit", "loss")
def loss(fixture: Fixture) -> Results:
    """Times, terms of the loss, its gradients and their norm."""
    config, given = fixture["config"], inputs(fixture)
    module = module_of(fixture, {"clip": None})
    total, losses = step(module, given, Draws(config["transport"].get("use_lognorm", False)))
    total.backward()
    optimizer: Any = SimpleNamespace(param_groups=[{"params": list(module.parameters())}])
    module.configure_gradient_clipping(optimizer)
    gradients = {name: p.grad for name, p in module.net.named_parameters() if p.grad is not None}
    theirs = outwards(gradients, module.net, grid_of(config))
    return {
        "t": 1 - losses.t,
        "mse_per_sample": losses.terms.get("mse", losses.total),
        "cos_per_sample": losses.terms.get("directional"),
        "total_loss": total[None],
        "grad_norm": module.grad_norm[None],
        **{f"grad.{key}": value for key, value in theirs.items()},
    }


@adapter("lightningdit", "train_steps")
def train(fixture: Fixture) -> Results:
    """Optimizer steps of the training module and its moving average."""
    config, given = fixture["config"], inputs(fixture)
    recipe = {**config["optimizer"], "clip": config["max_grad_norm"]}
    if recipe.pop("name") != "AdamW":
        raise NotImplementedError(f"optimizer {config['optimizer']['name']}")
    recipe |= {"schedule": "constant", "warmup_images": 0}
    training = Training(module_of(fixture, recipe), config["ema_decay"])
    net = training.module.net
    assert isinstance(net, LightningDiT)
    for k in range(config["steps"]):
        training.step(dense(net, given["x"], given["y"]), Draws(config["transport"].get("use_lognorm", False), k))
    states = {"weights": dict(net.named_parameters()), "ema": training.average}
    theirs = {name: outwards(state, net, grid_of(config)) for name, state in states.items()}
    weights = {f"{name}.{key}": value for name, state in theirs.items() for key, value in state.items()}
    return {"losses": torch.stack(training.losses), "grad_norms": torch.stack(training.norms), **weights}


@adapter("lightningdit", "sample")
def sample(fixture: Fixture) -> Results:
    """The official sampling, whose guided state holds every image twice; num_steps counts times."""
    config, given, net = fixture["config"], inputs(fixture), official(fixture)
    unknown = config.keys() - {
        *NETWORK, "sampling_method", "num_sampling_steps", "atol", "rtol", "timestep_shift", "cfg_scale",
        "cfg_interval_start",
    }  # fmt: skip
    if unknown:
        raise NotImplementedError(f"unknown arguments {sorted(unknown)}")
    method, shift, count = config["sampling_method"], config["timestep_shift"], config["num_sampling_steps"]
    name = "euler" if method == "euler" else "dopri5"
    options: dict[str, Any] = {"shift": 1 / shift if shift > 0 else 1.0}
    if name == "dopri5":
        options |= {"method": method, "atol": config["atol"], "rtol": config["rtol"]}
    around = guidance_of(
        "cfg",
        scale=config["cfg_scale"],
        interval=[0.0, 1 - config["cfg_interval_start"]],
        channels="first3",
        doubled=True,
    )
    z, y, objective = given["z"], given["y"], linear_flow()
    twice = dense(net, torch.cat([z, z]), torch.cat([y, torch.full_like(y, net.null_label or 0)]))
    results: dict[str, Any] = {}
    for kind, batch, guidance in (("guided", twice, around), ("unguided", dense(net, z, y), None)):
        states = walk(name, objective.field(net, guidance), batch, objective.times(count - 1), options)
        results |= {kind: states[-1][: len(z)], f"{kind}_mid": states[count // 2][: len(z)]}
    return results | {"denorm": denormalised(results["guided"])}


def walk(name: str, field: Any, batch: Batch, times: Tensor, options: Config) -> list[Tensor]:
    """The state at each time."""
    states = [batch.x]
    SAMPLERS[name](field, batch, times, Rng(0), lambda _, b: states.append(b.x), **options)
    return states


def denormalised(latents: Tensor) -> Tensor:
    """Latents as VA-VAE takes them, by the statistics in its file."""
    shape = (1, latents.shape[1], 1, 1)
    mean, spread = (torch.from_numpy(unit(f"latent_{name}", shape)) for name in ("mean", "std"))
    with tempfile.TemporaryDirectory() as folder:
        torch.save({"mean": 0.5 * mean, "std": 1 + 0.3 * spread}, Path(folder) / STATISTICS)
        codec = VAVAE(weights=folder, stride=16, multiplier=1.0)
    return latents / codec.scale + codec.shift


@adapter("lightningdit", "part")
@torch.no_grad()
def part(fixture: Fixture) -> Results:
    """One layer or block; which one, the names of its arguments tell."""
    config, x = fixture["config"], inputs(fixture).get("x")
    assert x is not None
    if "pt_seq_len" in config:
        head, side = 2 * config["dim"], config["pt_seq_len"]
        model = {"positions": "both", "width": head, "heads": 1, "rope_scaling": NORMAL, **FIXED}
        cos, sin = tables(model, (side, side)).values()
        turned = apply_rope(x.transpose(1, 2), rotation(head, side)).transpose(1, 2)
        return {"freqs_cos": cos, "freqs_sin": sin, "out": turned}
    layer: nn.Module
    if "in_features" in config:
        layer = FusedSwiGLU(config["in_features"], config["hidden_features"], bias=True)
        checkpoint_io.load_strict(layer, parameters(fixture), SOURCE)
        return {"out": layer(x)}
    if "input_scale" in config:
        name = "w_rmsnorm" if config["use_rmsnorm"] else "wb_layernorm"
        layer = Attention(config["dim"], config["num_heads"], name, name, config["qkv_bias"], False, "auto")
        checkpoint_io.load_strict(layer, parameters(fixture), SOURCE)
        rope = rotation(config["dim"] // config["num_heads"], config["seq"]) if config["use_rope"] else None
        return {"out": layer(x * config["input_scale"], one_size(x), rope)}
    if "hidden_size" in config:
        return {"out": block(fixture, x, inputs(fixture)["c"])}
    layer = norm_layer("norm", "w_rmsnorm", config["dim"])
    checkpoint_io.load_strict(layer, parameters(fixture), SOURCE)
    return {"out": layer(x), "out_tiny_input": layer(1e-3 * x)}


def block(fixture: Fixture, x: Tensor, c: Tensor) -> Tensor:
    """The block of a network of one."""
    config, off = fixture["config"], dict.fromkeys(("use_qknorm", "use_swiglu", "use_rmsnorm", "wo_shift"), False)
    asked = {**off, **config, "learn_sigma": False}
    sizes = {"channels": 4, "num_classes": 1, "patch_size": 1, "depth": 1, "mlp_ratio": 4.0, "label_drop": 0.1}
    named = {"width": asked["hidden_size"], "heads": asked["num_heads"], "rope_scaling": NORMAL, **FIXED}
    net = LightningDiT(**flags(asked), **sizes, **named, learn_sigma=False, activation_checkpointing=False)
    checkpoint_io.load_strict(net.blocks[0], parameters(fixture), SOURCE)
    rope = rotation(asked["hidden_size"] // asked["num_heads"], asked["seq"]) if asked["use_rope"] else None
    out: Tensor = net.blocks[0](x, c, 0.0, one_size(x), rope)
    return out


def one_size(x: Tensor) -> Batch:
    """A dense batch for tokens (B, N, D)."""
    side = int(x.shape[1] ** 0.5)
    return Dense(1).to_batch(list(x.new_zeros(len(x), 1, side, side)), torch.zeros(len(x), dtype=torch.long))


def rotation(head: int, side: int) -> Tensor:
    return Rope.of(head, 10_000, NORMAL)(places((side, side)), torch.tensor([[side, side]]), lambda v: v)
