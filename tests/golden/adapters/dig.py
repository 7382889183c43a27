"""DiG: the recurrence in every form, the orders of tokens, the network, its initial values, loss and samples."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genfound.backbones.dig import Block, DiG, GatedMlp, Place, scan_orders
from genfound.backbones.dit import position_table
from genfound.batch import Batch
from genfound.checkpoints.official.dig import ALIASES, from_official, official_options, to_official
from genfound.layers import gla
from genfound.layers.scans import ORDERS, Scans
from genfound.objectives.base import TimeAdapter
from genfound.rng import Rng
from genfound.runtime import checkpoint_io
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.dit import Draws, _All, dense, module_of
from tests.golden.adapters.gaussian import StepNoise, diffusion, sections
from tests.golden.fill import inputs, parameters
from tests.helpers import SAMPLERS, composed, guidance_of

Fixture = Mapping[str, Any]
Config = Mapping[str, Any]

SOURCE = Path("official weights")
DEFAULTS: dict[str, Any] = {
    "input_size": 32, "patch_size": 2, "in_channels": 4, "hidden_size": 1152, "depth": 28, "num_heads": 16,
    "mlp_ratio": 4.0, "class_dropout_prob": 0.1, "num_classes": 1000, "learn_sigma": True, "expand_k": 0.5,
    "expand_v": 1, "bid_mode": "layer", "if_dw_conv": False, "if_quad_dir": False, "if_in_block_conv": False,
    "conv_kernel_size": 3, "if_rms_norm": False, "if_skip": False, "if_zero_init_skip": False, "if_fuse_norm": True,
}  # fmt: skip
CALL = ("cfg_scale", "num_sampling_steps")


def model_of(config: Config) -> dict[str, Any]:
    """Keys of `model` for official constructor arguments; with the released quirks."""
    if unknown := config.keys() - DEFAULTS.keys() - set(CALL):
        raise NotImplementedError(f"unknown arguments {sorted(unknown)}")
    asked = DEFAULTS | {key: value for key, value in config.items() if key not in CALL}
    own = {key: v for key, v in composed("experiment=official/dig", "model=dig_s")["model"].items() if key[0] != "_"}
    skip = "identity" if asked["if_zero_init_skip"] else "xavier"
    return {
        **own, "channels": asked["in_channels"], "num_classes": asked["num_classes"], "width": asked["hidden_size"],
        "heads": asked["num_heads"], "label_drop": asked["class_dropout_prob"], "rms_norm": asked["if_rms_norm"],
        **{key: asked[key] for key in ("patch_size", "depth", "learn_sigma", "expand_k", "expand_v")},
        "flip": {"layer": True, "seq": False}[asked["bid_mode"]], "transpose": asked["if_quad_dir"],
        "conv": ("inside" if asked["if_in_block_conv"] else "after") if asked["if_dw_conv"] else "none",
        "conv_size": asked["conv_kernel_size"], "skip": skip if asked["if_skip"] else "none",
    }  # fmt: skip


def grid_of(config: Config) -> tuple[int, int]:
    return ((DEFAULTS | dict(config))["input_size"] // (DEFAULTS | dict(config))["patch_size"],) * 2


def official(fixture: Fixture) -> DiG:
    """The backbone with the official weights of a fixture, whose options its shapes tell too."""
    model, weights = model_of(fixture["config"]), parameters(fixture)
    weights = {key: weights[_first(key)] for key in weights}
    assert [key for key, _ in fixture["buffers"]] == ["pos_embed"]
    weights["pos_embed"] = position_table(*grid_of(fixture["config"]), model["width"])[None]
    told = official_options(weights)
    same = {key: value for key, value in told.items() if key not in ("mlp_ratio", "skip", "label_drop")}
    assert {key: model[key] for key in same} == same and (told.get("skip") == "xavier") == (model["skip"] != "none")
    net = DiG(**{**model, "mlp_ratio": told["mlp_ratio"], "label_drop": told.get("label_drop", model["label_drop"])})
    checkpoint_io.load_strict(net, from_official(weights), SOURCE)
    return net.eval()


def _first(key: str) -> str:
    """The name under which the values of a tensor with two names are found."""
    return next((key.replace(a, b) for a, b in ALIASES.items() if key.endswith(f".{a}")), key)


@adapter("dig", "gla_recurrence")
def recurrence(fixture: Fixture) -> Results:
    """Outputs, gradients and the last state, of every form; tokens after the last one read the state."""
    given, config = inputs(fixture), fixture["config"]
    size, found = config["head_k"], list[dict[str, Tensor]]()
    for form in ("reference", "chunked"):
        q, k, v, logits = (given[key].clone().requires_grad_() for key in ("q", "k", "v", "gate_logits"))
        g = nn.functional.logsigmoid(logits * config["gate_multiplier"]) / config["gate_normalizer"]
        ask = (torch.eye(size) * size**0.5).expand(*q.shape[:2], size, size)
        rows = [torch.cat([q, ask], dim=2), *(nn.functional.pad(x, (0, 0, 0, size)) for x in (k, v, g))]
        every = gla.gated_linear_attention(*(x.transpose(1, 2) for x in rows), form=form).transpose(1, 2)
        out, state = every.split([q.shape[2], size], dim=2)
        (out * given["cotangent"]).sum().backward()
        grads = {"grad.q": q.grad, "grad.k": k.grad, "grad.v": v.grad, "grad.gate_logits": logits.grad}
        found.append({"out": out, "final_state": state, **grads})  # type: ignore[dict-item]
    for key, value in found[0].items():
        torch.testing.assert_close(found[1][key], value, atol=5e-5 * value.detach().abs().max().item(), rtol=0)
    return found[1]


@adapter("dig", "scan_order")
def orders(fixture: Fixture) -> Results:
    """The order that each block sees, and the last layer; that of each skip, by the network's own list."""
    edge, found = fixture["config"]["edge"], {}
    scans = Scans.of_grid(edge, edge, torch.device("cpu"))
    for name in fixture["outputs"]:
        case, _, what = name.partition(".")
        depth, *flags = case.removeprefix("depth").split("_")
        walk = scan_orders(int(depth), True, "quad" in flags)
        number = what.removeprefix("block").removeprefix("skip")
        seen = -1 if what == "final" else int(number) if "block" in what else int(depth) - int(number)
        found[name] = scans.between(ORDERS[0], walk[seen]).tolist()
    return found


