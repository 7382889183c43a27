"""NiT: backbone, initialisation, positions, loss and ODE sampler of the official code.

The official model holds a projector for its alignment loss (REPA). It is no part of this project's backbone, so the
adapters own one, fed with the backbone's hidden states.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from genfound import checkpoints
from genfound.backbones.base import Backbone, TokenSpec
from genfound.backbones.nit import NiT, coordinates
from genfound.batch import Batch
from genfound.data.views import center_crop, native_size, resize
from genfound.layers.embed import TimeEmbedding, sinusoid
from genfound.layers.rope import rotate, rotation
from genfound.layouts import Packed
from genfound.layouts.base import from_tokens
from genfound.objectives.flow import Flow
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from genfound.samplers import SAMPLERS
from genfound.sampling import guided
from tests.golden.adapters import Results, adapter
from tests.golden.fill import inputs, parameters, unit
from tests.helpers import fresh_nit, linear_flow

Fixture = Mapping[str, Any]

DEFAULTS: dict[str, Any] = {
    "class_dropout_prob": 0.1, "num_classes": 1000, "mlp_ratio": 4.0, "qk_norm": False, "theta": 10_000,
    "encoder_depth": 4, "z_dim": 768, "projector_dim": 2048, "use_adaln_lora": False, "adaln_lora_dim": None,
    "use_checkpoint": False, "custom_freqs": "normal",
}  # fmt: skip
ONLY_WITH_CUSTOM_FREQS = ("decouple", "max_pe_len_h", "max_pe_len_w", "ori_max_pe_len")

RENAMED = {
    r"^x_embedder\.proj\.": "x_embedder.",
    r"^t_embedder\.mlp\.0\.": "t_embedder.first.",
    r"^t_embedder\.mlp\.2\.": "t_embedder.second.",
    r"\.mlp\.fc1\.": ".mlp.0.",
    r"\.mlp\.fc2\.": ".mlp.2.",
    r"^final_layer\.adaLN_modulation\.1\.": "final_layer.adaln.",
    r"\.adaLN_modulation\.1\.": ".adaln.0.",
    r"\.adaLN_modulation\.2\.": ".adaln.1.",
}

FLOW = linear_flow()


def our_key(official: str) -> str:
    """Where an official parameter lies in our backbone."""
    for pattern, ours in RENAMED.items():
        official = re.sub(pattern, ours, official)
    return official


def official_key(ours: str) -> str:
    """The inverse of `our_key`."""
    ours = re.sub(r"^x_embedder\.", "x_embedder.proj.", ours)
    ours = ours.replace("t_embedder.first.", "t_embedder.mlp.0.").replace("t_embedder.second.", "t_embedder.mlp.2.")
    ours = ours.replace(".mlp.0.", ".mlp.fc1.").replace(".mlp.2.", ".mlp.fc2.") if "blocks" in ours else ours
    ours = ours.replace("final_layer.adaln.", "final_layer.adaLN_modulation.1.")
    return re.sub(r"\.adaln\.(\d)\.", lambda match: f".adaLN_modulation.{int(match[1]) + 1}.", ours)


def official_shape(ours: str, tensor: Tensor, net: NiT) -> list[int]:
    """The patch embedding is officially a convolution."""
    patch = net.token_spec.patch_size
    if ours == "x_embedder.weight":
        return [len(tensor), net.token_spec.channels, patch, patch]
    return list(tensor.shape)


def build(official: Mapping[str, Any], seed: int = 0) -> NiT:
    """Our backbone for official constructor arguments, with the positions of the released weights."""
    config = {**DEFAULTS, **official}
    if config.pop("custom_freqs") != "normal":
        raise NotImplementedError(f"custom_freqs={official['custom_freqs']} is not supported yet")
    for key in (*ONLY_WITH_CUSTOM_FREQS, "encoder_depth", "z_dim", "projector_dim"):
        config.pop(key, None)
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
        attention="auto",
        activation_checkpointing=config.pop("use_checkpoint"),
    )
    if config:
        raise NotImplementedError(f"unknown arguments {sorted(config)}")
    return net


def projector(official: Mapping[str, Any]) -> nn.Sequential:
    """The official projector to the features of the teacher."""
    config = {**DEFAULTS, **official}
    sizes = [config["hidden_size"], config["projector_dim"], config["projector_dim"], config["z_dim"]]
    a, b, c = (nn.Linear(*pair) for pair in pairwise(sizes))
    for layer in (a, b, c):
        nn.init.xavier_uniform_(layer.weight)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(a, nn.SiLU(), b, nn.SiLU(), c)


def load(net: NiT, official: Mapping[str, Tensor]) -> nn.Module:
    """Fill the backbone with official weights, shapes and all."""
    own = {our_key(key): value for key, value in official.items() if not key.startswith("projector.")}
    own["x_embedder.weight"] = own["x_embedder.weight"].flatten(1)
    checkpoints.fill(net, own, Path("official weights"))
    return net


class Official(nn.Module):
    """A backbone and a projector with the weights of a fixture."""

    def __init__(self, fixture: Fixture, config: Mapping[str, Any]) -> None:
        super().__init__()
        weights = parameters(fixture)
        self.net = build(config)
        load(self.net, weights)
        self.align = projector(config)
        own = {k.removeprefix("projector."): v for k, v in weights.items() if k.startswith("projector.")}
        checkpoints.fill(self.align, own, Path("official weights"))
        self.encoder_depth = {**DEFAULTS, **config}["encoder_depth"]
        self.seen: dict[str, Tensor] = {}

    @contextmanager
    def watched(self) -> Iterator[dict[str, Tensor]]:
        """Collect the outputs of embedders and blocks, and the projection of the aligned block."""
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

    def zs(self) -> Tensor:
        """The projection of what the last watched call had after the aligned block, (T, z_dim)."""
        aligned: Tensor = self.align(self.seen[f"intermediate.blocks.{self.encoder_depth - 1}"])
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
    with official.watched() as seen:
        out = official.net(to_batch(x, sizes, y), t)
    alone = []
    if fixture["options"].get("alone"):
        for i, piece in enumerate(x.split([h * w for h, w in sizes])):
            alone.append(official.net(to_batch(piece, sizes[i : i + 1], y[i : i + 1]), t[i : i + 1]))
    return {
        "out": out.view_as(x),
        "zs.0": official.zs(),
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
    grads = {f"grad.{key}": own[our_key(key)].grad.view(shapes[key]) for key in fixture["options"]["grads"]}
    return {"out": out.view_as(given["x"]), **grads}


@adapter("nit", "nit_params")
def counts(fixture: Fixture) -> Results:
    """Exact parameter counts; the shapes that the fixture lists are checked on the way."""
    with torch.device("meta"):
        net, align = build(fixture["config"]), projector(fixture["config"])
    own = {official_key(key): official_shape(key, value, net) for key, value in net.state_dict().items()}
    own |= {f"projector.{key}": list(value.shape) for key, value in align.state_dict().items()}
    listed = dict(fixture["parameters"])
    assert listed == {key: own.get(key) for key in listed}
    inside, outside = (sum(p.numel() for p in module.parameters()) for module in (net, align))
    adaln = sum(p.numel() for key, p in net.named_parameters() if "adaln" in key)
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
        net, align = build(fixture["config"], seed), projector(fixture["config"])
        for key, value in net.state_dict().items():
            draws.setdefault(official_key(key), []).append(value)
            shapes[official_key(key)] = official_shape(key, value, net)
        for key, value in align.state_dict().items():
            draws.setdefault(f"projector.{key}", []).append(value)
            shapes[f"projector.{key}"] = list(value.shape)
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
    first = torch.tensor([1.0, 0.0]).repeat(len(places), 1, 2 * len(net.frequencies))  # (T, 1, d), pairs of (1, 0)
    turned = rotate(first, *rotation(places, net.frequencies)).squeeze(1)  # pairs of (cos, sin)
    cos, sin = (turned[:, i::2].repeat_interleave(2, dim=1) for i in (0, 1))
    return {
        "first_coordinate_uses_freqs_h": places[:, 0].tolist(),
        "second_coordinate_uses_freqs_w": places[:, 1].tolist(),
        "freqs_h": net.frequencies,
        "freqs_w": net.frequencies,
        "cos": cos,
        "sin": sin,
    }


@adapter("nit", "nit_t_embedder")
@torch.no_grad()
def time_embedding(fixture: Fixture) -> Results:
    """The sinusoid and the embedded time."""
    module = TimeEmbedding(fixture["config"]["hidden_size"])
    own = {our_key(f"t_embedder.{k}").removeprefix("t_embedder."): v for k, v in parameters(fixture).items()}
    checkpoints.fill(module, own, Path("official weights"))
    t = inputs(fixture)["t"]
    return {"frequencies": sinusoid(t), "out": module(t)}


class Toy(Backbone):
    """v = x (0.4 + 0.2 t) - 0.1 sin(y) + 0.05 cos(x), the network of fixtures that test what is around it."""

    layouts = ("packed",)
    time = "data0"
    null_label = 1000
    token_spec = TokenSpec(4, 1)

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """(T, P) -> (T, P)."""
        wave = 0.1 * torch.sin(batch.expand(batch.y.float()))
        return batch.x * (0.4 + 0.2 * batch.expand(t)) - wave + 0.05 * torch.cos(batch.x)


class Watched(Backbone):
    """Another network, whose inputs are rounded to a dtype and whose calls are remembered."""

    def __init__(self, net: Backbone, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.net, self.dtype = net, dtype
        self.null_label, self.token_spec = net.null_label, net.token_spec
        self.calls: list[tuple[Tensor, Tensor, Tensor]] = []

    def forward(self, batch: Batch, t: Tensor) -> Tensor:
        """(T, P) -> (T, P)."""
        x, t = (a.to(self.dtype).float() for a in (batch.x, t))
        out: Tensor = self.net(replace(batch, x=x), t)
        self.calls.append((x, t, out))
        return out


class NamedDraws(Rng):
    """The draws of a fixture in place of random ones, by purpose."""

    def __init__(self, draws: Mapping[str, Tensor]) -> None:
        super().__init__(0)
        self.draws = draws

    def normal(self, purpose: str, shape: Sequence[int], device: torch.device | str = "cpu") -> Tensor:
        """The draw of this purpose."""
        return self.draws[purpose].reshape(tuple(shape))


class StepNoise:
    """The noise of stochastic samplers, which ODE samplers must not draw; counts the draws."""

    draws = 0

    def normal(self, step: int) -> Tensor:
        """Nothing that a fixture of this project's samplers uses yet."""
        self.draws += 1
        raise NotImplementedError("stochastic samplers are not supported yet")


