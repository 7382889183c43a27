"""NiT: loss, ODE sampler and image sizes of the official code, around the backbone of `nit`."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from genfound.backbones.base import Backbone, TokenSpec
from genfound.batch import Batch
from genfound.data.views import center_crop, native_size, resize
from genfound.objectives.weighting import image_weight
from genfound.rng import Rng
from genfound.samplers import SAMPLERS
from genfound.sampling import guided
from tests.golden.adapters import Results, adapter
from tests.golden.adapters.nit import Fixture, Official, to_batch
from tests.golden.fill import inputs, unit
from tests.helpers import linear_flow

FLOW = linear_flow()


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
    objective = linear_flow(
        path=transport.pop("path_type"),
        prediction={"v": "velocity"}[transport.pop("prediction")],
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
