"""NiT: backbone, initialisation and positions of the official code.

The official model holds a projector for its alignment loss (REPA), which is no part of this project's backbone.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from genfound.alignment import Alignment
from genfound.backbones.nit import NiT, coordinates
from genfound.batch import Batch
from genfound.checkpoints.official import projectors
from genfound.checkpoints.official.nit import from_official, to_official
from genfound.layers.embed import TimestepEmbedder, sinusoid
from genfound.layers.rope import apply_rope
from genfound.layers.tokens import from_tokens
from genfound.layouts import Packed
from genfound.rng import Rng
from genfound.runtime import checkpoint_io
from tests.golden.adapters import Results, adapter
from tests.golden.fill import inputs, parameters
from tests.helpers import fresh_nit

Fixture = Mapping[str, Any]

DEFAULTS: dict[str, Any] = {
    "class_dropout_prob": 0.1, "num_classes": 1000, "mlp_ratio": 4.0, "qk_norm": False, "theta": 10_000,
    "encoder_depth": 4, "z_dim": 768, "projector_dim": 2048, "use_adaln_lora": False, "adaln_lora_dim": None,
    "use_checkpoint": False, "custom_freqs": "normal", "decouple": False, "max_pe_len_h": None, "max_pe_len_w": None,
    "ori_max_pe_len": None,
}  # fmt: skip

FACTORS = {"mscale": "yarn", "proportion1": "scale1", "proportion2": "scale2"}
"""The official constants, and the rules that multiply cosine and sine by them."""


def build(official: Mapping[str, Any], seed: int = 0) -> NiT:
    """Our backbone for official constructor arguments, with the positions of the released weights."""
    config = {**DEFAULTS, **official}
    for key in ("encoder_depth", "z_dim", "projector_dim"):
        config.pop(key)
    rank = config.pop("adaln_lora_dim")
    net = fresh_nit(
        channels=config.pop("in_channels"),
        num_classes=config.pop("num_classes"),
        seed=seed,
        patch_size=config.pop("patch_size"),
        width=config.pop("hidden_size"),
        depth=config.pop("depth"),
        heads=config.pop("num_heads"),
        mlp_ratio=config.pop("mlp_ratio"),
        qk_norm=config.pop("qk_norm"),
        adaln_rank=rank if config.pop("use_adaln_lora") else None,
        label_drop=config.pop("class_dropout_prob"),
        rope_theta=config.pop("theta"),
        rope_coords="official",
        rope_scaling=scaling(config),
        attention="auto",
        activation_checkpointing=config.pop("use_checkpoint"),
    )
    if config:
        raise NotImplementedError(f"unknown arguments {sorted(config)}")
    return net


def scaling(config: dict[str, Any]) -> dict[str, Any]:
    """Our rule of positions for official arguments, which are taken out; they are at hand for every rule but normal."""
    rule, trained = config.pop("custom_freqs").lower(), config.pop("ori_max_pe_len")
    target = [config.pop("max_pe_len_h"), config.pop("max_pe_len_w")]
    if rule != "normal" and None in (trained, *target):
        raise NotImplementedError(f"custom_freqs={rule} without lengths")
    known = {"rule": rule, "trained": trained or 16, "decouple": config.pop("decouple"), "exact": True}
    return known | {"target": None if None in target else target}


def alignment(official: Mapping[str, Any], seed: int = 0) -> Alignment:
    """Our alignment for official constructor arguments."""
    config = {**DEFAULTS, **official}
    built = Alignment(
        width=config["hidden_size"], widths={"radio": config["z_dim"]}, weight=1.0, depth=config["encoder_depth"],
        projector="mlp", hidden=config["projector_dim"], kernel=1,
    )  # fmt: skip
    if not any(p.is_meta for p in built.parameters()):
        built.initialise(Rng(seed, "initialise", "alignment"))
    return built


def projector(built: Alignment) -> dict[str, Tensor]:
    """The projector of an alignment under official names."""
    return projectors.to_official(built.state_dict(), "nit")


class Official(nn.Module):
    """A backbone and a projector with the weights of a fixture."""

    def __init__(self, fixture: Fixture, config: Mapping[str, Any]) -> None:
        super().__init__()
        weights = parameters(fixture)
        self.net = build(config)
        checkpoint_io.load_strict(self.net, from_official(weights), Path("official weights"))
        self.alignment = alignment(config)
        checkpoint_io.load_strict(self.alignment, projectors.from_official(weights), Path("official weights"))
        self.seen: dict[str, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[dict[str, Tensor]]:
        """Collect the outputs of embedders and blocks."""
        self.seen = {}
        modules = {"x_embedder": self.net.x_embedder, "t_embedder": self.net.t_embedder}
        modules |= {"y_embedder": self.net.y_embedder}
        modules |= {f"blocks.{i}": block for i, block in enumerate(self.net.blocks)}
        handles = [
            module.register_forward_hook(lambda _m, _i, out, name=name: self.seen.update({f"intermediate.{name}": out}))
            for name, module in modules.items()
        ]
        try:
            yield self.seen
        finally:
            for handle in handles:
                handle.remove()

    def zs(self, batch: Batch) -> Tensor:
        """The projection of what the last watched call had after the aligned block, (T, z_dim)."""
        hidden = self.seen[f"intermediate.blocks.{self.alignment.depth - 1}"]
        aligned: Tensor = self.alignment.projectors[0](hidden, batch)
        return aligned


def to_batch(tokens: Tensor, sizes: Sequence[Sequence[int]], y: Tensor) -> Batch:
    """Official tokens (N, C, p, p) of images of these rows and columns."""
    patch = tokens.shape[-1]
    pieces = tokens.flatten(1).split([h * w for h, w in sizes])
    latents = [from_tokens(piece, h, patch) for piece, (h, _) in zip(pieces, sizes, strict=True)]
    return Packed(patch).to_batch(latents, y)


@adapter("nit", "nit_forward")
@torch.no_grad()
def forward(fixture: Fixture) -> Results:
    """Output, projection and intermediate states of a pack, and of its images alone."""
    official = Official(fixture, fixture["config"])
    given = inputs(fixture)
    x, t, y, sizes = given["x"], given["t"], given["y"], given["hw_list"].tolist()
    official.eval()
    batch = to_batch(x, sizes, y)
    with official.watched() as seen:
        out = official.net(batch, t)
    projected = official.zs(batch)
    alone = []
    if fixture["options"].get("alone"):
        for i, piece in enumerate(x.split([h * w for h, w in sizes])):
            alone.append(official.net(to_batch(piece, sizes[i : i + 1], y[i : i + 1]), t[i : i + 1]))
    return {
        "out": out.view_as(x),
        "zs.0": projected,
        **seen,
        **({"out_each_image_alone": torch.cat(alone).view_as(x)} if alone else {}),
    }


@adapter("nit", "nit_checkpointing")
def checkpointing(fixture: Fixture) -> Results:
    """Gradients of mean(out^2) with every block recomputed."""
    official = Official(fixture, {**fixture["config"], "use_checkpoint": True})
    given = inputs(fixture)
    net = official.net.train()
    out = net(to_batch(given["x"], given["hw_list"].tolist(), given["y"]), given["t"])
    (out**2).mean().backward()
    own = dict(net.named_parameters())
    shapes = dict(fixture["parameters"])
    grads = {f"grad.{key}": own[key].grad.view(shapes[key]) for key in fixture["options"]["grads"]}
    return {"out": out.view_as(given["x"]), **grads}


@adapter("nit", "nit_params")
def counts(fixture: Fixture) -> Results:
    """Exact parameter counts; the shapes that the fixture lists are checked on the way."""
    with torch.device("meta"):
        net, align = build(fixture["config"]), alignment(fixture["config"])
    own = {key: list(value.shape) for key, value in to_official(net.state_dict(), net.token_spec.patch_size).items()}
    own |= {key: list(value.shape) for key, value in projector(align).items()}
    listed = dict(fixture["parameters"])
    assert listed == {key: own.get(key) for key in listed}
    inside, outside = (sum(p.numel() for p in module.parameters()) for module in (net, align))
    adaln = sum(p.numel() for key, p in net.named_parameters() if "adaLN" in key)
    return {
        "counts": {
            "total": inside + outside,
            "projector": outside,
            "total_without_projector": inside,
            "adaLN": adaln,
            "state_dict_entries": len(own),
        }
    }


@adapter("nit", "nit_init")
def initialisation(fixture: Fixture) -> Results:
    """The law of every parameter, estimated from many networks."""
    draws: dict[str, list[Tensor]] = {}
    shapes: dict[str, list[int]] = {}
    for seed in range(32):
        net, align = build(fixture["config"], seed), alignment(fixture["config"], seed)
        for key, value in to_official(net.state_dict(), net.token_spec.patch_size).items():
            draws.setdefault(key, []).append(value.flatten(1) if value.ndim > 1 else value)
            shapes[key] = list(value.shape)
        for key, value in projector(align).items():
            draws.setdefault(key, []).append(value)
            shapes[key] = list(value.shape)
    laws = {key: [key, shapes[key], *law(torch.stack(values))] for key, values in draws.items()}
    wanted = [key for key, *_ in fixture["outputs"]["initial_values"]["exact"]]
    return {"initial_values": [laws.pop(key) for key in wanted if key in laws] + list(laws.values())}


def law(draws: Tensor) -> list[Any]:
    """`zeros`, `ones`, `uniform(-a,a)` with a, or `normal` with its standard deviation, from (n, ...) draws."""
    if (draws == 0).all():
        return ["zeros"]
    if (draws == 1).all():
        return ["ones"]
    z = draws.double().flatten()
    kurtosis = ((z / z.std()) ** 4).mean()
    if kurtosis > 2.4:  # normal 3, uniform 1.8
        return ["normal", round(z.std().item(), 3)]
    xavier = (6 / (draws.shape[1] + draws.shape[2])) ** 0.5  # fan_out + fan_in of a matrix
    largest = z.abs().max().item()
    bound = xavier if 0.998 * xavier < largest <= xavier * (1 + 1e-6) else largest
    return ["uniform(-a,a)", float(f"{bound:.7g}")]


@adapter("nit", "nit_rope")
def rope(fixture: Fixture) -> Results:
    """Coordinates, frequencies, and the cosines and sines of every token and channel."""
    net = build(fixture["config"])
    sizes = inputs(fixture)["hw_list"].tolist()
    tokens = sum(h * w for h, w in sizes)
    spec = net.token_spec
    batch = to_batch(
        torch.zeros(tokens, spec.channels, spec.patch_size, spec.patch_size), sizes, torch.arange(len(sizes))
    )
    places = coordinates(batch, net.rope_coords)
    rule = net.rope
    first = torch.tensor([1.0, 0.0]).repeat(len(places), 1, rule.head // 2)  # (T, 1, d), pairs of (1, 0)
    turned = apply_rope(first, rule(places, batch.sizes, batch.per_token)).squeeze(1)  # pairs of (cos, sin)
    cos, sin = (turned[:, i::2].repeat_interleave(2, dim=1) for i in (0, 1))
    rows, columns = rule.frequencies(batch.sizes)[0]
    return {
        "first_coordinate_uses_freqs_h": places[:, 0].tolist(),
        "second_coordinate_uses_freqs_w": places[:, 1].tolist(),
        "freqs_h": rows,
        "freqs_w": columns,
        "cos": cos,
        "sin": sin,
        **{name: replace(rule, rule=other).factor(batch.sizes) for name, other in FACTORS.items()},
    }


@adapter("nit", "nit_t_embedder")
@torch.no_grad()
def time_embedding(fixture: Fixture) -> Results:
    """The sinusoid and the embedded time."""
    module = TimestepEmbedder(fixture["config"]["hidden_size"])
    checkpoint_io.load_strict(module, parameters(fixture), Path("official weights"))
    t = inputs(fixture)["t"]
    return {"frequencies": sinusoid(t), "out": module(t)}