@adapter("dig", "part")
@torch.no_grad()
def part(fixture: Fixture) -> Results:
    """A recurrence with its projections, an MLP or a block."""
    config, given = dict(fixture["config"]), inputs(fixture)
    if "d_model" in config:
        width, keys, values = config["d_model"], config["expand_k"], config["expand_v"]
        widths = (width, config["num_heads"], int(width * keys), int(width * values))
        gates = (config["gate_low_rank_dim"], config["gate_logit_normalizer"])
        layer = gla.GatedLinearAttention(*widths, *gates, "auto")
        checkpoint_io.load_strict(layer, parameters(fixture), SOURCE)
        return {"out": layer(given["x"], None)}
    if "hidden_ratio" in config:
        hidden = 256 * -(-int(config["hidden_size"] * config["hidden_ratio"] * 2 / 3) // 256)
        mlp = GatedMlp(config["hidden_size"], hidden)
        checkpoint_io.load_strict(mlp, parameters(fixture), SOURCE)
        return {"out": mlp(given["x"])}
    side = config.pop("edge_len")
    net = DiG(**model_of({**config, "num_classes": 1, "depth": 4}))
    block = net.blocks[-1].eval()
    assert isinstance(block, Block)
    weights = {key: value for key, value in parameters(fixture).items() if _first(key) == key}
    first = {key: value for key, value in weights.items() if not key.startswith(tuple(ALIASES))}
    checkpoint_io.load_strict(block, first, SOURCE)
    batch = dense(torch.zeros(len(given["x"]), 1, side, side), torch.zeros(len(given["x"]), dtype=torch.long), 1)
    place = Place(batch, None, Scans.of(batch, 1).grid(ORDERS[0], 3))
    return {"out": block(given["x"], nn.functional.silu(given["c"]), place, given.get("skip"))}


@adapter("dig", "model")
@torch.no_grad()
def forward(fixture: Fixture) -> Results:
    """The output of the network, or guided, with the tokens that leave each block."""
    config, given, net = fixture["config"], inputs(fixture), official(fixture)
    found = {"pos_embed": position_table(*grid_of(config), net.width)[None]}
    for i, block in enumerate(net.blocks):
        block.register_forward_hook(lambda _, given, out, i=i: found.update({f"block{i}": out}))
    patch, x, t = net.token_spec.patch_size, given["x"], given["t"]
    y = given.get("y", torch.zeros(len(x), dtype=torch.long))
    if "cfg_scale" in config:
        return {**found, "out": guided(net, x, t, y, config["cfg_scale"])}
    found["out"] = net(dense(x, y, patch), t)
    return found


def guided(net: DiG, x: Tensor, t: Tensor, y: Tensor, scale: float) -> Tensor:
    """Guidance image by image; the second half of t is the time of the pass without labels, and keeps its own rest."""
    around = guidance_of("cfg", scale=scale, interval=[0.0, 1000.0], channels="first3")
    assert around is not None
    first, second = [], []
    for image, time, null_time, label in zip(x, t, t[len(t) // 2 :], y, strict=False):
        batch, null = (dense(image[None], v[None], net.token_spec.patch_size) for v in (label, y[-1]))
        first.append(around(TimeAdapter(NullTime(net, null_time)))(batch, float(time)))
        second.append(torch.cat([first[-1][:, :3], net(null, null_time[None])[:, 3:]], dim=1))
    return torch.cat(first + second)


class NullTime:
    """A network whose pass without labels is at a time of its own."""

    def __init__(self, net: DiG, t: Tensor) -> None:
        self.net, self.t, self.token_spec, self.null_label = net, t, net.token_spec, net.null_label

    def __call__(self, batch: Batch, t: Tensor) -> Tensor:
        out: Tensor = self.net(batch, torch.where(batch.y == self.null_label, self.t, t))
        return out


@adapter("dig", "loss")
def loss(fixture: Fixture) -> Results:
    """The loss, its terms, and gradients."""
    config, given, net = fixture["config"], inputs(fixture), official(fixture).train()
    objective = diffusion({}, clip=False)
    draws = Draws(
        time=(given["t"] + 0.5) / len(objective.process), noise=given["noise"], label_drop=given["label_draws"]
    )
    module = module_of(net, objective, {})
    losses = module.evaluate(dense(given["x0"], given["y"], net.token_spec.patch_size), draws)
    losses.total.mean().backward()
    grads = {name: p.grad for name, p in net.named_parameters() if p.grad is not None}
    norm = nn.utils.get_total_norm(grads.values())
    theirs = to_official(grads, net.token_spec.patch_size, grid_of(config))
    moved = {f"grad.{name}": value for name, value in theirs.items()}
    return {"loss": losses.total, **losses.terms, "total_grad_norm": norm[None], **moved}


@adapter("dig", "sample")
def sample(fixture: Fixture) -> Results:
    """Ancestral sampling; of doubled noise only the first half matters."""
    config, given, net = fixture["config"], inputs(fixture), official(fixture)
    objective, scale = diffusion({}, clip=False), config["cfg_scale"]
    times = objective.times(sections({"timestep_respacing": config["num_sampling_steps"]}), "gaussian")
    around = guidance_of("cfg", scale=scale, interval=[0.0, 1000.0], channels="first3")
    batch = dense(given["z"], given["y"], net.token_spec.patch_size)
    noise = FromOne(given["z"].shape, copies=1 if scale == 1 else 2)
    return {"out": SAMPLERS["ddpm"](objective.field(net, around), batch, times, noise).x}


class FromOne(StepNoise):
    """The noise of step k is draw k + 1."""

    def normal(self, step: int) -> Tensor:
        return super().normal(step + 1)


@adapter("dig", "init", notes=_All())
def initialisation(fixture: Fixture) -> Results:
    """Mean, spread and largest value of every parameter, within what the number of elements allows."""
    net = DiG(**model_of(fixture["config"]))
    net.initialise(Rng(0))
    ours = to_official(net.state_dict(), net.token_spec.patch_size, grid_of(fixture["config"]))
    for key, entry in fixture["outputs"].items():
        mean, spread, most = entry["values"]
        value = ours[key].detach().double()
        if spread == 0:
            assert abs(value - mean).max() < 1e-7, key
            continue
        assert abs(value.mean() - mean) < 7 * spread / value.numel() ** 0.5, key
        assert abs(value.std(correction=0) / spread - 1) < 5 / value.numel() ** 0.5, key
        assert 0.8 < value.abs().max() / most < 1.25, key
    return {}
