"""FiT and FiTv2: positions, and the parts of the network alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from genfound.backbones.fit import Attention
from genfound.batch import Batch
from genfound.layers.embed import LabelEmbedder, sinusoid
from genfound.layers.mlp import feed_forward
from genfound.layers.norm import NORMS
from genfound.layers.rope import Rope, apply_rope
from genfound.layers.tokens import coordinates
from genfound.layouts import Padded
from genfound.runtime import checkpoint_io
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.dit import Draws, Labels, Probe, dense, module_of
from tests.golden.adapters.fit import SOURCE, Fixture, arguments, by_row, norm_name, positions, scaling
from tests.golden.adapters.nit import FACTORS
from tests.golden.fill import inputs, parameters, tensor, unit


def tables(rope: Rope, sizes: Tensor, length: int) -> tuple[Tensor, Tensor]:
    """Cosines and sines (B, length, d) of images with padding, whose positions are all (0, 0)."""
    batch = blank(sizes, length)
    places = coordinates(batch, 1) * (torch.arange(length) < sizes.prod(dim=1, keepdim=True))[..., None]
    return by_channel(rope(places, sizes, batch.per_token))


def by_channel(table: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine of every channel (..., d) from what `apply_rope` takes."""
    turned = apply_rope(torch.tensor([1.0, 0.0]).repeat(table.shape[-2]), table).squeeze(-2)  # pairs of (cos, sin)
    return turned[..., ::2].repeat_interleave(2, dim=-1), turned[..., 1::2].repeat_interleave(2, dim=-1)


def blank(sizes: Tensor, length: int) -> Batch:
    latents = [torch.zeros(1, h, w) for h, w in sizes.tolist()]
    return Padded(1, length).to_batch(latents, torch.zeros(len(latents), dtype=torch.long))


def rope_of(config: Mapping[str, Any]) -> Rope:
    """The positions that official arguments of the rotary module ask for."""
    config = dict(config)
    head, theta = config.pop("head_dim"), config.pop("theta", 10_000.0)
    return Rope.of(head, theta, scaling(arguments(config)))


@adapter("fit", "rope")
def rope(fixture: Fixture) -> Results:
    """Frequencies of both axes, tables of a grid, and the official constants."""
    rule = rope_of(fixture["config"])
    grid = torch.tensor([fixture["inputs"].get("grid_hw", [1, 1])])
    rows, columns = rule.frequencies(grid)[0]
    cos, sin = tables(rule, grid, int(grid.prod()))
    constants = {}
    if rule.target is not None:
        constants = {name: replace(rule, rule=other).factor(grid)[0] for name, other in FACTORS.items()}
    return {"freqs_h": rows, "freqs_w": columns, "cos": cos, "sin": sin, **constants}


@adapter("fit", "rope_option")
def rope_option(fixture: Fixture) -> Results:
    """Tables by each image's own size, rounded to bf16, or of any positions; or a rotated tensor."""
    rule, given = rope_of(fixture["config"]), fixture["inputs"]
    if "hw" in given:
        cos, sin = tables(rule, torch.tensor(given["hw"]), given["n"])
        return {"cos": cos, "sin": sin}
    if "grid_hw" in given:
        return rounded_tables(fixture, rule)
    entry = dict(given["grid"])
    times = entry.pop("times", 1)
    columns, rows, *later = (tensor(entry) * times).unbind(1)
    places = torch.stack([rows + sum(later), columns + sum(later)], dim=-1)  # (B, N, 2)
    turn = rule(places, torch.ones(len(places), 2), lambda v: v[:, None])
    if "x" not in given:
        return dict(zip(("cos", "sin"), by_channel(turn), strict=True))
    return {"out": apply_rope(tensor(given["x"]).transpose(1, 2), turn).transpose(1, 2)}


def rounded_tables(fixture: Fixture, rule: Rope) -> Results:
    """Tables after the module was cast to bfloat16, which rounds its saved frequencies too."""
    if "bfloat16" not in fixture["what"]:
        raise NotImplementedError("tables of a grid that are not rounded belong to kind rope")
    grid = torch.tensor([fixture["inputs"]["grid_hw"]])
    cos, sin = tables(replace(rule, exact=False), grid, int(grid.prod()))
    saved = {key: rope(fixture)[key].bfloat16().float() for key in ("freqs_h", "freqs_w")}
    return {**rope(fixture), **saved, "cos": cos, "sin": sin}