@adapter("nit", "nit_loss")
@torch.no_grad()
def loss(fixture: Fixture) -> Results:
    """The flow-matching loss of a pack, every token counting the same."""
    if fixture["options"].get("use_dir_loss"):
        raise NotImplementedError("the directional loss is not supported yet")
    transport = {"P_mean": 0.0, "P_std": 1.0, "prediction": "v", **fixture["config"]["transport"]}
    transport.pop("weighting")  # stored and never read
    objective = Flow(
        path=transport.pop("path_type"),
        prediction={"v": "velocity"}[transport.pop("prediction")],
        time="logit_normal",
        time_mean=transport.pop("P_mean"),
        time_std=transport.pop("P_std"),
        weight="token",
    )
    if transport:
        raise NotImplementedError(f"unknown arguments {sorted(transport)}")
    network = fixture["config"].get("network")
    official = None if network is None else Official(fixture, network)
    net = Watched(Toy() if official is None else official.net)
    given = inputs(fixture)
    images, sizes = given["images"], given["hw_list"].tolist()
    draws = {"noise": given["noises"].flatten(1), "time": torch.from_numpy(unit("noise.0", [len(sizes)]))}
    batch = to_batch(images, sizes, given["y"])
    with official.watched() if official else nullcontext():
        losses = objective.loss(net, batch, NamedDraws(draws))
    weights = image_weight(batch.tokens, objective.weight)
    mean = (weights * losses.total).sum() / weights.sum()
    ((x_t, t, out),) = net.calls
    results = {
        "t": t,
        "model_input": x_t.view_as(images),
        "model_output": out.view_as(images),
        "denoising_loss": mean[None],
        "loss": mean[None],
    }
    if official is not None:
        results["proj_loss"] = 1 - nn.functional.cosine_similarity(official.zs(), given["z"], dim=-1).mean()[None]
    return results