@adapter("fit", "attention")
@torch.no_grad()
def attention(fixture: Fixture) -> Results:
    """Attention alone, over padded rows."""
    asked = {"num_heads": 8, "qkv_bias": False, "q_norm": None, "k_norm": None, "qk_norm_weight": False}
    asked |= {"rel_pos_embed": None, "add_rel_pe_to_v": False, "dim": None}
    unknown = fixture["config"].keys() - asked.keys()
    if unknown:
        raise NotImplementedError(f"unknown arguments {sorted(unknown)}")
    asked |= fixture["config"]
    weighted, heads = asked["qk_norm_weight"], asked["num_heads"]
    names = (norm_name(asked[key], weighted) for key in ("q_norm", "k_norm"))
    net = Attention(asked["dim"], heads, *names, asked["qkv_bias"], asked["add_rel_pe_to_v"], "auto")
    checkpoint_io.load_strict(net, parameters(fixture), SOURCE)
    given = inputs(fixture)
    batch = blank(torch.ones(len(given["x"]), 2, dtype=torch.long), given["x"].shape[1])
    turn = None
    if positions(asked["rel_pos_embed"]) == "rope":
        rule = Rope(asked["dim"] // heads, 10_000.0, "normal", 16, None, decouple=False, exact=True)
        turn = rule(given["grid"].flip(1).transpose(1, 2), batch.sizes, batch.per_token)
    return {"out": net(given["x"], replace(batch, mask=given["mask"] != 0), turn)}


@adapter("fit", "ffn")
@torch.no_grad()
def feed_forwards(fixture: Fixture) -> Results:
    """Each kind of feed-forward network."""
    entry = dict(fixture["inputs"]["x"])
    x = entry.pop("times", 1) * tensor(entry)
    weights = parameters(fixture)
    results = {}
    for kind in fixture["outputs"]:
        net = feed_forward(kind, fixture["config"]["hidden_size"], fixture["config"]["mlp_ratio"], bias=True)
        fill_part(net, weights, f"{kind}.")
        results[kind] = net(x)
    return results


@adapter("fit", "norms")
@torch.no_grad()
def norms(fixture: Fixture) -> Results:
    """Each norm."""
    entry = dict(fixture["inputs"]["x"])
    times, plus = entry.pop("times", 1), entry.pop("plus", 0)
    x = times * tensor(entry) + plus
    results = {}
    for kind in fixture["outputs"]:
        net = NORMS[kind](fixture["config"]["dim"])
        fill_part(net, parameters(fixture), f"{kind}.")
        results[kind] = net(x)
    return results


def fill_part(net: nn.Module, weights: Mapping[str, Tensor], prefix: str) -> None:
    own = {key.removeprefix(prefix): value for key, value in weights.items() if key.startswith(prefix)}
    checkpoint_io.load_strict(net, own, SOURCE)


@adapter("fit", "timestep_embedding")
def time_sinusoid(fixture: Fixture) -> Results:
    """The sinusoid of times."""
    config = fixture["config"]
    return {"out": sinusoid(inputs(fixture)["t"], config["dim"], longest_period=config.get("max_period", 10_000))}


@adapter("fit", "label_embedding")
@torch.no_grad()
def label_embedding(fixture: Fixture) -> Results:
    """Rows of labels, of forced drops, and after the training module's dropout with each probability."""
    config, given = fixture["config"], inputs(fixture)
    net = Labels(LabelEmbedder(config["num_classes"], config["hidden_size"], null_class=True))
    checkpoint_io.load_strict(net.table, parameters(fixture), SOURCE)
    y = given["y"]
    forced = torch.where(given["force_drop_ids"] == 1, config["num_classes"], y)
    draw = torch.from_numpy(unit("noise.0", list(y.shape))) / (2 * 3**0.5) + 0.5
    results = {"eval": net.table(y), "forced": net.table(forced)}
    for name in fixture["outputs"].keys() - results.keys():
        probe = Probe(torch.zeros(0))
        module = module_of(net, probe, {"class_dropout_prob": float(name.removeprefix("train_p"))})
        module.evaluate(dense(torch.zeros(len(y), 1, 1, 1), y, 1), Draws(label_drop=draw))
        results[name] = probe.out
    return results


@adapter("fit", "unpatchify")
def unpatchify(fixture: Fixture) -> Results:
    """Latents from tokens, through the layout."""
    config, (height, width) = fixture["config"], fixture["inputs"]["hw"]
    patch = config["patch_size"]
    x = by_row(tensor(fixture["inputs"]["x"]), config)
    batch = blank(torch.tensor([[height // patch, width // patch]] * len(x)), x.shape[1])
    return {"out": torch.stack(Padded(patch).to_latents(x, batch))}