@adapter("nit", "nit_sampler")
def sample(fixture: Fixture) -> Results:
    """The ODE sampler with guidance: its samples, and when it called the network."""
    config = fixture["config"]
    if fixture["options"]["sampler"] != "euler_sampler":
        raise NotImplementedError(f"{fixture['options']['sampler']} is not supported yet")
    if "autoguidance_gain_shift" in config:
        raise NotImplementedError("autoguidance is not supported yet")
    asked = {"cfg_scale": 1.0, "guidance_low": 0.0, "guidance_high": 1.0, "heun": False, **config["sampler"]}
    interval = [asked.pop("guidance_low"), asked.pop("guidance_high")]
    name = "heun" if asked.pop("heun") else "euler"
    grid = FLOW.times(name, asked.pop("num_steps"))
    guidance = {"name": "cfg", "scale": asked.pop("cfg_scale"), "interval": interval, "channels": "all"}
    if asked:
        raise NotImplementedError(f"unknown arguments {sorted(asked)}")
    dtype = getattr(torch, fixture["options"].get("latents_dtype", "float32"))
    net = Watched(Official(fixture, config["network"]).net.eval() if "network" in config else Toy(), dtype)
    given = inputs(fixture)
    batch = to_batch(given["latents"].to(dtype).float(), given["hw_list"].tolist(), given["y"])
    rng = StepNoise()
    out = SAMPLERS[name](FLOW.field(guided(net, guidance, FLOW.time_range)), batch, grid, rng)
    return {
        "samples": out.x.view_as(given["latents"]),
        "noise_draws": rng.draws,
        "model_calls": len(net.calls),
        "model_calls_doubled_for_cfg": sum(len(t) == 2 * len(batch.y) for _, t, _ in net.calls),
        "model_call_times": torch.stack([t[0] for _, t, _ in net.calls]),
    }


@adapter("nit", "nit_time_grid")
def times(fixture: Fixture) -> Results:
    """The grid of an ODE, and the steps on which guidance acts for several intervals."""
    config = fixture["config"]
    if config["sampler"] != "euler_sampler":
        raise NotImplementedError(f"the grid of {config['sampler']} is not supported yet")
    grid = FLOW.times("euler", config["num_steps"])
    batch = to_batch(torch.zeros(1, 4, 1, 1), [[1, 1]], torch.zeros(1))
    steps = {}
    for interval in config["intervals"]:
        net = Watched(Toy())
        guidance = {"name": "cfg", "scale": 2.0, "interval": interval, "channels": "all"}
        SAMPLERS["euler"](FLOW.field(guided(net, guidance, FLOW.time_range)), batch, grid, StepNoise())
        on = [i for i, (_, t, _) in enumerate(net.calls) if len(t) == 2]
        steps[str(interval)] = {"first": on[0], "last": on[-1], "count": len(on)}
    return {"t_steps": grid, "guided_steps": steps}


@adapter("nit", "nr_resize")
def native_sizes(fixture: Fixture) -> Results:
    """The size to which an image of any size is brought, and that of its latent (stride 32)."""
    smallest, largest = fixture["config"]["min_image_size"], fixture["config"]["max_image_size"]
    rows = []
    for width, height in inputs(fixture)["wh"].tolist():
        new_height, new_width = native_size(height, width, smallest, (largest // smallest) ** 2)
        rows.append([width, height, new_width, new_height, new_width // 32, new_height // 32])
    return {"w_h_neww_newh_latentw_latenth": rows}


def picture(name: str, height: int, width: int) -> Image.Image:
    """The image of a fixture of pixels."""
    y, x = np.mgrid[:height, :width].astype(np.float64)
    ramp = np.stack([255 * x / max(width - 1, 1), 255 * y / max(height - 1, 1), 255 * (x + y) / (width + height)], -1)
    noise = unit(name, (height, width, 3)) / math.sqrt(3)
    return Image.fromarray(np.clip(0.7 * ramp + 38 * (noise + 1.0), 0, 255).astype(np.uint8))


@adapter("nit", "resize_pixels")
def pixels(fixture: Fixture) -> Results:
    """Pixels of the native resize, of the centre crop, and of a plain resize."""
    config, asked = fixture["config"], dict(fixture["config"]["args"])
    image = picture(config["image"], config["h"], config["w"])
    if config["op"] == "center_crop_arr":
        out = center_crop(image, asked.pop("image_size"))
    elif config["op"] == "resize_arr":
        out = resize(image, asked.pop("height"), asked.pop("width"), Image.Resampling.BICUBIC)
    elif config["op"] == "native_resolution_resize":
        smallest, largest = asked.pop("min_image_size"), asked.pop("max_image_size")
        size = native_size(image.height, image.width, smallest, (largest // smallest) ** 2)
        out = resize(image, *size, Image.Resampling.BICUBIC)
    else:
        raise NotImplementedError(f"unknown operation {config['op']}")
    if asked:
        raise NotImplementedError(f"unknown arguments {sorted(asked)}")
    return {"pixels_hwc_uint8": np.asarray(out), "size_w_h": list(out.size)}
